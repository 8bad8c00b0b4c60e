#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fewbits::runtime {

namespace {

constexpr std::int64_t CHUNK_BYTES = 1 << 16;  // of weights that a thread takes at a time for a row or two
constexpr std::int64_t CHUNK_PANELS = 4;       // for more, so that the inputs of a slab are read from memory once for all
constexpr std::int64_t FEW_ROWS = 8;
constexpr std::int64_t LITTLE = 1 << 20;  // products of numbers: one thread makes them while another one is woken
constexpr int ANGLE_ROWS = 16;

// Numbers from one row of a buffer to the next: whole panels, each a line of the cache, and an odd number of them. A
// power of two would put the same column of all rows into one set of each cache, which holds a dozen of them.
int stride_of(int width) { return ((width + PANEL - 1) / PANEL | 1) * PANEL; }

}  // namespace

void Aligned::Free::operator()(void* p) const { std::free(p); }

void Aligned::grow(std::size_t bytes, bool huge_pages) {
  if (bytes <= bytes_) return;
  const std::size_t line = huge_pages ? 2 << 20 : 64, whole = (bytes + line - 1) / line * line;
  at_.reset();
  bytes_ = 0;
  at_.reset(std::aligned_alloc(line, whole));
  if (!at_) throw OutOfMemory(whole, "the rows of a step", "run fewer at a time, or close other programs");
  bytes_ = whole;
#if defined(__linux__)
  if (huge_pages) madvise(at_.get(), whole, MADV_HUGEPAGE);
#endif
}

Program::Program(int threads, std::string_view target, KeyValues& cache, Team team)
    : pool_(threads, team), kernels_(runtime::kernels(target)), cache_(cache) {
  scratch_.resize(static_cast<std::size_t>(pool_.threads()));
  const std::size_t attention = attend_scratch(cache.head_dim) * sizeof(float);
  for (auto& one : scratch_) one.reserve<char>(std::max(kernels_.scratch_size, attention));
}

// ---- composing ----

Buffer Program::buffer(int width) {
  buffers_.push_back(std::make_unique<Rows>(Rows{width, stride_of(width), false, false, false, {}}));
  return static_cast<Buffer>(buffers_.size()) - 1;
}

float* Program::row(Buffer buffer, int row) const {
  const Rows& rows = *buffers_.at(static_cast<std::size_t>(buffer));
  return rows.numbers.data<float>() + static_cast<std::size_t>(row) * static_cast<std::size_t>(rows.stride);
}

// Notes that a buffer is written from here on, with a row for each token or for each wanted one; says which.
bool Program::write(Buffer out, bool selected) {
  Rows& rows = *buffers_.at(static_cast<std::size_t>(out));
  rows.selected = selected;
  (selected ? rows.of_wanted : rows.of_tokens) = true;
  return selected;
}

// Small work, row by row. It waits for what comes behind it: more such work on the same rows, or a product that reads
// them, is done by whoever did it, without everybody meeting in between.
void Program::each_row(bool selected, std::function<void(int row)> work) {
  if (selected != waiting_selected_) flush();
  waiting_selected_ = selected;
  waiting_.push_back(std::move(work));
}

std::vector<std::function<void(int row)>> Program::take_waiting(bool selected) {
  if (selected != waiting_selected_) flush();
  return std::exchange(waiting_, {});
}

// Makes a phase of its own of the work that waits.
void Program::flush() {
  if (waiting_.empty()) return;
  phases_.push_back({[this, selected = waiting_selected_] { return static_cast<std::size_t>(count(selected)); },
                     [works = std::exchange(waiting_, {})](std::size_t row, int) {
                       for (const auto& work : works) work(static_cast<int>(row));
                     }});
}

void Program::embed(const Weight& table, Buffer out, float scale) {
  vocabulary_ = table.rows;
  write(out, false);
  flush();
  phases_.push_back({[this] { return static_cast<std::size_t>(step_.rows); },
                     [this, table, out, scale](std::size_t r, int thread) {
                       const int at = static_cast<int>(r);
                       kernels_.embed(table, step_.tokens[at], scale, row(out, at), scratch(thread));
                     }});
}

