#pragma once

#include <cstddef>
#include <cstdint>

namespace fewbits {

// Whether this processor multiplies BF16 numbers in its vector units.
bool multiplies_bf16();

// Adds xᵀ·x to total, row-major [columns, columns], on and above the diagonal; some of what lies below is written too.
// x: BF16, row-major [rows, columns]. Only where multiplies_bf16().
void add_gram(const std::uint16_t* x, std::size_t rows, std::size_t columns, float* total, int threads);

}  // namespace fewbits
