#include "tests/gpu/sdpa_bench.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <utility>

#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/cuda_status.h"
#include "common/device/cuda/cudnn_sdpa.h"
#include "tests/gpu/require.h"

namespace headroom {
namespace {

using kernels::kWidePieceTokens;
using kernels::WideClass;
using kernels::WideClasses;
using kernels::WideLayout;
using kernels::WideShape;
using Mask = SdpaShape::Mask;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Random bits would hold NaN; this is small numbers of both signs, the same every 128 KiB.
void Fill(uint8_t* to, int64_t bytes) {
  static uint16_t values[65536];
  uint32_t state = 1;
  for (uint16_t& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<uint16_t>(0x3c00u | (state >> 16 & 0x837fu));
  }
  for (int64_t at = 0; at < bytes; at += sizeof(values)) {
    Require(HEADROOM_CUDA_STATUS(cudaMemcpy(
        to + at, values, static_cast<size_t>(std::min<int64_t>(sizeof(values), bytes - at)),
        cudaMemcpyHostToDevice)));
  }
}

void BenchPlan(CudnnSdpa& cudnn, const SdpaShape& shape, const SdpaBuffers& buffers,
               uint8_t* workspace, int64_t keys_seen, cudaStream_t stream) {
  constexpr const char* kMasks[] = {"none", "causal", "lengths"};
  std::printf("cuDNN, %d rows of %d + %d heads of %d on %d keys, cap %.0f, mask %s",
              static_cast<int>(shape.rows), shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
              static_cast<int>(shape.keys), static_cast<double>(shape.soft_cap),
              kMasks[static_cast<int>(shape.mask)]);
  if (shape.mask == Mask::kLengths) std::printf(" %d", static_cast<int>(keys_seen));
  const double begin = Seconds();
  const absl::StatusOr<int> plan = cudnn.Build(shape, kernels::kWideWorkspaceBytes);
  if (!plan.ok()) {
    std::printf(": %s\n", plan.status().ToString().c_str());
    return;
  }
  const double build_s = Seconds() - begin;
  const int32_t lengths[2] = {static_cast<int32_t>(shape.rows), static_cast<int32_t>(keys_seen)};
  Require(HEADROOM_CUDA_STATUS(
      cudaMemcpy(buffers.lengths, lengths, sizeof(lengths), cudaMemcpyHostToDevice)));
  const auto seconds = [&](int runs) {
    const double from = Seconds();
    for (int i = 0; i < runs; ++i) Require(cudnn.Run(*plan, buffers, workspace, stream));
    const double enqueued = Seconds();
    Require(HEADROOM_CUDA_STATUS(cudaStreamSynchronize(stream)));
    return std::pair<double, double>((Seconds() - from) / runs, (enqueued - from) / runs);
  };
  seconds(3);
  const auto [run_s, enqueue_s] = seconds(30);
  const double rows = static_cast<double>(shape.rows);
  const double pairs =
      shape.mask == Mask::kCausal ? rows * (rows + 1) / 2 : rows * static_cast<double>(keys_seen);
  std::printf(": %s, workspace %.0f KiB, built in %.0f ms, %.1f us (%.1f to enqueue), "
              "%.0f TFLOP/s\n",
              cudnn.name(*plan).c_str(), static_cast<double>(cudnn.workspace_bytes(*plan)) / 1024,
              1e3 * build_s, 1e6 * run_s, 1e6 * enqueue_s,
              4e-12 * pairs * shape.num_q_heads * shape.head_dim / run_s);
}

}  // namespace

void BenchSdpa(const WideShape& shape, uint8_t* scratch) {
  auto cudnn = CudnnSdpa::Open();
  if (!cudnn.ok()) {
    std::printf("cuDNN: %s\n", cudnn.status().ToString().c_str());
    return;
  }
  cudaStream_t made = nullptr;
  Require(HEADROOM_CUDA_STATUS(cudaStreamCreateWithFlags(&made, cudaStreamNonBlocking)));
  const CudaStream stream(made);
  const WideClasses classes(shape);
  const WideLayout layout(shape);
  Fill(scratch, layout.lengths);
  SdpaBuffers buffers;
  buffers.q = scratch + layout.q;
  buffers.k = scratch + layout.keys;
  buffers.v = scratch + layout.values;
  buffers.o = scratch + layout.o;
  buffers.lse = scratch + layout.lse;
  buffers.lengths = scratch + layout.lengths;
  for (int32_t heads = classes.least_heads; heads <= classes.most_heads; heads *= 2) {
    const WideClass of = classes.Of(heads);
    const auto bench = [&](int32_t its_heads, int64_t keys, Mask mask, int64_t keys_seen) {
      SdpaBuffers its = buffers;
      if (mask == Mask::kCausal) {
        its.o = scratch + layout.square_o;
        its.lse = scratch + layout.square_lse;
      }
      BenchPlan(**cudnn,
                {of.rows, keys, its_heads * shape.group(), its_heads, shape.head_dim, mask,
                 shape.soft_cap},
                its, scratch + layout.workspace, keys_seen, stream.get());
    };
    bench(heads, kWidePieceTokens, Mask::kNone, kWidePieceTokens);
    bench(heads, kWidePieceTokens, Mask::kLengths, kWidePieceTokens);
    bench(heads, kWidePieceTokens, Mask::kLengths, kWidePieceTokens / 4);
    bench(heads, of.rows, Mask::kCausal, of.rows);
    bench(of.square_heads, of.rows, Mask::kCausal, of.rows);
  }
}

}  // namespace headroom
