// Attention over the cache: softmax on the way (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022,
// arXiv:2205.14135), so nothing is as long as the context. Each block of 64 positions is read once for all queries of a
// group (rows times heads), which keep three things: the largest score so far, the sum of e^(score − largest), and the
// sum of values weighted with that; a larger score shrinks the latter two.
//
//   scores   [6 queries][TILE vectors of positions]   += q[d] · keys[d][positions]
//   values   [6 queries][TILE vectors of dimensions]  += probability[position] · values[position][dimensions]
//
// Both are products of small matrices whose result stays in registers. Up to two tiles of queries (decoding) convert
// the stored numbers where they use them; more (prefill) share a block converted once into float32, in the first two
// caches. Positions that a row does not see are masked in the blocks at the edges; blocks that none sees are not read.
// A block's unwritten positions are read too, and masked before anything is made of them.
//
// Cost per query and position: 2·head_dim multiplications and one e^x, a vector at a time.

namespace fewbits::runtime::FEWBITS_TARGET {

namespace {

constexpr float UNSEEN = -__builtin_inff(), LOWEST = -1e30f;  // a score that is masked; below every other

// Queries that go through the cache together, row by row and head by head, and what they keep.
struct Group {
  const AttendJob& job;
  int row, rows, head, heads;  // the first of each, and how many
  int width;                   // of a row of values, filled up
  float* q;                    // [tile][head_dim][queries of the tile], times scale
  float* scores;               // [query][64], then probabilities
  float* totals;               // [query][width]
  float* sums;                 // [query][LANES], a lane at a time
  float* largest;              // [query]
  float* shrinks;              // [query]: what a larger score makes of sums and totals
  float* keys;                 // a block as float32
  float* values;

  int queries() const { return rows * heads; }
  int tiles() const { return (queries() + HEIGHT - 1) / HEIGHT; }
  int tile_begin(int tile) const { return tile * queries() / tiles(); }  // of about the same height
  int position(int query) const { return job.first_position + (row - job.row_begin) + query / heads; }
  int first_seen(int position) const { return job.window > 0 ? most(0, position - job.window + 1) : 0; }
};

Group group_of(const AttendJob& job, int row, int rows, int head, int heads) {
  Group g{job, row, rows, head, heads, job.cache->value_width, job.scratch, nullptr, nullptr, nullptr, nullptr, nullptr,
          nullptr, nullptr};
  g.scores = g.q + QUERIES * job.cache->head_dim;
  g.totals = g.scores + QUERIES * POSITIONS;
  g.sums = g.totals + QUERIES * g.width;
  g.largest = g.sums + QUERIES * LANES;
  g.shrinks = g.largest + QUERIES;
  g.keys = g.shrinks + QUERIES;
  g.values = g.keys + POSITIONS * job.cache->head_dim;
  return g;
}

void begin(const Group& g) {
  const int head_dim = g.job.cache->head_dim;
  for (int tile = 0; tile < g.tiles(); ++tile) {
    const int first = g.tile_begin(tile), height = g.tile_begin(tile + 1) - first;
    for (int i = 0; i < height; ++i) {
      const int row = g.row + (first + i) / g.heads, head = g.head + (first + i) % g.heads;
      const float* from = g.job.q + static_cast<std::size_t>(row) * g.job.q_stride + head * head_dim;
      for (int d = 0; d < head_dim; ++d) g.q[first * head_dim + d * height + i] = from[d] * g.job.scale;
    }
  }
  __builtin_memset(g.totals, 0, static_cast<std::size_t>(g.queries() * g.width) * sizeof(float));
  __builtin_memset(g.sums, 0, static_cast<std::size_t>(g.queries() * LANES) * sizeof(float));
  for (int query = 0; query < g.queries(); ++query) g.largest[query] = LOWEST;
}

// A part of the same head's next block, `ahead` of this one's: hardware fetches ahead within a page, and a head's part
// of a block is no more than a few. From memory (16,384 positions) decoding reads 46 GB/s with it and 19 without.
template <class N, int BYTES>
FEWBITS_INLINE void fetch(const std::byte* from, std::ptrdiff_t ahead) {
  if constexpr (N::bits < 32)
#pragma GCC unroll 8
    for (int at = 0; at < BYTES; at += 64) __builtin_prefetch(from + ahead + at, 0, 2);
}

template <class N, int H>
void score(const float* q, const std::byte* keys, std::ptrdiff_t ahead, int head_dim, float* scores) {
  for (int first = 0; first < POSITIONS; first += TILE * LANES) {
    Vec sums[H][TILE] = {};
    const auto add_dimension = [&](int pair, int odd) __attribute__((always_inline)) {
      const float* factors = q + (2 * pair + odd) * H;
      Vec key[TILE];
#pragma GCC unroll 4
      for (int j = 0; j < TILE; ++j) key[j] = read_key<N>(keys, pair, odd, first + j * LANES);
#pragma GCC unroll 6
      for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < TILE; ++j) sums[i][j] += factors[i] * key[j];
    };
    for (int pair = 0; pair < head_dim / 2; ++pair) {
      if (first == 0) fetch<N, POSITIONS * N::bits / 4>(keys + pair * POSITIONS * N::bits / 4, ahead);
      add_dimension(pair, 0);
      add_dimension(pair, 1);
    }
#pragma GCC unroll 6
    for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < TILE; ++j) store(scores + i * POSITIONS + first + j * LANES, sums[i][j]);
  }
}

