// Vectors of float32 as wide as the target's registers, and the functions that the ops need of them.
//
// Plain C++ with GCC's vector types, so one text serves every target; intrinsics are left for conversions and maxima,
// which the compiler does not find. exp and tanh share one polynomial: x = n·ln 2 + r, |r| <= ln 2 / 2, and
// e^r − 1 = r + r²·(c0 + … + c4·r⁴), fitted for the smallest largest relative error (3e-9). Against long double,
// over every fifth float32: exp is off by 1.01 units in the last place at most, tanh by 2.6.
//
// Files that end in .inl are compiled once for each target within its own namespace and use nothing of std::, because
// the linker would keep one target's copy of a shared inline function for all of them.

#include <cstddef>
#include <cstdint>

#if defined(__AVX512F__) && !defined(FEWBITS_PORTABLE)
#include <immintrin.h>
#define FEWBITS_WIDTH 64
#define FEWBITS_TILE 4
#elif defined(__AVX2__) && defined(__F16C__) && !defined(FEWBITS_PORTABLE)
#include <immintrin.h>
#define FEWBITS_WIDTH 32
#define FEWBITS_TILE 2
#elif defined(__aarch64__)
#ifndef FEWBITS_PORTABLE
#include <arm_neon.h>
#endif
#define FEWBITS_WIDTH 16
#define FEWBITS_TILE 4
#else
#if defined(__SSE4_1__) && !defined(FEWBITS_PORTABLE)
#include <immintrin.h>
#endif
#define FEWBITS_WIDTH 16
#define FEWBITS_TILE 2
#endif

#if !defined(FEWBITS_PORTABLE) && (defined(__SSE4_1__) || defined(__aarch64__))
#define FEWBITS_INTRINSICS
#endif

#define FEWBITS_INLINE static inline __attribute__((always_inline))

namespace fewbits::runtime::FEWBITS_TARGET {

namespace {

typedef float Vec __attribute__((vector_size(FEWBITS_WIDTH)));
typedef std::int32_t IVec __attribute__((vector_size(FEWBITS_WIDTH)));

constexpr int LANES = FEWBITS_WIDTH / 4;

// Registers are 6 rows of TILE vectors, TILE operands, and one that is the same in all lanes.
constexpr int TILE = FEWBITS_TILE, HEIGHT = 6;

FEWBITS_INLINE int least(int a, int b) { return a < b ? a : b; }
FEWBITS_INLINE int most(int a, int b) { return a > b ? a : b; }

template <class T>
FEWBITS_INLINE T load_as(const void* from) {
  T loaded;
  __builtin_memcpy(&loaded, from, sizeof loaded);
  return loaded;
}

FEWBITS_INLINE Vec load(const float* from) { return load_as<Vec>(from); }
FEWBITS_INLINE void store(float* to, Vec v) { __builtin_memcpy(to, &v, sizeof v); }
FEWBITS_INLINE Vec all(float x) { return Vec{} + x; }

// Where a whole vector lies in a row of any width, and what is left at the row's end.
struct Whole {
  std::size_t at;
};
struct Part {
  std::size_t at, count;
};

FEWBITS_INLINE Vec load(const float* from, Whole w) { return load(from + w.at); }
FEWBITS_INLINE void store(float* to, Whole w, Vec v) { store(to + w.at, v); }

FEWBITS_INLINE Vec load(const float* from, Part p) {  // zeros behind
  Vec v = {};
  __builtin_memcpy(&v, from + p.at, p.count * sizeof(float));
  return v;
}
FEWBITS_INLINE void store(float* to, Part p, Vec v) { __builtin_memcpy(to + p.at, &v, p.count * sizeof(float)); }

template <class F>
FEWBITS_INLINE void by_vectors(std::size_t width, F body) {
  std::size_t at = 0;
  for (; at + LANES <= width; at += LANES) body(Whole{at});
  if (at < width) body(Part{at, width - at});
}

// The second where one of both is not a number, as the instructions of x86 do; GCC 12 does not find them by itself.
FEWBITS_INLINE Vec larger(Vec a, Vec b) {
#if defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 64
  return reinterpret_cast<Vec>(_mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 32
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#elif defined(FEWBITS_INTRINSICS) && defined(__SSE4_1__)
  return reinterpret_cast<Vec>(_mm_max_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  return a > b ? a : b;
#endif
}
FEWBITS_INLINE Vec smaller(Vec a, Vec b) { return -larger(-a, -b); }
FEWBITS_INLINE Vec magnitude(Vec x) { return reinterpret_cast<Vec>(reinterpret_cast<IVec>(x) & 0x7fffffff); }

FEWBITS_INLINE IVec lane_numbers() {
  IVec numbers;
  for (int i = 0; i < LANES; ++i) numbers[i] = i;
  return numbers;
}

// Lane i of the result is lane i ^ distance.
FEWBITS_INLINE Vec crossed(Vec v, int distance) { return __builtin_shuffle(v, lane_numbers() ^ distance); }

FEWBITS_INLINE float sum(Vec v) {
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) v += crossed(v, half);
  return v[0];
}

// In all lanes.
FEWBITS_INLINE Vec largest(Vec v) {
#pragma GCC unroll 4
  for (int half = LANES / 2; half > 0; half /= 2) v = larger(v, crossed(v, half));
  return v;
}

// x = n ln 2 + r with the nearest n: 2^n times 2^offset as bits, and e^r − 1.
struct Split {
  Vec power, rest;
};

FEWBITS_INLINE Split split(Vec x, int offset) {
  const Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 · 2^23: the last bits are the integer
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // the first factor is so short that n times it is exact
  const Vec tail = (((1.381453789e-3f * r + 8.36874532e-3f) * r + 4.166839083e-2f) * r + 0.166665204f) * r +
                   0.4999999343f;
  const IVec power = (reinterpret_cast<IVec>(shifted) << 23) + ((127 + offset) << 23);
  return {reinterpret_cast<Vec>(power), r * r * tail + r};
}

// e^x; 0 below −86.6 (before denormals begin), infinity above 88.72.
FEWBITS_INLINE Vec exp(Vec x) {
  const Split s = split(larger(all(-87.0f), smaller(all(89.0f), x)), -1);  // 2^128 would not fit
  const Vec y = (s.power + s.power * s.rest) * 2.0f;
  return x < -86.6f ? Vec{} : y;
}

// e^x for x <= 0, as cheap as it gets: below −87 it is e^−87, which vanishes beside 1.
FEWBITS_INLINE Vec exp_of_negative(Vec x) {
  const Split s = split(larger(all(-87.0f), x), 0);
  return s.power + s.power * s.rest;
}

// With e = e^2|x| − 1: e / (e + 2), which loses nothing near 0.
FEWBITS_INLINE Vec tanh(Vec x) {
  const Split s = split(smaller(all(20.0f), magnitude(x) * 2.0f), 0);
  const Vec e = s.power * s.rest + (s.power - 1.0f), y = e / (e + 2.0f);
  const IVec sign = reinterpret_cast<IVec>(x) & static_cast<std::int32_t>(0x80000000);
  return reinterpret_cast<Vec>(reinterpret_cast<IVec>(y) | sign);
}

}  // namespace

}  // namespace fewbits::runtime::FEWBITS_TARGET
