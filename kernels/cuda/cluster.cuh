// Blocks that work on one thing together: a cluster of compute capability 9.0, or one block alone.
#ifndef HEADROOM_KERNELS_CUDA_CLUSTER_CUH_
#define HEADROOM_KERNELS_CUDA_CLUSTER_CUH_

#include "kernels/cuda/device_util.cuh"

namespace headroom::kernels::cuda {

// As a thread has it. All threads of all blocks call everything together, but for Store().
class Cluster {
 public:
  static constexpr int kMost = 8;   // blocks
  static constexpr int kWords = 4;  // that one tells the others at a time

  using Words = uint64_t[kWords];
  // In shared memory of each block.
  struct Shared {
    Words told[2][kMost];  // by turns; whose
    Words of_warps[kWarp];
  };

  explicit __device__ Cluster(Shared& shared) : shared_(shared) {}

  __device__ static uint32_t Rank() {
    uint32_t rank = 0;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
  }
  __device__ static uint32_t Size() {
    uint32_t size = 1;
#if __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
    return size;
  }
  // What any has written before is there for all afterwards. The first Store(), Tell() or Reduce() must be after a
  // Sync(), or after Begin() and AwaitBegun(), which order nothing: all blocks have begun then. These two are one turn
  // of what the others wait at, too: none of them may come in between.
  __device__ static void Sync() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release.aligned;" : : : "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" : : : "memory");
#else
    __syncthreads();
#endif
  }

  __device__ static void Begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" : : : "memory");
#endif
  }
  __device__ static void AwaitBegun() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.aligned;" : : : "memory");
#endif
  }

  // To where `own`, in shared memory, lies in the block `rank`, which has begun. There after the next Sync().
  __device__ static void Store(uint64_t* own, [[maybe_unused]] uint32_t rank, uint64_t value) {
#if __CUDA_ARCH__ >= 900
    const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(own));
    asm volatile("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; st.shared::cluster.b64 [there], %2; }"
                 :
                 : "r"(address), "r"(rank), "l"(value)
                 : "memory");
#else
    *own = value;
#endif
  }
  __device__ static void Store(float2* own, uint32_t rank, float2 value) {
    Store(reinterpret_cast<uint64_t*>(own), rank,
          uint64_t{__float_as_uint(value.y)} << 32 | __float_as_uint(value.x));
  }

  // Every block's `values`, by rank, until the next call but one; those of a block are its first warp's.
  template <int kN>
  __device__ const Words* Tell(const uint64_t (&values)[kN]) {
    static_assert(kN <= kWords);
    auto& mine = shared_.told[turn_++ % 2];
    if (threadIdx.x < Size()) {  // a thread for each of the others
#pragma unroll
      for (int n = 0; n < kN; ++n) Store(&mine[Rank()][n], threadIdx.x, values[n]);
    }
    Sync();
    return mine;
  }

  // values[n] = op over those of all threads, in a fixed order.
  template <typename T, int kN, typename Op>
  __device__ void Reduce(T (&values)[kN], T identity, Op op) {
    const auto lane = static_cast<int>(threadIdx.x) % kWarp;
    const auto warps = static_cast<int>(blockDim.x) / kWarp;
    uint64_t of_block[kN];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const T of_warp = WarpReduce(values[n], op);
      if (lane == 0) shared_.of_warps[threadIdx.x / kWarp][n] = ToWord(of_warp);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        of_block[n] = ToWord(WarpReduce(lane < warps ? FromWord<T>(shared_.of_warps[lane][n]) : identity, op));
      }
    }
    const Words* const all = Tell(of_block);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      values[n] = FromWord<T>(all[0][n]);
      for (uint32_t rank = 1; rank < Size(); ++rank) values[n] = op(values[n], FromWord<T>(all[rank][n]));
    }
  }

 private:
  __device__ static uint64_t ToWord(uint64_t value) { return value; }
  __device__ static uint64_t ToWord(float value) { return __float_as_uint(value); }
  template <typename T>
  __device__ static T FromWord(uint64_t word) {
    if constexpr (sizeof(T) == 4) {
      return __uint_as_float(static_cast<uint32_t>(word));
    } else {
      return word;
    }
  }

  Shared& shared_;
  uint32_t turn_ = 0;
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_CLUSTER_CUH_