// Dimensions d … d + V·LANES of H queries' totals.
template <class N, int H, int V>
FEWBITS_INLINE void mix_columns(const float* weights, const float* shrinks, const std::byte* values,
                                std::ptrdiff_t ahead, int count, int width, int d, float* totals) {
  Vec sums[H][V];
#pragma GCC unroll 6
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) sums[i][j] = load(totals + i * width + d + j * LANES) * shrinks[i];
  const int row_bytes = width * N::bits / 8;
  for (int at = 0; at < count; ++at, values += row_bytes) {
    fetch<N, V * LANES * N::bits / 8>(values + d * N::bits / 8, ahead);
    Vec value[V];
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) value[j] = read_value<N>(values, d + j * LANES);
#pragma GCC unroll 6
    for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < V; ++j) sums[i][j] += weights[i * POSITIONS + at] * value[j];
  }
#pragma GCC unroll 6
  for (int i = 0; i < H; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < V; ++j) store(totals + i * width + d + j * LANES, sums[i][j]);
}

template <class N, int H>
void mix(const float* weights, const float* shrinks, const std::byte* values, std::ptrdiff_t ahead, int count,
         int width, float* totals) {
  int d = 0;
  for (; d + TILE * LANES <= width; d += TILE * LANES)
    mix_columns<N, H, TILE>(weights, shrinks, values, ahead, count, width, d, totals);
  for (; d < width; d += LANES) mix_columns<N, H, 1>(weights, shrinks, values, ahead, count, width, d, totals);
}

template <class F>
FEWBITS_INLINE void change(float* scores, F body) {
  for (int at = 0; at < POSITIONS; at += LANES) store(scores + at, body(load(scores + at), at));
}

// What products of stored numbers lack to be scores: scales, the cap, and the mask outside [from, to) of the block.
void complete(const AttendJob& job, const CacheBlock& block, int from, int to, float* scores) {
  if (block.key_scales) change(scores, [&](Vec s, int at) { return s * load(block.key_scales + at); });
  if (job.softcap > 0.0f) change(scores, [&](Vec s, int) { return capped(s, job.softcap); });
  if (from > 0 || to < POSITIONS)
    change(scores, [&](Vec s, int at) {
      const IVec position = lane_numbers() + at;
      return (position >= from) & (position < to) ? s : all(UNSEEN);
    });
}

// Scores of a query -> e^(score − largest), times the scales of values.
void weigh(const Group& g, int query, const CacheBlock& block, float* scores) {
  Vec high = all(g.largest[query]), sums = load(g.sums + query * LANES);
  for (int at = 0; at < POSITIONS; at += LANES) high = larger(high, load(scores + at));
  high = largest(high);
  g.shrinks[query] = 1.0f;
  if (high[0] != g.largest[query]) {  // rarely, once some blocks have passed
    const Vec shrink = exp_of_negative(all(g.largest[query]) - high);
    g.shrinks[query] = shrink[0];
    g.largest[query] = high[0];
    sums *= shrink;
  }
  change(scores, [&](Vec s, int) {
    const Vec p = exp_of_negative(s - high);
    sums += p;
    return p;
  });
  store(g.sums + query * LANES, sums);
  if (block.value_scales) change(scores, [&](Vec p, int at) { return p * load(block.value_scales + at); });
}

template <class F>
FEWBITS_INLINE void with_height(int height, F body) {
  switch (height) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    case 4: return body.template operator()<4>();
    case 5: return body.template operator()<5>();
    default: return body.template operator()<6>();
  }
}

