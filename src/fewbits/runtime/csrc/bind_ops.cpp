// The ops one by one, for the tests that compare them with foreign ones; programs run without Python between ops.

#include "bind_ops.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace nb = nanobind;

namespace fewbits::runtime {

namespace {

using Row = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Given = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using GivenRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Find = std::function<const Ops&(std::string_view)>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

Kind kind_of(const std::string& name) {
  if (name == "f16") return Kind::f16;
  if (name == "int8") return Kind::int8;
  if (name == "int4") return Kind::int4;
  throw std::invalid_argument("keys and values are kept as f16, int8 or int4, not " + name);
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  throw std::invalid_argument("an activation is silu, gelu_tanh or gelu, not " + name);
}

void require_position(const KeyValues& cache, int layer, int slot, int position) {
  require(layer >= 0 && layer < cache.layers, "there is no such layer");
  require(slot >= 0 && slot < cache.slots, "there is no such slot");
  require(position >= 0 && position < cache.length, "the position lies outside of the context");
}

void prepare(const Ops& ops, Rows q, Rows k, GivenRows v, GivenRows cosines, GivenRows sines,
             std::optional<Given> q_norm, std::optional<Given> k_norm, float eps, KeyValues& cache, int layer,
             Integers slots, Integers positions) {
  const std::size_t rows = q.shape(0), head_dim = static_cast<std::size_t>(cache.head_dim), half = cosines.shape(1);
  const std::size_t group = head_dim * static_cast<std::size_t>(cache.kv_heads);
  require(k.shape(0) == rows && v.shape(0) == rows && slots.shape(0) == rows && positions.shape(0) == rows,
          "q, k, v, slots and positions differ in rows");
  require(q.shape(1) % group == 0 && k.shape(1) == group && v.shape(1) == group, "q, k and v do not fit the cache");
  require(cosines.shape(0) == rows && sines.shape(0) == rows && sines.shape(1) == half && 2 * half <= head_dim,
          "cosines and sines must be [rows, up to head_dim / 2]");
  for (const auto& norm : {q_norm, k_norm}) require(!norm || norm->shape(0) == head_dim, "a norm must be [head_dim]");
  for (std::size_t row = 0; row < rows; ++row) require_position(cache, layer, slots(row), positions(row));
  ops.prepare({q.data(), k.data(), v.data(), q.shape(1), group, group, cosines.data(), sines.data(),
               static_cast<int>(2 * half), q_norm ? q_norm->data() : nullptr, k_norm ? k_norm->data() : nullptr, eps,
               static_cast<int>(q.shape(1) / head_dim), &cache, layer, slots.data(), positions.data(), 0,
               static_cast<int>(rows), 0, cache.kv_heads});
}

// heads and rows: what one chunk takes, of the heads of `kv_head` and of all rows.
void attend(const Ops& ops, GivenRows q, Rows out, const KeyValues& cache, int layer, int slot, int kv_head,
            nb::typed<nb::tuple, int, int> heads, nb::typed<nb::tuple, int, int> rows, int first_position, float scale,
            float softcap, int window) {
  const int head_begin = nb::cast<int>(heads[0]), head_end = nb::cast<int>(heads[1]);
  const int row_begin = nb::cast<int>(rows[0]), row_end = nb::cast<int>(rows[1]);
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1), "q and out differ");
  require(row_begin >= 0 && row_begin < row_end && row_end <= static_cast<int>(q.shape(0)), "there are no such rows");
  require(head_begin >= 0 && head_begin < head_end && head_end * cache.head_dim <= static_cast<int>(q.shape(1)),
          "there are no such heads");
  require(kv_head >= 0 && kv_head < cache.kv_heads, "there is no such head of keys and values");
  require_position(cache, layer, slot, first_position);
  require_position(cache, layer, slot, first_position + row_end - row_begin - 1);
  std::vector<float> scratch(attend_scratch(cache.head_dim));
  ops.attend({q.data(), out.data(), q.shape(1), q.shape(1), &cache, layer, slot, kv_head, head_begin, head_end,
              row_begin, row_end, first_position, scale, softcap, window, scratch.data()});
}

void bind_rows(nb::module_& m, const Find& find) {
  m.def("norm", [=](const std::string& target, Given x, Given weight, float eps, Row out, bool accumulate) {
    require(x.size() == weight.size() && x.size() == out.size(), "x, weight and out differ");
    find(target).norm(x.data(), weight.data(), eps, x.size(), out.data(), accumulate);
  });
  m.def("gate", [=](const std::string& target, Given gate, Given up, const std::string& activation, Row out) {
    require(gate.size() == up.size() && gate.size() == out.size(), "gate, up and out differ");
    find(target).gate(gate.data(), up.data(), gate.size(), activation_of(activation), out.data());
  });
  m.def("softcap", [=](const std::string& target, Row x, float cap) { find(target).softcap(x.data(), x.size(), cap); });
  m.def("add", [=](const std::string& target, Given x, float factor, Row out) {
    require(x.size() == out.size(), "x and out differ");
    find(target).add(x.data(), factor, x.size(), out.data());
  });
  m.def("angles", [](Given frequencies, float factor, int position, Row cosines, Row sines) {
    require(frequencies.size() == cosines.size() && frequencies.size() == sines.size(), "sizes differ");
    angles(frequencies.data(), static_cast<int>(frequencies.size()), factor, position, cosines.data(), sines.data());
  });
}

}  // namespace

void bind_ops(nb::module_& m, Find find) {
  nb::class_<KeyValues>(m, "KeyValues")
      .def("__init__",
           [](KeyValues* self, const std::string& kind, int layers, int slots, int context, int kv_heads,
              int head_dim) {
             new (self) KeyValues(kind_of(kind), layers, slots, context, kv_heads, head_dim);
           })
      .def_ro("context", &KeyValues::context)
      .def_prop_ro("nbytes", &KeyValues::bytes)
      .def("copy", [](KeyValues& self, int source, int target, int length) {
        require_position(self, 0, source, length - 1);
        require_position(self, 0, target, length - 1);
        self.copy(source, target, length);
      });
  bind_rows(m, find);
  m.def("prepare",
        [=](const std::string& target, Rows q, Rows k, GivenRows v, GivenRows cosines, GivenRows sines,
            std::optional<Given> q_norm, std::optional<Given> k_norm, float eps, KeyValues& cache, int layer,
            Integers slots, Integers positions) {
          prepare(find(target), q, k, v, cosines, sines, q_norm, k_norm, eps, cache, layer, slots, positions);
        },
        nb::arg("target"), nb::arg("q"), nb::arg("k"), nb::arg("v"), nb::arg("cosines"), nb::arg("sines"),
        nb::arg("q_norm").none(), nb::arg("k_norm").none(), nb::arg("eps"), nb::arg("cache"), nb::arg("layer"),
        nb::arg("slots"), nb::arg("positions"));
  m.def("attend", [=](const std::string& target, GivenRows q, Rows out, const KeyValues& cache, int layer, int slot,
                      int kv_head, nb::typed<nb::tuple, int, int> heads, nb::typed<nb::tuple, int, int> rows,
                      int first_position, float scale, float softcap, int window) {
    attend(find(target), q, out, cache, layer, slot, kv_head, heads, rows, first_position, scale, softcap, window);
  });
}

}  // namespace fewbits::runtime
