// The ops beside the matrix products: what the executor calls, compiled once for each target (`ops_target.cpp`).
//
// A job is one thread's share of an op, in plain pointers; what lies behind them is float32. Rows of q, k, v and out
// may be parts of wider buffers: `*_stride` is the distance of two rows in numbers.

#pragma once

#include <cstddef>

#include "cache.h"

namespace fewbits::runtime {

enum class Activation { silu, gelu_tanh, gelu };

// Queries and keys of some rows made ready, keys and values stored: for kv heads [kv_begin, kv_end), and their queries.
// q and k are normed head by head where norms are given, and rotated, in place. Chunks that run at the same time should
// differ in kv heads or lie whole blocks of positions apart: the 64 positions of a block share cache lines.
struct PrepareJob {
  float* q;
  float* k;
  const float* v;
  std::size_t q_stride, k_stride, v_stride;
  const float* cosines;  // [rows][rotated / 2], from `angles`
  const float* sines;
  int rotated;          // leading numbers of a head that are rotated, halves against one another; even
  const float* q_norm;  // [head_dim], or null
  const float* k_norm;
  float eps;
  int heads;
  KeyValues* cache;
  int layer;
  const int* slots;  // of each row
  const int* positions;
  int row_begin, row_end;
  int kv_begin, kv_end;
};

// Attention of consecutive rows of one sequence, their keys and values stored already, for some of the query heads of
// one kv head. Rows times heads should be about `QUERIES` where there are as many.
struct AttendJob {
  const float* q;
  float* out;
  std::size_t q_stride, out_stride;
  const KeyValues* cache;
  int layer, slot, kv_head;
  int head_begin, head_end;
  int row_begin, row_end;
  int first_position;  // of row_begin
  float scale;
  float softcap;  // 0: none
  int window;     // positions that a row sees, its own included; 0: all
  float* scratch;  // `attend_scratch` numbers of this thread
};

// Queries (rows times heads) that attention takes through the cache together.
inline constexpr int QUERIES = 96;

// Numbers of scratch that attention needs.
std::size_t attend_scratch(int head_dim);

// Cosine and sine of position · frequency, times factor; the product is rounded to float32 as transformers does.
void angles(const float* frequencies, int count, float factor, int position, float* cosines, float* sines);

struct Ops {
  const char* target;
  // out = x / sqrt(mean x² + eps) · weight, or added to out; out may be x.
  void (*norm)(const float* x, const float* weight, float eps, std::size_t width, float* out, bool accumulate);
  // out = activation(gate) · up; out may be either.
  void (*gate)(const float* gate, const float* up, std::size_t width, Activation activation, float* out);
  // x = cap · tanh(x / cap)
  void (*softcap)(float* x, std::size_t width, float cap);
  // out += factor · x
  void (*add)(const float* x, float factor, std::size_t width, float* out);
  void (*prepare)(const PrepareJob& job);
  void (*attend)(const AttendJob& job);
};

}  // namespace fewbits::runtime
