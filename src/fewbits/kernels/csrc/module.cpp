// What Python sees. Shapes and values are checked by the Python side of each op; here only that they fit each other.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "decode.h"
#include "gram.h"
#include "parallel.h"
#include "round_columns.h"

namespace nb = nanobind;

using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bits = nb::ndarray<const std::uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
template <typename Number>
using Into = nb::ndarray<Number, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Output = Into<float>;

namespace {

void require(bool fits, const char* what) {
  if (!fits) throw std::invalid_argument(what);
}

void add_gram(Bits x, Output total, int threads) {
  require(total.shape(0) == x.shape(1) && total.shape(1) == x.shape(1), "total must be [columns, columns]");
  require(fewbits::multiplies_bf16(), "this processor does not multiply BF16");
  nb::gil_scoped_release released;
  fewbits::add_gram(x.data(), x.shape(0), x.shape(1), total.data(), threads);
}

void round_columns(Matrix targets, Matrix feedback, Matrix scale, Matrix offset, Vector levels, Vector midpoints,
                   Matrix base, Output values, int threads) {
  const std::size_t columns = targets.shape(0), rows = targets.shape(1), params = scale.shape(0);
  require(feedback.shape(0) == columns && feedback.shape(1) == columns, "feedback must be [columns, columns]");
  require(params == 1 || params == columns, "scale must be [1, rows] or [columns, rows]");
  require(scale.shape(1) == rows && offset.shape(0) == params && offset.shape(1) == rows, "scale and offset differ");
  require(base.shape(0) == columns && base.shape(1) == rows, "base must be [columns, rows]");
  require(values.shape(0) == columns && values.shape(1) == rows, "values must be [columns, rows]");
  require(levels.size() > 0, "there must be a level");
  const std::size_t steps = midpoints.size() + 1;  // filled up to a power of two
  require(midpoints.size() == 0 || ((steps & (steps - 1)) == 0 && steps >= levels.size() && steps < 2 * levels.size()),
          "midpoints do not fit the levels");
  const fewbits::Columns job{columns,      rows,          params,      targets.data(), feedback.data(),
                             scale.data(), offset.data(), base.data(), values.data()};
  const fewbits::Grid grid{{levels.data(), levels.size()}, {midpoints.data(), midpoints.size()}};
  nb::gil_scoped_release released;
  fewbits::round_columns(job, grid, threads);
}

template <typename Number>
void decode(Bytes codes, int bits, Vector levels, Matrix scale, std::optional<Matrix> zero, std::size_t group,
            Into<Number> out, int threads) {
  const std::size_t rows = out.shape(0), columns = out.shape(1), params = scale.shape(0), groups = scale.shape(1);
  require(bits >= 1 && bits <= 8, "bits must be 1 to 8");
  require(codes.shape(0) == rows && codes.shape(1) >= (columns * static_cast<std::size_t>(bits) + 7) / 8,
          "codes must be [rows, the bytes of columns codes]");
  require(levels.size() == std::size_t{1} << bits, "levels must be one for each code");
  require(params == 1 || params == rows, "scale must be [1 or rows, groups]");
  require(group > 0 && groups == (columns + group - 1) / group, "scale must have one for each group of columns");
  require(!zero || (zero->shape(0) == params && zero->shape(1) == groups), "zero and scale differ");
  const fewbits::Lookup job{rows,         columns,      codes.data(),
                            codes.shape(1), bits,         levels.data(),
                            scale.data(), zero ? zero->data() : nullptr,
                            groups,       group,        params == rows ? groups : 0};
  nb::gil_scoped_release released;
  fewbits::decode(job, out.data(), threads);
}

template <typename Number>
void add_decode(nb::module_& m, const char* name) {
  m.def(name, &decode<Number>, nb::arg("codes").noconvert(), nb::arg("bits"), nb::arg("levels").noconvert(),
        nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(), nb::arg("group"), nb::arg("out").noconvert(),
        nb::arg("threads"));
}

}  // namespace

NB_MODULE(_core, m) {
  const auto as_is = [](const char* name) { return nb::arg(name).noconvert(); };  // a copy would be written to for nothing
  m.def("multiplies_bf16", &fewbits::multiplies_bf16);
  m.def("add_gram", &add_gram, as_is("x"), as_is("total"), nb::arg("threads"));
  m.def("round_columns", &round_columns, as_is("targets"), as_is("feedback"), as_is("scale"), as_is("offset"),
        as_is("levels"), as_is("midpoints"), as_is("base"), as_is("values"), nb::arg("threads"));
#ifdef _OPENMP
  m.attr("openmp_team") = nb::capsule(&fewbits::openmp_team, "fewbits.Team");
#else
  m.attr("openmp_team") = nb::none();
#endif
  add_decode<float>(m, "decode_float32");
  add_decode<std::uint16_t>(m, "decode_bfloat16");
}
