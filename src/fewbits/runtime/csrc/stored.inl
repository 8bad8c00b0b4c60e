// How keys and values lie in their cache: writing a position, and reading a vector of numbers of each kind.
//
// Attention reads LANES neighbours at a time, positions of a key's dimension or dimensions of a position's value, and
// applies the scale of a position to scores and probabilities, of which there are fewer; so reading is converting.

namespace fewbits::runtime::FEWBITS_TARGET {

namespace {

// LANES bytes or halves from an address on, as signed or unsigned integers. (GCC 12 takes __builtin_convertvector from
// narrow integers apart, number by number.)
FEWBITS_INLINE IVec wide_bytes(const std::byte* from) {
#if defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 64
  return reinterpret_cast<IVec>(_mm512_maskz_cvtepi8_epi32(0xffff, load_as<__m128i>(from)));
#elif defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 32
  return reinterpret_cast<IVec>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#elif defined(FEWBITS_INTRINSICS) && defined(__SSE4_1__)
  return reinterpret_cast<IVec>(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(load_as<int>(from))));
#elif defined(FEWBITS_INTRINSICS)
  const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(load_as<std::int32_t>(from)));
  return reinterpret_cast<IVec>(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
#else
  IVec v;
  for (int i = 0; i < LANES; ++i) v[i] = load_as<std::int8_t>(from + i);
  return v;
#endif
}

// FP16 to float32 by bits, for targets without an instruction: the exponent is corrected by a product, which makes
// denormals normal on the way (in a thread that does not flush them).
FEWBITS_INLINE Vec wide_halves(const std::byte* from) {
  IVec halves;
#if defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 16 && defined(__SSE4_1__)
  halves = reinterpret_cast<IVec>(_mm_cvtepu16_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#else
  for (int i = 0; i < LANES; ++i) halves[i] = load_as<std::uint16_t>(from + 2 * i);
#endif
  const IVec rest = (halves & 0x7fff) << 13, sign = (halves & 0x8000) << 16;
  const IVec infinite = rest >= 0x0f800000 ? IVec{} + 0x7f800000 : IVec{};  // or not a number
  const Vec scaled = reinterpret_cast<Vec>(rest) * 0x1p112f;
  return reinterpret_cast<Vec>(reinterpret_cast<IVec>(scaled) | sign | infinite);
}

// float32 to FP16 by bits, to the nearest, ties to even. A sum with 0.5 leaves denormals in its last bits; a normal
// number's are rounded by adding half of what is cut off, less one where the last bit kept is 0.
FEWBITS_INLINE std::uint16_t narrowed(float x) {
  const std::uint32_t bits = load_as<std::uint32_t>(&x), rest = bits & 0x7fffffff;
  const float small = load_as<float>(&rest) + 0.5f;
  const std::uint32_t denormal = load_as<std::uint32_t>(&small) - 0x3f000000;
  const std::uint32_t normal = (rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13;
  const std::uint32_t beyond = rest > 0x7f800000 ? 0x7e00 : 0x7c00;
  const std::uint32_t half = rest < 0x38800000 ? denormal : rest < 0x477ff000 ? normal : beyond;
  return static_cast<std::uint16_t>(half | (bits >> 16 & 0x8000));
}

// Each kind: `bits` of a number, and LANES of them from an address on. Nibbles come from the lower or upper half of
// LANES bytes.
struct Float {
  static constexpr int bits = 32;
  FEWBITS_INLINE Vec read(const std::byte* from) { return load_as<Vec>(from); }
};

struct Half {
  static constexpr int bits = 16;
  FEWBITS_INLINE Vec read(const std::byte* from) {
#if defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 64
    return reinterpret_cast<Vec>(_mm512_maskz_cvtph_ps(0xffff, load_as<__m256i>(from)));  // unmasked, GCC 12 warns
#elif defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 32
    return reinterpret_cast<Vec>(_mm256_cvtph_ps(load_as<__m128i>(from)));
#elif defined(FEWBITS_INTRINSICS) && defined(__aarch64__)
    return reinterpret_cast<Vec>(vcvt_f32_f16(load_as<float16x4_t>(from)));
#else
    return wide_halves(from);
#endif
  }
};

struct Byte {
  static constexpr int bits = 8;
  FEWBITS_INLINE Vec read(const std::byte* from) { return __builtin_convertvector(wide_bytes(from), Vec); }
};

struct Nibble {
  static constexpr int bits = 4;
  FEWBITS_INLINE Vec read(const std::byte* from, bool upper) {
    return __builtin_convertvector((wide_bytes(from) >> (upper ? 4 : 0) & 15) - 8, Vec);
  }
};

// Positions `first` and on of a block's keys, of dimension 2·pair or the one behind it.
template <class N>
FEWBITS_INLINE Vec read_key(const std::byte* keys, int pair, int odd, int first) {
  if constexpr (N::bits == 4)
    return N::read(keys + pair * POSITIONS + first, odd != 0);
  else
    return N::read(keys + ((2 * pair + odd) * POSITIONS + first) * (N::bits / 8));
}

// Dimensions d and on of a position's values.
template <class N>
FEWBITS_INLINE Vec read_value(const std::byte* row, int d) {
  if constexpr (N::bits == 4)
    return N::read(row + d / 32 * 16 + d % 16, d / 16 % 2 != 0);
  else
    return N::read(row + d * (N::bits / 8));
}

void halve(const float* x, int count, std::uint16_t* out) {
  int i = 0;
#if defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 64
  for (; i + 16 <= count; i += 16) {
    const __m256i h = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(out + i, &h, sizeof h);
  }
#elif defined(FEWBITS_INTRINSICS) && FEWBITS_WIDTH == 32
  for (; i + 8 <= count; i += 8) {
    const __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(x + i), _MM_FROUND_TO_NEAREST_INT);
    __builtin_memcpy(out + i, &h, sizeof h);
  }
#elif defined(FEWBITS_INTRINSICS) && defined(__aarch64__)
  for (; i + 4 <= count; i += 4) {
    const float16x4_t h = vcvt_f16_f32(vld1q_f32(x + i));
    __builtin_memcpy(out + i, &h, sizeof h);
  }
#endif
  for (; i < count; ++i) out[i] = narrowed(x[i]);
}

// Codes −levels … levels to the nearest, ties to even; the scale is returned. Rows that are 0, or as good as, have
// scale 0. `codes` has room for whole vectors.
float quantize(const float* x, int count, float levels, std::int8_t* codes) {
  Vec peaks = {};
  by_vectors(static_cast<std::size_t>(count), [&](auto where) { peaks = larger(peaks, magnitude(load(x, where))); });
  const float scale = largest(peaks)[0] / levels;
  if (!(scale >= 0x1p-120f)) {
    __builtin_memset(codes, 0, static_cast<std::size_t>(count));
    return 0.0f;
  }
  by_vectors(static_cast<std::size_t>(count), [&](auto where) {
    const Vec code = load(x, where) / scale;
    const Vec rounded = (code + 12582912.0f) - 12582912.0f;
    const IVec integers = __builtin_convertvector(rounded, IVec);
    for (std::size_t i = 0; i < LANES; ++i) codes[where.at + i] = static_cast<std::int8_t>(integers[i]);
  });
  return scale;
}

constexpr int WIDEST = 256;  // head_dim

void store_half(const KeyValues& cache, const CacheBlock& block, int at, const float* k, const float* v) {
  alignas(64) std::uint16_t halves[WIDEST];
  halve(k, cache.head_dim, halves);
  auto* keys = reinterpret_cast<std::uint16_t*>(block.keys) + at;
  for (int d = 0; d < cache.head_dim; ++d) keys[d * POSITIONS] = halves[d];
  halve(v, cache.head_dim, reinterpret_cast<std::uint16_t*>(block.values) + at * cache.value_width);
}

void store_bytes(const KeyValues& cache, const CacheBlock& block, int at, const float* k, const float* v) {
  alignas(64) std::int8_t codes[WIDEST];
  block.key_scales[at] = quantize(k, cache.head_dim, 127.0f, codes);
  auto* keys = reinterpret_cast<std::int8_t*>(block.keys) + at;
  for (int d = 0; d < cache.head_dim; ++d) keys[d * POSITIONS] = codes[d];
  block.value_scales[at] = quantize(v, cache.head_dim, 127.0f, codes);
  __builtin_memcpy(block.values + at * cache.value_width, codes, static_cast<std::size_t>(cache.head_dim));
}

FEWBITS_INLINE std::uint8_t pair(std::int8_t lower, std::int8_t upper) {
  return static_cast<std::uint8_t>((lower + 8) | (upper + 8) << 4);
}

void store_nibbles(const KeyValues& cache, const CacheBlock& block, int at, const float* k, const float* v) {
  alignas(64) std::int8_t codes[WIDEST] = {};
  block.key_scales[at] = quantize(k, cache.head_dim, 7.0f, codes);
  auto* keys = reinterpret_cast<std::uint8_t*>(block.keys) + at;
  for (int d = 0; d < cache.head_dim; d += 2) keys[d / 2 * POSITIONS] = pair(codes[d], codes[d + 1]);
  block.value_scales[at] = quantize(v, cache.head_dim, 7.0f, codes);
  auto* values = reinterpret_cast<std::uint8_t*>(block.values) + at * cache.value_width / 2;
  for (int d = 0; d < cache.value_width; d += 32)
    for (int i = 0; i < 16; ++i) values[d / 2 + i] = pair(codes[d + i], codes[d + 16 + i]);
}

// k and v [head_dim] become those of `position`.
void append(const KeyValues& cache, int layer, int slot, int kv_head, int position, const float* k, const float* v) {
  const CacheBlock block = cache.block(layer, slot, kv_head, position);
  const int at = position % POSITIONS;
  switch (cache.kind) {
    case Kind::f16: return store_half(cache, block, at, k, v);
    case Kind::int8: return store_bytes(cache, block, at, k, v);
    case Kind::int4: return store_nibbles(cache, block, at, k, v);
  }
}

}  // namespace

}  // namespace fewbits::runtime::FEWBITS_TARGET
