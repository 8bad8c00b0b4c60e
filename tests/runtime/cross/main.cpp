// Each target's kernels against the generic target's, over shapes with and without tails; every buffer has exactly the
// numbers it needs, so that sanitizers see the first one read or written too many.
//
// TARGETS is a list of the targets linked in, as `X(name) X(name)`, the generic one first.

#include "check.h"
#include "ops.h"
#include "products.h"

#include <vector>

#define X(name) \
  namespace fewbits::runtime::name { \
  extern const Ops ops; \
  extern const Kernels table; \
  extern const bool fuses; \
  int check_functions(); \
  }
TARGETS
#undef X

using namespace fewbits::runtime;

namespace {

constexpr double EPS = 0x1p-24;

std::vector<float> numbers(std::size_t count, float spread, std::uint64_t seed) {
  Random random{seed};
  std::vector<float> all(count);
  for (auto& x : all) x = random() * spread;
  return all;
}

void compare(Verdict& verdict, const char* what, const std::vector<float>& found, const std::vector<float>& expected,
             double bound, double relative) {
  for (std::size_t i = 0; i < found.size(); ++i)
    verdict.holds(std::fabs(found[i] - expected[i]) <= bound + relative * std::fabs(expected[i]), what,
                  static_cast<double>(i), found[i], expected[i]);
}

void check_rows(const Ops& generic, const Ops& ops, Verdict& verdict) {
  for (std::size_t width : {1, 2, 3, 15, 16, 17, 63, 64, 100, 257, 1024}) {
    const auto x = numbers(width, 8, width), y = numbers(width, 2, width + 1);
    const auto same = [&](const char* what, double bound, double relative, auto call) {
      auto found = y, expected = y;
      call(ops, found.data());
      call(generic, expected.data());
      compare(verdict, what, found, expected, bound, relative);
    };
    // Both err by a few roundings of each number (norm: of the sum of squares); sums by those of what is added.
    const double width_bound = (static_cast<double>(width) + 16) * EPS;
    same("norm", 0, width_bound, [&](const Ops& o, float* out) {
      o.norm(x.data(), y.data(), 1e-5f, width, out, false);
    });
    same("norm added", 64 * EPS, width_bound, [&](const Ops& o, float* out) {
      o.norm(x.data(), x.data(), 1e-5f, width, out, true);
    });
    for (auto activation : {Activation::silu, Activation::gelu_tanh, Activation::gelu})
      same("gate", 16 * EPS, 32 * EPS, [&](const Ops& o, float* out) {
        o.gate(x.data(), y.data(), width, activation, out);
      });
    same("softcap", 0, 16 * EPS, [&](const Ops& o, float* out) { o.softcap(out, width, 3); });
    same("add", 32 * EPS, 0, [&](const Ops& o, float* out) { o.add(x.data(), 1.3f, width, out); });
  }
}

struct Shape {
  Kind kind;
  int head_dim, group, length, rows, window;
  float softcap;
};

constexpr int KV_HEADS = 2;

// The last `rows` positions of a sequence of `length`, as one target does it from the first op to the last.
struct Attention {
  std::vector<float> q, k, out;
};

Attention attention(const Ops& ops, const Shape& s, bool turned) {
  const auto length = static_cast<std::size_t>(s.length), head_dim = static_cast<std::size_t>(s.head_dim);
  const std::size_t kv_width = KV_HEADS * head_dim, q_width = kv_width * static_cast<std::size_t>(s.group);
  Attention a{numbers(length * q_width, 2, 1), numbers(length * kv_width, 2, 2), numbers(length * q_width, 0, 0)};
  const auto v = numbers(length * kv_width, 2, 3);
  const auto norm = numbers(head_dim, 2, 4), frequencies = numbers(head_dim / 2, 1, 5);
  std::vector<float> cosines(length * head_dim / 2, 1.0f), sines(length * head_dim / 2, 0.0f);
  std::vector<int> slots(length, 1), positions(length);
  for (int i = 0; i < s.length; ++i) {
    positions[static_cast<std::size_t>(i)] = i;
    const auto at = static_cast<std::size_t>(i) * head_dim / 2;
    if (turned) angles(frequencies.data(), s.head_dim / 2, 1.0f, i, cosines.data() + at, sines.data() + at);
  }
  KeyValues cache(s.kind, 2, 2, s.length, KV_HEADS, s.head_dim);
  ops.prepare({a.q.data(), a.k.data(), v.data(), q_width, kv_width, kv_width, cosines.data(), sines.data(), s.head_dim,
               turned ? norm.data() : nullptr, turned ? norm.data() : nullptr, 1e-5f, KV_HEADS * s.group, &cache, 1,
               slots.data(), positions.data(), 0, s.length, 0, KV_HEADS});
  std::vector<float> scratch(attend_scratch(s.head_dim));
  const int first = s.length - s.rows;
  for (int head = 0; head < KV_HEADS; ++head)
    ops.attend({a.q.data(), a.out.data(), q_width, q_width, &cache, 1, 1, head, head * s.group, (head + 1) * s.group,
                first, s.length, first, 1.0f / std::sqrt(static_cast<float>(s.head_dim)), s.softcap, s.window,
                scratch.data()});
  return a;
}

void check_attention(const Ops& generic, const Ops& ops, Verdict& verdict, const Shape& s) {
  const Attention found = attention(ops, s, false), expected = attention(generic, s, false);
  // A score is a sum of head_dim products of at most 4, over √head_dim; twice that far apart, and as much again for the
  // sum that is divided by. Values are at most 2; `length` of them are summed.
  const double score = (s.head_dim + 4) * EPS * 4 * std::sqrt(s.head_dim) + 8 * EPS * s.softcap;
  compare(verdict, "attend", found.out, expected.out, 2 * (4 * score + (2 * s.length + 16) * EPS), 0);
  const Attention turned = attention(ops, s, true), reference = attention(generic, s, true);
  compare(verdict, "prepared q", turned.q, reference.q, 8 * (s.head_dim + 16) * EPS, 0);  // of numbers below 4
  compare(verdict, "prepared k", turned.k, reference.k, 8 * (s.head_dim + 16) * EPS, 0);
}

const Shape SHAPES[] = {
    {Kind::f16, 64, 4, 1, 1, 0, 0},       {Kind::f16, 64, 4, 130, 1, 0, 0},    {Kind::f16, 80, 3, 100, 100, 0, 0},
    {Kind::f16, 128, 1, 200, 70, 65, 0},  {Kind::f16, 8, 7, 65, 65, 0, 5},     {Kind::int8, 64, 4, 130, 1, 0, 0},
    {Kind::int8, 72, 2, 90, 90, 31, 0},   {Kind::int8, 256, 8, 70, 12, 0, 9},  {Kind::int4, 64, 4, 130, 1, 0, 0},
    {Kind::int4, 72, 2, 90, 90, 31, 0},   {Kind::int4, 120, 5, 128, 64, 0, 0}, {Kind::int4, 256, 100, 66, 2, 0, 0},
};

// A target's kernels, and whether they multiply and add in one, rounding once.
struct Target {
  const Ops& ops;
  const Kernels& kernels;
  bool fuses;
};

int check(const Target& generic_target, const Target& target, int (*check_functions)()) {
  const Ops &generic = generic_target.ops, &ops = target.ops;
  Verdict verdict{ops.target};
  check_rows(generic, ops, verdict);
  for (const Shape& shape : SHAPES) check_attention(generic, ops, verdict, shape);
  verdict.failures += check_products(generic_target.kernels, target.kernels, generic_target.fuses == target.fuses);
  verdict.failures += check_program(target.kernels.name);
  const int failures = verdict.failures + check_functions();
  std::printf("%-8s %s\n", ops.target, failures ? "FAILED" : "agrees with the generic target");
  return failures;
}

}  // namespace

int main() {
  int failures = check_pool();
#define X(name) \
  failures += check({generic::ops, generic::table, generic::fuses}, {name::ops, name::table, name::fuses}, name::check_functions);
  TARGETS
#undef X
  return failures != 0;
}
