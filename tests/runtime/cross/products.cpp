// Products and rows of embeddings of each target against the generic target's, over all the formats there are.
//
// Where both fuse a multiplication and an addition, or neither does, they add the same numbers in the same order, and
// so have the same bits. Else each sum is rounded once or twice for every segment of columns.

#include "matrix.h"
#include "products.h"

#include <algorithm>
#include <cstring>
#include <vector>

using namespace fewbits::runtime;

namespace {

constexpr double EPS = 0x1p-24;
constexpr float LARGEST_X = 3.0f;

// What a target's kernels read of inputs, and the memory for it.
struct Packed {
  Packed(const Kernels& kernels, const Weight& w, const std::vector<float>& x, int rows) {
    in.rows = rows, in.height = kernels.height(rows), in.padded = w.padded();
    if (w.bits) {
      in.segment = w.segment();
      in.segments = (in.padded + in.segment - 1) / in.segment;
      in.groups = (in.padded + LONGEST - 1) / LONGEST;
      in.zero = w.zero - (kernels.shifted && (w.bits == 8 || w.table) ? 128 : 0);
    }
    codes.resize(static_cast<std::size_t>(rows * in.padded * (w.bits ? 1 : 4)));
    scale.resize(static_cast<std::size_t>(rows * in.groups));
    start.resize(static_cast<std::size_t>(rows * in.segments));
    total.resize(start.size());
    in.codes = codes.data(), in.scale = scale.data(), in.start = start.data(), in.total = total.data();
    for (int tile = 0; tile * in.height < rows; ++tile) kernels.pack(in, x.data(), w.columns, w.columns, tile);
  }

  Inputs in;
  std::vector<char> codes;
  std::vector<float> scale, total;
  std::vector<std::int32_t> start;
};

struct Scratch {
  explicit Scratch(const Kernels& kernels) : memory(kernels.scratch_size + 64) {}
  void* data() {
    return reinterpret_cast<void*>((reinterpret_cast<std::uintptr_t>(memory.data()) + 63) / 64 * 64);
  }
  std::vector<char> memory;
};

std::vector<float> random_numbers(std::size_t count, std::uint64_t seed) {
  Random random{seed};
  std::vector<float> all(count);
  for (auto& x : all) x = random() * LARGEST_X;
  return all;
}

// All rows, in two shares, and added to a bias and to what is there, where `adds`.
std::vector<float> product(const Kernels& kernels, const Weight& w, int rows, bool adds) {
  const std::int64_t stride = w.panels() * PANEL, middle = w.panels() / 2;
  const auto x = random_numbers(static_cast<std::size_t>(rows * w.columns), 1);
  const auto bias = random_numbers(static_cast<std::size_t>(w.rows), 2);
  auto out = random_numbers(static_cast<std::size_t>(rows * stride), 3);
  const Packed packed(kernels, w, x, rows);
  Scratch scratch(kernels);
  for (const auto& [begin, end] : {std::pair{std::int64_t{0}, middle}, {middle, w.panels()}})
    if (begin < end) kernels.multiply(w, packed.in, begin, end, out.data(), stride, adds ? bias.data() : nullptr, adds, scratch.data());
  std::vector<float> kept;
  for (int r = 0; r < rows; ++r) kept.insert(kept.end(), out.begin() + r * stride, out.begin() + r * stride + w.rows);
  return kept;
}

std::vector<float> embedded(const Kernels& kernels, const Weight& w, std::int64_t row) {
  std::vector<float> out(static_cast<std::size_t>(w.columns));
  Scratch scratch(kernels);
  kernels.embed(w, row, 1.25f, out.data(), scratch.data());
  return out;
}

class Comparison {
 public:
  Comparison(const Kernels& reference, const Kernels& kernels, bool same_sums, Verdict& verdict)
      : reference_(reference), kernels_(kernels), same_sums_(same_sums), verdict_(verdict) {}

  void matrix(const Matrix& m) {
    for (int rows : {1, 2, 3, 8, 13, 19})
      for (bool adds : {false, true}) {
        // Each side rounds a sum for every number of x, or for every segment twice, and once for 128 columns.
        const auto added = static_cast<double>(m.w.bits ? 3 * (m.w.padded() / m.w.segment() + 1) : m.w.columns);
        const double sum = static_cast<double>(m.w.columns) * LARGEST_X * m.largest() + 2 * LARGEST_X;
        compare("product", product(kernels_, m.w, rows, adds), product(reference_, m.w, rows, adds), 2 * (added + 4) * EPS * sum);
      }
    for (std::int64_t row : {std::int64_t{0}, m.w.rows / 2, m.w.rows - 1})
      compare("embedding", embedded(kernels_, m.w, row), embedded(reference_, m.w, row), 8 * EPS * m.largest());
  }

 private:
  void compare(const char* what, const std::vector<float>& found, const std::vector<float>& expected, double bound) {
    for (std::size_t i = 0; i < found.size(); ++i)
      verdict_.holds(same_sums_ ? std::memcmp(&found[i], &expected[i], 4) == 0 : std::fabs(found[i] - expected[i]) <= bound,
                     what, static_cast<double>(i), found[i], expected[i]);
  }

  const Kernels &reference_, &kernels_;
  bool same_sums_;
  Verdict& verdict_;
};

struct Shape {
  int rows, columns;
};
const Shape SHAPES[] = {{16, 32}, {33, 256}, {70, 1100}};  // whole tiles; a panel's tail; that of a slab, a block, a group

// Params in every kind, one combination after the other.
void set_params(Matrix& m, int which) {
  using Kind = Params::Kind;
  switch (which % 5) {
    case 0: return m.set(m.w.scale, Kind::numbers, Number::f32);
    case 1: return m.set(m.w.scale, Kind::numbers, Number::f16), m.set(m.w.offset, Kind::zeros);
    case 2: return m.set(m.w.scale, Kind::numbers, Number::bf16), m.set(m.w.offset, Kind::numbers, Number::f16);
    case 3: return m.set(m.w.scale, Kind::steps, Number::f16, 4), m.set(m.w.offset, Kind::steps, Number::f16, 4);
    default: return m.set(m.w.scale, Kind::steps, Number::f16, 8), m.set(m.w.offset, Kind::numbers, Number::bf16);
  }
}

void check_codes(Comparison& both) {
  int which = 0;
  for (const Shape& s : SHAPES)
    for (int bits = 1; bits <= 8; ++bits)
      for (std::int64_t group : {16, 32, 64, 128, 0})
        for (int i = 0; i < 2; ++i, ++which) {  // over all of it, each of the five many times
          const std::int64_t columns = (s.columns + BLOCK - 1) / BLOCK * BLOCK;
          Matrix m(s.rows, s.columns, bits, group ? group : columns, which % 3 ? 1 << (bits - 1) : 0);
          if (bits <= 4 && i) m.look_up();
          set_params(m, which);
          both.matrix(m);
        }
}

void check_numbers(Comparison& both) {
  for (const Shape& s : SHAPES)
    for (Number number : {Number::f32, Number::f16, Number::bf16})
      for (std::int64_t group : {0, 16, 128}) {
        Matrix m(s.rows, s.columns, 0, group, 0);
        m.in_numbers(number);
        if (group) m.set(m.w.scale, Params::Kind::numbers, group == 16 ? Number::f16 : Number::f32);
        both.matrix(m);
      }
}

}  // namespace

int check_products(const Kernels& reference, const Kernels& kernels, bool same_sums) {
  Verdict verdict{kernels.name};
  Comparison both(reference, kernels, same_sums, verdict);
  check_codes(both);
  check_numbers(both);
  return verdict.failures;
}
