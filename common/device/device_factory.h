// Makes the device that a flag names. The only place that knows which devices were compiled in.
#ifndef HEADROOM_COMMON_DEVICE_DEVICE_FACTORY_H_
#define HEADROOM_COMMON_DEVICE_DEVICE_FACTORY_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/device/device.h"

namespace headroom {

struct DeviceOptions {
  std::string kind = "auto";  // "auto", "cpu" or "cuda"
  // The arena: everything that the worker ever keeps on the device. 0, on cuda only: what is free
  // less 1 GiB.
  int64_t memory_bytes = 0;
  // For tests: the CPU device delays each operation, the CUDA device each copy.
  std::optional<uint64_t> delay_seed;
  // CPU device only.
  int compute_threads = 1;
  std::string fail_file;
};

// "cuda" where `kind` is "auto", this binary has the CUDA device and the host has an NVIDIA driver
// (/dev/nvidiactl); "cpu" where it has not; any other `kind` as it is.
std::string ChooseDevice(absl::string_view kind);
// Device::product_type() of a chosen device, without making one.
kernels::ElementType ProductTypeOf(absl::string_view chosen_kind);

// Whether CreateDevice() would find a driver, where one is asked for. Errors as there.
absl::Status CheckDevice(absl::string_view kind);

// INVALID_ARGUMENT: `kind` is none of the three, or memory_bytes or compute_threads cannot be.
// UNAVAILABLE: the CUDA device is asked for and this binary, the driver or the card cannot give it.
// RESOURCE_EXHAUSTED: no memory for the arena. UNIMPLEMENTED: the CPU device on a processor that is
// too old.
absl::StatusOr<std::unique_ptr<Device>> CreateDevice(const DeviceOptions& options);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_DEVICE_FACTORY_H_
