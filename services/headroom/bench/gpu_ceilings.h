// The ceilings of a GPU: measured on the device itself, through the operations that the model runs.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_GPU_CEILINGS_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_GPU_CEILINGS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "common/segment/mapped_region.h"
#include "kernels/cpu/team.h"
#include "kernels/wide_shape.h"
#include "services/headroom/bench/ceilings.h"

namespace headroom {

// What is run; the defaults are Llama-3-8B's MLP and attention at the longest chunk. With a model's heads
// attention goes by what the device has prepared for it.
struct GpuProbeShape {
  int64_t gemm_m = 8192, gemm_n = 14336, gemm_k = 4096;
  kernels::WideShape attend = {8192, 32, 8, 128};
  std::vector<int64_t> attend_keys = {8192, 24576};  // each at least the rows, which are the last
  // Device memory that is read, and host memory, at least: more than the caches hold (of a host's processor
  // 320 MB and more).
  int64_t least_bytes = int64_t{1} << 30;
  int64_t copy_bytes = int64_t{1} << 30;  // of one measurement of a copy rate
};

// Works on a device that is in use (and idle while it measures), with memory from its arena: a second
// one would load libraries of its own. Not thread-safe.
class GpuCeilingProbe : public CeilingProbe {
 public:
  using ReadRate = std::function<absl::StatusOr<double>(uint8_t* data, int64_t bytes)>;

  // What Create() allocates in the arena.
  static int64_t ArenaBytes(const GpuProbeShape& shape);
  // What Create() wants of host memory.
  static int64_t HostBytes(const GpuProbeShape& shape);

  // `host`: HostBytes() that the device may name, filled with something; `threads` read it, and Measure() leaves
  // random bfloat16 numbers in its second half. `read_rate` is CardReadRate(), or what stands for it where there is no
  // card. Device and host memory outlive the probe.
  static absl::StatusOr<std::unique_ptr<GpuCeilingProbe>> Create(Device& device, const GpuProbeShape& shape,
                                                                 uint8_t* host, int threads, ReadRate read_rate);

  // Takes about two seconds on a GPU.
  absl::StatusOr<Ceilings> Measure() override;

 private:
  GpuCeilingProbe(Device& device, const GpuProbeShape& shape, uint8_t* host, int threads, ReadRate read_rate)
      : device_(device),
        shape_(shape),
        readers_(threads),
        read_rate_(std::move(read_rate)),
        host_(host),
        host_half_(HostBytes(shape) / 2) {}
  absl::Status Init();
  absl::Status Await(StreamId stream, EventId event);

  absl::StatusOr<double> GemmFlops();
  absl::StatusOr<double> AttentionFlops(int64_t keys);
  // Counts what is read and what is written.
  absl::StatusOr<double> CopyWithinDevice();
  absl::Status EnqueueCopy(StreamId stream, int64_t at, int64_t piece_bytes, bool to_device);
  // Bytes/s in pieces of `piece_bytes`; of both directions in sum where both are asked for.
  absl::StatusOr<double> CopyRate(int64_t piece_bytes, bool to_device, bool from_device);
  // In sum: copies to the device, `copy_rate` of them for kBothSeconds, beside threads that read.
  absl::StatusOr<double> BothLinksRate(double copy_rate);

  Device& device_;
  const GpuProbeShape shape_;
  kernels::CpuTeam readers_;
  const ReadRate read_rate_;

  StreamId compute_, in_, out_;
  EventId computed_, copied_in_, copied_out_, lead_copied_;
  // Two halves of one buffer of random bfloat16 numbers: what operations read and what they write.
  // Copies from the host go into the second, copies to it come from the first, so that no result is
  // ever read as an input.
  uint8_t* inputs_ = nullptr;
  uint8_t* results_ = nullptr;
  int64_t half_bytes_ = 0;
  uint8_t* const host_;      // copies to the device come from the first half, others go to the second
  const int64_t host_half_;  // bytes; no more than half_bytes_
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_GPU_CEILINGS_H_