void Program::norm(Buffer x, const float* weight, float eps, Buffer out, bool accumulate) {
  const auto width = static_cast<std::size_t>(buffers_.at(x)->width);
  each_row(write(out, buffers_.at(x)->selected), [=, this](int r) { kernels_.ops->norm(row(x, r), weight, eps, width, row(out, r), accumulate); });
}

void Program::gate(Buffer gate, Buffer up, Buffer out, Activation activation) {
  const auto width = static_cast<std::size_t>(buffers_.at(out)->width);
  each_row(write(out, buffers_.at(up)->selected), [=, this](int r) { kernels_.ops->gate(row(gate, r), row(up, r), width, activation, row(out, r)); });
}

void Program::add(Buffer x, Buffer out, Buffer gate) {
  const auto width = static_cast<std::size_t>(buffers_.at(out)->width);
  each_row(write(out, buffers_.at(x)->selected), [=, this](int r) {
    const float factor = gate < 0 ? 1.0f : 1.0f / (1.0f + std::exp(-*row(gate, r)));
    kernels_.ops->add(row(x, r), factor, width, row(out, r));
  });
}

void Program::softcap(Buffer x, float cap) {
  const auto width = static_cast<std::size_t>(buffers_.at(x)->width);
  each_row(buffers_.at(x)->selected, [=, this](int r) { kernels_.ops->softcap(row(x, r), width, cap); });
}

void Program::select(Buffer x, Buffer out) {
  flush();  // it reads other rows than it writes
  const auto bytes = static_cast<std::size_t>(buffers_.at(x)->width) * sizeof(float);
  each_row(write(out, true), [=, this](int r) { std::memcpy(row(out, r), row(x, step_.wanted[r]), bytes); });
}

// ---- products ----

Inputs Program::form(const Weight& w) const {
  Inputs in;
  in.padded = w.padded();
  if (!w.bits) return in;
  in.segment = w.segment();
  in.segments = (in.padded + in.segment - 1) / in.segment;
  in.groups = (in.padded + LONGEST - 1) / LONGEST;
  in.zero = w.zero - (kernels_.shifted && (w.bits == 8 || w.table) ? 128 : 0);
  return in;
}

void Program::prepare(Inputs& in, int set, std::int64_t rows) {
  while (static_cast<int>(sets_.size()) <= set) sets_.push_back(std::make_unique<Packed>());
  Packed& packed = *sets_[static_cast<std::size_t>(set)];
  in.rows = rows;
  in.height = height(rows);
  in.codes = packed.codes.reserve<char>(static_cast<std::size_t>(rows * in.padded * (in.segment ? 1 : 4)));
  in.scale = packed.scale.reserve<float>(static_cast<std::size_t>(rows * in.groups));
  in.start = packed.start.reserve<std::int32_t>(static_cast<std::size_t>(rows * in.segments));
  in.total = packed.total.reserve<float>(static_cast<std::size_t>(rows * in.segments));
}

std::int64_t Program::panels_at_a_time(const Weight& w, std::int64_t rows) const {
  if (rows > FEW_ROWS) return CHUNK_PANELS;
  return std::max<std::int64_t>(CHUNK_PANELS, CHUNK_BYTES / std::max<std::int64_t>(1, w.panel_bytes()) & ~1);
}

namespace {

bool same(const Inputs& a, const Inputs& b) {
  return a.padded == b.padded && a.segment == b.segment && a.zero == b.zero;
}

// Chunks of several matrices in a row: which matrix, and which of its panels.
struct Share {
  std::size_t weight;
  std::int64_t begin, end;
};

}  // namespace

