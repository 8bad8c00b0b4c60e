#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbits {

// Some rows of a matrix whose numbers are (levels[code] - zero) * scale. All row-major and contiguous.
struct Lookup {
  std::size_t rows, columns;
  const std::uint8_t* codes;  // [rows, bytes], a bit stream along each row, lowest bits first
  std::size_t bytes;
  int bits;               // of a code, 1 to 8
  const float* levels;    // [1 << bits]
  const float* scale;     // [rows or 1, groups]
  const float* zero;      // like scale; null where it is 0
  std::size_t groups;     // in a row
  std::size_t group;      // columns of each but the last
  std::size_t param_step; // from a row's params to the next one's: groups, or 0 where all rows share them
};

// See kernels/decode.py for what they compute. out: [rows, columns], float32 or the bits of bfloat16.
void decode(const Lookup& job, float* out, int threads);
void decode(const Lookup& job, std::uint16_t* out, int threads);

}  // namespace fewbits
