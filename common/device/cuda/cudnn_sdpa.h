// cuDNN's fused attention of fixed shapes, as plans that are built once and run often.
//
// libcudnn.so.9 is opened when it is asked for: the program links no part of it. For an H100 cuDNN
// compiles the kernel of each plan (0.9 s on a slow core), for which it opens libnvrtc.so.13
// itself. Not thread-safe.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_CUDNN_SDPA_H_
#define HEADROOM_COMMON_DEVICE_CUDA_CUDNN_SDPA_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headroom {

struct SdpaShape {
  enum class Mask {
    kNone,
    kCausal,   // query i sees keys [0, i]
    kLengths,  // only the first lengths[0] queries and lengths[1] keys are there
  };
  int64_t rows = 0;
  int64_t keys = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  Mask mask = Mask::kNone;
  float soft_cap = 0;  // c > 0: of softmax(c tanh(q k)) v, else of softmax(q k) v
};

// Device memory, aligned to 16 bytes; all but lse and lengths are bfloat16.
struct SdpaBuffers {
  void* q = nullptr;  // [num_q_heads, rows, head_dim]
  void* k = nullptr;  // [num_kv_heads, keys, head_dim]
  void* v = nullptr;  // likewise
  void* o = nullptr;  // like q
  // [num_q_heads, rows] float32: the natural logarithm of a query's sum of exp(score)
  void* lse = nullptr;
  void* lengths = nullptr;  // int32, read where the shape's mask is kLengths
};

class CudnnSdpa {
 public:
  // UNAVAILABLE: there is no cuDNN 9.14 or later. INTERNAL: it fails.
  static absl::StatusOr<std::unique_ptr<CudnnSdpa>> Open();
  ~CudnnSdpa();

  // The index of a new plan for softmax(q k) v, unscaled, or with a soft cap. UNAVAILABLE if cuDNN has none whose
  // workspace is within `most_workspace_bytes`, or cannot compile it.
  absl::StatusOr<int> Build(const SdpaShape& shape, int64_t most_workspace_bytes);
  // Enqueues it. `workspace` has as many bytes as were allowed when the plan was built.
  absl::Status Run(int plan, const SdpaBuffers& buffers, void* workspace, cudaStream_t stream);

  int64_t plans() const;                    // built so far
  int64_t workspace_bytes(int plan) const;  // that it takes
  std::string name(int plan) const;         // of cuDNN's engine and its settings

 private:
  struct Library;  // keeps cuDNN's headers out of this one
  explicit CudnnSdpa(std::unique_ptr<Library> library);

  const std::unique_ptr<Library> library_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_CUDNN_SDPA_H_
