// A model as a list of ops (ops.py), run from the first to the last by all threads without coming back to Python.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "kernels.h"
#include "ops.h"
#include "pool.h"
#include "weight.h"

namespace fewbits::runtime {

// What one run is given: `rows` tokens, and which of them logits are wanted of.
struct Step {
  int rows = 0;
  const int* tokens = nullptr;
  const int* slots = nullptr;
  const int* positions = nullptr;
  int wanted_rows = 0;
  const int* wanted = nullptr;
};

// Memory for numbers that kernels read in whole vectors; what it held is lost when it grows.
class Aligned {
 public:
  template <typename T>
  T* reserve(std::size_t count, bool huge_pages = false) {
    grow(count * sizeof(T), huge_pages);
    return static_cast<T*>(at_.get());
  }
  template <typename T>
  T* data() const {
    return static_cast<T*>(at_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const;
  };
  void grow(std::size_t bytes, bool huge_pages);

  std::unique_ptr<void, Free> at_;
  std::size_t bytes_ = 0;
};

using Buffer = int;

struct LinearOp {
  Buffer x;
  std::vector<Weight> weights;
  std::vector<Buffer> outs;
  std::vector<const float*> biases;  // null: none
  bool accumulate;
};

struct AttendOp {
  Buffer q, k, v, out;
  int layer, heads, kv_heads, head_dim;
  float scale, softcap;
  int window;
  std::vector<float> frequencies;
  float factor;
  const float* q_norm;
  const float* k_norm;
  float eps;
};

struct ExpertsOp {
  Buffer x, router, out;
  std::vector<Weight> gate, up, down;
  int top_k;
  bool normalise;
  Activation activation;
};

class Program {
 public:
  Program(int threads, std::string_view target, KeyValues& cache, Team team = nullptr);

  Buffer buffer(int width);
  void embed(const Weight& table, Buffer out, float scale);
  void norm(Buffer x, const float* weight, float eps, Buffer out, bool accumulate);
  void linear(LinearOp op);
  void attend(AttendOp op);
  void gate(Buffer gate, Buffer up, Buffer out, Activation activation);
  void experts(ExpertsOp op);
  void add(Buffer x, Buffer out, Buffer gate);  // gate −1: none
  void select(Buffer x, Buffer out);
  void softcap(Buffer x, float cap);

  // Runs everything; the last buffer's rows, `width` numbers each, are written to out. Throws std::invalid_argument for
  // tokens, slots or positions that are not there, OutOfMemory, and whatever a kernel throws.
  void run(const Step& step, Buffer logits, float* out);

  // The first rows of a buffer as the last run left it.
  void read(Buffer buffer, int rows, float* out) const;
  int wanted_rows() const { return step_.wanted_rows; }

  // Runs the ops on rows that are given, without tokens: for the tests of one op.
  void run_rows(int rows, Buffer x, const float* given, Buffer y, float* out);

  // x [rows, columns] · wᵀ + bias (null: none), out [rows, w.rows], at once: for layers that are called one by one.
  void multiply(const Weight& w, int rows, const float* x, const float* bias, float* out);

  // Rows `which` of a table, out [count, w.columns], at once.
  void look_up(const Weight& w, int count, const std::int64_t* which, float* out);

  // The same once more, on what the buffers hold now: for timing.
  void run_again() { pool_.run(phases_); }

  const Kernels& kernels() const { return kernels_; }
  int width(Buffer buffer) const { return buffers_.at(static_cast<std::size_t>(buffer))->width; }

 private:
  struct Rows {
    int width, stride;
    bool selected = false;                     // as ops are added: whether it has a row for each wanted one, or each
    bool of_tokens = false, of_wanted = false;  // at any time
    Aligned numbers;
  };
  // One form of an op's inputs, shared by its weights that agree in it; the memory is shared by all ops.
  struct Packed {
    Aligned codes, scale, start, total;
  };
  struct Part {  // some rows of one sequence
    int begin, end;
  };
  struct Attention {
    AttendOp op;
    std::size_t table;  // of angles
    int splits;         // of a group's heads
    std::vector<Part> parts;
  };
  struct Routing;

  float* row(Buffer buffer, int row) const;
  int count(bool selected) const { return selected ? step_.wanted_rows : step_.rows; }
  bool write(Buffer out, bool selected);
  void each_row(bool selected, std::function<void(int row)> work);
  std::vector<std::function<void(int row)>> take_waiting(bool selected);
  void flush();
  Inputs form(const Weight& w) const;
  void prepare(Inputs& in, int set, std::int64_t rows);
  std::int64_t height(std::int64_t rows) const { return kernels_.height(rows); }
  std::int64_t tiles(std::int64_t rows) const { return (rows + height(rows) - 1) / height(rows); }
  std::int64_t panels_at_a_time(const Weight& w, std::int64_t rows) const;
  void* scratch(int thread) const { return scratch_[static_cast<std::size_t>(thread)].data<void>(); }
  void angles(std::size_t table);
  std::size_t table(const AttendOp& op);
  bool alone(const Attention& a) const;
  void cut(Attention& a) const;
  void store_keys(const Attention& a, int head);
  void attend_part(const Attention& a, const Part& part, int kv_head, int split, int thread);
  void check(const Step& step) const;
  void make_room();

  Pool pool_;
  const Kernels& kernels_;
  KeyValues& cache_;
  std::vector<std::unique_ptr<Rows>> buffers_;
  std::vector<std::unique_ptr<Packed>> sets_;
  std::vector<Aligned> scratch_;
  std::vector<Phase> phases_;
  std::vector<std::function<void(int row)>> waiting_;  // on rows of tokens, or of wanted ones
  bool waiting_selected_ = false;
  struct Angles {
    std::vector<float> frequencies;
    float factor;
    Aligned cosines, sines;
  };
  std::vector<std::unique_ptr<Angles>> angles_;
  Aligned product_;  // of `multiply`, in whole panels
  Step step_;
  std::int64_t vocabulary_ = 0;
};

}  // namespace fewbits::runtime
