#include "common/device/cuda/copies.h"

#include <cstddef>
#include <cstdint>

namespace headroom {
namespace {

bool IsDense(const CopyArgs& copy) {
  return copy.height == 1 || (copy.width_bytes == copy.src_pitch_bytes &&
                              copy.width_bytes == copy.dst_pitch_bytes);
}

// Pieces that go to the driver in one call.
class Batch {
 public:
  explicit Batch(cudaStream_t stream) : stream_(stream) {}

  cudaError_t Add(void* dst, const void* src, int64_t bytes) {
    if (count_ == kPieces) {
      if (const cudaError_t error = Enqueue(); error != cudaSuccess) return error;
    }
    dsts_[count_] = dst;
    srcs_[count_] = src;
    sizes_[count_++] = static_cast<size_t>(bytes);
    return cudaSuccess;
  }
  cudaError_t Enqueue() {
    if (count_ == 0) return cudaSuccess;
    cudaMemcpyAttributes attributes = {};
    attributes.srcAccessOrder = cudaMemcpySrcAccessOrderStream;
    attributes.flags = cudaMemcpyFlagPreferOverlapWithCompute;
    size_t from_first = 0;
    const size_t count = count_;
    count_ = 0;
    return cudaMemcpyBatchAsync(dsts_, srcs_, sizes_, count, &attributes, &from_first, 1, stream_);
  }

 private:
  static constexpr size_t kPieces = 64;

  const cudaStream_t stream_;
  size_t count_ = 0;
  void* dsts_[kPieces];
  const void* srcs_[kPieces];
  size_t sizes_[kPieces];
};

}  // namespace

cudaError_t EnqueueCopy(const CopyArgs& a, cudaStream_t stream) {
  if (IsDense(a)) {
    return cudaMemcpyAsync(a.dst, a.src, static_cast<size_t>(a.width_bytes * a.height),
                           cudaMemcpyDefault, stream);
  }
  return cudaMemcpy2DAsync(a.dst, static_cast<size_t>(a.dst_pitch_bytes), a.src,
                           static_cast<size_t>(a.src_pitch_bytes),
                           static_cast<size_t>(a.width_bytes), static_cast<size_t>(a.height),
                           cudaMemcpyDefault, stream);
}

cudaError_t EnqueueCopies(absl::Span<const CopyArgs> copies, cudaStream_t stream) {
  Batch batch(stream);
  for (const CopyArgs& a : copies) {
    if (a.width_bytes == 0 || a.height == 0) continue;
    const int64_t rows = IsDense(a) ? 1 : a.height;
    const int64_t bytes = a.width_bytes * (a.height / rows);
    for (int64_t row = 0; row < rows; ++row) {
      const cudaError_t error = batch.Add(static_cast<uint8_t*>(a.dst) + row * a.dst_pitch_bytes,
                                          static_cast<const uint8_t*>(a.src) + row * a.src_pitch_bytes,
                                          bytes);
      if (error != cudaSuccess) return error;
    }
  }
  return batch.Enqueue();
}

}  // namespace headroom
