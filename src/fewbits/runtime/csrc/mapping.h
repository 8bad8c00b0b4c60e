// A file's contents in memory, read-only, and moved into huge pages while they are used.
//
// A mapped file comes in pages of 4 KB, and a core that streams through hundreds of megabytes spends a tenth of its time
// looking up where they are. Copying everything before the first token would cost more than it brings, for a short
// answer. So the file is mapped, which takes no time, and whoever goes on using it has it moved piece by piece: copied
// into huge pages, which then take the place of the file's at the same addresses. Readers notice nothing; every byte is
// the same before and after.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <thread>

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

  // Begins to move all of it, on a thread of its own; a second call does nothing. The thread is not Python's, so that a
  // program may end while it works.
  void move();
  void wait();  // until it has ended

 private:
  bool move_on();
  bool map_file(std::size_t from, std::size_t bytes);

  int file_ = -1;
  std::uint8_t* data_ = nullptr;
  std::size_t size_ = 0, reserved_ = 0;
  void* reservation_ = nullptr;
  std::atomic<std::size_t> moved_{0};
  std::atomic<bool> stop_{false};
  std::thread mover_;
};

}  // namespace fewbits::runtime
