// What Python sees of the runtime: weights, programs, and each kernel by itself for its tests. Values are checked on the
// Python side (compiled.py); here, that sizes fit one another, so that no mistake there reads or writes out of bounds.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>

#include "bind_ops.h"
#include "mapping.h"
#include "program.h"

namespace nb = nanobind;
using namespace fewbits::runtime;

namespace {

using Bytes = nb::ndarray<const std::uint8_t, nb::c_contig, nb::device::cpu>;
using Any = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Vector = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Numbers = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Written = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Integers = nb::ndarray<const int, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

Number number_of(const std::string& name) {
  if (name == "f32") return Number::f32;
  if (name == "f16") return Number::f16;
  if (name == "bf16") return Number::bf16;
  throw std::invalid_argument("numbers are f32, f16 or bf16, not " + name);
}

std::size_t bytes_of(Number number) { return number == Number::f32 ? 4 : 2; }

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu_tanh") return Activation::gelu_tanh;
  if (name == "gelu") return Activation::gelu;
  throw std::invalid_argument("an activation is silu, gelu_tanh or gelu, not " + name);
}

// A weight and the arrays that it points into.
struct Held {
  Weight weight;
  std::vector<nb::object> arrays;
};

void set_numbers(Held& h, Params& p, const Any& values, const std::string& kind) {
  p.kind = Params::Kind::numbers;
  p.number = number_of(kind);
  p.values = values.data();
  const auto wanted = static_cast<std::size_t>(h.weight.panels() * h.weight.groups() * PANEL) * bytes_of(p.number);
  require(values.nbytes() == wanted, "params must be [panels, groups, 16]");
  h.arrays.push_back(nb::cast(values));
}

void set_steps(Held& h, Params& p, const Any& steps, const Any& factor, int per) {
  require(per > 0, "a factor must have groups");
  p.kind = Params::Kind::steps;
  p.values = steps.data();
  p.factor = static_cast<const std::uint16_t*>(factor.data());
  p.per = per;
  const std::int64_t groups = h.weight.groups(), spans = (groups + per - 1) / per;
  require(static_cast<std::int64_t>(steps.nbytes()) == h.weight.panels() * groups * PANEL, "steps must be [panels, groups, 16]");
  require(static_cast<std::int64_t>(factor.nbytes()) == h.weight.panels() * spans * PANEL * 2, "factors must be [panels, spans, 16]");
  h.arrays.push_back(nb::cast(steps));
  h.arrays.push_back(nb::cast(factor));
}

void set_zeros(Held& h, const Any& values) {
  h.weight.offset.kind = Params::Kind::zeros;
  h.weight.offset.values = values.data();
  require(static_cast<std::int64_t>(values.nbytes()) == h.weight.panels() * h.weight.groups() * PANEL,
          "zeros must be [panels, groups, 16]");
  h.arrays.push_back(nb::cast(values));
}

void make_tiles(Held* self, std::int64_t rows, std::int64_t columns, int bits, std::int64_t group, int zero, Any codes,
                std::optional<Any> table) {
  require(rows > 0 && columns > 0 && bits >= 1 && bits <= 8, "a matrix has rows, columns, and 1 to 8 bits a code");
  Weight w;
  w.rows = rows, w.columns = columns, w.bits = bits, w.group = group, w.zero = zero;
  require(group > 0 && group % PANEL == 0 && (group <= LONGEST ? LONGEST % group == 0 || group >= w.padded()
                                                               : group % LONGEST == 0 || group >= w.padded()),
          "groups have 16, 32, 64 or a multiple of 128 columns, or all");
  w.codes = codes.data();
  require(static_cast<std::int64_t>(codes.nbytes()) == w.panels() * w.panel_bytes(), "codes must be [panels, blocks, 64 · bits]");
  new (self) Held{w, {nb::cast(codes)}};
  if (table) {
    require(bits <= 4 && table->nbytes() == 16, "a table has 16 entries, for up to 4 bits");
    self->weight.table = static_cast<const std::uint8_t*>(table->data());
    self->arrays.push_back(nb::cast(*table));
  }
}

