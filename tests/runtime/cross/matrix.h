#pragma once

#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "check.h"
#include "weight.h"

constexpr float LARGEST_SCALE = 0.5f;

// A matrix of random codes and params, every array exactly as long as its layout says.
class Matrix {
  using Number = fewbits::runtime::Number;
  using Params = fewbits::runtime::Params;
  static constexpr int PANEL = fewbits::runtime::PANEL;

 public:
  Matrix(int rows, int columns, int bits, std::int64_t group, int zero) : random_{static_cast<std::uint64_t>(rows * columns * 8 + bits)} {
    w.rows = rows, w.columns = columns, w.bits = bits, w.group = group, w.zero = zero;
    w.codes = bits ? bytes(w.panels() * w.panel_bytes()) : numbers(w.number, w.panels() * w.padded() * PANEL);
  }

  void look_up() { w.table = bytes(PANEL); }

  void in_numbers(Number number) {
    w.number = number;
    w.codes = numbers(number, w.panels() * w.padded() * PANEL);
  }

  void set(Params& p, Params::Kind kind, Number number = Number::f32, int per = 1) {
    const std::int64_t count = w.panels() * w.groups() * PANEL, spans = (w.groups() + per - 1) / per;
    p.kind = kind, p.number = number, p.per = per;
    if (kind == Params::Kind::numbers) p.values = numbers(number, count);
    if (kind == Params::Kind::steps || kind == Params::Kind::zeros) p.values = bytes(count);
    if (kind == Params::Kind::steps) p.factor = static_cast<const std::uint16_t*>(numbers(Number::f16, w.panels() * spans * PANEL));
  }

  // No number of the matrix is larger, nor anything that it is a sum of.
  double largest() const {
    if (!w.bits) return LARGEST_SCALE * (w.scale.kind == Params::Kind::none ? 1 : LARGEST_SCALE);
    const double scale = LARGEST_SCALE * (w.scale.kind == Params::Kind::steps ? 128 : 1);
    const double offset = w.offset.kind == Params::Kind::none ? 0
                          : w.offset.kind == Params::Kind::zeros ? 255 * scale
                          : LARGEST_SCALE * (w.offset.kind == Params::Kind::steps ? 128 : 1);
    return 255 * scale + offset;
  }

  fewbits::runtime::Weight w;

 private:
  const std::uint8_t* bytes(std::int64_t count) {
    std::vector<std::uint8_t> all(static_cast<std::size_t>(count));
    for (auto& one : all) one = static_cast<std::uint8_t>((random_() + 1) * 127.99f);
    return held_.emplace_back(std::move(all)).data();
  }

  // float32 bits in (-LARGEST_SCALE, LARGEST_SCALE), cut down to the type; FP16's without subnormals.
  const void* numbers(Number number, std::int64_t count) {
    const std::size_t width = number == Number::f32 ? 4 : 2;
    std::vector<std::uint8_t> all(static_cast<std::size_t>(count) * width);
    for (std::size_t i = 0; i < all.size(); i += width) {
      const float x = random_() * LARGEST_SCALE;
      std::uint32_t bits;
      std::memcpy(&bits, &x, 4);
      if (number == Number::bf16) bits >>= 16;
      if (number == Number::f16) bits = (bits >> 16 & 0x8000) | 0x2400 | (bits >> 13 & 0x13ff);
      std::memcpy(&all[i], &bits, width);
    }
    return held_.emplace_back(std::move(all)).data();
  }

  Random random_;
  std::vector<std::vector<std::uint8_t>> held_;
};
