// Work on several threads: OpenMP's where it is there, else threads that are made for one call and end with it.
//
// torch runs its own work by OpenMP, and its threads go on spinning for milliseconds after it. Where they are the same
// threads (libgomp is loaded once) that costs nothing; threads of our own would have to share the cores with them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fewbits {

#ifdef _OPENMP
// OpenMP's threads for whoever cannot be compiled with it (runtime/csrc/pool.h has the same type): calls work(data, t) on
// up to so many of them at once, t = 0 on the one that asks, and returns when all have returned.
using Team = void (*)(int threads, void (*work)(void* data, int thread), void* data);
inline const Team openmp_team = [](int threads, void (*work)(void* data, int thread), void* data) {
#pragma omp parallel num_threads(threads)
  work(data, omp_get_thread_num());
};
#endif

// Calls work(i) for every i below count. Whoever is done takes the next one, so a thread that the system holds up does
// not hold up the others. What work throws ends the loop and is thrown again here.
template <typename Work>
void parallel_for(std::size_t count, int threads, Work&& work) {
  std::atomic<std::size_t> next{0};
  std::exception_ptr thrown;
  std::mutex first;
  auto run = [&] {
    try {
      for (std::size_t i = next++; i < count; i = next++) work(i);
    } catch (...) {
      next = count;
      const std::lock_guard lock(first);
      if (!thrown) thrown = std::current_exception();
    }
  };
  const auto wanted = std::min<std::size_t>(count, static_cast<std::size_t>(std::max(1, threads)));
#ifdef _OPENMP
#pragma omp parallel num_threads(static_cast<int>(wanted)) if (wanted > 1)
  run();
#else
  std::vector<std::thread> others;
  try {
    for (std::size_t t = 1; t < wanted; ++t) others.emplace_back(run);
  } catch (const std::exception&) {
  }
  run();
  for (auto& thread : others) thread.join();
#endif
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace fewbits
