#include "common/device/cuda/copy_kv_rows.h"

#include <cstdint>

#include "kernels/cuda/kernels.h"

namespace headroom {
namespace {

using kernels::CopyKvItem;
using kernels::CopyKvRowsArgs;
using kernels::KvSpan;

// Shorter runs cost a copy engine more than they cost a kernel.
constexpr int64_t kLongRunBytes = int64_t{128} << 10;

// The row of the span's first position, or -1 if its rows wrap around.
int64_t FirstRow(const KvSpan& span) {
  const int64_t row = (span.first_pos - span.origin_pos) % span.capacity;
  return row + span.count <= span.capacity ? row : -1;
}

bool IsLong(const CopyKvItem& item, int32_t head_dim) {
  const KvLayout layout = {item.to.capacity, head_dim};
  return item.to.count * layout.RowBytes() >= kLongRunBytes && FirstRow(item.to) >= 0 &&
         FirstRow(CopyKvSource(item, head_dim)) >= 0;
}

// K of the first head, its V, K of the next ...: runs at one distance from each other on either side.
cudaError_t EnqueueRuns(const CopyKvItem& item, int32_t head_dim, cudaStream_t stream) {
  const KvSpan from = CopyKvSource(item, head_dim);
  const KvLayout source = {from.capacity, head_dim};
  const KvLayout target = {item.to.capacity, head_dim};
  const int32_t heads = item.to.kv_head_end - item.to.kv_head_begin;
  return cudaMemcpy2DAsync(
      item.to.base + target.KeyOffset(0, FirstRow(item.to)),
      static_cast<size_t>(target.HeadBytes() / 2),
      from.base + source.KeyOffset(0, FirstRow(from)), static_cast<size_t>(source.HeadBytes() / 2),
      static_cast<size_t>(item.to.count * target.RowBytes()), static_cast<size_t>(2 * heads),
      cudaMemcpyDefault, stream);
}

}  // namespace

cudaError_t EnqueueCopyKvRows(const CopyKvRowsArgs& args, cudaStream_t stream) {
  if (args.max_blocks == 0) return kernels::cuda::LaunchCopyKvRows(args, stream);
  for (int32_t i = 0; i < args.items.count;) {
    cudaError_t error = cudaSuccess;
    if (IsLong(args.items.host[i], args.head_dim)) {
      error = EnqueueRuns(args.items.host[i], args.head_dim, stream);
      ++i;
    } else {
      CopyKvRowsArgs some = args;
      some.items.host += i;
      some.items.device += i;
      for (some.items.count = 0; i < args.items.count; ++i, ++some.items.count) {
        if (IsLong(args.items.host[i], args.head_dim)) break;
      }
      error = kernels::cuda::LaunchCopyKvRows(some, stream);
    }
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace headroom
