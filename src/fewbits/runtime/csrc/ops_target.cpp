// The kernels of one target. The build compiles this file once for each, with FEWBITS_TARGET for its name and the flags
// of its instructions; FEWBITS_PORTABLE leaves every intrinsic out, for comparison.

#include "ops.h"

#include "lanes.inl"
#include "rows.inl"
#include "stored.inl"
#include "attend.inl"

#define FEWBITS_TEXT_OF(name) #name
#define FEWBITS_TEXT(name) FEWBITS_TEXT_OF(name)

namespace fewbits::runtime::FEWBITS_TARGET {

extern const Ops ops;
const Ops ops{FEWBITS_TEXT(FEWBITS_TARGET), norm, gate, softcap, add, prepare, attend};

}  // namespace fewbits::runtime::FEWBITS_TARGET
