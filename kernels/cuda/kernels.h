// Launchers of the CUDA kernels: each enqueues one operation of kernels/*.h on `stream`.
//
// They read Table::host, never Table::device, for what a grid must cover; kernels read the device
// copies. A launch that is captured into a graph keeps its grid: a replay must come with tables of
// the shape that was recorded. Results depend on no launch geometry, to the bit: sums have a fixed
// order, nothing is merged by atomics, and a row's results do not depend on the other rows of the
// batch.
//
// Gemm and Embed read a weight matrix as it is published, row-major [n, k]; the padding that
// PackedWeightBytes() counts follows it.
//
// Errors: what the launch returned (cudaErrorInvalidValue for shapes no kernel is made for).
#ifndef HEADROOM_KERNELS_CUDA_KERNELS_H_
#define HEADROOM_KERNELS_CUDA_KERNELS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernels/attention.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/embed.h"
#include "kernels/fill_random.h"
#include "kernels/gemm.h"
#include "kernels/mailbox.h"
#include "kernels/merge_partials.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/swiglu.h"

namespace headroom::kernels::cuda {

// Loads every kernel and sets what it needs once. To be called before work is enqueued: a kernel
// that is loaded at its first launch waits for the device to be idle, and a waiting stream never
// is.
[[nodiscard]] cudaError_t LoadKernels();

[[nodiscard]] cudaError_t LaunchEmbed(const EmbedArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchRmsNorm(const RmsNormArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchGemm(const GemmArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchSwiGlu(const SwiGluArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchRopeTable(const RopeTableArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchRopeAppend(const RopeAppendArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAttend(const AttendArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchCopyKvRows(const CopyKvRowsArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchSample(const SampleArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchFillRandom(const FillRandomArgs& args, cudaStream_t stream);

[[nodiscard]] cudaError_t LaunchMergePartials(const MergePartialsArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchPostQueries(const PostQueriesArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAwaitPartials(const AwaitPartialsArgs& args, cudaStream_t stream);

// LaunchAttend()'s way for items of few queries; the others it leaves out.
[[nodiscard]] cudaError_t LaunchUnitAttend(const AttendArgs& args, cudaStream_t stream);
// LaunchGemm()'s way for a decode step's rows, where IsSkinny().
bool IsSkinny(const GemmArgs& args);
[[nodiscard]] cudaError_t LaunchSkinnyGemm(const GemmArgs& args, cudaStream_t stream);
// Reads `bytes` of device memory, a multiple of kReadMemoryBytes, as fast as the card can; what
// benches compare with. `never` is a word that is not written in practice.
inline constexpr int64_t kReadMemoryBytes = 32768;
[[nodiscard]] cudaError_t LaunchReadMemory(const void* data, int64_t bytes, uint32_t* never,
                                           cudaStream_t stream);

// Parts of LoadKernels(), one in each source file.
[[nodiscard]] cudaError_t LoadAttend();
[[nodiscard]] cudaError_t LoadElementwise();
[[nodiscard]] cudaError_t LoadFillRandom();
[[nodiscard]] cudaError_t LoadGemm();
[[nodiscard]] cudaError_t LoadKvRows();
[[nodiscard]] cudaError_t LoadMailbox();
[[nodiscard]] cudaError_t LoadReadMemory();
[[nodiscard]] cudaError_t LoadSample();
[[nodiscard]] cudaError_t LoadSkinnyGemm();
[[nodiscard]] cudaError_t LoadUnitAttend();

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_KERNELS_H_
