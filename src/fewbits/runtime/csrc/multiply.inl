// Products of inputs with a weight of any format: out[m, n] = Σ_k x[m, k] · w[n, k].
//
// Columns go by in slabs. A slab of a few panels is decoded into bytes that stay in the first-level cache (codes of 8
// bits already are bytes, and stay where they are), its params into floats; then every tile of inputs is multiplied
// with it. So decoding is done once for all rows of inputs. Few rows take another way (`stream`), because what bounds
// them is how fast the weight comes from memory.
//
// The arithmetic of a tile of M rows, per step of four columns: a load for each vector of 16 weights' rows, a broadcast
// for each row of inputs, M · vectors instructions of 4 · LANES multiply-adds. With 2 × 6 (AVX-512) 12 such instructions
// share 8 loads, and both kinds of accumulators (a segment's integers, floats for 128 columns) fit 32 registers. A
// segment ends in two more for each accumulator (converted, scaled and added), 128 columns in a third: at most 78 % of
// the peak in segments of 32 columns, 91 % in those of 128.
//
// Rows and columns are filled up to whole panels and blocks, in weights and in inputs and outputs, so there are no
// tails but a last segment that is shorter.
#pragma once

#include "vec.h"
#include "weight.h"

namespace fewbits::runtime::FEWBITS_TARGET {
namespace {

constexpr int SLAB = 512;       // columns decoded at a time: 8 KB a panel
constexpr int FLOAT_SLAB = 64;  // the same for floating-point numbers: 4 KB a panel
constexpr int MOST_PANELS = 4;
constexpr int LINE = 64;     // bytes of a cache's line
constexpr int AHEAD = 5120;  // bytes: what is fetched while codes are decoded
constexpr int PARAMS_AHEAD = 1024;  // the same for what comes with a group
constexpr int MOST_SEGMENTS = SLAB / PANEL;

struct Scratch {
  alignas(64) std::uint8_t codes[MOST_PANELS][SLAB * PANEL];
  alignas(64) float scale[MOST_SEGMENTS * MOST_PANELS * PANEL];
  alignas(64) float offset[MOST_SEGMENTS * MOST_PANELS * PANEL];
};

// ---- decoding ----

// A block as its 8 steps, in registers as long as there are enough.
using Block = Bytes[STEPS][VECTORS];

// Codes of the steps that lie I planes up in a vector of WIDTH-bit codes, beside higher bits where those are there.
template <int WIDTH, int SHIFT, bool MERGE, int I>
inline void unfold(Bytes packed, Block& out, int j, int part) {
  if constexpr (I * WIDTH < 8) {
    Bytes codes = both(right<WIDTH * I>(packed), all_bytes((1 << WIDTH) - 1));
    if constexpr (SHIFT > 0) codes = left<SHIFT>(codes);
    if constexpr (MERGE) codes = either(codes, out[j + I * WIDTH][part]);
    out[j + I * WIDTH][part] = codes;
    unfold<WIDTH, SHIFT, MERGE, I + 1>(packed, out, j, part);
  }
}

template <int WIDTH, int SHIFT, bool MERGE>
inline const std::uint8_t* plane(const std::uint8_t* in, Block& out) {
#pragma GCC unroll 8
  for (int j = 0; j < WIDTH; ++j) {
    __builtin_prefetch(in + j * STEP_BYTES + AHEAD);
#pragma GCC unroll 4
    for (int part = 0; part < VECTORS; ++part)
      unfold<WIDTH, SHIFT, MERGE, 0>(load_bytes(in + j * STEP_BYTES + part * VECTOR_BYTES), out, j, part);
  }
  return in + WIDTH * STEP_BYTES;
}

// One block of a panel, BITS · 64 bytes: the plane of the highest bits first.
template <int BITS>
inline const std::uint8_t* decode_block(const std::uint8_t* in, Block& out) {
  constexpr int low = BITS == 8 ? 8 : BITS >= 4 ? 4 : BITS >= 2 ? 2 : 1;
  constexpr int middle = BITS - low >= 2 ? 2 : BITS - low, high = BITS - low - middle;
  if constexpr (high > 0) in = plane<high, low + middle, false>(in, out);
  if constexpr (middle > 0) in = plane<middle, low, (high > 0)>(in, out);
  return plane<low, 0, (middle > 0)>(in, out);
}

// Codes as the dot product takes them: looked up, and signed where it wants them so.
inline Bytes finish(Bytes codes, bool lookup, Bytes table) {
  if (lookup) codes = look_up(table, codes);
#if defined(__ARM_NEON) && !defined(FEWBITS_PORTABLE)
  codes = veorq_u8(codes, all_bytes(128));
#endif
  return codes;
}

template <int BITS>
void decode_blocks(const Weight& w, const std::uint8_t* in, int blocks, std::uint8_t* out) {
  const bool lookup = w.table, finishes = lookup || (SHIFTED && BITS == 8);
  const Bytes table = lookup ? load_table(w.table) : all_bytes(0);
  for (int b = 0; b < blocks; ++b) {
    Block block;
    in = decode_block<BITS>(in, block);
#pragma GCC unroll 8
    for (int step = 0; step < STEPS; ++step)
#pragma GCC unroll 4
      for (int part = 0; part < VECTORS; ++part, out += VECTOR_BYTES)
        store_bytes(out, finishes ? finish(block[step][part], lookup, table) : block[step][part]);
  }
}

inline bool is_wide(const Weight& w) { return w.bits == 8 || w.table; }

inline const std::uint8_t* codes_at(const Weight& w, std::int64_t panel, std::int64_t block) {
  return static_cast<const std::uint8_t*>(w.codes) + panel * w.panel_bytes() + block * w.bits * STEP_BYTES;
}

// `blocks` blocks of a panel from one on. Returns where they are: in `out`, or where they were.
const std::uint8_t* decode(const Weight& w, std::int64_t panel, std::int64_t block, int blocks, std::uint8_t* out) {
  const std::uint8_t* in = codes_at(w, panel, block);
  switch (w.bits) {
    case 1: decode_blocks<1>(w, in, blocks, out); break;
    case 2: decode_blocks<2>(w, in, blocks, out); break;
    case 3: decode_blocks<3>(w, in, blocks, out); break;
    case 4: decode_blocks<4>(w, in, blocks, out); break;
    case 5: decode_blocks<5>(w, in, blocks, out); break;
    case 6: decode_blocks<6>(w, in, blocks, out); break;
    case 7: decode_blocks<7>(w, in, blocks, out); break;
    default:
      if (!SHIFTED) return in;
      decode_blocks<8>(w, in, blocks, out);
  }
  return out;
}

inline Float number(Number kind, const void* values, std::int64_t at) {
  switch (kind) {
    case Number::f32: return load(static_cast<const float*>(values) + at);
    case Number::f16: return from_half(static_cast<const std::uint16_t*>(values) + at);
    default: return from_brain(static_cast<const std::uint16_t*>(values) + at);
  }
}

// Where segments come in the params of a panel, counted on without a division.
struct Cursor {
  int each, into = 0;   // segments of a group
  int per, within = 0;  // groups under a factor
  std::int64_t group = 0, factor = 0;