void Program::linear(LinearOp op) {
  struct State {
    LinearOp op;
    std::vector<Inputs> forms;
    std::vector<std::size_t> form_of;
    std::vector<Share> shares;
    bool selected;
  };
  const bool selected = buffers_.at(op.x)->selected;
  for (Buffer out : op.outs) write(out, selected);
  const auto state = std::make_shared<State>(State{std::move(op), {}, {}, {}, selected});
  for (const Weight& w : state->op.weights) {
    const Inputs wanted = form(w);
    const auto found = std::find_if(state->forms.begin(), state->forms.end(), [&](auto& f) { return same(f, wanted); });
    state->form_of.push_back(static_cast<std::size_t>(found - state->forms.begin()));
    if (found == state->forms.end()) state->forms.push_back(wanted);
  }
  phases_.push_back({[this, state] {
                       const int rows = count(state->selected);
                       for (std::size_t i = 0; i < state->forms.size(); ++i) prepare(state->forms[i], static_cast<int>(i), rows);
                       return static_cast<std::size_t>(tiles(rows));
                     },
                     [this, state, works = take_waiting(selected)](std::size_t tile, int) {
                       const int rows = count(state->selected), high = static_cast<int>(height(rows));
                       const int begin = static_cast<int>(tile) * high, end = std::min(begin + high, rows);
                       for (int r = begin; r < end; ++r)
                         for (const auto& work : works) work(r);
                       const Rows& x = *buffers_.at(state->op.x);
                       for (const Inputs& in : state->forms)
                         kernels_.pack(in, x.numbers.data<float>(), x.width, x.stride, static_cast<std::int64_t>(tile));
                     }});
  phases_.push_back({[this, state] {
                       state->shares.clear();
                       const int rows = count(state->selected);
                       for (std::size_t i = 0; rows && i < state->op.weights.size(); ++i) {
                         const Weight& w = state->op.weights[i];
                         const std::int64_t step = panels_at_a_time(w, rows);
                         for (std::int64_t at = 0; at < w.panels(); at += step)
                           state->shares.push_back({i, at, std::min(at + step, w.panels())});
                       }
                       return state->shares.size();
                     },
                     [this, state](std::size_t chunk, int thread) {
                       const auto [i, begin, end] = state->shares[chunk];
                       const Buffer out = state->op.outs[i];
                       kernels_.multiply(state->op.weights[i], state->forms[state->form_of[i]], begin, end, row(out, 0),
                                         buffers_.at(out)->stride, state->op.biases[i], state->op.accumulate,
                                         scratch(thread));
                     }});
}

void Program::multiply(const Weight& w, int rows, const float* x, const float* bias, float* out) {
  if (rows == 0) return;
  Inputs in = form(w);
  prepare(in, 0, rows);
  const std::int64_t stride = stride_of(static_cast<int>(w.rows)), step = panels_at_a_time(w, rows);
  float* panels = product_.reserve<float>(static_cast<std::size_t>(rows * stride));
  pool_.run({{[&] { return static_cast<std::size_t>(tiles(rows)); },
              [&](std::size_t tile, int) { kernels_.pack(in, x, w.columns, w.columns, static_cast<std::int64_t>(tile)); }},
             {[&] { return static_cast<std::size_t>((w.panels() + step - 1) / step); },
              [&](std::size_t chunk, int thread) {
                const std::int64_t begin = static_cast<std::int64_t>(chunk) * step, end = std::min(begin + step, w.panels());
                kernels_.multiply(w, in, begin, end, panels, stride, bias, false, scratch(thread));
                const std::int64_t first = begin * PANEL, count = std::min(end * PANEL, w.rows) - first;
                for (std::int64_t r = 0; r < rows; ++r)
                  std::memcpy(out + r * w.rows + first, panels + r * stride + first, static_cast<std::size_t>(count) * sizeof(float));
              }}},
            rows * w.rows * w.columns <= LITTLE);
}

void Program::look_up(const Weight& w, int count, const std::int64_t* which, float* out) {
  for (int r = 0; r < count; ++r)
    if (which[r] < 0 || which[r] >= w.rows)
      throw std::invalid_argument("row " + std::to_string(which[r]) + " is not one of 0 … " + std::to_string(w.rows - 1));
  pool_.run({{[=] { return static_cast<std::size_t>(count); }, [&](std::size_t r, int thread) {
                kernels_.embed(w, which[r], 1.0f, out + static_cast<std::int64_t>(r) * w.columns, scratch(thread));
              }}});
}

// ---- attention ----