Held make_floats(std::int64_t rows, std::int64_t columns, const std::string& kind, Any values, std::int64_t group,
                 std::optional<Any> scale, const std::string& scale_kind) {
  require(rows > 0 && columns > 0 && group >= 0, "a matrix has rows and columns");
  Held h;
  h.weight.rows = rows, h.weight.columns = columns, h.weight.number = number_of(kind), h.weight.group = scale ? group : 0;
  h.weight.codes = values.data();
  require(static_cast<std::int64_t>(values.nbytes()) == h.weight.panels() * h.weight.panel_bytes(),
          "numbers must be [panels, columns of whole blocks, 16]");
  h.arrays.push_back(nb::cast(values));
  require(!scale || group > 0, "a scale has a group");
  if (scale) set_numbers(h, h.weight.scale, *scale, scale_kind);
  return h;
}

// x [M, K] · wᵀ, by the kernels of one target and so many threads: what the tests of products call.
void multiply(const std::string& target, int threads, const Held& held, Numbers x, Written out,
              std::optional<Vector> bias, bool accumulate) {
  const Weight& w = held.weight;
  require(static_cast<std::int64_t>(x.shape(1)) == w.columns && x.shape(0) == out.shape(0) &&
              static_cast<std::int64_t>(out.shape(1)) == w.rows && (!bias || static_cast<std::int64_t>(bias->size()) == w.rows),
          "x, weight, bias and out do not fit one another");
  KeyValues none(Kind::f16, 1, 1, 1, 1, 16);
  Program program(threads, target, none);
  const auto before = program.buffer(static_cast<int>(w.columns)), after = program.buffer(static_cast<int>(w.rows));
  program.linear({before, {w}, {after}, {bias ? bias->data() : nullptr}, accumulate});
  program.run_rows(static_cast<int>(x.shape(0)), before, x.data(), after, out.data());
}

// The team that a capsule points to; none for none.
Team team_of(const std::optional<nb::capsule>& capsule) {
  if (!capsule) return nullptr;
  constexpr const char* NAME = "fewbits.Team";
  require(PyCapsule_IsValid(capsule->ptr(), NAME), "a team comes in a capsule of that name");
  return *static_cast<const Team*>(PyCapsule_GetPointer(capsule->ptr(), NAME));
}

using Places = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Products that are asked for one by one, of any matrices, by threads that all of them share; one at a time, whoever asks.
class Products {
 public:
  Products(int threads, const std::string& target, const std::optional<nb::capsule>& team)
      : program_(threads, target, none_, team_of(team)) {}

  void multiply(const Held& held, Numbers x, std::optional<Vector> bias, Written out) {
    const Weight& w = held.weight;
    require(static_cast<std::int64_t>(x.shape(1)) == w.columns && x.shape(0) == out.shape(0) &&
                static_cast<std::int64_t>(out.shape(1)) == w.rows && (!bias || static_cast<std::int64_t>(bias->size()) == w.rows),
            "x, weight, bias and out do not fit one another");
    nb::gil_scoped_release released;
    const std::lock_guard lock(busy_);
    program_.multiply(w, static_cast<int>(x.shape(0)), x.data(), bias ? bias->data() : nullptr, out.data());
  }

  void look_up(const Held& held, Places which, Written out) {
    require(which.size() == out.shape(0) && static_cast<std::int64_t>(out.shape(1)) == held.weight.columns,
            "places, weight and out do not fit one another");
    nb::gil_scoped_release released;
    const std::lock_guard lock(busy_);
    program_.look_up(held.weight, static_cast<int>(which.size()), which.data(), out.data());
  }

 private:
  KeyValues none_{Kind::f16, 1, 1, 1, 1, 16};
  Program program_;
  std::mutex busy_;
};

using Objects = std::vector<nb::object>;

std::vector<Weight> weights_of(const Objects& handles) {
  std::vector<Weight> weights;
  for (const auto& handle : handles) weights.push_back(nb::cast<const Held&>(handle).weight);
  return weights;
}

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Seconds of a product of `rows` inputs, median of `rounds`. A round goes through all weights, matrices of one shape: so
// many that no cache holds them, where reading them is what is to be timed. Rounding of the inputs to INT8 is included.
double time_multiply(const std::string& target, int threads, const Objects& handles, int rows, int rounds) {
  require(!handles.empty() && rows > 0 && rounds > 0, "weights, rows and rounds must be there to be timed");
  const std::vector<Weight> weights = weights_of(handles);
  const std::int64_t in = weights[0].columns, out = weights[0].rows;
  KeyValues none(Kind::f16, 1, 1, 1, 1, 16);
  Program program(threads, target, none);
  const auto before = program.buffer(static_cast<int>(in)), after = program.buffer(static_cast<int>(out));
  for (const Weight& w : weights) {
    require(w.columns == in && w.rows == out, "weights must have one shape");
    program.linear({before, {w}, {after}, {nullptr}, false});
  }
  std::vector<float> x(static_cast<std::size_t>(rows * in)), y(static_cast<std::size_t>(rows * out));
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 251) - 125.0f;
  std::vector<double> seconds(static_cast<std::size_t>(rounds));
  nb::gil_scoped_release released;
  program.run_rows(rows, before, x.data(), after, y.data());  // threads awake, pages there
  for (double& one : seconds) {
    const auto begin = std::chrono::steady_clock::now();
    program.run_again();
    one = seconds_since(begin) / static_cast<double>(weights.size());
  }
  const auto middle = seconds.begin() + rounds / 2;
  std::nth_element(seconds.begin(), middle, seconds.end());
  return *middle;
}

