// Tensor cores for float32 operands: products of m16n8k16 with the left operand split into two
// bfloat16, and the copies that feed them.
//
// hi = bf16(x) and lo = bf16(x - hi) leave out less than 2^-16 of x; products of bfloat16 are
// exact in float32. An output's sum has the order of the instructions that form it, whatever lies
// beside it.
//
// Lanes of a fragment, quad = lane / 4, pair = lane % 4: register i of A holds row quad + i % 2 *
// 8, columns 2 pair + i / 2 * 8 and the next; register i of B rows 2 pair + 8 i and the next,
// column quad; float i of C row quad + i / 2 * 8, column 2 pair + i % 2.
#ifndef HEADROOM_KERNELS_CUDA_TENSOR_CORE_CUH_
#define HEADROOM_KERNELS_CUDA_TENSOR_CORE_CUH_

#include "kernels/cuda/device_util.cuh"

namespace headroom::kernels::cuda {

// Copies 16 bytes to shared memory, or zeros where `bytes` is 0. Not ordered before CommitCopies()
// and AwaitCopies().
__device__ inline void CopyAsync16(void* shared, const void* global, int bytes) {
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(global), "r"(bytes)
               : "memory");
}
__device__ inline void CommitCopies() { asm volatile("cp.async.commit_group;" : : : "memory"); }
template <int kLeft>
__device__ void AwaitCopies() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kLeft) : "memory");
}

// hi and lo of two neighbours, packed as the products want them.
__device__ inline void Split(float2 a, uint32_t& hi, uint32_t& lo) {
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(hi) : "f"(a.y), "f"(a.x));
  const float x = __fsub_rn(a.x, WidenLow(hi));
  const float y = __fsub_rn(a.y, WidenHigh(hi));
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(lo) : "f"(y), "f"(x));
}

__device__ inline void Multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of bfloat16 from shared memory: lane i gives row i % 8 of matrix i / 8 and
// gets of each matrix row `quad`, columns 2 pair and the next.
__device__ inline void LoadMatrices(uint32_t (&m)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}
// ... transposed: of each matrix rows 2 pair and the next, column `quad`.
__device__ inline void LoadMatricesTransposed(uint32_t (&m)[4], const void* row) {
  const auto from = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(from)
               : "memory");
}

}  // namespace headroom::kernels::cuda

#endif  // HEADROOM_KERNELS_CUDA_TENSOR_CORE_CUH_