std::size_t Program::table(const AttendOp& op) {
  for (std::size_t i = 0; i < angles_.size(); ++i)
    if (angles_[i]->frequencies == op.frequencies && angles_[i]->factor == op.factor) return i;
  angles_.push_back(std::make_unique<Angles>(Angles{op.frequencies, op.factor, {}, {}}));
  angles(angles_.size() - 1);
  return angles_.size() - 1;
}

// Cosines and sines of the rows' positions, which all layers share.
void Program::angles(std::size_t table) {
  phases_.push_back({[this, table] {
                       Angles& a = *angles_[table];
                       const std::size_t numbers = static_cast<std::size_t>(step_.rows) * a.frequencies.size();
                       a.cosines.reserve<float>(numbers);
                       a.sines.reserve<float>(numbers);
                       return static_cast<std::size_t>((step_.rows + ANGLE_ROWS - 1) / ANGLE_ROWS);
                     },
                     [this, table](std::size_t chunk, int) {
                       const Angles& a = *angles_[table];
                       const int begin = static_cast<int>(chunk) * ANGLE_ROWS, half = static_cast<int>(a.frequencies.size());
                       for (int r = begin; r < std::min(begin + ANGLE_ROWS, step_.rows); ++r)
                         runtime::angles(a.frequencies.data(), half, a.factor, step_.positions[r],
                                         a.cosines.data<float>() + r * half, a.sines.data<float>() + r * half);
                     }});
}

void Program::attend(AttendOp op) {
  flush();
  const std::size_t table = this->table(op);
  write(op.out, false);
  const auto shared = std::make_shared<Attention>(Attention{std::move(op), table, 1, {}});
  phases_.push_back({[this, shared] { return alone(*shared) ? 0 : static_cast<std::size_t>(shared->op.kv_heads); },
                     [this, shared](std::size_t head, int) { store_keys(*shared, static_cast<int>(head)); }});
  phases_.push_back({[this, shared] {
                       cut(*shared);
                       const int heads = shared->op.kv_heads;
                       if (alone(*shared)) return static_cast<std::size_t>(heads);
                       return shared->parts.size() * static_cast<std::size_t>(heads * shared->splits);
                     },
                     [this, shared](std::size_t chunk, int thread) {
                       const auto heads = static_cast<std::size_t>(shared->op.kv_heads);
                       const auto splits = static_cast<std::size_t>(shared->splits);
                       if (!alone(*shared))
                         return attend_part(*shared, shared->parts[chunk / splits / heads], static_cast<int>(chunk / splits % heads),
                                            static_cast<int>(chunk % splits), thread);
                       store_keys(*shared, static_cast<int>(chunk));
                       for (const Part& part : shared->parts) attend_part(*shared, part, static_cast<int>(chunk), 0, thread);
                     }});
}

// Whether one thread does all for a head of keys and values: few rows are not worth meeting in between.
bool Program::alone(const Attention& a) const { return step_.rows <= FEW_ROWS && a.op.kv_heads >= pool_.threads(); }

// Consecutive rows of one sequence, as many as attention takes together. Heads of a group read the same keys, so they
// stay together as long as there is work for all threads.
void Program::cut(Attention& a) const {
  const int group = a.op.heads / a.op.kv_heads, most = std::max(1, QUERIES / group);
  a.parts.clear();
  for (int r = 0; r < step_.rows;) {
    int end = r + 1;
    while (end < step_.rows && end - r < most && step_.slots[end] == step_.slots[r]) ++end;
    a.parts.push_back({r, end});
    r = end;
  }
  const int chunks = static_cast<int>(a.parts.size()) * a.op.kv_heads;
  a.splits = !alone(a) && chunks < pool_.threads() ? std::min(group, pool_.threads()) : 1;
}

void Program::store_keys(const Attention& a, int head) {
  const AttendOp& o = a.op;
  const Angles& angles = *angles_[a.table];
  const auto stride = [this](Buffer b) { return static_cast<std::size_t>(buffers_.at(b)->stride); };
  kernels_.ops->prepare({row(o.q, 0), row(o.k, 0), row(o.v, 0), stride(o.q), stride(o.k), stride(o.v),
                         angles.cosines.data<float>(), angles.sines.data<float>(),
                         2 * static_cast<int>(angles.frequencies.size()), o.q_norm, o.k_norm, o.eps, o.heads, &cache_,
                         o.layer, step_.slots, step_.positions, 0, step_.rows, head, head + 1});
}

