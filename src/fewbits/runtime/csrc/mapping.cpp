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
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(path);
  struct stat facts {};
  if (fstat(file, &facts) == 0) size_ = static_cast<std::size_t>(facts.st_size);
  reserved_ = size_ + HUGE_PAGE;
  reservation_ = mmap(nullptr, reserved_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  void* mapped = MAP_FAILED;
  if (reservation_ != MAP_FAILED && size_)
    mapped = mmap(aligned(reservation_), size_, PROT_READ, MAP_SHARED | MAP_FIXED, file, 0);
  const int problem = errno;
  close(file);
  if (mapped == MAP_FAILED) {
    if (reservation_ != MAP_FAILED) munmap(reservation_, reserved_);
    errno = size_ ? problem : EINVAL;
    fail(path);
  }
  data_ = static_cast<std::uint8_t*>(mapped);
}

Mapping::~Mapping() { munmap(reservation_, reserved_); }

bool Mapping::move_on() {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const std::size_t piece = std::min(PIECE, size_ / HUGE_PAGE * HUGE_PAGE - moved_);
  if (piece == 0 || available() < size_ - moved_ + SPARE) return false;
  void* room = mmap(nullptr, piece + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  std::uint8_t* copy = aligned(room);
  std::uint8_t* target = data_ + moved_;
  bool done = madvise(copy, piece, MADV_HUGEPAGE) == 0;
  if (done) {
    std::memcpy(copy, target, piece);
    done = mprotect(copy, piece, PROT_READ) == 0 &&
           mremap(copy, piece, piece, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target;
  }
  // What was moved away is unmapped already; unmapping it again does nothing.
  munmap(room, piece + HUGE_PAGE);
  if (done) moved_ += piece;
  return done;
#else
  return false;
#endif
}

}  // namespace fewbits::runtime
