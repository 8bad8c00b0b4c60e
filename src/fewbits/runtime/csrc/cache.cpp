#include "cache.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>

namespace fewbits::runtime {

namespace {

constexpr std::size_t HUGE_PAGE = std::size_t{2} << 20;

// Shapes are ints, and not negative where this is asked.
constexpr std::size_t size(int number) { return static_cast<std::size_t>(number); }

constexpr std::size_t rounded_up(std::size_t number, std::size_t step) { return (number + step - 1) / step * step; }

constexpr std::size_t bits(Kind kind) { return kind == Kind::f16 ? 16 : kind == Kind::int8 ? 8 : 4; }

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

// The product, or all ones where it does not fit: no machine has that much.
std::size_t product(std::size_t a, std::size_t b) {
  const std::size_t most = std::numeric_limits<std::size_t>::max();
  return b != 0 && a > most / b ? most : a * b;
}

}  // namespace

OutOfMemory::OutOfMemory(std::size_t bytes, const std::string& purpose, const std::string& advice)
    : message_("no memory for " + purpose + ": " + std::to_string(bytes) + " bytes were asked for; " + advice) {}

const char* OutOfMemory::what() const noexcept { return message_.c_str(); }

KeyValues::KeyValues(Kind kind, int layers, int slots, int context, int kv_heads, int head_dim)
    : kind(kind),
      layers(layers),
      slots(slots),
      length(context),
      context(static_cast<int>(rounded_up(size(context > 0 ? context : 0), POSITIONS))),
      kv_heads(kv_heads),
      head_dim(head_dim),
      value_width(static_cast<int>(rounded_up(size(head_dim), kind == Kind::int4 ? 32 : 16))) {
  require(layers > 0 && slots > 0 && context > 0 && kv_heads > 0, "layers, slots, context and heads must be positive");
  require(context <= std::numeric_limits<int>::max() - POSITIONS, "a context is less than 2^31 - 64 positions");
  require(head_dim % 8 == 0 && head_dim > 0 && head_dim <= 256,
          "head_dim must be a multiple of 8 up to 256, not " + std::to_string(head_dim));
  const std::size_t asked = bytes();
  const auto fail = [asked] {
    throw OutOfMemory(asked, "keys and values", "take a shorter context, fewer sequences, or INT8 or INT4");
  };
  if (asked > std::numeric_limits<std::size_t>::max() - HUGE_PAGE) fail();
  mapped_bytes_ = asked + HUGE_PAGE;  // room to begin where a huge page does
  mapped_ = mmap(nullptr, mapped_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped_ == MAP_FAILED) fail();
  first_ = reinterpret_cast<std::byte*>(rounded_up(reinterpret_cast<std::uintptr_t>(mapped_), HUGE_PAGE));
#ifdef MADV_HUGEPAGE
  madvise(first_, asked, MADV_HUGEPAGE);  // where it is refused, small pages do
#endif
}

KeyValues::~KeyValues() { munmap(mapped_, mapped_bytes_); }

CacheBlock KeyValues::block(int layer, int slot, int kv_head, int position) const noexcept {
  const std::size_t block_index = size(position / POSITIONS) * size(kv_heads) + size(kv_head);
  std::byte* slot_begin = first_ + (size(layer) * size(slots) + size(slot)) * slot_bytes();
  std::byte* keys = slot_begin + block_index * block_bytes();
  std::byte* values = keys + key_bytes();
  if (kind == Kind::f16) return {keys, values, nullptr, nullptr};
  float* scales = reinterpret_cast<float*>(values + value_bytes());
  return {keys, values, scales, scales + POSITIONS};
}

std::ptrdiff_t KeyValues::ahead() const noexcept {
  return static_cast<std::ptrdiff_t>(size(kv_heads) * block_bytes());
}

void KeyValues::copy(int source, int target, int length) noexcept {
  if (source == target) return;
  const std::size_t blocks = rounded_up(size(length), POSITIONS) / POSITIONS;
  const std::size_t bytes = blocks * size(kv_heads) * block_bytes();
  for (int layer = 0; layer < layers; ++layer)
    std::memcpy(block(layer, target, 0, 0).keys, block(layer, source, 0, 0).keys, bytes);
}

std::size_t KeyValues::bytes() const noexcept { return product(product(slot_bytes(), size(slots)), size(layers)); }

std::size_t KeyValues::key_bytes() const noexcept { return POSITIONS * size(head_dim) * bits(kind) / 8; }

std::size_t KeyValues::value_bytes() const noexcept { return POSITIONS * size(value_width) * bits(kind) / 8; }

std::size_t KeyValues::block_bytes() const noexcept {
  return key_bytes() + value_bytes() + (kind == Kind::f16 ? 0 : 2 * POSITIONS * sizeof(float));
}

std::size_t KeyValues::slot_bytes() const noexcept {
  return product(size(context / POSITIONS), product(size(kv_heads), block_bytes()));
}

}  // namespace fewbits::runtime
