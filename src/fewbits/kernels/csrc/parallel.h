// Work on several threads, for calls that take milliseconds: threads are made for one call and end with it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fewbits {

// Calls work(i) for every i below count. Whoever is done takes the next one, so a thread that the system holds up does
// not hold up the others. What work throws ends the loop and is thrown again here; threads that the system refuses to
// make are done without.
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
  std::vector<std::thread> others;
  const auto wanted = std::min<std::size_t>(count, static_cast<std::size_t>(std::max(1, threads)));
  try {
    for (std::size_t t = 1; t < wanted; ++t) others.emplace_back(run);
  } catch (const std::exception&) {
  }
  run();
  for (auto& thread : others) thread.join();
  if (thrown) std::rethrow_exception(thrown);
}

}  // namespace fewbits
