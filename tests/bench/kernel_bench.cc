// Rates of the CPU kernels beside the machine's ceilings, measured in the same run:
//   kernel_bench [threads [in_place [GiB]]]
// GEMM at the shapes of SmolLM2-135M (and OpenBLAS sgemm where it was found), attention as prefill
// and as decode. Each figure is the best of several runs.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/team.h"
#include "kernels/gemm.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/swiglu.h"
#include "tests/bench/best_seconds.h"
#include "tests/bench/in_place_bench.h"

#if defined(HEADROOM_HAVE_OPENBLAS)
extern "C" {
void openblas_set_num_threads(int threads);
void cblas_sgemm(int order, int trans_a, int trans_b, int m, int n, int k, float alpha,
                 const float* a, int lda, const float* b, int ldb, float beta, float* c, int ldc);
}
#endif

namespace headroom::kernels {
namespace {

// 2 MiB pages where the kernel gives them: what the arena has.
template <typename T>
std::shared_ptr<T[]> Buffer(int64_t count) {
  constexpr size_t kHuge = size_t{2} << 20;
  const size_t bytes = (count * sizeof(T) + kHuge - 1) / kHuge * kHuge;
  void* memory = std::aligned_alloc(kHuge, bytes);
  if (memory == nullptr) std::abort();
  std::memset(memory, 0, bytes);
  return std::shared_ptr<T[]>(static_cast<T*>(memory), [](T* p) { std::free(p); });
}

std::shared_ptr<float[]> RandomFloats(int64_t count) {
  auto data = Buffer<float>(count);
  std::mt19937 random(1);
  for (int64_t i = 0; i < count; ++i) {
    data[i] = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  }
  return data;
}

std::shared_ptr<BFloat16[]> RandomBf16(int64_t count) {
  auto data = Buffer<BFloat16>(count);
  std::mt19937 random(2);
  for (int64_t i = 0; i < count; ++i) {
    data[i] = ToBFloat16(static_cast<float>(random()) * 0x1p-31f - 1.0f);
  }
  return data;
}

// ---- Ceilings ------------------------------------------------------------------------------------

// 12 independent chains a loop, 4 or 8 cycles deep: 384 FLOP an iteration on AVX-512, 192 on AVX2.
#define HEADROOM_FMA(r) "vfmadd231ps %%" r ", %%" r ", %%" r "\n\t"
#define HEADROOM_FMA12(v)                                                                    \
  HEADROOM_FMA(v "0") HEADROOM_FMA(v "1") HEADROOM_FMA(v "2") HEADROOM_FMA(v "3")            \
  HEADROOM_FMA(v "4") HEADROOM_FMA(v "5") HEADROOM_FMA(v "6") HEADROOM_FMA(v "7")            \
  HEADROOM_FMA(v "8") HEADROOM_FMA(v "9") HEADROOM_FMA(v "10") HEADROOM_FMA(v "11")
#define HEADROOM_FMA_CLOBBERS                                                                \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11"

__attribute__((target("avx512f"))) double FmaLoopAvx512(int64_t iterations) {
  asm volatile("vzeroall" ::: HEADROOM_FMA_CLOBBERS, "xmm12", "xmm13", "xmm14", "xmm15");
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile(HEADROOM_FMA12("zmm") ::: HEADROOM_FMA_CLOBBERS);
  }
  return 384.0 * static_cast<double>(iterations);
}
__attribute__((target("avx2,fma"))) double FmaLoopAvx2(int64_t iterations) {
  asm volatile("vzeroall" ::: HEADROOM_FMA_CLOBBERS, "xmm12", "xmm13", "xmm14", "xmm15");
  for (int64_t i = 0; i < iterations; ++i) {
    asm volatile(HEADROOM_FMA12("ymm") ::: HEADROOM_FMA_CLOBBERS);
  }
  return 192.0 * static_cast<double>(iterations);
}

double PeakFlops(CpuTeam& team) {
  const bool avx512 = __builtin_cpu_supports("avx512f");
  std::vector<double> flop(team.size() * 8);
  const double seconds = BestSeconds([&] {
    team.Run([&](int member) {
      flop[member * 8] = avx512 ? FmaLoopAvx512(200000) : FmaLoopAvx2(200000);
    });
  });
  return flop[0] * team.size() / seconds;
}

double ReadBytesPerSecond(CpuTeam& team) {
  constexpr int64_t kBytes = int64_t{256} << 20;
  const auto data = Buffer<uint64_t>(kBytes / 8);
  std::vector<uint64_t> sums(team.size() * 8);
  const double seconds = BestSeconds([&] {
    team.Run([&](int member) {
      const int64_t count = kBytes / 8 / team.size();
      const uint64_t* p = data.get() + member * count;
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < count; i += 8) {
        __builtin_prefetch(p + i + 2048);
        for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
      }
      for (int j = 0; j < 8; ++j) sums[member * 8] += sum[j];
    });
  });
  return kBytes / seconds;
}

