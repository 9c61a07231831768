// What the machine can do, measured: the denominators of every ratio that the bench prints.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_CEILINGS_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_CEILINGS_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "common/segment/mapped_region.h"
#include "kernels/cpu/team.h"
#include "services/headroom/bench/costs.h"

namespace headroom {

class CeilingProbe {
 public:
  virtual ~CeilingProbe() = default;
  // Each figure is the best of at least three measurements. The measured device must be idle.
  virtual absl::StatusOr<Ceilings> Measure() = 0;
};

// Measures on a CPU device of its own, with as many threads as the measured one has. Keeps its
// buffers (half a GiB, larger than any cache) between measurements. Not thread-safe.
class CpuCeilingProbe : public CeilingProbe {
 public:
  static absl::StatusOr<std::unique_ptr<CpuCeilingProbe>> Create(int threads);
  ~CpuCeilingProbe() override;

  // Takes about a second.
  absl::StatusOr<Ceilings> Measure() override;

 private:
  explicit CpuCeilingProbe(int threads) : readers_(threads) {}
  absl::Status Init(int threads);
  // The real kernel at several wide shapes.
  absl::StatusOr<double> GemmFlops();
  // One thread, mapped memory to arena, as the copy stream does it.
  absl::StatusOr<double> CopyBytes();

  kernels::CpuTeam readers_;
  std::unique_ptr<Device> device_;
  StreamId compute_;
  StreamId copy_;
  EventId computed_;
  EventId copied_;
  float* a_ = nullptr;
  kernels::BFloat16* w_ = nullptr;
  float* c_ = nullptr;
  uint8_t* arena_buffer_ = nullptr;
  MappedRegion mapped_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_CEILINGS_H_
