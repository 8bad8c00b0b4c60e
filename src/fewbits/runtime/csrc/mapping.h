// A file's contents in memory, read-only, and moved into huge pages while they are used.
//
// A mapped file comes in pages of 4 KB, and a core that streams through hundreds of megabytes spends a tenth of its time
// looking up where they are. Copying everything before the first token would cost more than it brings, for a short
// answer. So the file is mapped, which takes no time, and whoever goes on using it has it moved piece by piece: copied
// into huge pages, which then take the place of the file's at the same addresses. Readers notice nothing; every byte is
// the same before and after.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace fewbits::runtime {

class Mapping {
 public:
  // Throws std::system_error where the file cannot be mapped.
  explicit Mapping(const std::string& path);
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::size_t moved() const { return moved_; }  // bytes that lie in huge pages

  // Moves the next piece. False where nothing is left, the system has no huge pages, or memory is short: the file's own
  // pages can be dropped and read again at any time, these cannot.
  bool move_on();

 private:
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0, moved_ = 0, reserved_ = 0;
  void* reservation_ = nullptr;
};

}  // namespace fewbits::runtime