double seconds_of(Pool& pool, std::size_t chunks, const std::function<void(std::size_t, int)>& work) {
  const std::vector<Phase> phases{{[=] { return chunks; }, work}};
  pool.run(phases);  // threads awake, pages there
  const auto begin = std::chrono::steady_clock::now();
  pool.run(phases);
  return seconds_since(begin);
}

// Operations a second, a multiplication and an addition each counted, of products from registers.
double integer_peak(const std::string& target, int threads) {
  constexpr std::int64_t rounds = 1 << 19;
  const Kernels& k = kernels(target);
  Pool pool(threads);
  std::atomic<std::int64_t> done{0};
  nb::gil_scoped_release released;
  const double seconds = seconds_of(pool, static_cast<std::size_t>(threads) * 8, [&](std::size_t, int) { done += k.integer_products(rounds); });
  return static_cast<double>(done) / seconds;  // two runs of one operation each
}

// Bytes a second that threads read from `bytes` of memory together; more than any cache holds.
double read_bandwidth(const std::string& target, int threads, std::int64_t bytes) {
  constexpr std::int64_t part = 1 << 20;
  require(bytes >= part, "too few bytes to tell");
  const Kernels& k = kernels(target);
  Pool pool(threads);
  Aligned memory;
  nb::gil_scoped_release released;
  auto* at = memory.reserve<std::uint8_t>(static_cast<std::size_t>(bytes), true);
  std::memset(at, 1, static_cast<std::size_t>(bytes));
  std::atomic<unsigned> seen{0};
  const double seconds = seconds_of(pool, static_cast<std::size_t>(bytes / part), [&](std::size_t i, int) { seen += k.read_lines(at + i * part, part); });
  return static_cast<double>(bytes / part * part) / seconds;
}

const float* data_of(const std::optional<Vector>& vector) { return vector ? vector->data() : nullptr; }

// A program with what its ops point into.
struct Composed {
  Composed(int threads, const std::string& target, nb::object cache)
      : program(threads, target, nb::cast<KeyValues&>(cache)), held{cache} {}

  void hold(const std::optional<Vector>& vector) {
    if (vector) held.push_back(nb::cast(*vector));
  }

  Program program;
  Objects held;
  std::mutex one_at_a_time;  // of the threads of Python that run it: they let go of its lock
};

void linear(Composed& self, Buffer x, const Objects& weights, const std::vector<Buffer>& outs,
            const std::vector<std::optional<Vector>>& biases, bool accumulate) {
  require(weights.size() == outs.size() && weights.size() == biases.size(), "weights, outs and biases differ");
  LinearOp op{x, weights_of(weights), outs, {}, accumulate};
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const Weight& w = op.weights[i];
    require(self.program.width(x) == w.columns && self.program.width(outs[i]) == w.rows, "a weight does not fit its buffers");
    require(!biases[i] || static_cast<std::int64_t>(biases[i]->size()) == w.rows, "a bias does not fit its weight");
    op.biases.push_back(data_of(biases[i]));
    self.hold(biases[i]);
  }
  self.held.insert(self.held.end(), weights.begin(), weights.end());
  self.program.linear(std::move(op));
}

