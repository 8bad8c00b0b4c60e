// xᵀ·x of BF16 numbers, summed in float32: half the work of a product of two matrices, because it is symmetric.
//
// The instruction (vdpbf16ps) adds to each lane the products of two neighbouring numbers, so x is packed into panels of
// PANEL columns in which a lane holds the numbers of two rows of x: [panel][pair of rows][column][2]. The same panels
// serve both operands. A tile of the result is PANEL by PANEL; HEIGHT rows of it stay in registers while CHUNK pairs
// pass, whose second operand stays in the first-level cache.

#include "gram.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "parallel.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FEWBITS_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#endif

namespace fewbits {

#ifdef FEWBITS_BF16

namespace {

constexpr std::size_t LANES = 16, VECTORS = 3, PANEL = LANES * VECTORS, HEIGHT = 8, CHUNK = 128;
static_assert(PANEL % HEIGHT == 0);

// One panel of x: columns from `first` on, the missing ones as zeros, and a row of zeros if their number is odd.
void pack(const std::uint16_t* x, std::size_t rows, std::size_t columns, std::size_t first, std::uint32_t* panel) {
  const std::size_t count = std::min(PANEL, columns - first);
  for (std::size_t pair = 0; pair < (rows + 1) / 2; ++pair, panel += PANEL) {
    const std::uint16_t* even = x + 2 * pair * columns + first;
    const bool whole = 2 * pair + 1 < rows;
    for (std::size_t i = 0; i < count; ++i)
      panel[i] = even[i] | static_cast<std::uint32_t>(whole ? even[i + columns] : 0) << 16;
    std::fill(panel + count, panel + PANEL, 0u);
  }
}

// Adds `pairs` pairs' products of HEIGHT columns of a and all of b to total, whose rows are `stride` apart; only the
// first `height` rows and `width` columns are there.
FEWBITS_BF16
void add_rows(const std::uint32_t* a, const std::uint32_t* b, std::size_t pairs, float* total, std::size_t stride,
              std::size_t height, std::size_t width) {
  __m512 sums[HEIGHT][VECTORS];
#pragma GCC unroll 8
  for (std::size_t i = 0; i < HEIGHT; ++i)
#pragma GCC unroll 3
    for (std::size_t v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_setzero_ps();
  for (std::size_t pair = 0; pair < pairs; ++pair, a += PANEL, b += PANEL) {
    __m512bh right[VECTORS];
#pragma GCC unroll 3
    for (std::size_t v = 0; v < VECTORS; ++v)
      right[v] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + v * LANES));
#pragma GCC unroll 8
    for (std::size_t i = 0; i < HEIGHT; ++i) {
      const __m512bh left = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a[i])));
#pragma GCC unroll 3
      for (std::size_t v = 0; v < VECTORS; ++v) sums[i][v] = _mm512_dpbf16_ps(sums[i][v], left, right[v]);
    }
  }
#pragma GCC unroll 8
  for (std::size_t i = 0; i < HEIGHT; ++i) {
    if (i >= height) break;
#pragma GCC unroll 3
    for (std::size_t v = 0; v < VECTORS; ++v) {
      const std::size_t left = width > v * LANES ? std::min(LANES, width - v * LANES) : 0;
      const auto mask = static_cast<__mmask16>((1u << left) - 1);
      float* at = total + i * stride + v * LANES;
      _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, at), sums[i][v]));
    }
  }
}

}  // namespace

bool multiplies_bf16() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
}

void add_gram(const std::uint16_t* x, std::size_t rows, std::size_t columns, float* total, int threads) {
  const std::size_t panels = (columns + PANEL - 1) / PANEL, pairs = (rows + 1) / 2, size = pairs * PANEL;
  const auto packed = std::make_unique_for_overwrite<std::uint32_t[]>(panels * size);
  parallel_for(panels, threads, [&](std::size_t p) { pack(x, rows, columns, p * PANEL, packed.get() + p * size); });
  parallel_for(panels * (panels + 1) / 2, threads, [&](std::size_t tile) {
    std::size_t p = 0;  // tiles of the first row of panels come first, then those of the second, one fewer
    for (std::size_t in_row = panels; tile >= in_row; tile -= in_row--) ++p;
    const std::size_t top = p * PANEL, left = (p + tile) * PANEL;
    const std::uint32_t *a = packed.get() + p * size, *b = packed.get() + (p + tile) * size;
    for (std::size_t pair = 0; pair < pairs; pair += CHUNK)
      for (std::size_t i = 0; i < PANEL && top + i < columns; i += HEIGHT)
        add_rows(a + pair * PANEL + i, b + pair * PANEL, std::min(CHUNK, pairs - pair),
                 total + (top + i) * columns + left, columns, std::min(HEIGHT, columns - top - i),
                 std::min(PANEL, columns - left));
  });
}

#else

bool multiplies_bf16() { return false; }

void add_gram(const std::uint16_t*, std::size_t, std::size_t, float*, int) {
  throw std::runtime_error("this processor does not multiply BF16");
}

#endif

}  // namespace fewbits
