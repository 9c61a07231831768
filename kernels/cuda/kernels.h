// Launchers of the CUDA kernels: each enqueues one operation of kernels/*.h on `stream`.
//
// They read Table::host, never Table::device, for what a grid must cover; kernels read the device
// copies. A launch that is captured into a graph keeps its grid, and which kernels it is: a replay must come with
// tables of the shape that was recorded, of attention with as many units in each item, `reset` and `finish` as then.
// Results depend on no launch geometry, to the bit: sums have a fixed
// order, nothing is merged by atomics, and a row of a decode step (up to kFewGemmRows rows, up to
// kUnitQueries queries a KV head) does not depend on the other rows of the batch.
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
#include "kernels/chain.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/embed.h"
#include "kernels/fill_random.h"
#include "kernels/gemm.h"
#include "kernels/mailbox.h"
#include "kernels/merge_partials.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/soft_cap.h"
#include "kernels/swiglu.h"
#include "kernels/wide_shape.h"

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
// `tickets` is a word of device memory that is 0, before and afterwards; launches that may run at one time
// need one each.
[[nodiscard]] cudaError_t LaunchAttend(const AttendArgs& args, uint32_t* tickets,
                                       cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchCopyKvRows(const CopyKvRowsArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchSoftCap(const SoftCapArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchSample(const SampleArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchFillRandom(const FillRandomArgs& args, cudaStream_t stream);

[[nodiscard]] cudaError_t LaunchMergePartials(const MergePartialsArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchPostQueries(const PostQueriesArgs& args, cudaStream_t stream);
[[nodiscard]] cudaError_t LaunchAwaitPartials(const AwaitPartialsArgs& args, cudaStream_t stream);

// LaunchAttend()'s way for items of few queries; the others it leaves out.
[[nodiscard]] cudaError_t LaunchUnitAttend(const AttendArgs& args, uint32_t* tickets,
                                           cudaStream_t stream);
// LaunchGemm()'s way for a decode step's rows, where IsSkinny().
bool IsSkinny(const GemmArgs& args);
[[nodiscard]] cudaError_t LaunchSkinnyGemm(const GemmArgs& args, cudaStream_t stream);
// REQUIRES: IsSkinny(args.gemm), as many columns of c as the width of swiglu, twice.
[[nodiscard]] cudaError_t LaunchGatedGemm(const GatedGemmArgs& args, cudaStream_t stream);
// A chain's first operations that one kernel does, as many as that: 0 where there is no such kernel for the
// first of them.
size_t ChainLength(const ChainOp* ops, size_t count);
// `words`: kChainWords of device memory that are 0, before and afterwards; launches that may run at one time
// need some each. No other launch may wait for one that has not ended, but on the same stream.
// REQUIRES: ChainLength(ops, count) == count.
inline constexpr int kChainWords = 24;
[[nodiscard]] cudaError_t LaunchChain(const ChainOp* ops, size_t count, uint32_t* words,
                                      cudaStream_t stream);
// Reads `bytes` of device memory, a multiple of kReadMemoryBytes, as fast as the card can; what
// benches compare with. `never` is a word that is not written in practice.
inline constexpr int64_t kReadMemoryBytes = 32768;
[[nodiscard]] cudaError_t LaunchReadMemory(const void* data, int64_t bytes, uint32_t* never,
                                           cudaStream_t stream);
// ---- What is around a library's fused kernel for attention of many rows (kernels/wide_shape.h).
// Every pointer is aligned to 16 bytes, and so is every row of q, out and state.

// Rows of q, scaled, as bfloat16: row r of head h to `to` + (h * row_capacity + r) * head_dim. What
// no row or head fills becomes zero.
struct WideQueriesArgs {
  const float* q = nullptr;  // the first row of the first head
  int64_t q_stride = 0;
  BFloat16* to = nullptr;  // [head_capacity, row_capacity, head_dim]
  int64_t rows = 0;
  int64_t row_capacity = 0;
  int32_t heads = 0;
  int32_t head_capacity = 0;
  int32_t head_dim = 0;
  float scale = 0;
  bool backwards = false;  // the last row first
};
[[nodiscard]] cudaError_t LaunchWideQueries(const WideQueriesArgs& args, cudaStream_t stream);

// The keys [begin, begin + count) of some heads, wherever they lie, one head's behind the other's.
// Rows behind the last key become zero, so that a masked product with them is.
struct WideKeysArgs {
  struct Head {
    int32_t span_begin = 0;  // spans that hold the keys, in the order of positions
    int32_t span_count = 0;
    int32_t kv_head = 0;
  };
  const KvSpan* spans = nullptr;
  Head heads[kMaxWideHeads];
  int32_t num_heads = 0;
  int32_t head_dim = 0;
  int64_t begin = 0;
  int64_t count = 0;
  int64_t row_capacity = 0;
  BFloat16* keys = nullptr;  // [num_heads, row_capacity, head_dim]
  BFloat16* values = nullptr;
  int32_t* lengths = nullptr;  // if given, becomes {query_rows, count}
  int32_t query_rows = 0;
  bool backwards = false;  // the last key first
};
[[nodiscard]] cudaError_t LaunchWideKeys(const WideKeysArgs& args, cudaStream_t stream);

// Folds partials, each the normalised result `o` of some keys and the logarithm of their sum, into
// the states of the rows, in their order; after which U is empty.
struct WideFoldArgs {
  struct Partial {
    const BFloat16* o = nullptr;  // [heads, row_capacity, head_dim]
    const float* lse = nullptr;   // [heads, row_capacity]
    int64_t rows = 0;             // that it is of: the others are not changed by it
    bool backwards = false;       // the last of them is its first
  };
  Partial partials[kWidePartials];
  int32_t num_partials = 0;
  int32_t heads = 0;
  int32_t head_dim = 0;
  int32_t num_q_heads = 0;
  int64_t rows = 0;
  int64_t row_capacity = 0;
  float* state = nullptr;  // of the first row's first head
  Activations out;         // likewise
  bool reset = false;      // the state before is the empty one
  bool finish = false;     // the result goes to out, and the states are left as they are
};
[[nodiscard]] cudaError_t LaunchWideFold(const WideFoldArgs& args, cudaStream_t stream);

// Parts of LoadKernels(), one in each source file.
[[nodiscard]] cudaError_t LoadAttend();
[[nodiscard]] cudaError_t LoadChain();
[[nodiscard]] cudaError_t LoadElementwise();
[[nodiscard]] cudaError_t LoadFillRandom();
[[nodiscard]] cudaError_t LoadGemm();
[[nodiscard]] cudaError_t LoadKvRows();
[[nodiscard]] cudaError_t LoadMailbox();
[[nodiscard]] cudaError_t LoadReadMemory();
[[nodiscard]] cudaError_t LoadSample();
[[nodiscard]] cudaError_t LoadSkinnyGemm();
[[nodiscard]] cudaError_t LoadUnitAttend();
[[nodiscard]] cudaError_t LoadWideAttention();

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_KERNELS_H_