void attend(Composed& self, std::vector<Buffer> buffers, int layer, int heads, int kv_heads, int head_dim, float scale,
            float softcap, int window, std::vector<float> frequencies, float factor, std::optional<Vector> q_norm,
            std::optional<Vector> k_norm, float eps) {
  require(buffers.size() == 4, "q, k, v, out");
  require(kv_heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= QUERIES, "queries must share heads of keys evenly");
  require(2 * frequencies.size() <= static_cast<std::size_t>(head_dim), "more angles than a head has pairs");
  const auto fits = [&](Buffer b, int count) { return self.program.width(b) == count * head_dim; };
  require(fits(buffers[0], heads) && fits(buffers[1], kv_heads) && fits(buffers[2], kv_heads) && fits(buffers[3], heads),
          "buffers must be as wide as their heads");
  const KeyValues& cache = nb::cast<const KeyValues&>(self.held[0]);
  require(cache.kv_heads == kv_heads && cache.head_dim == head_dim && layer >= 0 && layer < cache.layers,
          "the cache is another model's");
  for (const auto& norm : {q_norm, k_norm}) {
    require(!norm || static_cast<int>(norm->size()) == head_dim, "a head's norm must be [head_dim]");
    self.hold(norm);
  }
  self.program.attend({buffers[0], buffers[1], buffers[2], buffers[3], layer, heads, kv_heads, head_dim, scale, softcap,
                       window, std::move(frequencies), factor, data_of(q_norm), data_of(k_norm), eps});
}

void experts(Composed& self, Buffer x, Buffer router, Buffer out, const Objects& gate, const Objects& up,
             const Objects& down, int top_k, bool normalise, const std::string& activation) {
  require(!gate.empty() && gate.size() == up.size() && gate.size() == down.size(), "an expert has a gate, an up and a down");
  require(top_k > 0 && top_k <= static_cast<int>(gate.size()) && self.program.width(router) == static_cast<int>(gate.size()),
          "the router must choose among the experts that there are");
  ExpertsOp op{x, router, out, weights_of(gate), weights_of(up), weights_of(down), top_k, normalise, activation_of(activation)};
  for (std::size_t e = 0; e < gate.size(); ++e) {
    const std::int64_t ffn = op.gate[0].rows;
    require(op.gate[e].columns == self.program.width(x) && op.gate[e].rows == ffn && op.up[e].rows == ffn &&
                op.up[e].columns == op.gate[e].columns && op.down[e].columns == ffn && op.down[e].rows == self.program.width(out),
            "an expert does not fit its buffers");
  }
  for (const Objects* some : {&gate, &up, &down}) self.held.insert(self.held.end(), some->begin(), some->end());
  self.program.experts(std::move(op));
}

void run(Composed& self, Integers tokens, Integers slots, Integers positions, Integers wanted, Buffer logits, Written out) {
  require(tokens.size() == slots.size() && tokens.size() == positions.size(), "tokens, slots and positions differ");
  require(out.shape(0) == wanted.size() && static_cast<int>(out.shape(1)) == self.program.width(logits), "out does not fit");
  nb::gil_scoped_release released;
  const std::lock_guard alone(self.one_at_a_time);
  self.program.run({static_cast<int>(tokens.size()), tokens.data(), slots.data(), positions.data(),
                    static_cast<int>(wanted.size()), wanted.data()},
                   logits, out.data());
}

void read(Composed& self, Buffer buffer, Written out) {
  require(static_cast<int>(out.shape(1)) == self.program.width(buffer), "out does not fit");
  const std::lock_guard alone(self.one_at_a_time);
  require(static_cast<int>(out.shape(0)) <= self.program.wanted_rows(), "more rows than the last run was asked for");
  self.program.read(buffer, static_cast<int>(out.shape(0)), out.data());
}

const Ops& ops_of(std::string_view target) { return *kernels(target).ops; }

void bind_weights(nb::module_& m) {
  nb::class_<Held>(m, "Weight")
      .def("__init__", &make_tiles, nb::arg("rows"), nb::arg("columns"), nb::arg("bits"), nb::arg("group"), nb::arg("zero"),
           nb::arg("codes"), nb::arg("table").none())
      .def_static("floats", &make_floats)
      .def("scale_numbers", [](Held& h, const Any& values, const std::string& kind) { set_numbers(h, h.weight.scale, values, kind); })
      .def("scale_steps", [](Held& h, const Any& steps, const Any& factor, int per) { set_steps(h, h.weight.scale, steps, factor, per); })
      .def("offset_numbers", [](Held& h, const Any& values, const std::string& kind) { set_numbers(h, h.weight.offset, values, kind); })
      .def("offset_steps", [](Held& h, const Any& steps, const Any& factor, int per) { set_steps(h, h.weight.offset, steps, factor, per); })
      .def("offset_zeros", &set_zeros);
}