// ---- GEMM ----------------------------------------------------------------------------------------

void BenchGemm(CpuTeam& team, int64_t k, int64_t n, double peak, double read) {
  // Weights of several layers, so that a decode step finds none of them in the cache.
  const int64_t bytes = PackedWeightBytes(n, k);
  const int64_t copies = std::max<int64_t>(1, (int64_t{96} << 20) / bytes);
  const auto weights = RandomBf16(copies * bytes / 2);
  const auto a = RandomFloats(512 * k);
  const auto c = Buffer<float>(512 * n);
#if defined(HEADROOM_HAVE_OPENBLAS)
  const auto plain = RandomFloats(copies * n * k);
#endif
  for (const int64_t m : {1, 2, 5, 8, 16, 32, 64, 512}) {
    const int64_t used = m <= 8 ? copies : std::max<int64_t>(1, copies / 8);
    const double flop = 2.0 * m * n * k;
    const double seconds = BestSeconds([&] {
      for (int64_t copy = 0; copy < used; ++copy) {
        GemmArgs args;
        args.a = a.get();
        args.a_stride = k;
        args.w = {weights.get() + copy * bytes / 2, n, k};
        args.c = c.get();
        args.c_stride = n;
        args.m = m;
        cpu::Gemm(args, team);
      }
    }) / used;
    std::printf("gemm %4ld x %5ld, m %3ld: %7.1f GFLOP/s (%3.0f%% of peak) %6.1f GB/s (%3.0f%% of reads)",
                static_cast<long>(k), static_cast<long>(n), static_cast<long>(m),
                flop / seconds / 1e9, 100 * flop / seconds / peak, bytes / seconds / 1e9,
                100 * bytes / seconds / read);
#if defined(HEADROOM_HAVE_OPENBLAS)
    constexpr int kRowMajor = 101, kNoTrans = 111, kTrans = 112;
    openblas_set_num_threads(team.size());
    const double blas = BestSeconds([&] {
      for (int64_t copy = 0; copy < used; ++copy) {
        cblas_sgemm(kRowMajor, kNoTrans, kTrans, m, n, k, 1, a.get(), k, plain.get() + copy * n * k,
                    k, 0, c.get(), n);
      }
    }) / used;
    std::printf("  OpenBLAS %7.1f GFLOP/s: %.2fx", flop / blas / 1e9, blas / seconds);
#endif
    std::printf("\n");
    std::fflush(stdout);
  }
}

// ---- Attention -----------------------------------------------------------------------------------

// `rows` rows at the end of `keys` keys of one layer; copies of the KV so that it comes from memory.
void BenchAttend(CpuTeam& team, int32_t q_heads, int32_t kv_heads, int32_t d, int64_t rows,
                 int64_t keys, double peak, double read) {
  const int64_t capacity = (keys + 63) / 64 * 64;
  const KvLayout layout{capacity, d};
  const int64_t bytes = layout.BytesFor(kv_heads);
  const int64_t copies = rows > 32 ? 1 : std::max<int64_t>(1, (int64_t{96} << 20) / bytes);
  const auto kv = RandomBf16(copies * bytes / 2);
  const auto q = RandomFloats(rows * q_heads * d);
  const auto state = Buffer<float>(rows * q_heads * AttentionStateFloats(d));
  const auto out = Buffer<float>(rows * q_heads * d);
  const auto scratch = Buffer<float>(kMinAttendScratchFloats);
  AttendItem item;
  item.row_count = static_cast<int32_t>(rows);
  item.first_pos = keys - rows;
  item.kv_head_end = kv_heads;
  item.span_count = 1;
  item.reset = item.finish = 1;
  const double seconds = BestSeconds([&] {
    for (int64_t copy = 0; copy < copies; ++copy) {
      KvSpan span;
      span.base = reinterpret_cast<uint8_t*>(kv.get()) + copy * bytes;
      span.count = static_cast<int32_t>(keys);
      span.capacity = static_cast<int32_t>(capacity);
      span.kv_head_end = kv_heads;
      AttendArgs args;
      args.q = q.get();
      args.q_stride = int64_t{q_heads} * d;
      args.state = state.get();
      args.out = out.get();
      args.rows = rows;
      args.items = {&item, &item, 1};
      args.spans = {&span, &span, 1};
      args.scratch = scratch.get();
      args.scratch_floats = kMinAttendScratchFloats;
      args.scale = 0.125f;
      args.num_q_heads = q_heads;
      args.num_kv_heads = kv_heads;
      args.head_dim = d;
      cpu::Attend(args, team);
    }
  }) / copies;
  const double pairs = rows * (static_cast<double>(keys - rows) + (rows + 1) / 2.0);
  const double flop = 4.0 * pairs * q_heads * d;
  const double kv_bytes = 2.0 * keys * kv_heads * d * 2;
  std::printf("attend %2d/%d heads of %3d, %4ld rows, %5ld keys: %7.1f us %7.1f GFLOP/s (%3.0f%% of "
              "peak) %6.1f GB/s (%3.0f%% of reads)\n",
              q_heads, kv_heads, d, static_cast<long>(rows), static_cast<long>(keys), seconds * 1e6,
              flop / seconds / 1e9, 100 * flop / seconds / peak, kv_bytes / seconds / 1e9,
              100 * kv_bytes / seconds / read);
  std::fflush(stdout);
}

