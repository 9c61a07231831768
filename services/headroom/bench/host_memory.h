// Host memory of the bench: mapped as a store's is, filled with keys, read by all threads.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_HOST_MEMORY_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_HOST_MEMORY_H_

#include <algorithm>
#include <chrono>
#include <cstdint>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/segment/mapped_region.h"
#include "common/status.h"
#include "kernels/cpu/team.h"

namespace headroom {

// Shared memory as a store's data file is mapped; zeroed, and not backed before it is written. Errors
// name `what`.
absl::StatusOr<MappedRegion> MapSharedMemory(int64_t bytes, absl::string_view what);

// What the system could still give away without swapping; int64's largest where it does not say.
int64_t AvailableHostBytes();

// Finite keys and values: bfloat16 in (-1, 1), a MiB of them over and over.
void FillWithKeys(uint8_t* data, int64_t bytes, kernels::CpuTeam& team);

// Reads every byte once, as fast as the team can.
void ReadHost(const uint8_t* data, int64_t bytes, kernels::CpuTeam& team);

// Bytes/s at which the team reads a region that is larger than the caches and not constant (memory
// that was never written is one page of zeros over and over, which a cache holds). Best of several.
double HostReadRate(const uint8_t* data, int64_t bytes, kernels::CpuTeam& team,
                    double least_seconds);

// Seconds of the fastest run of `fn`: of at least 3, and of as many as fit into `least_seconds`.
template <typename Fn>
absl::StatusOr<double> BestSeconds(double least_seconds, Fn&& fn) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  double total = 0;
  for (int run = 0; run < 3 || total < least_seconds; ++run) {
    const auto begin = Clock::now();
    HEADROOM_RETURN_IF_ERROR(fn());
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::min(best, seconds);
    total += seconds;
  }
  return best;
}

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_HOST_MEMORY_H_