void Program::attend_part(const Attention& a, const Part& part, int kv_head, int split, int thread) {
  const AttendOp& o = a.op;
  const int group = o.heads / o.kv_heads, first = kv_head * group;
  const auto stride = [this](Buffer b) { return static_cast<std::size_t>(buffers_.at(b)->stride); };
  kernels_.ops->attend({row(o.q, 0), row(o.out, 0), stride(o.q), stride(o.out), &cache_, o.layer, step_.slots[part.begin],
                        kv_head, first + group * split / a.splits, first + group * (split + 1) / a.splits, part.begin,
                        part.end, step_.positions[part.begin], o.scale, o.softcap, o.window,
                        static_cast<float*>(scratch(thread))});
}

// ---- experts ----

// Which rows each expert is given. Entries (a row and one of its experts) lie by expert, rows of one in order.
struct Program::Routing {
  ExpertsOp op;
  int width, ffn;
  const Kernels* kernels;
  Inputs into, out_of;  // inputs of gate and up, and of down
  std::vector<int> first;  // of each expert's entries; one more at the end
  std::vector<int> rows;   // of each entry
  std::vector<float> shares;
  std::vector<int> entries;  // [rows][top_k]
  std::vector<Share> tiles, products;
  Aligned gathered, gates, ups, results;

  int stride(int columns) const { return stride_of(columns); }
  int entries_of(std::size_t expert) const { return first[expert + 1] - first[expert]; }