// ---- The small ones ------------------------------------------------------------------------------

void BenchElementwise(CpuTeam& team, int64_t rows) {
  const auto x = RandomFloats(rows * 3072);
  const auto out = Buffer<float>(rows * 3072);
  const auto weight = RandomBf16(576);
  RmsNormArgs norm;
  norm.x = x.get();
  norm.x_rows = norm.rows = rows;
  norm.weight = weight.get();
  norm.out = out.get();
  norm.hidden = 576;
  norm.epsilon = 1e-5f;
  const double norm_s = BestSeconds([&] { cpu::RmsNorm(norm, team); });
  SwiGluArgs swiglu{x.get(), out.get(), rows, 1536};
  const double swiglu_s = BestSeconds([&] { cpu::SwiGlu(swiglu, team); });

  const auto kv = RandomBf16(rows * 3 * 64 * 2 + 64 * 64 * 6);
  AppendItem item;
  item.target.base = reinterpret_cast<uint8_t*>(kv.get());
  item.target.count = item.target.capacity = static_cast<int32_t>(rows);
  item.target.kv_head_end = 3;
  RopeAppendArgs rope;
  rope.qkv = out.get();
  rope.cos_sin = x.get();
  rope.items = {&item, &item, 1};
  rope.rows = rows;
  rope.num_q_heads = 9;
  rope.num_kv_heads = 3;
  rope.head_dim = 64;
  const double rope_s = BestSeconds([&] { cpu::RopeAppend(rope, team); });
  std::printf("%4ld rows: norm %.1f us, swiglu %.1f us, rope and append %.1f us\n",
              static_cast<long>(rows), norm_s * 1e6, swiglu_s * 1e6, rope_s * 1e6);
}

void BenchTeam(CpuTeam& team) {
  const double seconds = BestSeconds([&] {
    for (int i = 0; i < 1000; ++i) team.Run([](int) {});
  });
  std::printf("team of %d: %.2f us a run\n", team.size(), seconds * 1e3);
}

int Main(int threads, bool in_place_alone, int64_t in_place_bytes) {
  CpuTeam team(threads);
  const InPlaceBench in_place(team, in_place_bytes);
  std::printf("%.1f GB of shared memory: %.1f GB/s of reads\n", in_place.bytes() / 1e9,
              in_place.Reads(team).best);
  for (const int32_t rows : {1, 2, 8, 32}) {
    for (const InPlaceKernel& kernel : InPlaceKernels()) {
      std::printf("in place, %3d queries a KV head, %-10s: %6.1f GB/s\n", rows * InPlaceBench::kGroup,
                  kernel.name, in_place.Attend(team, rows, kernel).best);
      std::fflush(stdout);
    }
  }
  if (in_place_alone) return 0;
  const double peak = PeakFlops(team);
  const double read = ReadBytesPerSecond(team);
  std::printf("%d threads: %.1f GFLOP/s of fused multiply-adds, %.1f GB/s of reads\n", team.size(),
              peak / 1e9, read / 1e9);
  BenchTeam(team);
  BenchGemm(team, 576, 960, peak, read);
  BenchGemm(team, 576, 576, peak, read);
  BenchGemm(team, 576, 3072, peak, read);
  BenchGemm(team, 1536, 576, peak, read);
  BenchGemm(team, 576, 49152, peak, read);
  for (const int64_t keys : {100, 1000, 7000}) {
    BenchAttend(team, 9, 3, 64, 1, keys, peak, read);
  }
  BenchAttend(team, 32, 8, 128, 1, 7000, peak, read);
  BenchAttend(team, 9, 3, 64, 16, 2048, peak, read);
  BenchAttend(team, 9, 3, 64, 64, 2048, peak, read);
  BenchAttend(team, 9, 3, 64, 2048, 2048, peak, read);
  BenchAttend(team, 32, 8, 128, 512, 2048, peak, read);
  BenchElementwise(team, 1);
  BenchElementwise(team, 512);
  return 0;
}

}  // namespace
}  // namespace headroom::kernels

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : static_cast<int>(std::thread::hardware_concurrency());
  const bool in_place_alone = argc > 2 && std::strcmp(argv[2], "in_place") == 0;
  const int64_t gib = argc > 3 ? std::atoi(argv[3]) : 2;
  return headroom::kernels::Main(threads, in_place_alone, gib << 30);
}