  void next() {
    if (++into < each) return;
    into = 0, ++group;
    if (++within == per) within = 0, ++factor;
  }
};

// At the segment that begins at a column.
inline Cursor cursor(const Weight& w, const Params& p, std::int64_t column) {
  Cursor c{};
  c.each = static_cast<int>((w.group + w.segment() - 1) / w.segment());
  c.per = p.per;
  const std::int64_t segment = column / w.segment();
  c.group = segment / c.each, c.into = static_cast<int>(segment % c.each);
  c.factor = c.group / c.per, c.within = static_cast<int>(c.group % c.per);
  return c;
}

// Calls put(group, factor, at) for each segment of a panel: numbers before the group's, before its factor's, and floats
// of the destination.
template <typename Put>
inline void each_segment(const Weight& w, const Params& p, std::int64_t panel, std::int64_t column, int segments,
                         int stride, Put&& put) {
  const std::int64_t groups = w.groups(), factors = (groups + p.per - 1) / p.per;
  Cursor c = cursor(w, p, column);
  for (int i = 0; i < segments; ++i, c.next())
    for (int row = 0; row < PANEL; row += LANES)
      put((panel * groups + c.group) * PANEL + row, (panel * factors + c.factor) * PANEL + row, i * stride + row);
}

// Params of one panel's segments as floats, `stride` floats apart. `scale`: what zero-points are multiplied by.
void decode_params(const Weight& w, const Params& p, std::int64_t panel, std::int64_t column, int segments, int stride,
                   const float* scale, float* out) {
  const auto each = [&](auto&& put) { each_segment(w, p, panel, column, segments, stride, put); };
  switch (p.kind) {
    case Params::Kind::numbers:
      switch (p.number) {
        case Number::f32:
          return each([&](auto from, auto, int to) {
            store(out + to, load(static_cast<const float*>(p.values) + from));
          });
        case Number::f16:
          return each([&](auto from, auto, int to) {
            store(out + to, from_half(static_cast<const std::uint16_t*>(p.values) + from));
          });
        case Number::bf16:
          return each([&](auto from, auto, int to) {
            store(out + to, from_brain(static_cast<const std::uint16_t*>(p.values) + from));
          });
      }
      return;
    case Params::Kind::steps:
      return each([&](auto from, auto factor, int to) {
        const Float step = from_signed(static_cast<const std::int8_t*>(p.values) + from);
        store(out + to, multiply(from_half(p.factor + factor), step));
      });
    case Params::Kind::zeros:
      return each([&](auto from, auto, int to) {
        const Float zero = from_unsigned(static_cast<const std::uint8_t*>(p.values) + from);
        store(out + to, multiply(multiply(all(-1.0f), zero), load(scale + to)));
      });
    case Params::Kind::none: return;
  }
}

// ---- inputs ----

// 8-bit codes of one row's group: their scale, and into `codes`. The largest magnitude is found among the bits of
// floats, whose order it is; a NaN is the largest of all, and makes the scale, so the result, NaN.
inline float quantize(const float* x, int count, std::int8_t* codes) {
  std::int32_t most = 0;
  for (int i = 0; i < count; ++i) {
    std::int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    most = bits > most ? bits : most;
  }
  float peak;
  std::memcpy(&peak, &most, 4);
  const float inverse = peak > 0 ? 127.0f / peak : 0.0f;
  for (int i = 0; i < count; ++i) codes[i] = static_cast<std::int8_t>(static_cast<std::int32_t>(__builtin_nearbyintf(x[i] * inverse)));
  return peak / 127.0f;
}

// Where codes of a tile lie from a column on: slab by slab, so that all tiles' parts of one are read in a row.
inline std::int64_t place(const Inputs& in, std::int64_t before, std::int64_t column, int rows) {
  const std::int64_t slab = column / SLAB * SLAB, width = in.padded - slab < SLAB ? in.padded - slab : SLAB;
  return slab * in.rows + before * width + (column - slab) * rows;
}

// Row `m` of a tile of `rows`: codes, scales, and what is needed of their sums.
void quantize_row(const Inputs& in, const float* x, std::int64_t columns, std::int64_t tile, int rows, int m) {
  alignas(64) float filled[LONGEST];
  alignas(64) std::int8_t codes[LONGEST];
  const std::int64_t before = tile * in.height;
  auto* codes_out = static_cast<std::int8_t*>(in.codes);
  float* scales = in.scale + before * in.groups + m;
  std::int32_t* start = in.start + before * in.segments + m;
  float* total = in.total + before * in.segments + m;
  for (std::int64_t at = 0; at < in.padded; at += LONGEST, scales += rows) {
    const int count = static_cast<int>(in.padded - at < LONGEST ? in.padded - at : LONGEST);
    const float* group = x + at;
    if (at + count > columns) {
      for (int i = 0; i < count; ++i) filled[i] = at + i < columns ? x[at + i] : 0.0f;
      group = filled;
    }
    const float scale = quantize(group, count, codes);
    *scales = scale;
    std::int8_t* out = codes_out + place(in, before, at, rows) + m * STEP;
    for (int i = 0; i < count; i += STEP) std::memcpy(out + i * rows, codes + i, STEP);
    for (int first = 0; first < count; first += in.segment, start += rows, total += rows) {
      const int last = first + in.segment < count ? first + in.segment : count;
      std::int32_t sum = 0;
      for (int i = first; i < last; ++i) sum += codes[i];
      *start = -in.zero * sum;
      *total = static_cast<float>(sum);
    }
  }
}

void copy_row(const Inputs& in, const float* x, std::int64_t columns, std::int64_t tile, int rows, int m) {
  float* out = static_cast<float*>(in.codes) + tile * in.height * in.padded + m;
  for (std::int64_t k = 0; k < in.padded; ++k) out[k * rows] = k < columns ? x[k] : 0.0f;
}

inline int rows_of(const Inputs& in, std::int64_t tile) {
  return static_cast<int>(in.rows - tile * in.height < in.height ? in.rows - tile * in.height : in.height);
}

// x [rows, columns], rows `stride` apart: one tile of them made ready.
void pack(const Inputs& in, const float* x, std::int64_t columns, std::int64_t stride, std::int64_t tile) {
  const int rows = rows_of(in, tile);
  for (int m = 0; m < rows; ++m) {
    const float* row = x + (tile * in.height + m) * stride;
    in.segment ? quantize_row(in, row, columns, tile, rows, m) : copy_row(in, row, columns, tile, rows, m);
  }
}

// ---- products ----

struct Slab {
  const std::uint8_t* codes[MOST_PANELS];  // or floats
  const float* scale;
  const float* offset;  // null where there is none
  const std::uint8_t* next[MOST_PANELS];  // what is decoded after this one
  int next_bytes;                         // for each step of this one, to be fetched by the first tile; 0: nothing
  int steps, segment_steps;
  std::int64_t column, first_segment, first_group;  // first_group: of the inputs
  bool adds;  // to what stands in out
};

template <int P, int M>
struct Sums {
  static constexpr int R = P * VECTORS;
  Float at[M][R];