// One block, stored as N, for all tiles of queries that see any of it.
template <class N>
void attend_block(const Group& g, const CacheBlock& block, const std::byte* keys, const std::byte* values, int start) {
  const int head_dim = g.job.cache->head_dim;
  const std::ptrdiff_t ahead = g.job.cache->ahead();
  const auto by_tile = [&](auto body) {
    for (int tile = 0; tile < g.tiles(); ++tile) {
      const int first = g.tile_begin(tile), end = g.tile_begin(tile + 1), last_seen = g.position(end - 1);
      if (start <= last_seen && start + POSITIONS > g.first_seen(g.position(first)))
        body(first, end - first, least(POSITIONS, last_seen + 1 - start));
    }
  };
  by_tile([&](int first, int height, int) {
    with_height(height, [&]<int H>() {
      score<N, H>(g.q + first * head_dim, keys, ahead, head_dim, g.scores + first * POSITIONS);
    });
    for (int query = first; query < first + height; ++query) {
      const int position = g.position(query);
      complete(g.job, block, g.first_seen(position) - start, position + 1 - start, g.scores + query * POSITIONS);
      weigh(g, query, block, g.scores + query * POSITIONS);
    }
  });
  by_tile([&](int first, int height, int count) {
    with_height(height, [&]<int H>() {
      mix<N, H>(g.scores + first * POSITIONS, g.shrinks + first, values, ahead, count, g.width,
                g.totals + first * g.width);
    });
  });
}

template <class N>
void widen(const Group& g, const CacheBlock& block) {
  for (int d = 0; d < g.job.cache->head_dim; ++d)
    for (int at = 0; at < POSITIONS; at += LANES)
      store(g.keys + d * POSITIONS + at, read_key<N>(block.keys, d / 2, d % 2, at));
  for (int at = 0; at < POSITIONS; ++at)
    for (int d = 0; d < g.width; d += LANES)
      store(g.values + at * g.width + d, read_value<N>(block.values + at * g.width * N::bits / 8, d));
}

template <class N>
void attend_blocks(const Group& g) {
  const int end = g.position(g.queries() - 1) + 1;
  for (int start = g.first_seen(g.position(0)) / POSITIONS * POSITIONS; start < end; start += POSITIONS) {
    const CacheBlock block = g.job.cache->block(g.job.layer, g.job.slot, g.job.kv_head, start);
    if (g.tiles() <= 2) {
      attend_block<N>(g, block, block.keys, block.values, start);
    } else {
      widen<N>(g, block);
      attend_block<Float>(g, block, reinterpret_cast<const std::byte*>(g.keys),
                          reinterpret_cast<const std::byte*>(g.values), start);
    }
  }
}

void finish(const Group& g) {
  const int head_dim = g.job.cache->head_dim;
  for (int query = 0; query < g.queries(); ++query) {
    const int row = g.row + query / g.heads, head = g.head + query % g.heads;
    const float factor = 1.0f / sum(load(g.sums + query * LANES));
    float* out = g.job.out + static_cast<std::size_t>(row) * g.job.out_stride + head * head_dim;
    by_vectors(static_cast<std::size_t>(head_dim),
               [&](auto where) { store(out, where, load(g.totals + query * g.width, where) * factor); });
  }
}

void attend_group(const Group& g) {
  begin(g);
  switch (g.job.cache->kind) {
    case Kind::f16: attend_blocks<Half>(g); break;
    case Kind::int8: attend_blocks<Byte>(g); break;
    case Kind::int4: attend_blocks<Nibble>(g); break;
  }
  finish(g);
}

void attend(const AttendJob& job) {
  const int heads = least(job.head_end - job.head_begin, QUERIES), rows = QUERIES / heads;
  for (int head = job.head_begin; head < job.head_end; head += heads)
    for (int row = job.row_begin; row < job.row_end; row += rows)
      attend_group(group_of(job, row, least(rows, job.row_end - row), head, least(heads, job.head_end - head)));
}

void ready(float* head, const float* norm_weight, const PrepareJob& job, int row) {
  if (norm_weight)
    norm(head, norm_weight, job.eps, static_cast<std::size_t>(job.cache->head_dim), head, false);
  const int half = job.rotated / 2;
  rotate(head, job.cosines + row * half, job.sines + row * half, half);
}

// Head by head, so that the rows' keys meet the same block in the cache.
void prepare(const PrepareJob& job) {
  const int head_dim = job.cache->head_dim, group = job.heads / job.cache->kv_heads;
  for (int kv_head = job.kv_begin; kv_head < job.kv_end; ++kv_head)
    for (int row = job.row_begin; row < job.row_end; ++row) {
      float* q = job.q + static_cast<std::size_t>(row) * job.q_stride + kv_head * group * head_dim;
      float* k = job.k + static_cast<std::size_t>(row) * job.k_stride + kv_head * head_dim;
      const float* v = job.v + static_cast<std::size_t>(row) * job.v_stride + kv_head * head_dim;
      for (int head = 0; head < group; ++head) ready(q + head * head_dim, job.q_norm, job, row);
      ready(k, job.k_norm, job, row);
      append(*job.cache, job.layer, job.slots[row], kv_head, job.positions[row], k, v);
    }
}

}  // namespace

}  // namespace fewbits::runtime::FEWBITS_TARGET
