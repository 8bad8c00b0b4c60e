// Registers of one target. A panel of 16 rows takes 16 / LANES of them; every function here is an instruction or two.
//
//     Int, Float   LANES 32-bit numbers          Bytes   4·LANES bytes
//     dot(sum, w, x)   sum[i] += Σ_j w[4i + j] · x[4i + j], j = 0…3; w unsigned, x signed bytes
//
// AVX2 and AVX-512 without VNNI multiply bytes into 16-bit sums of two, which saturate. Codes of at most 7 bits are
// safe (2 · 127 · 127 < 2^15); wider ones are taken as 16 · high + low (`dot_wide`). ARM's dot product takes signed
// bytes: wide codes are shifted by 128 (SHIFTED), and so is their zero.
//
// TILE: rows of inputs beside two panels (or one) that fill the registers; STREAMED: those beside one panel whose codes
// come straight from memory, and PASSES how often those may be read.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && !defined(FEWBITS_PORTABLE)
#include <arm_neon.h>
#endif

namespace fewbits::runtime::FEWBITS_TARGET {
namespace {

#if defined(__AVX512BW__)

constexpr int LANES = 16, TILE = 6, STREAMED = 8, PASSES = 2, MOST_VECTORS = 4;
constexpr bool SHIFTED = false;
using Int = __m512i;
using Bytes = __m512i;
using Float = __m512;

inline Bytes load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, Bytes v) { _mm512_storeu_si512(p, v); }
inline Bytes all_bytes(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
inline Bytes both(Bytes a, Bytes b) { return _mm512_and_si512(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
template <int N>
inline Bytes right(Bytes v) {
  return _mm512_srli_epi16(v, N);
}
template <int N>
inline Bytes left(Bytes v) {
  return _mm512_slli_epi16(v, N);
}
inline Bytes load_table(const std::uint8_t* p) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes look_up(Bytes table, Bytes v) { return _mm512_shuffle_epi8(table, v); }
inline Bytes four(const void* p) {
  std::int32_t v;
  std::memcpy(&v, p, 4);
  return _mm512_set1_epi32(v);
}
inline Int all(std::int32_t v) { return _mm512_set1_epi32(v); }
inline Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
inline Float to_float(Int v) { return _mm512_cvtepi32_ps(v); }
inline Float all(float v) { return _mm512_set1_ps(v); }
inline Float load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
inline Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
inline Float multiply_add(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
inline Float from_half(const std::uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Float from_brain(const std::uint16_t* p) {
  const auto wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline Float from_signed(const std::int8_t* p) {
  return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Float from_unsigned(const std::uint8_t* p) {
  return to_float(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#if defined(__AVX512VNNI__)
// As text: gcc 12 copies every accumulator twice around the intrinsic, which takes as long as the product itself.
inline Int dot(Int sum, Bytes w, Bytes x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
  return sum;
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) { return dot(sum, w, x); }
#else
inline Int dot(Int sum, Bytes w, Bytes x) {
  return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(w, x), _mm512_set1_epi16(1)));
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) {
  const auto low = _mm512_maddubs_epi16(both(w, all_bytes(15)), x);
  const auto high = _mm512_maddubs_epi16(both(right<4>(w), all_bytes(15)), x);
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(low, _mm512_set1_epi16(1)));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(high, _mm512_set1_epi16(16)));
}
#endif

#elif defined(__AVX2__)

constexpr int LANES = 8, TILE = 3, STREAMED = 2, PASSES = 1, MOST_VECTORS = 4;
constexpr bool SHIFTED = false;
using Int = __m256i;
using Bytes = __m256i;
using Float = __m256;

inline Bytes load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void store_bytes(void* p, Bytes v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
inline Bytes all_bytes(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
inline Bytes both(Bytes a, Bytes b) { return _mm256_and_si256(a, b); }
inline Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
template <int N>
inline Bytes right(Bytes v) {
  return _mm256_srli_epi16(v, N);
}
template <int N>
inline Bytes left(Bytes v) {
  return _mm256_slli_epi16(v, N);
}
inline Bytes load_table(const std::uint8_t* p) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Bytes look_up(Bytes table, Bytes v) { return _mm256_shuffle_epi8(table, v); }
inline Bytes four(const void* p) {
  std::int32_t v;
  std::memcpy(&v, p, 4);
  return _mm256_set1_epi32(v);
}
inline Int all(std::int32_t v) { return _mm256_set1_epi32(v); }
inline Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
inline Float to_float(Int v) { return _mm256_cvtepi32_ps(v); }
inline Float all(float v) { return _mm256_set1_ps(v); }
inline Float load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
inline Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
inline Float multiply_add(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
inline Float from_half(const std::uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Float from_brain(const std::uint16_t* p) {
  const auto wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline Float from_signed(const std::int8_t* p) {
  return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Float from_unsigned(const std::uint8_t* p) {
  return to_float(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
#if defined(__AVXVNNI__)
inline Int dot(Int sum, Bytes w, Bytes x) {
  asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(w), "x"(x));
  return sum;
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) { return dot(sum, w, x); }
#else
inline Int dot(Int sum, Bytes w, Bytes x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) {
  const auto low = _mm256_maddubs_epi16(both(w, all_bytes(15)), x);
  const auto high = _mm256_maddubs_epi16(both(right<4>(w), all_bytes(15)), x);
  sum = _mm256_add_epi32(sum, _mm256_madd_epi16(low, _mm256_set1_epi16(1)));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
}
#endif

#elif defined(__ARM_NEON) && !defined(FEWBITS_PORTABLE)

constexpr int LANES = 4, TILE = 3, STREAMED = 2, PASSES = 1, MOST_VECTORS = 4;
constexpr bool SHIFTED = true;
using Int = int32x4_t;
using Bytes = uint8x16_t;
using Float = float32x4_t;

inline Bytes load_bytes(const void* p) { return vld1q_u8(static_cast<const std::uint8_t*>(p)); }
inline void store_bytes(void* p, Bytes v) { vst1q_u8(static_cast<std::uint8_t*>(p), v); }
inline Bytes all_bytes(int v) { return vdupq_n_u8(static_cast<std::uint8_t>(v)); }
inline Bytes both(Bytes a, Bytes b) { return vandq_u8(a, b); }
inline Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
template <int N>
inline Bytes right(Bytes v) {
  if constexpr (N == 0)
    return v;
  else
    return vshrq_n_u8(v, N);
}
template <int N>
inline Bytes left(Bytes v) {
  return vshlq_n_u8(v, N);
}
inline Bytes load_table(const std::uint8_t* p) { return vld1q_u8(p); }
inline Bytes look_up(Bytes table, Bytes v) { return vqtbl1q_u8(table, v); }
inline Bytes four(const void* p) {
  std::uint32_t v;
  std::memcpy(&v, p, 4);
  return vreinterpretq_u8_u32(vdupq_n_u32(v));
}
inline Int all(std::int32_t v) { return vdupq_n_s32(v); }
inline Int add(Int a, Int b) { return vaddq_s32(a, b); }
inline Float to_float(Int v) { return vcvtq_f32_s32(v); }
inline Float all(float v) { return vdupq_n_f32(v); }
inline Float load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Float v) { vst1q_f32(p, v); }
inline Float multiply(Float a, Float b) { return vmulq_f32(a, b); }
inline Float multiply_add(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
inline Float from_half(const std::uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
inline Float from_brain(const std::uint16_t* p) {
  return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vld1_u16(p)), 16));
}
inline Float from_signed(const std::int8_t* p) {
  std::int32_t v;
  std::memcpy(&v, p, 4);
  return to_float(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(v))))));
}
inline Float from_unsigned(const std::uint8_t* p) {
  std::uint32_t v;
  std::memcpy(&v, p, 4);
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(v))))));
}
inline Int dot(Int sum, Bytes w, Bytes x) {
  const int8x16_t a = vreinterpretq_s8_u8(w), b = vreinterpretq_s8_u8(x);
#if defined(__ARM_FEATURE_DOTPROD)
  return vdotq_s32(sum, a, b);
#else
  const int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
#endif
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) { return dot(sum, w, x); }

#else  // any processor: what the compiler makes of it

constexpr int LANES = 4, TILE = 2, STREAMED = 2, PASSES = 1, MOST_VECTORS = 4;
constexpr bool SHIFTED = false;
typedef std::int32_t Int __attribute__((vector_size(16)));
typedef std::uint8_t Bytes __attribute__((vector_size(16)));
typedef std::uint16_t Shorts __attribute__((vector_size(16)));
typedef float Float __attribute__((vector_size(16)));

inline Bytes load_bytes(const void* p) {
  Bytes v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_bytes(void* p, Bytes v) { std::memcpy(p, &v, sizeof v); }
inline Bytes all_bytes(int v) { return Bytes{} + static_cast<std::uint8_t>(v); }
inline Bytes both(Bytes a, Bytes b) { return a & b; }
inline Bytes either(Bytes a, Bytes b) { return a | b; }
template <int N>
inline Bytes right(Bytes v) {
  return v >> static_cast<std::uint8_t>(N);
}
template <int N>
inline Bytes left(Bytes v) {
  return v << static_cast<std::uint8_t>(N);
}
inline Bytes load_table(const std::uint8_t* p) { return load_bytes(p); }
inline Bytes look_up(Bytes table, Bytes v) { return __builtin_shuffle(table, v); }
inline Bytes four(const void* p) {
  std::int32_t v;
  std::memcpy(&v, p, 4);
  return reinterpret_cast<Bytes>(Int{v, v, v, v});
}
inline Int all(std::int32_t v) { return Int{v, v, v, v}; }
inline Int add(Int a, Int b) { return a + b; }
inline Float to_float(Int v) { return __builtin_convertvector(v, Float); }
inline Float all(float v) { return Float{v, v, v, v}; }
inline Float load(const float* p) {
  Float v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Float v) { std::memcpy(p, &v, sizeof v); }
inline Float multiply(Float a, Float b) { return a * b; }
// Left to itself the compiler fuses the two in some places and not in others, and a row's bits depended on its tile.
inline Float multiply_add(Float a, Float b, Float c) {
#if defined(__FP_FAST_FMAF)
  for (int i = 0; i < 4; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
inline float half(std::uint16_t h) {  // exponents are 112 apart; what is subnormal is normal afterwards
  const std::uint32_t sign = static_cast<std::uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
  const std::uint32_t shifted = rest << 13;
  float v;
  if (rest >= 0x7c00) {
    const std::uint32_t special = shifted | 0x7f800000;
    std::memcpy(&v, &special, 4);
  } else {
    std::memcpy(&v, &shifted, 4);
    v *= 0x1p112f;
  }
  return sign ? -v : v;
}
inline Float from_half(const std::uint16_t* p) { return Float{half(p[0]), half(p[1]), half(p[2]), half(p[3])}; }
inline Float from_brain(const std::uint16_t* p) {
  return reinterpret_cast<Float>(Int{p[0] << 16, p[1] << 16, p[2] << 16, p[3] << 16});
}
inline Float from_signed(const std::int8_t* p) { return to_float(Int{p[0], p[1], p[2], p[3]}); }
inline Float from_unsigned(const std::uint8_t* p) { return to_float(Int{p[0], p[1], p[2], p[3]}); }
inline Int dot(Int sum, Bytes w, Bytes x) {
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 4; ++j) sum[i] += w[4 * i + j] * static_cast<std::int8_t>(x[4 * i + j]);
  return sum;
}
inline Int dot_wide(Int sum, Bytes w, Bytes x) { return dot(sum, w, x); }

#endif

constexpr int VECTORS = PANEL / LANES;   // of a panel
constexpr int VECTOR_BYTES = 4 * LANES;  // of codes, and of numbers

}  // namespace
}  // namespace fewbits::runtime::FEWBITS_TARGET
