// A matrix in the runtime's layout (tiles.py): pointers into arrays that Python keeps alive.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbits::runtime {

constexpr int PANEL = 16;  // rows that lie interleaved
constexpr int BLOCK = 32;  // columns of one set of planes
constexpr int STEP = 4;    // columns that one instruction adds up
constexpr int STEPS = BLOCK / STEP;
constexpr int STEP_BYTES = PANEL * STEP;
constexpr int LONGEST = 128;  // columns of the inputs that share a scale; no more are summed as integers

enum class Number { f32, f16, bf16 };

// Params of groups: numbers, or integers times a factor that `per` groups share.
struct Params {
  enum class Kind { none, numbers, steps, zeros } kind = Kind::none;
  Number number = Number::f32;
  const void* values = nullptr;  // [panels][groups][16]: numbers, int8 steps, or uint8 zero-points
  const std::uint16_t* factor = nullptr;
  int per = 1;
};

struct Weight {
  std::int64_t rows = 0, columns = 0;
  int bits = 0;  // of a code; 0 where the numbers are floating-point ones
  Number number = Number::f32;
  std::int64_t group = 0;  // columns that share params
  int zero = 0;
  const std::uint8_t* table = nullptr;
  const void* codes = nullptr;
  Params scale, offset;

  std::int64_t panels() const { return (rows + PANEL - 1) / PANEL; }
  std::int64_t blocks() const { return (columns + BLOCK - 1) / BLOCK; }
  std::int64_t padded() const { return blocks() * BLOCK; }
  std::int64_t groups() const { return group ? (padded() + group - 1) / group : 1; }
  std::int64_t panel_bytes() const {
    return bits ? blocks() * bits * STEP_BYTES : padded() * PANEL * (number == Number::f32 ? 4 : 2);
  }
  // Columns that are summed as integers: a group, or a part of a large one.
  int segment() const { return group && group < LONGEST ? static_cast<int>(group) : LONGEST; }
};

// Inputs of a product as its kernels read them: tiles of `height` rows interleaved, the last one of fewer.
//   codes  [tiles][columns / 4][rows of the tile][4]; floating-point numbers: [tiles][columns][rows of the tile]
//   scale  [tiles][input groups][rows of the tile]
//   start  [tiles][segments][rows of the tile]: −zero · Σ codes, where the sum of products begins
//   total  the same, Σ codes: what an offset of the weight is multiplied by
struct Inputs {
  std::int64_t rows = 0, height = 1, padded = 0, segments = 0, groups = 0;
  int segment = 0, zero = 0;  // segment 0: floating-point numbers
  void* codes = nullptr;
  float* scale = nullptr;
  std::int32_t* start = nullptr;
  float* total = nullptr;

};

}  // namespace fewbits::runtime