  void load_from(const float* out, std::int64_t stride) {
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) at[m][r] = load(out + m * stride + r * LANES);
  }
  void clear() {
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) at[m][r] = all(0.0f);
  }
  void store_to(float* out, std::int64_t stride) const {
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < R; ++r) store(out + m * stride + r * LANES, at[m][r]);
  }
};

constexpr int UNROLLED = 4;  // steps, so that the loop over a segment's is too short for its end to be mispredicted

// Fetches a part of the next slab while steps of this one are multiplied, so that memory is never idle.
template <int P>
inline void fetch(const Slab& s, int step, int end) {
  for (int at = s.next_bytes * step / LINE * LINE; at < s.next_bytes * end; at += LINE)
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) __builtin_prefetch(s.next[p] + at);
}

// Sums in units of the inputs' scale fill registers beside the segment's integers; whole sums wait in out.
template <int P, int M, bool WIDE>
void integer_tile(const Slab& s, const Inputs& in, std::int64_t before, float* out, std::int64_t stride) {
  constexpr int R = P * VECTORS;
  const auto* x = static_cast<const std::int8_t*>(in.codes) + place(in, before, s.column, M);
  const std::int32_t* start = in.start + before * in.segments + s.first_segment * M;
  const float* total = in.total + before * in.segments + s.first_segment * M;
  const float* x_scale = in.scale + before * in.groups + s.first_group * M;
  const float *w_scale = s.scale, *offset = s.offset;
  for (int step = 0; step < s.steps; x_scale += M) {
    const int group_end = step + LONGEST / STEP < s.steps ? step + LONGEST / STEP : s.steps;
    const bool adds = s.adds || step > 0;
    Float sums[M][R];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums[m][r] = all(0.0f);
    while (step < group_end) {
      const int end = step + s.segment_steps < group_end ? step + s.segment_steps : group_end;
      fetch<P>(s, step, end);
      Int dots[M][R];
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) dots[m][r] = all(start[m]);
      for (; step < end; step += UNROLLED)
#pragma GCC unroll 16
        for (int i = 0; i < UNROLLED; ++i, x += M * STEP) {
          Bytes w[R];
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r)
            w[r] = load_bytes(s.codes[r / VECTORS] + (step + i) * STEP_BYTES + r % VECTORS * VECTOR_BYTES);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) {
            const Bytes inputs = four(x + m * STEP);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
              dots[m][r] = WIDE ? dot_wide(dots[m][r], w[r], inputs) : dot(dots[m][r], w[r], inputs);
          }
        }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const Float scale = load(w_scale + r * LANES);
