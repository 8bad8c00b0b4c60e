// Ops on one row: a few instructions for each number, so what they cost is reading and writing it. Rows of any width;
// what is left behind the last whole vector goes through the same arithmetic, filled up with zeros.

namespace fewbits::runtime::FEWBITS_TARGET {

namespace {

// Four sums side by side, because one alone would wait for itself.
float sum_of_squares(const float* x, std::size_t width) {
  Vec sums[4] = {};
  std::size_t at = 0;
  for (; at + 4 * LANES <= width; at += 4 * LANES)
    for (int i = 0; i < 4; ++i) {
      const Vec v = load(x + at + static_cast<std::size_t>(i * LANES));
      sums[i] += v * v;
    }
  by_vectors(width - at, [&](auto where) {
    const Vec v = load(x + at, where);
    sums[0] += v * v;
  });
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

void norm(const float* x, const float* weight, float eps, std::size_t width, float* out, bool accumulate) {
  const float mean = sum_of_squares(x, width) / static_cast<float>(width);
  const float factor = 1.0f / __builtin_sqrtf(mean + eps);
  by_vectors(width, [&](auto where) {
    const Vec normed = load(x, where) * factor * load(weight, where);
    store(out, where, accumulate ? load(out, where) + normed : normed);
  });
}

// Number i turns with number i + half: (a, b) -> (a cos − b sin, b cos + a sin).
void rotate(float* x, const float* cosines, const float* sines, int half) {
  float* second = x + half;
  by_vectors(static_cast<std::size_t>(half), [&](auto where) {
    const Vec a = load(x, where), b = load(second, where), c = load(cosines, where), s = load(sines, where);
    store(x, where, a * c - b * s);
    store(second, where, b * c + a * s);
  });
}

FEWBITS_INLINE Vec silu(Vec x) { return x / (1.0f + exp(-x)); }

// x·(1 + tanh u) / 2 = x / (1 + e^−2u), which does not cancel where x is far below 0; u = √(2/π)·(x + 0.044715·x³).
FEWBITS_INLINE Vec gelu_tanh(Vec x) {
  const Vec u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp(-2.0f * u));
}

// x·Φ(x). Behind z = |x| / √2 the normal distribution has erfc(z) / 2 left, and erfc(z) = e^(−z²) times a polynomial of
// t = 1 / (1 + z / 2), fitted to z <= 10 with a relative error of 4e-7; e^(−z²) is 0 long before.
FEWBITS_INLINE Vec gelu(Vec x) {
  const Vec z = magnitude(x) * 0.7071067812f, t = 1.0f / (1.0f + 0.5f * z);
  const Vec scaled = ((((((0.09771815286f * t - 0.3924157985f) * t + 0.4437526765f) * t - 0.005898993365f) * t +
                        0.3013563306f) * t + 0.2725225229f) * t + 0.2830010407f) * t - 3.551582399e-5f;
  const Vec behind = 0.5f * scaled * exp(-z * z);
  return x * (x < 0.0f ? behind : 1.0f - behind);
}

template <class F>
FEWBITS_INLINE void gate_by(F activation, const float* gate, const float* up, std::size_t width, float* out) {
  by_vectors(width, [&](auto where) { store(out, where, activation(load(gate, where)) * load(up, where)); });
}

void gate(const float* gate, const float* up, std::size_t width, Activation activation, float* out) {
  switch (activation) {
    case Activation::silu: return gate_by([](Vec x) { return silu(x); }, gate, up, width, out);
    case Activation::gelu_tanh: return gate_by([](Vec x) { return gelu_tanh(x); }, gate, up, width, out);
    case Activation::gelu: return gate_by([](Vec x) { return gelu(x); }, gate, up, width, out);
  }
}

FEWBITS_INLINE Vec capped(Vec x, float cap) { return cap * tanh(x * (1.0f / cap)); }

void softcap(float* x, std::size_t width, float cap) {
  by_vectors(width, [&](auto where) { store(x, where, capped(load(x, where), cap)); });
}

void add(const float* x, float factor, std::size_t width, float* out) {
  by_vectors(width, [&](auto where) { store(out, where, load(out, where) + factor * load(x, where)); });
}

}  // namespace

}  // namespace fewbits::runtime::FEWBITS_TARGET
