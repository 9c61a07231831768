// Barriers in shared memory (mbarrier), and the bulk copies that arrive at them.
#ifndef HEADROOM_KERNELS_CUDA_MBARRIER_CUH_
#define HEADROOM_KERNELS_CUDA_MBARRIER_CUH_

#include <cstdint>

namespace headroom::kernels::cuda {

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Where threads meet again and again without waiting before they must: what a thread has read or written
// before Arrive() is done when another comes from Wait(). Turns count from 0, and a thread may be behind by
// one at most.
struct MBarrier {
  uint64_t word;
  // By one thread; seen by others after InitDone() and a __syncthreads(). `count` arrivals end a turn.
  __device__ void Init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(SharedAddress(&word)), "r"(count) : "memory");
  }
  // By the thread that has called Init() of some: bulk copies see them.
  __device__ static void InitDone() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#endif
  }
  __device__ void Arrive() {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 :
                 : "r"(SharedAddress(&word))
                 : "memory");
  }
  // Whether the turn has ended.
  __device__ bool Test(uint32_t turn) {
    uint32_t ended;
    asm volatile(
        "{ .reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(ended)
        : "r"(SharedAddress(&word)), "r"(turn & 1)
        : "memory");
    return ended != 0;
  }
  __device__ void Wait(uint32_t turn) {
    while (!Test(turn)) {}
  }
  // Arrives; the turn ends when bulk copies have brought so many bytes, too. Compute capability 9.0.
  __device__ void ArriveExpecting([[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :
                 : "r"(SharedAddress(&word)), "r"(bytes)
                 : "memory");
#endif
  }
  // Copies to shared memory; addresses and `bytes` are multiples of 16. Not through L1, nor behind loads that
  // wait there. Compute capability 9.0.
  __device__ void BulkCopy([[maybe_unused]] void* shared, [[maybe_unused]] const void* global,
                           [[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        :
        : "r"(SharedAddress(shared)), "l"(global), "r"(bytes), "r"(SharedAddress(&word))
        : "memory");
#endif
  }
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_MBARRIER_CUH_
