// Rows of keys and values to host memory: long runs by the card's copy engines, all else by a kernel.
//
// A kernel that waits for PCIe keeps multiprocessors from the persistent kernels of a prefill chunk,
// which then take two rounds: copies of 1 MiB runs move at nearly the same rate and take none.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_COPY_KV_ROWS_H_
#define HEADROOM_COMMON_DEVICE_CUDA_COPY_KV_ROWS_H_

#include <cuda_runtime_api.h>

#include "kernels/copy_kv_rows.h"

namespace headroom {

cudaError_t EnqueueCopyKvRows(const kernels::CopyKvRowsArgs& args, cudaStream_t stream);

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_COPY_KV_ROWS_H_
