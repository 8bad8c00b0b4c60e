#include "mapping.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <system_error>

namespace fewbits::runtime {

namespace {

constexpr std::size_t HUGE_PAGE = 2 << 20, PIECE = 16 * HUGE_PAGE;
constexpr std::size_t SPARE = std::size_t{1} << 30;  // memory that is left to others

[[noreturn]] void fail(const std::string& path) { throw std::system_error(errno, std::generic_category(), path); }

// Bytes of memory that may be taken without making the system swap; none where it does not say.
std::size_t available() {
  std::ifstream file("/proc/meminfo");
  std::string name, unit;
  for (std::size_t kilobytes; file >> name >> kilobytes; file >> unit)
    if (name == "MemAvailable:") return kilobytes << 10;
  return 0;
}

std::uint8_t* aligned(void* p) {
  return reinterpret_cast<std::uint8_t*>((reinterpret_cast<std::uintptr_t>(p) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE);
}

}  // namespace

Mapping::Mapping(const std::string& path) {
  file_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file_ < 0) fail(path);
  struct stat facts {};
  if (fstat(file_, &facts) == 0) size_ = static_cast<std::size_t>(facts.st_size);
  reserved_ = size_ + HUGE_PAGE;
  reservation_ = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  data_ = aligned(reservation_);
  errno = size_ ? errno : EINVAL;
  if (size_ && reservation_ != MAP_FAILED && map_file(0, size_)) return;
  const int problem = errno;
  if (reservation_ != MAP_FAILED) munmap(reservation_, reserved_);
  close(file_);
  errno = problem;
  fail(path);
}

Mapping::~Mapping() {
  stop_ = true;
  wait();
  munmap(reservation_, reserved_);
  close(file_);
}

void Mapping::move() {
  if (mover_.joinable()) return;
  mover_ = std::thread([this] {
    while (!stop_ && move_on()) {
    }
  });
}

void Mapping::wait() {
  if (mover_.joinable()) mover_.join();
}

bool Mapping::map_file(std::size_t from, std::size_t bytes) {
  return mmap(data_ + from, bytes, PROT_READ, MAP_SHARED | MAP_FIXED, file_, static_cast<off_t>(from)) != MAP_FAILED;
}

// The next piece. False where nothing is left, the system has no huge pages, or memory is short: the file's own pages can
// be dropped and read again at any time, these cannot.
bool Mapping::move_on() {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::size_t piece = std::min(PIECE, size_ / HUGE_PAGE * HUGE_PAGE - moved_);
  if (piece == 0 || available() < size_ - moved_ + SPARE) return false;
  void* room = mmap(nullptr, piece + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  auto* begin = static_cast<std::uint8_t*>(room);
  std::uint8_t *copy = aligned(room), *target = data_ + moved_;
  if (madvise(copy, piece, MADV_HUGEPAGE) != 0) {
    munmap(room, piece + HUGE_PAGE);
    return false;
  }
  std::memcpy(copy, target, piece);
  const bool moved = mprotect(copy, piece, PROT_READ) == 0 &&
                     mremap(copy, piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target;
  if (moved) {
    moved_ += piece;
  } else {
    map_file(moved_, piece);  // what was there may have been taken away before it failed
    munmap(copy, piece);
  }
  // Around the copy alone: its own place may be somebody else's by now.
  if (copy != begin) munmap(begin, static_cast<std::size_t>(copy - begin));
  munmap(copy + piece, static_cast<std::size_t>(begin + HUGE_PAGE - copy));
  return moved;
#else
  return false;
#endif
}

}  // namespace fewbits::runtime
