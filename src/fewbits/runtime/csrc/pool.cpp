#include "pool.h"

#include <chrono>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fewbits::runtime {

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto BETWEEN_PHASES = std::chrono::microseconds(20);
constexpr auto BETWEEN_JOBS = std::chrono::microseconds(200);  // a token is chosen and printed in that time
constexpr std::uint64_t MASK = Pool::MOST_CHUNKS;
constexpr std::uint32_t JOBS = (1 << 24) - 1;  // numbers of jobs, 1 and on; 0 is none

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Until the value is another than `old`: spins, then sleeps.
void wait_while(const std::atomic<std::uint32_t>& value, std::uint32_t old, Clock::duration spin) {
  for (int i = 0; i < 64; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (const auto end = Clock::now() + spin; Clock::now() < end;)
    for (int i = 0; i < 16; ++i) {
      if (value.load(std::memory_order_acquire) != old) return;
      pause();
    }
  value.wait(old, std::memory_order_acquire);
}

constexpr int END = 20, JOB = 40;                       // where they begin in what is left of a share

std::uint64_t share_of(std::uint32_t job, std::uint64_t begin, std::uint64_t end) {
  return static_cast<std::uint64_t>(job) << JOB | end << END | begin;
}

}  // namespace

Pool::Pool(int threads, Team team) : team_(team), progress_(new Progress[MOST_PHASES]) {
  if (threads < 1) throw std::invalid_argument(std::to_string(threads) + " threads; at least one has to do the work");
  threads_ = threads;
  shares_.reset(new Share[MOST_PHASES * static_cast<std::size_t>(threads)]);
  if (team) return;
  try {
    for (int t = 1; t < threads; ++t) others_.emplace_back([this, t] { serve(t); });
  } catch (const std::system_error&) {  // those that run already hold this
    stop();
    throw std::runtime_error("the system has no room for " + std::to_string(threads) + " threads; ask for fewer");
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  stop_ = true;
  ++job_;
  job_.notify_all();
  for (auto& other : others_) other.join();
}

void Pool::run(const std::vector<Phase>& phases, bool little) {
  if (phases.empty()) return;
  if (phases.size() > MOST_PHASES)
    throw std::invalid_argument(std::to_string(phases.size()) + " phases; a job may have " + std::to_string(MOST_PHASES));
  phases_ = &phases;
  failed_ = false;
  thrown_ = nullptr;
  const std::uint32_t job = job_.load() % JOBS + 1;
  open(0, phases.size(), job);
  count_.store(phases.size());
  job_.store(job);
  if (team_ && !little) {
    auto share = [&](int thread) { work(job, phases.size(), thread); };
    team_(threads_, [](void* data, int thread) { (*static_cast<decltype(share)*>(data))(thread); }, &share);
  } else {
    job_.notify_all();
    work(job, phases.size(), 0);
  }
  if (thrown_) std::rethrow_exception(std::exchange(thrown_, nullptr));
}

void Pool::serve(int thread) {
  for (std::uint32_t seen = 0; !stop_.load();) {
    wait_while(job_, seen, BETWEEN_JOBS);
    seen = job_.load();
    const std::size_t phases = count_.load();
    if (!stop_ && job_.load() == seen) work(seen, phases, thread);
  }
}

void Pool::work(std::uint32_t job, std::size_t phases, int thread) {
  for (std::size_t i = 0; i < phases; ++i) {
    for (int t = 0; t < threads_; ++t)
      if (!work_off(i, (thread + t) % threads_, job, thread)) return;
    if (!wait_for(progress_[i].done, job)) return;
  }
}

// A thread's share of a phase: its owner begins at the front, anybody else at the back. False if the job is done and the
// share another's.
bool Pool::work_off(std::size_t phase, int owner, std::uint32_t job, int thread) {
  std::atomic<std::uint64_t>& left = share(phase, owner);
  for (std::uint64_t at = left.load();;) {
    const std::uint64_t next = at & MASK, end = at >> END & MASK;
    if (at >> JOB != job) return false;
    if (next == end) return true;
    const bool front = owner == thread;
    if (!left.compare_exchange_weak(at, front ? share_of(job, next + 1, end) : share_of(job, next, end - 1))) continue;
    carry_out(phase, front ? next : end - 1, thread);
    if (--progress_[phase].unfinished == 0) {
      open(phase + 1, phases_->size(), job);
      finish(phase, job);
    }
    at = left.load();
  }
}

// False if the job was done meanwhile, which a thread that slept may find.
bool Pool::wait_for(const std::atomic<std::uint32_t>& done, std::uint32_t job) const {
  for (std::uint32_t at = done.load(); at != job; at = done.load()) {
    if (job_.load() != job) return false;
    wait_while(done, at, BETWEEN_PHASES);
  }
  return true;
}

void Pool::carry_out(std::size_t phase, std::size_t chunk, int thread) {
  if (failed_.load(std::memory_order_relaxed)) return;
  try {
    (*phases_)[phase].work(chunk, thread);
  } catch (...) {
    fail();
  }
}

// Lets a phase begin, and the one behind it if there is nothing to do in it.
void Pool::open(std::size_t phase, std::size_t phases, std::uint32_t job) {
  for (; phase < phases; ++phase) {
    const std::size_t chunks = count(phase);
    progress_[phase].unfinished.store(static_cast<std::uint32_t>(chunks));
    progress_[phase].done.store(0);  // numbers of jobs come again, and the last one's must not look like this one's
    const auto among = static_cast<std::size_t>(threads_);
    for (std::size_t t = 0; t < among; ++t)
      share(phase, static_cast<int>(t)).store(share_of(job, (chunks * t + among - 1) / among, (chunks * (t + 1) + among - 1) / among));
    if (chunks) return;
    finish(phase, job);
  }
}

void Pool::finish(std::size_t phase, std::uint32_t job) {
  progress_[phase].done.store(job);
  progress_[phase].done.notify_all();
}

std::size_t Pool::count(std::size_t phase) {
  if (failed_.load()) return 0;
  try {
    const std::size_t chunks = (*phases_)[phase].chunks();
    if (chunks > MOST_CHUNKS) throw std::length_error(std::to_string(chunks) + " chunks are more than a phase may have");
    return chunks;
  } catch (...) {
    fail();
    return 0;
  }
}

// What is being thrown is kept for whoever runs the job, unless there is something already.
void Pool::fail() {
  const std::lock_guard lock(first_);
  if (!thrown_) thrown_ = std::current_exception();
  failed_ = true;
}

}  // namespace fewbits::runtime
