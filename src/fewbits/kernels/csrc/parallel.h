// Work on several threads, for calls that take milliseconds: threads are made for one call and end with it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <thread>
#include <vector>

namespace fewbits {

// Calls work(i) for every i below count. Whoever is done takes the next one, so a thread that the system holds up does
// not hold up the others.
template <typename Work>
void parallel_for(std::size_t count, int threads, Work&& work) {
  std::atomic<std::size_t> next{0};
  auto run = [&] {
    for (std::size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> others;
  const auto wanted = std::min<std::size_t>(count, static_cast<std::size_t>(std::max(1, threads)));
  for (std::size_t t = 1; t < wanted; ++t) others.emplace_back(run);
  run();
  for (auto& thread : others) thread.join();
}

}  // namespace fewbits
