// Error feedback over columns: the rows of the matrix are independent, so a thread takes LANES of them through all
// columns, with what rounding did to them in a buffer of its own, [columns, LANES]: 32 KiB for a group of 128, the
// first-level cache. A target is LANES accumulators in registers; each earlier column is one multiply-add on them.
//
// Cost: columns / 2 multiply-adds a weight, and some ten operations to round it, whatever the number of levels if they
// are even, log2(levels) gathers more if not. Rows past the last one are computed as zeros and not stored.

#include "round_columns.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "parallel.h"
#include "targets.h"

namespace fewbits {
namespace {

constexpr std::size_t LANES = 64;

// The nearest level to each lane, at scale 1.
inline void nearest(float* u, const Grid& grid) {
  const auto& levels = grid.levels;
  if (grid.midpoints.empty()) {
    const float low = levels.front(), high = levels.back();
    const float gap = levels.size() > 1 ? levels[1] - levels[0] : 1.0f;
#pragma omp simd
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      const float level = low + gap * std::nearbyint((u[lane] - low) / gap);
      u[lane] = level < low ? low : level > high ? high : level;
    }
    return;
  }
  const float* midpoints = grid.midpoints.data();
  const float* table = levels.data();
  const int half = static_cast<int>(grid.midpoints.size() + 1) / 2;
#pragma omp simd
  for (std::size_t lane = 0; lane < LANES; ++lane) {
    int at = 0;  // how many midpoints lie below
    for (int step = half; step > 0; step /= 2) at += u[lane] > midpoints[at + step - 1] ? step : 0;
    u[lane] = table[at];
  }
}

// Columns from the last to the first, for `count` rows from `row` on. moved: scratch, [columns, LANES].
FEWBITS_CLONES
void round_rows(const Columns& job, const Grid& grid, std::size_t row, std::size_t count, float* moved) {
  float target[LANES], scale[LANES], offset[LANES], level[LANES];
  for (std::size_t j = job.columns; j-- > 0;) {
    const std::size_t at = j * job.rows + row;
    const std::size_t param = std::min(j, job.params - 1) * job.rows + row;
    std::fill(target, target + LANES, 0.0f);
    std::fill(scale, scale + LANES, 1.0f);
    std::fill(offset, offset + LANES, 0.0f);
    std::copy_n(job.targets + at, count, target);
    std::copy_n(job.scale + param, count, scale);
    std::copy_n(job.offset + param, count, offset);
    const float* feedback = job.feedback + j * job.columns;
    for (std::size_t i = j + 1; i < job.columns; ++i) {
      const float share = feedback[i];
      const float* error = moved + i * LANES;
#pragma omp simd
      for (std::size_t lane = 0; lane < LANES; ++lane) target[lane] += share * error[lane];
    }
#pragma omp simd
    for (std::size_t lane = 0; lane < LANES; ++lane)
      level[lane] = scale[lane] != 0.0f ? (target[lane] - offset[lane]) / scale[lane] : 0.0f;
    nearest(level, grid);
    float* value = moved + j * LANES;
#pragma omp simd
    for (std::size_t lane = 0; lane < LANES; ++lane) value[lane] = level[lane] * scale[lane] + offset[lane];
    std::copy_n(value, count, job.values + at);
    std::fill(target, target + LANES, 0.0f);
    std::copy_n(job.base + at, count, target);
#pragma omp simd
    for (std::size_t lane = 0; lane < LANES; ++lane) value[lane] = target[lane] - value[lane];
  }
}

}  // namespace

void round_columns(const Columns& job, const Grid& grid, int threads) {
  const std::size_t strips = (job.rows + LANES - 1) / LANES;
  parallel_for(strips, threads, [&](std::size_t strip) {
    std::vector<float> moved(job.columns * LANES);
    const std::size_t row = strip * LANES;
    round_rows(job, grid, row, std::min(LANES, job.rows - row), moved.data());
  });
}

}  // namespace fewbits
