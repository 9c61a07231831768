#include "services/headroom/bench/bench_segment.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/segment_format.h"
#include "common/status.h"
#include "kernels/cpu/team.h"
#include "services/headroom/bench/host_memory.h"

namespace headroom {
namespace {

// Beside the keys: what follows them, and what the driver notes of every page that is pinned (measured while 112 GiB
// were).
constexpr int64_t kLeftToOthers = int64_t{128} << 20;
constexpr int64_t kNotesOfAPage = 78;
constexpr int64_t kPageBytes = 4096;

}  // namespace

absl::StatusOr<std::unique_ptr<BenchSegment>> BenchSegment::Create(Device& device, int64_t bytes,
                                                                   int32_t threads) {
  // A system that runs out kills the process without a word.
  const int64_t available = AvailableHostBytes();
  const int64_t left = kLeftToOthers + bytes / kPageBytes * kNotesOfAPage;
  if (bytes > available - left) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the keys of the longest item take ", bytes, " bytes of host memory; ", available,
                     " are available, ", left, " of them for everything else"));
  }
  HEADROOM_ASSIGN_OR_RETURN(MappedRegion region, MapSharedMemory(bytes, "headroom-bench-segment"));
  std::unique_ptr<BenchSegment> segment(new BenchSegment(device, std::move(region)));
  segment->background_ =
      std::thread([raw = segment.get(), threads] { raw->Prepare(threads); });
  return segment;
}

BenchSegment::~BenchSegment() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
  }
  background_.join();
  MutexLock lock(&mutex_);
  for (int64_t at = 0; at < ready_bytes_; at += kRegistrationBytes) {
    device_.UnregisterHost(data() + at).IgnoreError();
  }
}

absl::Status BenchSegment::Await(int64_t end) {
  MutexLock lock(&mutex_);
  while (ready_bytes_ < end && status_.ok()) more_ready_.Wait(&mutex_);
  return ready_bytes_ < end ? status_ : absl::OkStatus();
}

void BenchSegment::Prepare(int32_t threads) {
  kernels::CpuTeam team(threads);
  for (int64_t at = 0; at < bytes(); at += kRegistrationBytes) {
    const int64_t piece = std::min(kRegistrationBytes, bytes() - at);
    region_.MakeHugePages(at, piece);
    FillWithKeys(data() + at, piece, team);
    const absl::Status status = device_.RegisterHost(data() + at, piece);
    MutexLock lock(&mutex_);
    if (status.ok()) ready_bytes_ = at + piece;
    status_ = status;
    more_ready_.SignalAll();
    if (!status.ok() || stop_) return;
  }
}

}  // namespace headroom
