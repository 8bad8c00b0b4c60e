// A small model from tokens to logits: however many threads there are, the same bits. It has one op of each kind, and
// what its threads read and write is seen by the sanitizers, that of threads too.

#include "program.h"

#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "matrix.h"
#include "products.h"

#define X(name) \
  namespace fewbits::runtime::name { \
  extern const Kernels table; \
  }
TARGETS
#undef X

namespace fewbits::runtime {

// Instead of kernels.cpp's: the targets that are linked in here.
const Kernels& kernels(std::string_view wanted) {
#define X(name) \
  if (wanted == #name) return name::table;
  TARGETS
#undef X
  throw std::invalid_argument("no kernels for " + std::string(wanted));
}

}  // namespace fewbits::runtime

using namespace fewbits::runtime;

namespace {

constexpr int VOCABULARY = 70, WIDTH = 64, FFN = 96, HEADS = 4, KV_HEADS = 2, HEAD_DIM = 16, EXPERTS = 3, CONTEXT = 40;

class Model {
 public:
  Model(const char* target, int threads, Kind kind)
      : cache_(kind, 2, 2, CONTEXT, KV_HEADS, HEAD_DIM), program_(threads, target, cache_), ones_(WIDTH, 1.0f) {
    h_ = program_.buffer(WIDTH), x_ = program_.buffer(WIDTH), logits_ = program_.buffer(VOCABULARY);
    const Buffer kept = program_.buffer(WIDTH), normed = program_.buffer(WIDTH);
    program_.embed(weight(VOCABULARY, WIDTH), h_, 0.1f);
    attention(0);
    gated();
    attention(1);
    experts();
    program_.select(h_, kept);
    program_.norm(kept, ones_.data(), 1e-5f, normed, false);
    program_.linear({normed, {weight(VOCABULARY, WIDTH)}, {logits_}, {nullptr}, false});
    program_.softcap(logits_, 20.0f);
  }

  // Two sequences of 19 and 3 tokens, read in one call, then two more tokens of each.
  std::vector<float> logits() {
    std::vector<int> tokens, slots, positions, wanted;
    for (int i = 0; i < 22; ++i) {
      tokens.push_back(i * 7 % VOCABULARY), slots.push_back(i < 19 ? 0 : 1), positions.push_back(i < 19 ? i : i - 19);
      if (i % 3 == 0) wanted.push_back(i);
    }
    std::vector<float> all = run(tokens, slots, positions, wanted);
    run(tokens, slots, positions, {});
    for (int i = 0; i < 2; ++i) {
      const auto more = run({5 + i, 60}, {0, 1}, {19 + i, 3 + i}, {1, 0});
      all.insert(all.end(), more.begin(), more.end());
    }
    return all;
  }

  std::vector<float> run(const std::vector<int>& tokens, const std::vector<int>& slots, const std::vector<int>& positions,
                         const std::vector<int>& wanted) {
    std::vector<float> out(wanted.size() * VOCABULARY);
    program_.run({static_cast<int>(tokens.size()), tokens.data(), slots.data(), positions.data(),
                  static_cast<int>(wanted.size()), wanted.data()}, logits_, out.data());
    return out;
  }

 private:
  // 4 bits with zero-points, by groups of 32; the router's stay numbers.
  const Weight& weight(int rows, int columns) {
    Matrix& m = matrices_.emplace_back(rows, columns, 4, 32, 8);
    m.set(m.w.scale, Params::Kind::numbers, Number::f16);
    return m.w;
  }

  const Weight& numbers(int rows, int columns) {
    Matrix& m = matrices_.emplace_back(rows, columns, 0, 0, 0);
    m.in_numbers(Number::f32);
    return m.w;
  }

  void attention(int layer) {
    const Buffer q = program_.buffer(HEADS * HEAD_DIM), k = program_.buffer(KV_HEADS * HEAD_DIM);
    const Buffer v = program_.buffer(KV_HEADS * HEAD_DIM), out = program_.buffer(HEADS * HEAD_DIM);
    program_.norm(h_, ones_.data(), 1e-5f, x_, false);
    program_.linear({x_, {weight(64, WIDTH), weight(32, WIDTH), numbers(32, WIDTH)}, {q, k, v}, {nullptr, ones_.data(), nullptr}, false});
    program_.attend({q, k, v, out, layer, HEADS, KV_HEADS, HEAD_DIM, 0.1f, layer ? 5.0f : 0.0f, layer ? 7 : 0,
                     {1.0f, 0.5f, 0.25f, 0.1f}, 1.0f, ones_.data(), nullptr, 1e-5f});
    program_.linear({out, {weight(WIDTH, HEADS * HEAD_DIM)}, {h_}, {nullptr}, true});
  }

  void gated() {
    const Buffer gate = program_.buffer(FFN), up = program_.buffer(FFN), down = program_.buffer(WIDTH);
    program_.norm(h_, ones_.data(), 1e-5f, x_, false);
    program_.linear({x_, {weight(FFN, WIDTH), weight(FFN, WIDTH)}, {gate, up}, {nullptr, nullptr}, false});
    program_.gate(gate, up, gate, Activation::silu);
    program_.linear({gate, {weight(WIDTH, FFN)}, {down}, {nullptr}, false});
    program_.norm(down, ones_.data(), 1e-5f, h_, true);
  }

  void experts() {
    const Buffer router = program_.buffer(EXPERTS), shared = program_.buffer(1), out = program_.buffer(WIDTH);
    program_.norm(h_, ones_.data(), 1e-5f, x_, false);
    program_.norm(h_, ones_.data(), 1e-5f, out, false);
    program_.linear({x_, {numbers(EXPERTS, WIDTH), numbers(1, WIDTH)}, {router, shared}, {nullptr, nullptr}, false});
    ExpertsOp op{x_, router, h_, {}, {}, {}, 2, true, Activation::gelu};
    for (int e = 0; e < EXPERTS; ++e) {
      op.gate.push_back(weight(FFN, WIDTH));
      op.up.push_back(weight(FFN, WIDTH));
      op.down.push_back(weight(WIDTH, FFN));
    }
    program_.experts(std::move(op));
    program_.add(out, h_, shared);
  }

  std::deque<Matrix> matrices_;
  KeyValues cache_;
  Program program_;
  std::vector<float> ones_;
  Buffer h_, x_, logits_;
};

bool refuses(Model& model, int token, int slot, int position) {
  try {
    model.run({token}, {slot}, {position}, {0});
  } catch (const std::invalid_argument&) {
    return true;
  }
  return false;
}

}  // namespace

int check_program(const char* target) {
  Verdict verdict{target};
  for (Kind kind : {Kind::f16, Kind::int8, Kind::int4}) {
    Model alone(target, 1, kind);
    const auto expected = alone.logits();
    for (float one : expected) verdict.holds(std::isfinite(one), "a number of a program", 0, one, 0);
    for (int threads : {2, 3, 5}) {
      Model model(target, threads, kind);
      for (int run = 0; run < 3; ++run) {
        const auto found = model.logits();
        const bool same = found.size() == expected.size() && !std::memcmp(found.data(), expected.data(), found.size() * sizeof(float));
        verdict.holds(same, "a program on so many threads", threads, 0, 1);
        verdict.holds(refuses(model, VOCABULARY, 0, 0) && refuses(model, 0, 2, 0) && refuses(model, 0, 0, CONTEXT),
                      "what is not there is refused", threads, 0, 1);
      }
    }
  }
  return verdict.failures;
}
