// What the processor can do at most, to say how far from it the kernels are: integer products from registers alone,
// and reading of memory that is in no cache.
#pragma once

#include "vec.h"

namespace fewbits::runtime::FEWBITS_TARGET {
namespace {

// Keeps the compiler from knowing what a register holds, and so from computing anything beforehand.
inline void forget(Bytes& v) {
#if defined(__ARM_NEON)
  asm volatile("" : "+w"(v));
#elif defined(__AVX512BW__)
  asm volatile("" : "+v"(v));
#elif defined(__x86_64__)
  asm volatile("" : "+x"(v));
#else
  asm volatile("" : "+m"(v));
#endif
}

constexpr int CHAINS = 12;  // enough that the next product never waits for the one before

// Multiply-adds of bytes done by `rounds` rounds, twice as many operations.
std::int64_t integer_products(std::int64_t rounds) {
  Int sums[CHAINS];
#pragma GCC unroll 16
  for (int i = 0; i < CHAINS; ++i) sums[i] = all(static_cast<std::int32_t>(i));
  Bytes w = all_bytes(3), x = all_bytes(5);
  for (std::int64_t r = 0; r < rounds; ++r)
#pragma GCC unroll 16
    for (int i = 0; i < CHAINS; ++i) {
      forget(x);
      sums[i] = dot(sums[i], w, x);
    }
  std::int64_t kept = 0;
  for (int i = 0; i < CHAINS; ++i) {
    std::int32_t lanes[LANES];
    std::memcpy(lanes, &sums[i], sizeof lanes);
    kept += lanes[0];
  }
  asm volatile("" : : "r"(kept));
  return rounds * CHAINS * LANES * STEP;
}

// Reads whole lines of memory; what they hold comes back, so that they must be read.
std::uint8_t read_lines(const std::uint8_t* at, std::int64_t bytes) {
  Bytes found[4] = {all_bytes(0), all_bytes(0), all_bytes(0), all_bytes(0)};
  for (std::int64_t i = 0; i < bytes; i += 4 * VECTOR_BYTES) {
    __builtin_prefetch(at + i + 4096);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) found[j] = either(found[j], load_bytes(at + i + j * VECTOR_BYTES));
  }
  std::uint8_t lanes[VECTOR_BYTES];
  const Bytes all_found = either(either(found[0], found[1]), either(found[2], found[3]));
  std::memcpy(lanes, &all_found, sizeof lanes);
  return lanes[0];
}

}  // namespace
}  // namespace fewbits::runtime::FEWBITS_TARGET
