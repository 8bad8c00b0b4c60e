#pragma once

#include <nanobind/nanobind.h>

#include <functional>
#include <string_view>

#include "ops.h"

namespace fewbits::runtime {

// Puts the ops and the cache into a module. `find`: the ops of a target, or std::invalid_argument.
void bind_ops(nanobind::module_& m, std::function<const Ops&(std::string_view)> find);

}  // namespace fewbits::runtime
