// How long something takes, of many runs.
#ifndef HEADROOM_TESTS_BENCH_BEST_SECONDS_H_
#define HEADROOM_TESTS_BENCH_BEST_SECONDS_H_

#include <algorithm>
#include <chrono>

namespace headroom::kernels {

struct RunSeconds {
  double best = 1e9;
  double total = 0;
  int runs = 0;
};

// Of the runs that fit into about a third of a second, at least 5.
template <typename Fn>
RunSeconds TimeRuns(Fn&& fn) {
  using Clock = std::chrono::steady_clock;
  RunSeconds seconds;
  while (seconds.runs < 5 || (seconds.total < 0.35 && seconds.runs < 2000)) {
    const auto begin = Clock::now();
    fn();
    const double one = std::chrono::duration<double>(Clock::now() - begin).count();
    seconds.best = std::min(seconds.best, one);
    seconds.total += one;
    ++seconds.runs;
  }
  return seconds;
}

template <typename Fn>
double BestSeconds(Fn&& fn) {
  return TimeRuns(fn).best;
}

}  // namespace headroom::kernels

#endif  // HEADROOM_TESTS_BENCH_BEST_SECONDS_H_
