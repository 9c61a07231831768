// Attention on the GPU: items of many rows through cuDNN where it is there, all others by our own
// kernels. Not thread-safe: cuDNN's handle is one thread's at a time. What is enqueued on several
// streams at once must come with scratch of its own.
//
// A job's rows (wide_jobs.h) go through block by block, with as many heads as a square takes: q
// becomes bfloat16, and the square is attended to; before that, with rows and keys backwards, the edge,
// which so is a square as well. Then with as many heads as a piece takes: each
// piece of keys that the block sees is attended to, read in place where it is all that a call of one
// head takes and lies in one run, else gathered, with zeros behind; partials are folded into the
// states in the order of positions, the square's last, kWidePartials at once, the last time into the
// result. Pieces go in two lanes (wide_shape.h), which begin and end with the block. All is in scratch.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_WIDE_ATTEND_H_
#define HEADROOM_COMMON_DEVICE_CUDA_WIDE_ATTEND_H_

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/cudnn_sdpa.h"
#include "common/device/cuda/wide_jobs.h"
#include "common/device/device.h"
#include "kernels/attention.h"

namespace headroom {

class WideAttend {
 public:
  // Device::PrepareWideAttend; enqueues one run of each plan.
  absl::Status Prepare(const kernels::WideShape& shape, float* scratch, int64_t scratch_floats,
                       cudaStream_t stream);
  // Device::Attend; tickets: of the stream, see kernels::cuda::LaunchAttend().
  absl::Status Attend(const kernels::AttendArgs& args, uint32_t* tickets, cudaStream_t stream);

  WideAttendUse use() const;
  // Thread-safe, so that who only counts does not wait for an Attend.
  int64_t plans_built() const { return plans_built_; }

 private:
  struct Plans {
    kernels::WideClass of;
    int piece = -1;    // kWidePieceTokens keys
    int lengths = -1;  // up to as many
    int square = -1;   // as many keys as rows, with square_heads
  };
  struct Prepared {
    kernels::WideShape shape;
    kernels::WideClasses classes;
    kernels::WideLayout layout;
    std::vector<Plans> plans;

    explicit Prepared(const kernels::WideShape& its)
        : shape(its), classes(its), layout(its) {}
    const Plans& For(int64_t rows) const;
  };
  struct Pass;

  absl::Status Open();
  absl::Status BuildPlans(Prepared& prepared);
  absl::Status WarmUp(const Prepared& prepared, uint8_t* scratch, cudaStream_t stream);
  const Prepared* Find(const kernels::AttendArgs& args) const;
  absl::Status AttendBlock(const Pass& pass, const WideBlock& block);
  absl::Status Queries(const Pass& pass, int64_t row, int64_t count, int32_t heads,
                       bool backwards);
  // The block's square, or its edge.
  absl::Status AttendSquare(const Pass& pass, const WideBlock& block, const WidePiece& piece);
  // Heads [head, head + heads) of the pass's, in a lane: lane 0 is the pass's stream.
  absl::Status AttendPieces(const Pass& pass, const WideBlock& block, int32_t head, int32_t heads,
                            int32_t lane);
  absl::Status AttendPiece(const Pass& pass, const WideBlock& block, const WidePiece& piece,
                           int32_t head, int32_t heads, int32_t lane, const SdpaBuffers& buffers);
  absl::Status Gather(const Pass& pass, const WideBlock& block, const WidePiece& piece,
                      int32_t head, int32_t heads, int64_t capacity, const SdpaBuffers& to,
                      cudaStream_t stream);

  CudaStream aside_;  // lane 1
  CudaEvent forked_;
  CudaEvent joined_;
  bool opened_ = false;
  absl::Status open_status_;
  std::unique_ptr<CudnnSdpa> cudnn_;
  std::vector<std::unique_ptr<Prepared>> prepared_;
  int64_t calls_ = 0;
  std::atomic<int64_t> plans_built_{0};
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_WIDE_ATTEND_H_
