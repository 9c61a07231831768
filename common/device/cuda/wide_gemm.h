// Matrix products of many rows through cuBLASLt, which is opened at run time.
//
// One algorithm for each shape class, {n, k, rows rounded up to a power of two, type of c, accumulate},
// chosen at start, none that splits k: a row's bits depend on the class, not on what else runs. Run() is
// for one thread at a time; Prepare() for start-up, or for a shape that start-up did not know.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_WIDE_GEMM_H_
#define HEADROOM_COMMON_DEVICE_CUDA_WIDE_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/gemm.h"

namespace headroom {

class WideGemm {
 public:
  // What an algorithm may use beside its operands. NVIDIA's advice for Hopper.
  static constexpr int64_t kWorkspaceBytes = int64_t{32} << 20;
  // Classes are planned for kernels::kFewGemmRows < rows <= kMaxRows; longer ones run in parts.
  static constexpr int64_t kMaxRows = 8192;

  // `workspace`: kWorkspaceBytes of device memory, 256-byte aligned, in use as long as this lives.
  // UNAVAILABLE where there is no cuBLASLt of CUDA 13.
  static absl::StatusOr<std::unique_ptr<WideGemm>> Open(uint8_t* workspace);
  ~WideGemm();

  // Chooses an algorithm for each class of an [n, k] matrix, and loads its code by running it on one
  // row of whatever is in `weights` (n x k) and the workspace.
  absl::Status Prepare(int64_t n, int64_t k, const uint8_t* weights, cudaStream_t stream);
  // Whether Run() takes it: bfloat16, more than kernels::kFewGemmRows rows, 16-byte rows.
  static bool Takes(const kernels::GemmArgs& args) { return Takes(args, false); }
  absl::Status Run(const kernels::GemmArgs& args, cudaStream_t stream);

  // Algorithms chosen so far: constant once steps run.
  int64_t plans() const;

 private:
  struct Impl;
  static bool Takes(const kernels::GemmArgs& args, bool any_rows);
  explicit WideGemm(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_WIDE_GEMM_H_
