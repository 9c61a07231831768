// What the attention kernels share: where an item's keys and queries lie.
#ifndef HEADROOM_KERNELS_CUDA_ATTENTION_PARTS_CUH_
#define HEADROOM_KERNELS_CUDA_ATTENTION_PARTS_CUH_

#include <math_constants.h>

#include <type_traits>

#include "kernels/attention.h"
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/fold_weights.cuh"

namespace headroom::kernels::cuda {

inline constexpr int kBlock = static_cast<int>(kBlockTokens);
inline constexpr int64_t kMaxGridY = 65535;

// Up to so many queries (rows x GQA group) of a KV head an item's keys are computed unit by unit
// (unit_attention.cu), more are walked (attention.cu). By item, so that a sequence's bits do not depend on
// its batch. Units read the keys once for every 8 queries, but all multiprocessors share them; walked,
// 120 queries on 128K tokens, a question of 30 tokens, keep 16 of them busy: it took 2.6 s.
inline constexpr int64_t kUnitQueries = 512;
HEADROOM_HOST_DEVICE inline bool GoesByUnits(const AttendItem& item, int32_t group) {
  return int64_t{item.row_count} * group <= kUnitQueries;
}

// launch(std::integral_constant<int, head_dim>()), for the head sizes there are kernels for.
template <typename F>
cudaError_t ForHeadDim(int32_t head_dim, F&& launch) {
  switch (head_dim) {
    case 64:
      return launch(std::integral_constant<int, 64>());
    case 128:
      return launch(std::integral_constant<int, 128>());
    case 256:
      return launch(std::integral_constant<int, 256>());
    default:
      return cudaErrorInvalidValue;
  }
}

// Two neighbours; `i` is even.
__device__ inline void StorePair(const Activations& to, int64_t i, float2 value) {
  if (to.type == ElementType::kFloat32) {
    *reinterpret_cast<float2*>(to.floats() + i) = value;
  } else {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(value.y), "f"(value.x));
    *reinterpret_cast<uint32_t*>(to.bfloats() + i) = both;
  }
}

// What softmax takes: of q . k, scaled and capped.
__device__ inline float Scored(const AttendArgs& a, float product) {
  const float score = __fmul_rn(product, a.scale);
  return a.soft_cap == 0 ? score : a.soft_cap * tanhf(score / a.soft_cap);
}

// The keys [begin, end) that a query sees, of some that follow each other; none: begin == end.
struct SeenKeys {
  int begin;
  int end;
  __device__ SeenKeys() : begin(0), end(0) {}
  // Of `count` keys from `first_key` on, by a query at `pos`.
  __device__ SeenKeys(const AttendArgs& a, int64_t pos, int64_t first_key, int count)
      : begin(Within(FirstSeen(a.window, pos) - first_key, count)),
        end(Within(pos + 1 - first_key, count)) {
    if (begin > end) begin = end;
  }
  __device__ bool Any() const { return begin < end; }
  __device__ bool Has(int key) const { return key >= begin && key < end; }

 private:
  __device__ static int Within(int64_t key, int count) {
    return key <= 0 ? 0 : key < count ? static_cast<int>(key) : count;
  }
};

// An item's keys and places of its queries.
struct Work {
  const AttendArgs& a;
  const AttendItem& item;
  int32_t group;

  __device__ Work(const AttendArgs& args, const AttendItem& its)
      : a(args), item(its), group(args.num_q_heads / args.num_kv_heads) {}

  __device__ const KvSpan& span(int32_t i) const { return a.spans.device[item.span_begin + i]; }
  __device__ int64_t begin_pos() const { return item.span_count > 0 ? span(0).first_pos : 0; }
  __device__ int64_t end_pos() const {
    if (item.span_count == 0) return 0;
    const KvSpan& last = span(item.span_count - 1);
    return last.first_pos + last.count;
  }
  __device__ int64_t num_queries() const { return int64_t{item.row_count} * group; }
  __device__ int64_t row(int64_t query) const { return item.row_begin + RowOf(query); }
  __device__ int64_t pos(int64_t query) const { return item.first_pos + RowOf(query); }
  __device__ int64_t q_head(int32_t kv_head, int64_t query) const {
    return int64_t{kv_head} * group + (query - int64_t{RowOf(query)} * group);
  }
  __device__ const float* q(int32_t kv_head, int64_t query) const {
    return a.q + row(query) * a.q_stride + q_head(kv_head, query) * a.head_dim;
  }
  // R; U follows it.
  __device__ float* state(int32_t kv_head, int64_t query) const {
    const int64_t floats = 2 * (a.head_dim + 2);  // AttentionStateFloats()
    return a.state + (row(query) * a.num_q_heads + q_head(kv_head, query)) * floats;
  }
  // The query's first element of a.out.
  __device__ int64_t out(int32_t kv_head, int64_t query) const {
    return (row(query) * a.num_q_heads + q_head(kv_head, query)) * a.head_dim;
  }

 private:
  // Of the item. A division of 64 bits takes as long as a load.
  __device__ uint32_t RowOf(int64_t query) const {
    return static_cast<uint32_t>(query) / static_cast<uint32_t>(group);
  }
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_ATTENTION_PARTS_CUH_
