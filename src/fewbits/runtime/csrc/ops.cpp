#include "ops.h"

#include <cmath>

namespace fewbits::runtime {

std::size_t attend_scratch(int head_dim) {
  const std::size_t width = (static_cast<std::size_t>(head_dim) + 31) / 32 * 32, lanes = 16, largest_and_shrink = 2;
  return QUERIES * (2 * width + POSITIONS + lanes + largest_and_shrink) + 2 * POSITIONS * width;
}

void angles(const float* frequencies, int count, float factor, int position, float* cosines, float* sines) {
  for (int i = 0; i < count; ++i) {
    const float angle = static_cast<float>(position) * frequencies[i];
    cosines[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * factor;
    sines[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * factor;
  }
}

}  // namespace fewbits::runtime
