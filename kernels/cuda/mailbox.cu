// The GPU's ends of a mailbox, and the merge of what comes back.
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kPostThreads = 1024;
constexpr int kMergeThreads = 128;

__device__ uint64_t LoadAcquireSystem(const std::atomic<uint64_t>* p) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(p) : "memory");
  return value;
}
__device__ uint32_t LoadAcquireSystem(const std::atomic<uint32_t>* p) {
  uint32_t value;
  asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ void StoreReleaseSystem(std::atomic<uint32_t>* p, uint32_t value) {
  asm volatile("st.release.sys.global.u32 [%0], %1;" : : "l"(p), "r"(value) : "memory");
}
__device__ void StoreReleaseSystem(std::atomic<uint64_t>* p, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(p), "l"(value) : "memory");
}
__device__ uint64_t NowNs() {
  uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns));
  return ns;
}

// One block: 16 KiB of queries (Llama-3-8B) are four stores a thread.
__global__ void PostKernel(PostQueriesArgs a) {
  __shared__ uint32_t retired;
  if (threadIdx.x == 0) retired = LoadAcquireSystem(&a.mailbox->retired);
  __syncthreads();
  if (retired != 0) return;
  const int64_t vectors = a.row_floats / 4;
  for (int64_t i = threadIdx.x; i < a.rows * vectors; i += kPostThreads) {
    const int64_t row = i / vectors;
    const int64_t column = i % vectors * 4;
    *reinterpret_cast<float4*>(a.queries + row * a.row_floats + column) =
        *reinterpret_cast<const float4*>(a.q + row * a.q_stride + column);
  }
  __threadfence_system();
  __syncthreads();
  if (threadIdx.x != 0) return;
  a.slot->post = a.post;
  StoreReleaseSystem(&a.slot->posted, a.count);
}

// One thread. What another wait has set first stays. (No compare-and-swap: PCIe need not have
// atomics.)
__global__ void AwaitKernel(AwaitPartialsArgs a, uint64_t deadline_ns) {
  const auto give_up = [&a](AwaitResult why) {
    if (LoadAcquireSystem(a.status) == kAwaitOk) StoreReleaseSystem(a.status, why);
    StoreReleaseSystem(&a.mailbox->retired, 1);
  };
  const uint64_t begin = NowNs();
  while (LoadAcquireSystem(&a.slot->answered) < a.count) {
    if (LoadAcquireSystem(&a.mailbox->retired) != 0) return give_up(kAwaitRetired);
    if (NowNs() - begin > deadline_ns) return give_up(kAwaitExpired);
  }
  // Retired by an earlier wait: even what has come since is not taken.
  if (LoadAcquireSystem(&a.mailbox->retired) != 0) return give_up(kAwaitRetired);
  const volatile MailboxAnswer& from = a.slot->answer;
  if (from.generation != a.generation || from.step != a.step || from.attempt != a.attempt ||
      from.layer != a.layer) {
    return give_up(kAwaitMismatch);
  }
  if (from.code != 0) give_up(kAwaitRefused);
}

// a = fold(a, b) of {o, m, l}, b the later keys, for column `column`.
struct Part {
  float o, m, l;
};
__device__ Part Folded(const Part& a, const Part& b) {
  if (b.l == 0) return a;
  if (a.l == 0) return b;
  const float m = a.m < b.m ? b.m : a.m;
  const float wa = expf(a.m - m);
  const float wb = expf(b.m - m);
  return {__fmaf_rn(b.o, wb, __fmul_rn(a.o, wa)), m, __fmaf_rn(b.l, wb, __fmul_rn(a.l, wa))};
}

// Block (row and query head of the batch): a thread has columns of its own, so that nothing is shared
// but m and l, which are read before they are written.
__global__ void MergeKernel(MergePartialsArgs a) {
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  const int64_t row = blockIdx.x;
  const auto q_head = static_cast<int32_t>(blockIdx.y);
  const MergeItem* item = nullptr;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const MergeItem& at = a.items.device[i];
    if (row >= at.row_begin && row < at.row_begin + at.row_count &&
        q_head / group >= at.kv_head_begin && q_head / group < at.kv_head_end) {
      item = &at;
    }
  }
  if (item == nullptr) return;
  const int32_t d = a.head_dim;
  const int64_t at = row * a.num_q_heads + q_head;
  const float* const from = a.partials + at * AttentionStateFloats(d);
  float* const to = a.state + at * AttentionStateFloats(d);
  const auto part = [d](const float* state, int32_t column) {
    return Part{state[column], state[d], state[d + 1]};
  };
  const bool reset = item->reset != 0;
  const int kColumns = 256 / kMergeThreads;
  Part finished[kColumns], open[kColumns];
  for (int i = 0; i < kColumns; ++i) {
    const int32_t column = static_cast<int32_t>(threadIdx.x) + i * kMergeThreads;
    if (column >= d) break;
    const Part r = part(from, column);
    const Part u = part(from + d + 2, column);
    finished[i] = reset ? r : Folded(Folded(r, u), part(to, column));
    open[i] = reset ? u : part(to + d + 2, column);
  }
  __syncthreads();
  for (int i = 0; i < kColumns; ++i) {
    const int32_t column = static_cast<int32_t>(threadIdx.x) + i * kMergeThreads;
    if (column >= d) break;
    to[column] = finished[i].o;
    if (reset) to[d + 2 + column] = open[i].o;
    if (column == 0) {
      to[d] = finished[i].m;
      to[d + 1] = finished[i].l;
      if (reset) to[d + 2 + d] = open[i].m;
      if (reset) to[d + 2 + d + 1] = open[i].l;
    }
    if (item->finish == 0) continue;
    const Part all = Folded(finished[i], open[i]);
    StoreActivation(a.out, at * d + column, __fdiv_rn(all.o, all.l));
  }
}

}  // namespace

cudaError_t LaunchPostQueries(const PostQueriesArgs& args, cudaStream_t stream) {
  if (args.row_floats % 4 != 0 || args.q_stride % 4 != 0) return cudaErrorInvalidValue;
  return LaunchOn(stream, PostKernel, dim3(1), kPostThreads, 0, args);
}

cudaError_t LaunchAwaitPartials(const AwaitPartialsArgs& args, cudaStream_t stream) {
  const uint64_t deadline_ns =
      args.deadline_us > 0 ? static_cast<uint64_t>(args.deadline_us) * 1000 : 0;
  return LaunchOn(stream, AwaitKernel, dim3(1), 1, 0, args, deadline_ns);
}

cudaError_t LaunchMergePartials(const MergePartialsArgs& args, cudaStream_t stream) {
  if (args.items.count == 0 || args.rows == 0) return cudaSuccess;
  if (args.head_dim > 256) return cudaErrorInvalidValue;
  const dim3 grid(static_cast<unsigned>(args.rows), static_cast<unsigned>(args.num_q_heads));
  return LaunchOn(stream, MergeKernel, grid, kMergeThreads, 0, args);
}

cudaError_t LoadMailbox() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(PostKernel));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadDecodeKernel(AwaitKernel));
  return LoadDecodeKernel(MergeKernel);
}

}  // namespace headroom::kernels::cuda