void bind_mapping(nb::module_& m) {
  nb::class_<Mapping>(m, "Mapping")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def("bytes", [](nb::object self) {
        const auto& mapping = nb::cast<const Mapping&>(self);
        return nb::ndarray<nb::numpy, const std::uint8_t, nb::ndim<1>>(mapping.data(), {mapping.size()}, self);
      })
      .def_prop_ro("moved", &Mapping::moved)
      .def("move", &Mapping::move)
      .def("wait", &Mapping::wait, nb::call_guard<nb::gil_scoped_release>());
}

void bind_program(nb::module_& m) {
  nb::class_<Composed>(m, "Program")
      .def(nb::init<int, const std::string&, nb::object>(), nb::arg("threads"), nb::arg("target"), nb::arg("cache"))
      .def_prop_ro("target", [](const Composed& self) { return self.program.kernels().name; })
      .def("buffer", [](Composed& self, int width) {
        require(width > 0, "a buffer has a width");
        return self.program.buffer(width);
      })
      .def("embed", [](Composed& self, nb::object table, Buffer out, float scale) {
        const Weight& w = nb::cast<const Held&>(table).weight;
        require(self.program.width(out) == w.columns, "the table does not fit its buffer");
        self.held.push_back(table);
        self.program.embed(w, out, scale);
      })
      .def("norm", [](Composed& self, Buffer x, Vector weight, float eps, Buffer out, bool accumulate) {
        require(self.program.width(x) == static_cast<int>(weight.size()) && self.program.width(out) == self.program.width(x), "a norm must fit its buffers");
        self.hold(weight);
        self.program.norm(x, weight.data(), eps, out, accumulate);
      })
      .def("linear", &linear)
      .def("attend", &attend)
      .def("gate", [](Composed& self, Buffer gate, Buffer up, Buffer out, const std::string& activation) {
        const int width = self.program.width(out);
        require(self.program.width(gate) == width && self.program.width(up) == width, "gate, up and out differ");
        self.program.gate(gate, up, out, activation_of(activation));
      })
      .def("experts", &experts)
      .def("add", [](Composed& self, Buffer x, Buffer out, std::optional<Buffer> gate) {
        require(self.program.width(x) == self.program.width(out) && (!gate || self.program.width(*gate) == 1), "x, out and gate do not fit one another");
        self.program.add(x, out, gate.value_or(-1));
      }, nb::arg("x"), nb::arg("out"), nb::arg("gate").none())
      .def("select", [](Composed& self, Buffer x, Buffer out) {
        require(self.program.width(x) == self.program.width(out), "x and out differ");
        self.program.select(x, out);
      })
      .def("softcap", [](Composed& self, Buffer x, float cap) { self.program.softcap(x, cap); })
      .def("run", &run, nb::arg("tokens"), nb::arg("slots"), nb::arg("positions"), nb::arg("wanted"), nb::arg("logits"), nb::arg("out"))
      .def("read", &read, nb::arg("buffer"), nb::arg("out"));
}

}  // namespace

NB_MODULE(_runtime, m) {
  nb::register_exception_translator([](const std::exception_ptr& thrown, void*) {
    try {
      std::rethrow_exception(thrown);
    } catch (const OutOfMemory& error) {
      PyErr_SetString(PyExc_MemoryError, error.what());
    } catch (const std::system_error& error) {
      PyErr_SetString(PyExc_OSError, error.what());
    }
  });
  m.def("targets", [] {
    std::vector<std::string> names;
    for (const Kernels* one : targets()) names.emplace_back(one->name);
    return names;
  });
  bind_ops(m, ops_of);
  bind_weights(m);
  bind_mapping(m);
  bind_program(m);
  nb::class_<Products>(m, "Products")
      .def(nb::init<int, const std::string&, std::optional<nb::capsule>>(), nb::arg("threads"), nb::arg("target"),
           nb::arg("team").none())
      .def("multiply", &Products::multiply, nb::arg("weight"), nb::arg("x"), nb::arg("bias").none(), nb::arg("out"))
      .def("look_up", &Products::look_up, nb::arg("table"), nb::arg("which"), nb::arg("out"));
  m.def("integer_peak", &integer_peak, nb::arg("target"), nb::arg("threads"));
  m.def("read_bandwidth", &read_bandwidth, nb::arg("target"), nb::arg("threads"), nb::arg("bytes"));
  m.def("time_multiply", &time_multiply, nb::arg("target"), nb::arg("threads"), nb::arg("weights"), nb::arg("rows"),
        nb::arg("rounds"));
  m.def("multiply", &multiply, nb::arg("target"), nb::arg("threads"), nb::arg("weight"), nb::arg("x"), nb::arg("out"),
        nb::arg("bias").none(), nb::arg("accumulate"));
}
