// Codes into numbers, through a table. A row is taken CHUNK columns at a time: its codes are unpacked to bytes, which
// stay in the first-level cache, then looked up, scaled, rounded and written where they will be multiplied.
//
// Eight codes of b bits are b bytes, whatever b is, so codes are unpacked by eights; a chunk begins at a whole byte, and
// groups of any size are cut where chunks end. Codes past the last whole eight lie in bytes of which some may be missing:
// those pass through a buffer of eight zeros. Cost per weight: a shift and a mask, a load from the table, two operations
// and four more for bfloat16: about a third of a nanosecond, whether the processor has gathers or not.

#include "decode.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "parallel.h"
#include "targets.h"

namespace fewbits {
namespace {

constexpr std::size_t CHUNK = 256;     // columns
constexpr std::size_t PART = 1 << 14;  // weights that a thread takes at a time

static_assert(std::endian::native == std::endian::little, "streams are read as little-endian words");

// Widths that divide a byte go byte by byte, which the compiler turns into vectors. The others go through words of eight
// bytes as long as the stream has so many left.
template <std::size_t BITS>
[[gnu::always_inline]] inline void unpack_eights(const std::uint8_t* stream, std::size_t bytes, std::size_t eights,
                                                 std::uint8_t* codes) {
  constexpr unsigned MASK = (1u << BITS) - 1;
  if constexpr (8 % BITS == 0) {
    constexpr std::size_t IN_BYTE = 8 / BITS;
    for (std::size_t i = 0; i < eights * BITS; ++i)
      for (std::size_t j = 0; j < IN_BYTE; ++j)
        codes[i * IN_BYTE + j] = static_cast<std::uint8_t>(stream[i] >> (BITS * j) & MASK);
  } else {
    for (std::size_t e = 0; e < eights; ++e) {
      std::uint64_t word = 0;
      const std::uint8_t* from = stream + e * BITS;
      if (e * BITS + sizeof word <= bytes)
        std::memcpy(&word, from, sizeof word);
      else
        std::memcpy(&word, from, BITS);
      for (std::size_t j = 0; j < 8; ++j) codes[8 * e + j] = static_cast<std::uint8_t>(word >> (BITS * j) & MASK);
    }
  }
}

[[gnu::always_inline]] inline void unpack_eights(const std::uint8_t* stream, std::size_t bytes, int bits,
                                                 std::size_t eights, std::uint8_t* codes) {
  switch (bits) {
    case 1: return unpack_eights<1>(stream, bytes, eights, codes);
    case 2: return unpack_eights<2>(stream, bytes, eights, codes);
    case 3: return unpack_eights<3>(stream, bytes, eights, codes);
    case 4: return unpack_eights<4>(stream, bytes, eights, codes);
    case 5: return unpack_eights<5>(stream, bytes, eights, codes);
    case 6: return unpack_eights<6>(stream, bytes, eights, codes);
    case 7: return unpack_eights<7>(stream, bytes, eights, codes);
    default: return unpack_eights<8>(stream, bytes, eights, codes);
  }
}

// `count` codes, of which the first begins with stream's first bit; `bytes` of it are there.
[[gnu::always_inline]] inline void unpack(const std::uint8_t* stream, std::size_t bytes, int bits, std::size_t count,
                                          std::uint8_t* codes) {
  const std::size_t whole = count / 8, used = whole * static_cast<std::size_t>(bits);
  unpack_eights(stream, bytes, bits, whole, codes);
  if (count % 8 == 0) return;
  std::uint8_t rest[8] = {}, last[8];
  std::copy_n(stream + used, std::min<std::size_t>(bytes - used, 8), rest);
  unpack_eights(rest, sizeof rest, bits, 1, last);
  std::copy_n(last, count % 8, codes + 8 * whole);
}

inline void put(float value, float& out) { out = value; }

// To the nearest, ties to even; a NaN stays one.
inline void put(float value, std::uint16_t& out) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  out = static_cast<std::uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

template <typename Out>
[[gnu::always_inline]] inline void decode_one(const Lookup& job, std::size_t row, Out* out) {
  const std::uint8_t* stream = job.codes + row * job.bytes;
  const float* scales = job.scale + row * job.param_step;
  const float* zeros = job.zero ? job.zero + row * job.param_step : nullptr;
  std::uint8_t codes[CHUNK];
  for (std::size_t start = 0; start < job.columns; start += CHUNK) {
    const std::size_t stop = std::min(start + CHUNK, job.columns), byte = start / 8 * static_cast<std::size_t>(job.bits);
    unpack(stream + byte, job.bytes - byte, job.bits, stop - start, codes);
    for (std::size_t at = start, group = start / job.group; at < stop; ++group) {
      const std::size_t end = std::min(stop, (group + 1) * job.group);
      const float scale = scales[group], zero = zeros ? zeros[group] : 0.0f;
#pragma omp simd
      for (std::size_t i = at; i < end; ++i) put((job.levels[codes[i - start]] - zero) * scale, out[i]);
      at = end;
    }
  }
}

FEWBITS_CLONES
void decode_row(const Lookup& job, std::size_t row, float* out) { decode_one(job, row, out); }

FEWBITS_CLONES
void decode_row(const Lookup& job, std::size_t row, std::uint16_t* out) { decode_one(job, row, out); }

template <typename Out>
void decode_rows(const Lookup& job, Out* out, int threads) {
  const std::size_t height = std::max<std::size_t>(1, PART / job.columns);
  parallel_for((job.rows + height - 1) / height, threads, [&](std::size_t part) {
    for (std::size_t row = part * height; row < std::min(job.rows, (part + 1) * height); ++row)
      decode_row(job, row, out + row * job.columns);
  });
}

}  // namespace

void decode(const Lookup& job, float* out, int threads) { decode_rows(job, out, threads); }
void decode(const Lookup& job, std::uint16_t* out, int threads) { decode_rows(job, out, threads); }

}  // namespace fewbits