#pragma GCC unroll 16
        for (int m = 0; m < M; ++m) sums[m][r] = multiply_add(to_float(dots[m][r]), scale, sums[m][r]);
      }
      if (offset) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const Float added = load(offset + r * LANES);
#pragma GCC unroll 16
          for (int m = 0; m < M; ++m) sums[m][r] = multiply_add(added, all(total[m]), sums[m][r]);
        }
        offset += R * LANES;
      }
      w_scale += R * LANES;
      start += M;
      total += M;
    }
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        float* at = out + m * stride + r * LANES;
        store(at, multiply_add(sums[m][r], all(x_scale[m]), adds ? load(at) : all(0.0f)));
      }
  }
}

template <int P, int M>
void float_tile(const Slab& s, const Inputs& in, std::int64_t before, float* out, std::int64_t stride) {
  constexpr int R = P * VECTORS;
  const float* x = static_cast<const float*>(in.codes) + before * in.padded + s.column * M;
  Sums<P, M> sums;
  s.adds ? sums.load_from(out, stride) : sums.clear();
  for (int k = 0; k < s.steps; ++k, x += M) {
    Float w[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
      w[r] = load(reinterpret_cast<const float*>(s.codes[r / VECTORS]) + k * PANEL + r % VECTORS * LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sums.at[m][r] = multiply_add(w[r], all(x[m]), sums.at[m][r]);
  }
  sums.store_to(out, stride);
}

using Tile = void (*)(const Slab&, const Inputs&, std::int64_t, float*, std::int64_t);

template <int P, int M>
Tile tile_of_kind(const Weight& w) {
  if constexpr (M > TILE) return float_tile<P, M>;  // so many integers are streamed
  if (!w.bits) return float_tile<P, M>;
  return is_wide(w) ? integer_tile<P, M, true> : integer_tile<P, M, false>;
}

constexpr int HIGHEST = TILE > STREAMED ? TILE : STREAMED;

// The tile for so many panels and rows.
template <int P, int M = 1>
Tile tile_for(const Weight& w, int rows) {
  if (rows == M) return tile_of_kind<P, M>(w);
  if constexpr (M < HIGHEST) return tile_for<P, M + 1>(w, rows);
  return nullptr;  // no tile is higher
}

constexpr int FEW_TILES = 4;

// Panels that fill the registers: few rows leave room for more.
constexpr int FULL = LANES == 16 ? 2 : 1;  // beside TILE rows
constexpr int FEW = LANES == 16 ? 4 : LANES == 8 ? 2 : 1;  // floating-point ones beside one or two

inline Tile tile_for(const Weight& w, int panels, int rows) {
  if (panels == 1) return tile_for<1>(w, rows);
  if (panels == 2) return tile_for<2>(w, rows);
  return rows == 1 ? float_tile<MOST_PANELS, 1> : float_tile<MOST_PANELS, 2>;
}

// Floating-point numbers of some columns of a panel, times their scale.
const std::uint8_t* decode_floats(const Weight& w, std::int64_t panel, std::int64_t column, int columns, float* out) {
  const std::int64_t at = (panel * w.padded() + column) * PANEL;
  if (w.number == Number::f32 && w.scale.kind == Params::Kind::none)
    return reinterpret_cast<const std::uint8_t*>(static_cast<const float*>(w.codes) + at);
  const std::int64_t first = panel * w.groups() * PANEL;
  for (int k = 0; k < columns; ++k)
    for (int row = 0; row < PANEL; row += LANES) {
      Float v = number(w.number, w.codes, at + k * PANEL + row);
      if (w.group) v = multiply(v, number(w.scale.number, w.scale.values, first + (column + k) / w.group * PANEL + row));
      store(out + k * PANEL + row, v);
    }
  return reinterpret_cast<const std::uint8_t*>(out);
}

// Some panels' slab from a column on, ready to be multiplied.
Slab open_slab(const Weight& w, std::int64_t panel, int count, std::int64_t column, Scratch& scratch) {
  Slab s{};
  s.column = column;
  const std::int64_t left = w.padded() - column;
  if (!w.bits) {
    s.steps = static_cast<int>(left < FLOAT_SLAB ? left : FLOAT_SLAB);
    for (int p = 0; p < count; ++p)
      s.codes[p] = decode_floats(w, panel + p, column, s.steps, reinterpret_cast<float*>(scratch.codes[p]));
    return s;
  }
  const int columns = static_cast<int>(left < SLAB ? left : SLAB), length = w.segment();
  s.steps = columns / STEP;
  s.segment_steps = length / STEP;
  s.first_segment = column / length;
  s.first_group = column / LONGEST;
  for (int p = 0; p < count; ++p)
    s.codes[p] = decode(w, panel + p, column / BLOCK, columns / BLOCK, scratch.codes[p]);
  const int segments = (columns + length - 1) / length, stride = count * PANEL;
  for (int p = 0; p < count; ++p) {
    float* scale = scratch.scale + p * PANEL;
    decode_params(w, w.scale, panel + p, column, segments, stride, nullptr, scale);
    decode_params(w, w.offset, panel + p, column, segments, stride, scale, scratch.offset + p * PANEL);
  }
  s.scale = scratch.scale;
  s.offset = w.offset.kind == Params::Kind::none ? nullptr : scratch.offset;
  return s;
}

// ---- few rows of inputs ----
//
// A few rows are multiplied as fast as the weight comes from memory, so it goes straight from there into registers:
// decoded block by block, multiplied, dropped. Fetching is spread over the arithmetic evenly, which a slab in two passes
// is not, and there is one stream of codes: two panels abreast would share what is broadcast, but are read more slowly.

// LANES params of a panel from a row on. groups, factors: of a panel; `scale`: what zero-points are multiplied by.
inline Float param(const Params& p, const Cursor& c, std::int64_t groups, std::int64_t factors, std::int64_t panel, int row,
                   Float scale) {
  const std::int64_t at = (panel * groups + c.group) * PANEL + row;
  if (p.kind == Params::Kind::numbers) {
    const std::int64_t size = p.number == Number::f32 ? 4 : 2;
    __builtin_prefetch(static_cast<const std::uint8_t*>(p.values) + at * size + PARAMS_AHEAD);
    return number(p.number, p.values, at);
  }
  __builtin_prefetch(static_cast<const std::uint8_t*>(p.values) + at + PARAMS_AHEAD);
  if (p.kind == Params::Kind::zeros)
    return multiply(multiply(all(-1.0f), from_unsigned(static_cast<const std::uint8_t*>(p.values) + at)), scale);
  return multiply(from_half(p.factor + (panel * factors + c.factor) * PANEL + row),
                  from_signed(static_cast<const std::int8_t*>(p.values) + at));
}

template <int BITS, int M, bool WIDE>
void stream(const Weight& w, const Inputs& in, std::int64_t tile, std::int64_t panel, bool adds, float* out,
            std::int64_t stride) {
  constexpr bool lookup = WIDE && BITS < 8, finishes = lookup || (SHIFTED && WIDE);
  constexpr int chains = VECTORS * M == 1 ? 2 : 1;  // sums that steps are added to in turn: one alone waits for itself
  const bool offsets = w.offset.kind != Params::Kind::none;
  const Bytes table = lookup ? load_table(w.table) : all_bytes(0);
  const int length = w.segment();
  const std::int64_t blocks = w.blocks(), groups = w.groups();
  const std::int64_t scale_factors = (groups + w.scale.per - 1) / w.scale.per;
  const std::int64_t offset_factors = (groups + w.offset.per - 1) / w.offset.per;
  const std::uint8_t* codes = codes_at(w, panel, 0);
  const std::int64_t before = tile * in.height;
  const float *x_scales = in.scale + before * in.groups, *totals = in.total + before * in.segments;
  const std::int32_t* starts = in.start + before * in.segments;
  Float sums[VECTORS][M], inner[VECTORS][M];
  Int dots[VECTORS][M][chains];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      sums[v][m] = adds ? load(out + m * stride + v * LANES) : all(0.0f);
      inner[v][m] = all(0.0f);
      for (int c = 0; c < chains; ++c) dots[v][m][c] = all(c ? 0 : starts[m]);
    }
  Cursor scales = cursor(w, w.scale, 0), shifts = cursor(w, w.offset, 0);
  int segment = 0, columns = 0;  // of the segment that is open
  const std::int8_t* x = nullptr;
  for (std::int64_t b = 0; b < blocks; ++b, x += BLOCK * M) {
    if (b % (SLAB / BLOCK) == 0) x = static_cast<const std::int8_t*>(in.codes) + place(in, before, b * BLOCK, M);
    Block block;
    codes = decode_block<BITS>(codes, block);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int step = half * STEPS / 2; step < (half + 1) * STEPS / 2; ++step)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          const Bytes inputs = four(x + (step * M + m) * STEP);
#pragma GCC unroll 8
          for (int v = 0; v < VECTORS; ++v) {
            const Bytes w4 = finishes ? finish(block[step][v], lookup, table) : block[step][v];
            Int& sum = dots[v][m][step % chains];
            sum = WIDE ? dot_wide(sum, w4, inputs) : dot(sum, w4, inputs);
          }
        }
      columns += BLOCK / 2;
      const bool last = b + 1 == blocks && half == 1;
      if (columns < length && !last) continue;
      columns = 0;
      const float* total = totals + segment * M;
      ++segment;
      const std::int32_t* start = starts + (last ? 0 : segment * M);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; ++v) {
        const Float scale = param(w.scale, scales, groups, scale_factors, panel, v * LANES, all(1.0f));
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
          Int whole = dots[v][m][0];
          if constexpr (chains > 1) whole = add(whole, dots[v][m][1]);
          inner[v][m] = multiply_add(to_float(whole), scale, inner[v][m]);
          for (int c = 0; c < chains; ++c) dots[v][m][c] = all(c ? 0 : start[m]);
        }
        if (!offsets) continue;
        const Float offset = param(w.offset, shifts, groups, offset_factors, panel, v * LANES, scale);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) inner[v][m] = multiply_add(offset, all(total[m]), inner[v][m]);
      }
      scales.next();
      shifts.next();
    }
    if ((b + 1) % (LONGEST / BLOCK) != 0 && b + 1 < blocks) continue;
    const float* x_scale = x_scales + b / (LONGEST / BLOCK) * M;
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        sums[v][m] = multiply_add(inner[v][m], all(x_scale[m]), sums[v][m]);
        inner[v][m] = all(0.0f);
      }
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v)
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) store(out + m * stride + v * LANES, sums[v][m]);
}

