#pragma once

#include <cstddef>
#include <span>

namespace fewbits {

// The evenly spaced numbers or the table that scaled targets are rounded to. midpoints: between neighbouring levels,
// ascending, filled up with +inf to a power of two less one; empty where levels are even.
struct Grid {
  std::span<const float> levels;
  std::span<const float> midpoints;
};

// All row-major: targets, values [columns, rows]; feedback [columns, columns]; scale, offset [1 or columns, rows];
// base [columns, rows].
struct Columns {
  std::size_t columns, rows, params;  // params: 1, or columns
  const float *targets, *feedback, *scale, *offset, *base;
  float* values;
};

// See kernels/round_columns.py for what it computes.
void round_columns(const Columns& job, const Grid& grid, int threads);

}  // namespace fewbits
