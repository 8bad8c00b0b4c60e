// A module of the ops alone.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "bind_ops.h"

namespace fewbits::runtime {

#if defined(__x86_64__)
namespace avx512 {
extern const Ops ops;
}
namespace avx2 {
extern const Ops ops;
}
#elif defined(__aarch64__)
namespace neon {
extern const Ops ops;
}
#endif
namespace generic {
extern const Ops ops;
}

namespace {

std::vector<const Ops*> targets() {
  std::vector<const Ops*> found;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    found.push_back(&avx512::ops);
  if (avx2) found.push_back(&avx2::ops);
#elif defined(__aarch64__)
  found.push_back(&neon::ops);
#endif
  found.push_back(&generic::ops);
  return found;
}

const Ops& find(std::string_view name) {
  for (const Ops* ops : targets())
    if (name == ops->target) return *ops;
  throw std::invalid_argument("this processor has no target " + std::string(name));
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Ops* ops : targets()) all.emplace_back(ops->target);
  return all;
}

}  // namespace

}  // namespace fewbits::runtime

NB_MODULE(_runtime_ops, m) {
  m.def("targets", &fewbits::runtime::names);
  fewbits::runtime::bind_ops(m, fewbits::runtime::find);
}
