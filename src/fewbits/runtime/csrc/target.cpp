// One target's kernels. Compiled several times, with FEWBITS_TARGET and the processor's flags set by CMake; everything
// here has internal linkage, so that no function with one target's instructions is linked in place of another's.

#include "kernels.h"
#include "multiply.inl"
#include "roofline.inl"

#define FEWBITS_TEXT(x) #x
#define FEWBITS_NAME(x) FEWBITS_TEXT(x)

namespace fewbits::runtime::FEWBITS_OPS {  // the target that has the other ops: the same, or one without dot products
extern const Ops ops;
}

namespace fewbits::runtime::FEWBITS_TARGET {
namespace {

void multiply_with(const Weight& w, const Inputs& in, std::int64_t begin, std::int64_t end, float* out,
                   std::int64_t stride, const float* bias, bool accumulate, void* scratch) {
  multiply(w, in, begin, end, out, stride, bias, accumulate, *static_cast<Scratch*>(scratch));
}

void embed_with(const Weight& w, std::int64_t row, float factor, float* out, void* scratch) {
  embed(w, row, factor, out, *static_cast<Scratch*>(scratch));
}

}  // namespace

extern const Kernels table;
const Kernels table{FEWBITS_NAME(FEWBITS_TARGET), TILE, STREAMED, PASSES, SHIFTED, sizeof(Scratch), pack,
                    multiply_with, embed_with, &FEWBITS_OPS::ops, integer_products, read_lines};

}  // namespace fewbits::runtime::FEWBITS_TARGET
