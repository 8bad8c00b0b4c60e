#include "kernels.h"

#include <stdexcept>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// What CMakeLists.txt compiles, the best first.
#if defined(__x86_64__)
#define FEWBITS_TARGETS(X) X(avx512vnni) X(avx512) X(avxvnni) X(avx2) X(generic)
#elif defined(__aarch64__)
#define FEWBITS_TARGETS(X) X(neondot) X(neon)
#else
#define FEWBITS_TARGETS(X) X(generic)
#endif

#define FEWBITS_DECLARE(target) \
  namespace fewbits::runtime::target { \
  extern const Kernels table; \
  }
FEWBITS_TARGETS(FEWBITS_DECLARE)

namespace fewbits::runtime {

namespace {

#if defined(__x86_64__)
bool has_avx_vnni() {  // gcc 12 has no name for it; if the system saves AVX's registers it saves these
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 4);
}
#endif

// Whether this processor has what a target was compiled for.
bool runs(std::string_view target) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (target == "avx512vnni") return avx512 && __builtin_cpu_supports("avx512vnni");
  if (target == "avx512") return avx512;
  if (target == "avxvnni") return avx2 && has_avx_vnni();
  if (target == "avx2") return avx2;
#elif defined(__aarch64__)
#if defined(__linux__)
  if (target == "neondot") return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  if (target == "neondot") return true;  // every one that macOS runs on
#endif
#endif
  return target == "neon" || target == "generic";
}

std::vector<const Kernels*> found() {
  std::vector<const Kernels*> all;
#define FEWBITS_ADD(target) \
  if (runs(#target)) all.push_back(&target::table);
  FEWBITS_TARGETS(FEWBITS_ADD)
  return all;
}

}  // namespace

std::span<const Kernels* const> targets() {
  static const std::vector<const Kernels*> all = found();
  return all;
}

const Kernels& kernels(std::string_view name) {
  for (const Kernels* one : targets())
    if (name.empty() || name == one->name) return *one;
  throw std::invalid_argument("kernels for '" + std::string(name) + "' are not compiled in, or not for this processor");
}

}  // namespace fewbits::runtime
