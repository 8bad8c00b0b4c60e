// Threads that carry out phases of work together, without anyone being in charge.
//
// A job is a row of phases, each cut into chunks. A thread takes the next chunk of the current phase from a counter;
// where none is left it waits for those that others still work on, and goes on to the next phase. Nobody waits for a
// *thread*: one that the system has taken off its core holds up the others only by the chunk it was working on.
//
// Waiting spins for a few microseconds, since phases of one token take no longer, and then sleeps. A thread that
// sleeps gives its core away, so a thread of ours that was put aside, or a neighbour, gets it at once: spinning for
// long is what makes a busy machine many times slower, because the spinning thread keeps the working one waiting.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace fewbits::runtime {

struct Phase {
  std::function<std::size_t()> chunks;  // asked when the phase before is done
  std::function<void(std::size_t chunk, int thread)> work;
};

class Pool {
 public:
  static constexpr std::size_t MOST_PHASES = 1 << 14, MOST_CHUNKS = (1 << 20) - 1;

  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(others_.size()) + 1; }

  // Carries out the phases one after the other; what is thrown in a chunk is thrown here, and the rest left out.
  void run(const std::vector<Phase>& phases);

 private:
  // Where a phase stands, with the number of its job, so that a thread that comes late finds that it is another one's.
  struct alignas(64) Progress {
    std::atomic<std::uint64_t> next{0};      // job, chunks, next chunk: 24, 20, 20 bits
    std::atomic<std::uint32_t> finished{0};  // chunks
    std::atomic<std::uint32_t> done{0};      // the last job in which it was
  };

  void stop();
  void serve(int thread);
  void work(std::uint32_t job, std::size_t phases, int thread);
  bool wait_for(const std::atomic<std::uint32_t>& done, std::uint32_t job) const;
  void carry_out(std::size_t phase, std::size_t chunk, int thread);
  void open(std::size_t phase, std::size_t phases, std::uint32_t job);
  void finish(std::size_t phase, std::uint32_t job);
  std::size_t count(std::size_t phase);
  void fail();

  std::vector<std::thread> others_;
  std::unique_ptr<Progress[]> progress_;
  const std::vector<Phase>* phases_ = nullptr;
  std::atomic<std::size_t> count_{0};
  std::atomic<std::uint32_t> job_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr thrown_;
  std::mutex first_;
};

}  // namespace fewbits::runtime
