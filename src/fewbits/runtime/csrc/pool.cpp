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

std::uint64_t opened(std::uint32_t job, std::size_t chunks) { return static_cast<std::uint64_t>(job) << 40 | chunks << 20; }

}  // namespace

Pool::Pool(int threads) : progress_(new Progress[MOST_PHASES]) {
  if (threads < 1) throw std::invalid_argument(std::to_string(threads) + " threads; at least one has to do the work");
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

void Pool::run(const std::vector<Phase>& phases) {
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
  job_.notify_all();
  work(job, phases.size(), 0);
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
    auto& next = progress_[i].next;
    for (std::uint64_t at = next.load();;) {
      if (at >> 40 != job) return;  // the job is done, and this another's
      if ((at & MASK) >= (at >> 20 & MASK)) break;
      if (!next.compare_exchange_weak(at, at + 1)) continue;
      carry_out(i, at & MASK, thread);
      if (++progress_[i].finished == (at >> 20 & MASK)) {
        open(i + 1, phases_->size(), job);
        finish(i, job);
      }
      at = next.load();
    }
    if (!wait_for(progress_[i].done, job)) return;
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
    progress_[phase].finished.store(0);
    progress_[phase].done.store(0);  // numbers of jobs come again, and the last one's must not look like this one's
    progress_[phase].next.store(opened(job, chunks));
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
