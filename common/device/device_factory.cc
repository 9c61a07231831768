#include "common/device/device_factory.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "common/device/card_probe.h"
#include "common/device/cpu/cpu_device.h"
#include "common/status.h"
#if HEADROOM_HAVE_CUDA
#include "common/device/cuda/cuda_device.h"
#endif

namespace headroom {
namespace {

#if HEADROOM_HAVE_CUDA
constexpr bool kHaveCuda = true;
absl::Status CheckCuda() { return CheckCudaDriver(); }
absl::StatusOr<std::unique_ptr<Device>> CreateCuda(const DeviceOptions& options) {
  return CreateCudaDevice(
      {.arena_bytes = options.memory_bytes, .delay_seed = options.delay_seed});
}
#else
constexpr bool kHaveCuda = false;
absl::Status CheckCuda() {
  return absl::UnavailableError("--device cuda: this binary was built without CUDA; use --device cpu");
}
absl::StatusOr<std::unique_ptr<Device>> CreateCuda(const DeviceOptions&) { return CheckCuda(); }
#endif

}  // namespace

#if !HEADROOM_HAVE_CUDA
absl::StatusOr<int64_t> CardMemoryInUse() {
  return absl::UnavailableError("this binary was built without CUDA");
}
absl::StatusOr<double> CardReadRate(uint8_t*, int64_t) {
  return absl::UnavailableError("this binary was built without CUDA");
}
#endif

std::string ChooseDevice(absl::string_view kind) {
  if (kind != "auto") return std::string(kind);
  return kHaveCuda && access("/dev/nvidiactl", F_OK) == 0 ? "cuda" : "cpu";
}

kernels::ElementType ProductTypeOf(absl::string_view chosen_kind) {
  return chosen_kind == "cuda" ? kernels::ElementType::kBFloat16 : kernels::ElementType::kFloat32;
}

absl::Status CheckDevice(absl::string_view kind) {
  const std::string chosen = ChooseDevice(kind);
  if (chosen != "cpu" && chosen != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrCat("--device '", kind, "', expected auto, cpu or cuda"));
  }
  return chosen == "cuda" ? CheckCuda() : absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Device>> CreateDevice(const DeviceOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckDevice(options.kind));
  const std::string kind = ChooseDevice(options.kind);
  if (options.memory_bytes < 0 || (options.memory_bytes == 0 && kind == "cpu")) {
    return absl::InvalidArgumentError(
        absl::StrCat("device memory must be positive, not ", options.memory_bytes, " bytes"));
  }
  if (kind == "cuda") return CreateCuda(options);
  if (options.compute_threads < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("compute threads must be at least 1, not ", options.compute_threads));
  }
  return CreateCpuDevice({.arena_bytes = options.memory_bytes,
                          .compute_threads = options.compute_threads,
                          .delay_seed = options.delay_seed,
                          .fail_file = options.fail_file});
}

}  // namespace headroom
