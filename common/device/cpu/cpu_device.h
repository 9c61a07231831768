// The device that runs everywhere: host memory for device memory, a thread for each stream.
//
// Streams are real: each has a thread and a bounded queue of fixed-size operations (no allocation
// when enqueuing or running), and only events order them, so that ThreadSanitizer reports a missing
// event here as the data race that it would be on a GPU. Operations of the stream named "compute" run
// on a team of threads; the others on their own thread alone. It computes in float32 from bfloat16
// weights and keys.
#ifndef HEADROOM_COMMON_DEVICE_CPU_CPU_DEVICE_H_
#define HEADROOM_COMMON_DEVICE_CPU_CPU_DEVICE_H_

#include <cstdint>
#include <memory>
#include <optional>

#include "absl/status/statusor.h"
#include "common/device/device.h"

namespace headroom {

struct CpuDeviceOptions {
  int64_t arena_bytes = 0;
  // Threads of the compute stream's team, its own included.
  int compute_threads = 1;
  // For tests: each operation is delayed by 0 to 5 ms, drawn from this seed. What it computes may
  // not change.
  std::optional<uint64_t> delay_seed;
  // For tests: once there is a file of this name the device is lost, as a card can be.
  std::string fail_file;
};

// RESOURCE_EXHAUSTED if the arena cannot be mapped; UNIMPLEMENTED on a processor without AVX2.
absl::StatusOr<std::unique_ptr<Device>> CreateCpuDevice(const CpuDeviceOptions& options);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CPU_CPU_DEVICE_H_
