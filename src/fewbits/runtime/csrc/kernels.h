// What is compiled once for each kind of processor (target.cpp), as a table of functions.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "ops.h"
#include "weight.h"

namespace fewbits::runtime {

struct Kernels {
  const char* name;
  int tile;                  // rows of inputs that are multiplied together, at most
  int streamed, passes;      // the same where a weight goes straight from memory into registers, and how often at most
  bool shifted;              // whether wide codes are signed bytes, and their zero 128 lower
  std::size_t scratch_size;  // bytes of a thread's Scratch
  void (*pack)(const Inputs&, const float* x, std::int64_t columns, std::int64_t stride, std::int64_t tile);
  void (*multiply)(const Weight&, const Inputs&, std::int64_t begin, std::int64_t end, float* out, std::int64_t stride,
                   const float* bias, bool accumulate, void* scratch);
  void (*embed)(const Weight&, std::int64_t row, float factor, float* out, void* scratch);
  const Ops* ops;  // the others
  std::int64_t (*integer_products)(std::int64_t rounds);
  std::uint8_t (*read_lines)(const std::uint8_t* at, std::int64_t bytes);

  // Rows that are interleaved, of so many: tiles of about the same height, because a low one takes as long as a higher.
  std::int64_t height(std::int64_t rows) const {
    const std::int64_t most = rows <= passes * streamed ? streamed : tile, tiles = (rows + most - 1) / most;
    return tiles ? (rows + tiles - 1) / tiles : 1;
  }
};

// Targets that this processor runs, the best first; the last one runs anywhere.
std::span<const Kernels* const> targets();

// The one of that name, or the best for "". Throws std::invalid_argument for one that is not there.
const Kernels& kernels(std::string_view name = "");

}  // namespace fewbits::runtime