  void choose(const float* logits, int row, std::vector<std::pair<float, int>>& order) const {
    const auto experts = static_cast<int>(op.gate.size());
    order.clear();
    for (int e = 0; e < experts; ++e) order.emplace_back(logits[static_cast<std::size_t>(row) * stride(experts) + e], e);
    std::partial_sort(order.begin(), order.begin() + op.top_k, order.end(), [](auto& a, auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    float sum = 0;
    const std::size_t over = op.normalise ? static_cast<std::size_t>(op.top_k) : order.size();
    const float most = order[0].first;
    for (std::size_t i = 0; i < over; ++i) sum += std::exp(order[i].first - most);
    for (int i = 0; i < op.top_k; ++i) order[i].first = std::exp(order[i].first - most) / sum;
  }

  void route(const float* logits, int count) {
    const std::size_t experts = op.gate.size();
    std::vector<std::pair<float, int>> order;
    std::vector<std::pair<float, int>> chosen;
    for (int r = 0; r < count; ++r) {
      choose(logits, r, order);
      chosen.insert(chosen.end(), order.begin(), order.begin() + op.top_k);
    }
    first.assign(experts + 1, 0);
    for (const auto& [share, expert] : chosen) ++first[static_cast<std::size_t>(expert) + 1];
    for (std::size_t e = 0; e < experts; ++e) first[e + 1] += first[e];
    std::vector<int> next(first.begin(), first.end() - 1);
    rows.resize(chosen.size());
    shares.resize(chosen.size());
    entries.resize(chosen.size());
    for (std::size_t i = 0; i < chosen.size(); ++i) {
      const int entry = next[static_cast<std::size_t>(chosen[i].second)]++;
      rows[static_cast<std::size_t>(entry)] = static_cast<int>(i) / op.top_k;
      shares[static_cast<std::size_t>(entry)] = chosen[i].first;
      entries[i] = entry;
    }
  }

  // The inputs of one expert, which lie behind those of the experts before it.
  Inputs of(const Inputs& all, std::size_t expert) const {
    const std::int64_t before = first[expert];
    Inputs in = all;
    in.rows = entries_of(expert);
    in.height = kernels->height(in.rows);
    in.codes = static_cast<char*>(all.codes) + before * all.padded * (all.segment ? 1 : 4);
    in.scale += before * all.groups;
    in.start += before * all.segments;
    in.total += before * all.segments;
    return in;
  }

  template <typename Step>
  void cut(std::vector<Share>& into_parts, Step&& parts) const {
    into_parts.clear();
    for (std::size_t e = 0; e < op.gate.size(); ++e)
      if (entries_of(e)) parts(e);
  }
};

void Program::experts(ExpertsOp op) {
  flush();
  const auto r = std::make_shared<Routing>();
  r->width = buffers_.at(op.out)->width;
  r->ffn = static_cast<int>(op.gate.at(0).rows);
  r->kernels = &kernels_;
  r->into = form(op.gate.at(0));
  r->out_of = form(op.down.at(0));
  for (std::size_t e = 0; e < op.gate.size(); ++e)
    if (!same(form(op.gate[e]), r->into) || !same(form(op.up[e]), r->into) || !same(form(op.down[e]), r->out_of))
      throw std::invalid_argument("experts of one layer must read their inputs in one form");
  r->op = std::move(op);

  const auto by_tile = [this, r] {
    r->cut(r->tiles, [&](std::size_t e) {
      for (std::int64_t t = 0; t < tiles(r->entries_of(e)); ++t) r->tiles.push_back({e, t, t + 1});
    });
    return r->tiles.size();
  };
  const auto by_panels = [this, r](const std::vector<Weight>& weights, int times) {
    r->cut(r->products, [&](std::size_t e) {
      const std::int64_t step = panels_at_a_time(weights[e], r->entries_of(e));
      for (int i = 0; i < times; ++i)
        for (std::int64_t at = 0; at < weights[e].panels(); at += step)
          r->products.push_back({2 * e + static_cast<std::size_t>(i), at, std::min(at + step, weights[e].panels())});
    });
    return r->products.size();
  };
  const auto entry = [](const Aligned& numbers, int at, int stride) {
    return numbers.data<float>() + static_cast<std::size_t>(at) * static_cast<std::size_t>(stride);
  };

  phases_.push_back({[] { return std::size_t{1}; },
                     [this, r](std::size_t, int) {
                       r->route(row(r->op.router, 0), step_.rows);
                       const auto all = static_cast<std::size_t>(r->rows.size());
                       prepare(r->into, 0, static_cast<std::int64_t>(all));
                       prepare(r->out_of, 1, static_cast<std::int64_t>(all));
                       r->gathered.reserve<float>(all * r->stride(r->width));
                       r->gates.reserve<float>(all * r->stride(r->ffn));
                       r->ups.reserve<float>(all * r->stride(r->ffn));
                       r->results.reserve<float>(all * r->stride(r->width));
                     }});
  phases_.push_back({by_tile, [this, r, entry](std::size_t chunk, int) {
                       const auto [e, tile, _] = r->tiles[chunk];
                       const int high = static_cast<int>(height(r->entries_of(e)));
                       const int begin = r->first[e] + static_cast<int>(tile) * high;
                       const int end = std::min(begin + high, r->first[e + 1]), stride = r->stride(r->width);
                       for (int at = begin; at < end; ++at)
                         std::memcpy(entry(r->gathered, at, stride), row(r->op.x, r->rows[at]), sizeof(float) * r->width);
                       kernels_.pack(r->of(r->into, e), entry(r->gathered, r->first[e], stride), r->width, stride, tile);
                     }});
  phases_.push_back({[r, by_panels] { return by_panels(r->op.gate, 2); },
                     [this, r, entry](std::size_t chunk, int thread) {
                       const auto [which, begin, end] = r->products[chunk];
                       const std::size_t e = which / 2;
                       const int stride = r->stride(r->ffn);
                       kernels_.multiply((which % 2 ? r->op.up : r->op.gate)[e], r->of(r->into, e), begin, end,
                                         entry(which % 2 ? r->ups : r->gates, r->first[e], stride), stride, nullptr, false,
                                         scratch(thread));
                     }});
  phases_.push_back({by_tile, [this, r, entry](std::size_t chunk, int) {
                       const auto [e, tile, _] = r->tiles[chunk];
                       const int high = static_cast<int>(height(r->entries_of(e)));
                       const int begin = r->first[e] + static_cast<int>(tile) * high;
                       const int end = std::min(begin + high, r->first[e + 1]), stride = r->stride(r->ffn);
                       for (int at = begin; at < end; ++at) {
                         float* gate = entry(r->gates, at, stride);
                         kernels_.ops->gate(gate, entry(r->ups, at, stride), r->ffn, r->op.activation, gate);
                       }
                       kernels_.pack(r->of(r->out_of, e), entry(r->gates, r->first[e], stride), r->ffn, stride, tile);
                     }});
  phases_.push_back({[r, by_panels] { return by_panels(r->op.down, 1); },
                     [this, r, entry](std::size_t chunk, int thread) {
                       const auto [which, begin, end] = r->products[chunk];
                       const std::size_t e = which / 2;
                       const int stride = r->stride(r->width);
                       kernels_.multiply(r->op.down[e], r->of(r->out_of, e), begin, end,
                                         entry(r->results, r->first[e], stride), stride, nullptr, false, scratch(thread));
                     }});
  each_row(write(r->op.out, false), [this, r, entry](int at) {
    for (int i = 0; i < r->op.top_k; ++i) {
      const int found = r->entries[static_cast<std::size_t>(at * r->op.top_k + i)];
      kernels_.ops->add(entry(r->results, found, r->stride(r->width)), r->shares[found], r->width, row(r->op.out, at));
    }
  });
}

// ---- running ----

void Program::check(const Step& step) const {
  const auto refuse = [](const char* what, int found, std::int64_t below) {
    throw std::invalid_argument(std::string(what) + " " + std::to_string(found) + " is not one of 0 … " +
                                std::to_string(below - 1));
  };
  for (int r = 0; r < step.rows; ++r) {
    if (step.tokens[r] < 0 || step.tokens[r] >= vocabulary_) refuse("token", step.tokens[r], vocabulary_);
    if (step.slots[r] < 0 || step.slots[r] >= cache_.slots) refuse("slot", step.slots[r], cache_.slots);
    if (step.positions[r] < 0 || step.positions[r] >= cache_.length) refuse("position", step.positions[r], cache_.length);
    if (r && step.slots[r] == step.slots[r - 1] && step.positions[r] != step.positions[r - 1] + 1)
      throw std::invalid_argument("rows of one slot must be at consecutive positions");
  }
  for (int r = 0; r < step.wanted_rows; ++r)
    if (step.wanted[r] < 0 || step.wanted[r] >= step.rows) refuse("wanted row", step.wanted[r], step.rows);
}

void Program::make_room() {
  for (const auto& rows : buffers_)
    rows->numbers.reserve<float>(
        static_cast<std::size_t>(std::max(rows->of_tokens ? step_.rows : 0, rows->of_wanted ? step_.wanted_rows : 0)) *
        static_cast<std::size_t>(rows->stride));
}

void Program::run(const Step& step, Buffer logits, float* out) {
  flush();
  check(step);
  if (step.rows == 0) return;
  step_ = step;
  make_room();
  pool_.run(phases_);
  read(logits, step.wanted_rows, out);
}

void Program::read(Buffer buffer, int rows, float* out) const {
  const auto numbers = static_cast<std::size_t>(width(buffer));
  for (int r = 0; r < rows; ++r) std::memcpy(out + r * numbers, row(buffer, r), numbers * sizeof(float));
}

void Program::run_rows(int rows, Buffer x, const float* given, Buffer y, float* out) {
  flush();
  step_ = {};
  step_.rows = rows;
  write(x, false);
  make_room();
  const auto before = static_cast<std::size_t>(width(x)), after = static_cast<std::size_t>(width(y));
  for (int r = 0; r < rows; ++r) {
    std::memcpy(row(x, r), given + r * before, before * sizeof(float));
    std::memcpy(row(y, r), out + r * after, after * sizeof(float));
  }
  pool_.run(phases_);
  for (int r = 0; r < rows; ++r) std::memcpy(out + r * after, row(y, r), after * sizeof(float));
}

}  // namespace fewbits::runtime
