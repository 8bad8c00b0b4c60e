// The cache of keys and values of all layers and sequences, in one allocation.
//
// A *slot* holds one sequence. Positions lie in *blocks* of 64, which is what attention reads at a time: layer, slot,
// block, head of keys and values. So what a sequence uses grows from its beginning in one piece (huge pages are filled
// one after the other, and a prefix is copied as it lies), and one head's part of a block is
//
//   keys    [head_dim][64]      scores of 64 positions are sums of rows of this
//   values  [64][value_width]   head_dim filled up to whole vectors of 16 (INT4: 32)
//   key scales [64], value scales [64]   float32, INT8 and INT4 only
//
// INT8 and INT4 are symmetric with a scale for each position and head: codes -127…127 and -7…7, the latter stored as
// code + 8 in four bits. A byte of keys holds two neighbouring dimensions, the even one in its lower half; a byte of
// values holds dimensions 32·i + j (lower half) and 32·i + 16 + j.

#pragma once

#include <cstddef>
#include <new>
#include <string>

namespace fewbits::runtime {

enum class Kind { f16, int8, int4 };

// What failed says how much was asked for.
class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(std::size_t bytes, const std::string& purpose, const std::string& advice);
  const char* what() const noexcept override;

 private:
  std::string message_;
};

// One head's part of 64 positions. The scales are there for INT8 and INT4 only.
struct CacheBlock {
  std::byte* keys;
  std::byte* values;
  float* key_scales;
  float* value_scales;
};

// Positions of a block.
inline constexpr int POSITIONS = 64;

class KeyValues {
 public:
  // context: positions of a slot, filled up to whole blocks. Zeroed, so that nothing read is ever undefined.
  KeyValues(Kind kind, int layers, int slots, int context, int kv_heads, int head_dim);
  ~KeyValues();
  KeyValues(const KeyValues&) = delete;
  KeyValues& operator=(const KeyValues&) = delete;

  // The block that holds `position`.
  CacheBlock block(int layer, int slot, int kv_head, int position) const noexcept;

  // Bytes from a block to the same head's next one.
  std::ptrdiff_t ahead() const noexcept;

  // Makes the first `length` positions of `target` those of `source`; what comes behind them in `target` is lost.
  void copy(int source, int target, int length) noexcept;

  std::size_t bytes() const noexcept;

  const Kind kind;
  const int layers, slots;
  const int length;   // positions of a slot that were asked for
  const int context;  // and those that it has
  const int kv_heads, head_dim;
  const int value_width;  // numbers of a row of values, filled up

 private:
  std::size_t key_bytes() const noexcept;
  std::size_t value_bytes() const noexcept;
  std::size_t block_bytes() const noexcept;
  std::size_t slot_bytes() const noexcept;

  void* mapped_ = nullptr;
  std::size_t mapped_bytes_ = 0;
  std::byte* first_ = nullptr;
};

}  // namespace fewbits::runtime
