// Functions inside the kernels against long double, compiled for each target like the kernels themselves.

#include "check.h"
#include "ops.h"

#include "lanes.inl"
#include "stored.inl"

#include <cstring>

namespace fewbits::runtime::FEWBITS_TARGET {

namespace {

constexpr std::uint32_t STRIDE = 4999;  // odd, so that all last bits come by

float number(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// By how many units in the last place `found` is off.
double units(float found, long double exact) {
  const int exponent = std::ilogb(static_cast<double>(exact));
  return static_cast<double>(std::fabs(found - exact) / std::ldexp(1.0L, (exponent < -126 ? -126 : exponent) - 23));
}

// Every STRIDE-th float32 between two of the same sign.
template <class F, class G>
double worst(float from, float to, F function, G exact, Verdict& verdict, double bound,
             const char* name) {
  std::uint32_t first, last;
  std::memcpy(&first, &from, 4);
  std::memcpy(&last, &to, 4);
  double most_units = 0;
  for (std::uint32_t bits = first; bits <= last; bits += STRIDE) {
    const float x = number(bits), found = function(all(x))[0];
    const double off = units(found, exact(static_cast<long double>(x)));
    verdict.holds(off <= bound, name, x, found, static_cast<double>(exact(x)));
    most_units = off > most_units ? off : most_units;
  }
  return most_units;
}

void check_exp(Verdict& verdict) {
  const auto vector = [](Vec x) { return exp(x); };
  const auto exact = [](long double x) { return std::exp(x); };
  const double up = worst(1e-30f, 88.72f, vector, exact, verdict, 1.5, "exp");
  const double down = worst(-1e-30f, -86.59f, vector, exact, verdict, 1.5, "exp");
  const double cheap = worst(-1e-30f, -86.99f, [](Vec x) { return exp_of_negative(x); }, exact, verdict, 1.5,
                             "exp_of_negative");
  std::printf("%-8s exp %.2f and %.2f, exp_of_negative %.2f units", verdict.target, up, down, cheap);
  for (float x : {88.73f, 1000.0f, INFINITY})
    verdict.holds(exp(all(x))[0] == INFINITY, "exp", x, exp(all(x))[0], INFINITY);
  for (float x : {-86.7f, -1000.0f, -INFINITY}) verdict.holds(exp(all(x))[0] == 0, "exp", x, exp(all(x))[0], 0);
  verdict.holds(std::isnan(exp(all(NAN))[0]), "exp", NAN, exp(all(NAN))[0], NAN);
  verdict.holds(std::isnan(exp_of_negative(all(NAN))[0]), "exp_of_negative", NAN, exp_of_negative(all(NAN))[0], NAN);
}

void check_tanh(Verdict& verdict) {
  const auto vector = [](Vec x) { return tanh(x); };
  const auto exact = [](long double x) { return std::tanh(x); };
  const double up = worst(1e-30f, 1e5f, vector, exact, verdict, 3, "tanh");
  const double down = worst(-1e-30f, -1e5f, vector, exact, verdict, 3, "tanh");
  std::printf(", tanh %.2f and %.2f\n", up, down);
  verdict.holds(tanh(all(INFINITY))[0] == 1, "tanh", INFINITY, tanh(all(INFINITY))[0], 1);
  verdict.holds(std::isnan(tanh(all(NAN))[0]), "tanh", NAN, tanh(all(NAN))[0], NAN);
}

// The value of half bits by their definition.
double meaning(std::uint32_t half) {
  const int exponent = static_cast<int>(half >> 10 & 31);
  const double fraction = half & 1023, sign = half >> 15 ? -1 : 1;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}

void check_halves(Verdict& verdict) {
  for (std::uint32_t half = 0; half < 65536; ++half) {
    std::uint16_t halves[LANES];
    for (auto& h : halves) h = static_cast<std::uint16_t>(half);
    const double exact = meaning(half);
    for (float found : {Half::read(reinterpret_cast<const std::byte*>(halves))[LANES - 1],
                        wide_halves(reinterpret_cast<const std::byte*>(halves))[LANES - 1]})
      verdict.holds(found == exact || (std::isnan(found) && std::isnan(exact)), "FP16 read", half, found, exact);
  }
}

// The nearest half, the even one of two, found by asking its neighbours.
bool is_nearest(float x, std::uint32_t half) {
  const double found = meaning(half);
  if (std::isnan(x)) return std::isnan(found);
  if (std::isinf(found)) return std::fabs(x) >= 65520 && std::signbit(x) == std::signbit(found);
  for (std::uint32_t other : {half - 1, half + 1}) {
    const double value = meaning(other & 0xffff);
    if (std::isnan(value) || half >> 15 != other >> 15) continue;  // no neighbour of that sign
    const double there = std::isinf(value) ? std::copysign(65536, x) : value;
    const double here_off = std::fabs(x - found), there_off = std::fabs(x - there);
    if (there_off < here_off || (there_off == here_off && half % 2 != 0)) return false;
  }
  return std::signbit(x) == (half >> 15 != 0);
}

void check_halving(Verdict& verdict) {
  for (std::uint64_t bits = 0; bits < 1ull << 32; bits += 2 * STRIDE + 1) {
    float x[19];  // a whole vector of any target, and a rest
    for (auto& one : x) one = number(static_cast<std::uint32_t>(bits));
    std::uint16_t halves[19];
    halve(x, 19, halves);
    for (std::uint16_t half : {halves[0], halves[18], narrowed(x[0])})
      verdict.holds(is_nearest(x[0], half), "FP16 written", x[0], meaning(half), x[0]);
  }
}

}  // namespace

extern const Ops ops;
extern const bool fuses;
#if defined(__FMA__) || defined(__aarch64__)
const bool fuses = true;
#else
const bool fuses = false;
#endif

int check_functions() {
  Verdict verdict{ops.target};
  check_exp(verdict);
  check_tanh(verdict);
  check_halves(verdict);
  check_halving(verdict);
  return verdict.failures;
}

}  // namespace fewbits::runtime::FEWBITS_TARGET
