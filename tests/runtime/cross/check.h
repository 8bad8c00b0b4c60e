// What the checks have in common. The program is built once for each processor and once with sanitizers; see the
// Makefile beside it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>

// Counts what does not hold, and says where the first few were.
struct Verdict {
  const char* target;
  int failures = 0;

  void holds(bool good, const char* what, double at, double found, double expected) {
    if (good || ++failures > 10) return;
    std::printf("%s: %s at %.9g: %.9g instead of %.9g\n", target, what, at, found, expected);
  }
};

// Reproducible numbers in [-1, 1).
struct Random {
  std::uint64_t state;
  float operator()() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(static_cast<std::int32_t>(state >> 32)) * 0x1p-31f;
  }
};