template <int BITS, bool WIDE, int M = 1>
void stream_rows(const Weight& w, const Inputs& in, std::int64_t tile, std::int64_t panel, bool adds, float* out,
                 std::int64_t stride) {
  if (rows_of(in, tile) == M) return stream<BITS, M, WIDE>(w, in, tile, panel, adds, out, stride);
  if constexpr (M < STREAMED) stream_rows<BITS, WIDE, M + 1>(w, in, tile, panel, adds, out, stride);
}

// Panel after panel, as they lie: one stream of codes is what memory is read fastest by.
template <int BITS>
void stream_panels(const Weight& w, const Inputs& in, std::int64_t begin, std::int64_t end, bool adds, float* out,
                   std::int64_t stride) {
  const std::int64_t tiles = (in.rows + in.height - 1) / in.height;
  for (std::int64_t panel = begin; panel < end; ++panel)
    for (std::int64_t t = 0; t < tiles; ++t) {
      float* to = out + t * in.height * stride + panel * PANEL;
      w.table ? stream_rows<BITS, true>(w, in, t, panel, adds, to, stride)
              : stream_rows<BITS, BITS == 8>(w, in, t, panel, adds, to, stride);
    }
}

void stream_all(const Weight& w, const Inputs& in, std::int64_t begin, std::int64_t end, bool adds, float* out,
                std::int64_t stride) {
  switch (w.bits) {
    case 1: return stream_panels<1>(w, in, begin, end, adds, out, stride);
    case 2: return stream_panels<2>(w, in, begin, end, adds, out, stride);
    case 3: return stream_panels<3>(w, in, begin, end, adds, out, stride);
    case 4: return stream_panels<4>(w, in, begin, end, adds, out, stride);
    case 5: return stream_panels<5>(w, in, begin, end, adds, out, stride);
    case 6: return stream_panels<6>(w, in, begin, end, adds, out, stride);
    case 7: return stream_panels<7>(w, in, begin, end, adds, out, stride);
    default: return stream_panels<8>(w, in, begin, end, adds, out, stride);
  }
}

