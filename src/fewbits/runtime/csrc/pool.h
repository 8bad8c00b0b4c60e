// Threads that carry out phases of work together, without anyone being in charge.
//
// A job is a row of phases, each cut into chunks, of which every thread has a share that lies together: it goes through
// memory as that lies, and what it fetches ahead is what it reads next. Who has done its share takes from the ends of the
// others', and where nothing is left it waits for the chunks that others still work on, and goes on to the next phase.
// Nobody waits for a *thread*: one that the system has taken off its core holds up the others only by the chunk it was
// working on.
//
// Waiting spins for a few microseconds, since phases of one token take no longer, and then sleeps. A thread that
// sleeps gives its core away, so a thread of ours that was put aside, or a neighbour, gets it at once: spinning for
// long is what makes a busy machine many times slower, because the spinning thread keeps the working one waiting.
//
// Or the threads are somebody else's, a team that is called for each job. Where another library works between our jobs
// and its threads spin for the next one, threads of ours would only take turns with them on the same cores.
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

// Calls work(data, t) on so many threads, t = 0 on the one that asks, and returns when all have returned.
using Team = void (*)(int threads, void (*work)(void* data, int thread), void* data);

struct Phase {
  std::function<std::size_t()> chunks;  // asked when the phase before is done
  std::function<void(std::size_t chunk, int thread)> work;
};

class Pool {
 public:
  static constexpr std::size_t MOST_PHASES = 1 << 12, MOST_CHUNKS = (1 << 20) - 1;

  explicit Pool(int threads, Team team = nullptr);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return threads_; }

  // Carries out the phases one after the other; what is thrown in a chunk is thrown here, and the rest left out.
  // little: work that is done before a team is called together.
  void run(const std::vector<Phase>& phases, bool little = false);

 private:
  // Where a phase stands, and what is left of a thread's share in it, with the number of their job, so that a thread
  // that comes late finds that they are another one's.
  struct alignas(64) Progress {
    std::atomic<std::uint32_t> unfinished{0};  // chunks
    std::atomic<std::uint32_t> done{0};        // the last job in which it was
  };
  struct alignas(64) Share {
    std::atomic<std::uint64_t> left{0};  // job, end, next chunk: 24, 20, 20 bits
  };

  void stop();
  void serve(int thread);
  void work(std::uint32_t job, std::size_t phases, int thread);
  bool work_off(std::size_t phase, int owner, std::uint32_t job, int thread);
  bool wait_for(const std::atomic<std::uint32_t>& done, std::uint32_t job) const;
  void carry_out(std::size_t phase, std::size_t chunk, int thread);
  void open(std::size_t phase, std::size_t phases, std::uint32_t job);
  void finish(std::size_t phase, std::uint32_t job);
  std::size_t count(std::size_t phase);
  void fail();
  std::atomic<std::uint64_t>& share(std::size_t phase, int thread) {
    return shares_[phase * static_cast<std::size_t>(threads_) + static_cast<std::size_t>(thread)].left;
  }

  int threads_ = 1;
  Team team_ = nullptr;
  std::vector<std::thread> others_;
  std::unique_ptr<Progress[]> progress_;
  std::unique_ptr<Share[]> shares_;  // [phases][threads]
  const std::vector<Phase>* phases_ = nullptr;
  std::atomic<std::size_t> count_{0};
  std::atomic<std::uint32_t> job_{0};
  std::atomic<bool> stop_{false}, failed_{false};
  std::exception_ptr thrown_;
  std::mutex first_;
};

}  // namespace fewbits::runtime
