// Tasks in a row that go to the members of a team in runs, so that each streams what it reads, of
// lengths that shrink towards the end, so that all end together even if a core is also wanted
// elsewhere (by a copy stream, say): guided self-scheduling, Polychronopoulos and Kuck, IEEE ToC
// 1987.
#ifndef HEADROOM_KERNELS_CPU_RUNS_H_
#define HEADROOM_KERNELS_CPU_RUNS_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

struct Runs {
  int64_t total;
  int members;

  int64_t End(int64_t begin) const {
    return begin + std::max<int64_t>(1, (total - begin) / (2 * members));
  }
  int64_t Count() const {
    int64_t count = 0;
    for (int64_t at = 0; at < total; at = End(at)) ++count;
    return count;
  }
  int64_t Begin(int64_t run) const {
    int64_t at = 0;
    for (; run > 0; --run) at = End(at);
    return at;
  }
};

// Calls fn(begin, end) for each run of tasks of [0, total), on the members as they get free.
template <typename Fn>
void ForEachRun(CpuTeam& team, int64_t total, Fn&& fn) {
  const Runs runs{total, team.size()};
  team.ForEach(runs.Count(), [&](int64_t run) {
    const int64_t begin = runs.Begin(run);
    fn(begin, runs.End(begin));
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_RUNS_H_