// What is read when the slab at a column is done: the panels' next one, or the first of the panels behind them.
void look_ahead(const Weight& w, std::int64_t panel, int count, std::int64_t column, Slab& s) {
  const std::int64_t next = column + SLAB;
  const bool more = next < w.padded();
  s.next_bytes = w.bits * STEP_BYTES / STEPS;
  for (int p = 0; p < count; ++p)
    s.next[p] = more ? codes_at(w, panel + p, next / BLOCK) : codes_at(w, panel + count + p, 0);
}

// out[m, n] (+)= Σ_k x[m, k] · w[n, k] (+ bias[n]) for the rows of panels begin to end. out has `stride` numbers a row,
// whole panels. Where it accumulates, out holds what is added to; a bias is added there too.
void multiply(const Weight& w, const Inputs& in, std::int64_t begin, std::int64_t end, float* out, std::int64_t stride,
              const float* bias, bool accumulate, Scratch& scratch) {
  for (std::int64_t m = 0; bias && m < in.rows; ++m)
    for (std::int64_t n = begin * PANEL; n < end * PANEL && n < w.rows; ++n)
      out[m * stride + n] = bias[n] + (accumulate ? out[m * stride + n] : 0.0f);
  const bool adds = accumulate || bias;
  if (w.bits && in.rows <= PASSES * STREAMED) return stream_all(w, in, begin, end, adds, out, stride);
  const std::int64_t tiles = (in.rows + in.height - 1) / in.height, width = w.bits ? SLAB : FLOAT_SLAB;
  const int together = !w.bits && in.rows <= 2 ? FEW : FULL;
  // Many tiles: all panels of a slab before the next, so that its inputs stay in the second-level cache. Few tiles are
  // there anyway, and the weight is read as it lies.
  const bool few = tiles <= FEW_TILES;
  const std::int64_t span = few ? together : end - begin;
  for (std::int64_t first = begin; first < end; first += span)
    for (std::int64_t column = 0; column < w.padded(); column += width)
      for (std::int64_t panel = first; panel < first + span && panel < end;) {
        int count = static_cast<int>(end - panel < together ? end - panel : together);
        if (count == 3) count = 2;
        Slab s = open_slab(w, panel, count, column, scratch);
        s.adds = adds || column > 0;
        if (few && w.bits) look_ahead(w, panel, count, column, s);
        for (std::int64_t t = 0; t < tiles; ++t, s.next_bytes = 0) {
          const int rows = rows_of(in, t);
          tile_for(w, count, rows)(s, in, t * in.height, out + t * in.height * stride + panel * PANEL, stride);
        }
        panel += count;
      }
}

// out[k] = factor · w[row, k]
void embed(const Weight& w, std::int64_t row, float factor, float* out, Scratch& scratch) {
  const std::int64_t panel = row / PANEL;
  const int lane = static_cast<int>(row % PANEL);
  for (std::int64_t column = 0; column < w.padded(); column += w.bits ? SLAB : FLOAT_SLAB) {
    const Slab s = open_slab(w, panel, 1, column, scratch);
    const int columns = w.bits ? s.steps * STEP : s.steps;
    for (int k = 0; k < columns && column + k < w.columns; ++k) {
      if (!w.bits) {
        out[column + k] = factor * reinterpret_cast<const float*>(s.codes[0])[k * PANEL + lane];
        continue;
      }
      const int code = s.codes[0][k / STEP * STEP_BYTES + lane * STEP + k % STEP];
      const int at = k / (s.segment_steps * STEP) * PANEL + lane;
      const int level = (SHIFTED && is_wide(w) ? code ^ 128 : code) - w.zero;
      out[column + k] = factor * (s.scale[at] * static_cast<float>(level) + (s.offset ? s.offset[at] : 0.0f));
    }
  }
}

}  // namespace
}  // namespace fewbits::runtime::FEWBITS_TARGET
