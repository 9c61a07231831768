// Barriers in shared memory (mbarrier), and the tensor copies that arrive at them.
#ifndef HEADROOM_KERNELS_CUDA_MBARRIER_CUH_
#define HEADROOM_KERNELS_CUDA_MBARRIER_CUH_

#include <cuda.h>

#include <cstdint>

namespace headroom::kernels::cuda {

__device__ inline uint32_t SharedAddress(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The first element of a box of a tensor, innermost coordinate first.
struct TensorElement {
  int32_t x, y, z, u, v;
};

// Where threads meet again and again without waiting before they must: what a thread has read or written
// before Arrive() is done when another comes from Wait(), for its loads and stores, but not for copies that it asks
// for then (chain_weights.cuh, Take()). Turns count from 0, and a thread may be behind by one at most.
struct MBarrier {
  uint64_t word;
  // By one thread; seen by others after InitDone() and a __syncthreads(). `count` arrivals end a turn.
  __device__ void Init(int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" : : "r"(SharedAddress(&word)), "r"(count) : "memory");
  }
  // By the thread that has called Init() of some: copies see them.
  __device__ static void InitDone() {
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" : : : "memory");
#endif
  }
  // `nothing` is 0, computed from what has to be there before.
  __device__ void Arrive(uint32_t nothing = 0) {
    asm volatile("{ .reg .b64 state; mbarrier.arrive.shared.b64 state, [%0]; }"
                 :
                 : "r"(SharedAddress(&word) + nothing)
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
  // Arrives; the turn ends when copies have brought so many bytes, too. Compute capability 9.0.
  __device__ void ArriveExpecting([[maybe_unused]] uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{ .reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1; }"
                 :
                 : "r"(SharedAddress(&word)), "r"(bytes)
                 : "memory");
#endif
  }
  // Copies a box of a tensor, from its element `at` on, to shared memory. Not through L1, nor behind loads that
  // wait there. `tensor` is a parameter of the kernel (__grid_constant__). Compute capability 9.0.
  __device__ void TensorCopy([[maybe_unused]] void* shared, [[maybe_unused]] const CUtensorMap& tensor,
                             [[maybe_unused]] TensorElement at) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];"
        :
        : "r"(SharedAddress(shared)), "l"(&tensor), "r"(at.x), "r"(at.y), "r"(at.z), "r"(at.u), "r"(at.v),
          "r"(SharedAddress(&word))
        : "memory");
#endif
  }
};

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_MBARRIER_CUH_
