#include "services/headroom/bench/ceilings.h"

#include <algorithm>
#include <cstring>

#include "common/device/cpu/cpu_device.h"
#include "common/status.h"
#include "services/headroom/bench/host_memory.h"

namespace headroom {
namespace {

// Larger than the last-level cache of any processor this runs on.
constexpr int64_t kBufferBytes = int64_t{256} << 20;
constexpr int64_t kCopyPieceBytes = int64_t{4} << 20;
// Of one figure; the best run of that time counts.
constexpr double kFigureTime = 0.25;
constexpr absl::Duration kCpuTimeout = absl::Minutes(2);

struct GemmShape {
  int64_t m, n, k;
};
// Wide in every dimension; the shapes of small and of middling models.
constexpr GemmShape kGemmShapes[] = {{960, 3072, 576}, {960, 4096, 1024}, {480, 4096, 2048}};

}  // namespace

absl::StatusOr<std::unique_ptr<CpuCeilingProbe>> CpuCeilingProbe::Create(int threads) {
  std::unique_ptr<CpuCeilingProbe> probe(new CpuCeilingProbe(threads));
  HEADROOM_RETURN_IF_ERROR(probe->Init(threads));
  return probe;
}

CpuCeilingProbe::~CpuCeilingProbe() {
  if (mapped_.data() != nullptr && device_ != nullptr) {
    device_->UnregisterHost(mapped_.data()).IgnoreError();
  }
}

absl::Status CpuCeilingProbe::Init(int threads) {
  int64_t a_floats = 0, w_bytes = 0, c_floats = 0;
  for (const GemmShape& shape : kGemmShapes) {
    a_floats = std::max(a_floats, shape.m * shape.k);
    w_bytes = std::max(w_bytes, kernels::PackedWeightBytes(shape.n, shape.k));
    c_floats = std::max(c_floats, shape.m * shape.n);
  }
  const int64_t a_bytes = a_floats * static_cast<int64_t>(sizeof(float));
  const int64_t c_bytes = c_floats * static_cast<int64_t>(sizeof(float));
  CpuDeviceOptions options;
  options.compute_threads = threads;
  options.arena_bytes = kBufferBytes + a_bytes + w_bytes + c_bytes + (int64_t{1} << 20);
  HEADROOM_ASSIGN_OR_RETURN(device_, CreateCpuDevice(options));
  HEADROOM_ASSIGN_OR_RETURN(compute_, device_->CreateStream("compute"));
  HEADROOM_ASSIGN_OR_RETURN(copy_, device_->CreateStream("copy"));
  HEADROOM_ASSIGN_OR_RETURN(computed_, device_->CreateEvent());
  HEADROOM_ASSIGN_OR_RETURN(copied_, device_->CreateEvent());
  HEADROOM_ASSIGN_OR_RETURN(arena_buffer_, device_->Allocate(kBufferBytes, "probe"));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const a, device_->Allocate(a_bytes, "probe"));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const w, device_->Allocate(w_bytes, "probe"));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const c, device_->Allocate(c_bytes, "probe"));
  a_ = reinterpret_cast<float*>(a);
  w_ = reinterpret_cast<kernels::BFloat16*>(w);
  c_ = reinterpret_cast<float*>(c);
  std::fill(a_, a_ + a_floats, 1.0f);
  std::fill(w_, w_ + w_bytes / 2, kernels::ToBFloat16(0.01f));
  // Untouched memory is one page of zeros over and over, which a cache holds.
  std::memset(arena_buffer_, 1, kBufferBytes);
  HEADROOM_ASSIGN_OR_RETURN(mapped_, MapSharedMemory(kBufferBytes, "headroom-bench-probe"));
  mapped_.MakeHugePages(0, kBufferBytes);
  std::memset(mapped_.data(), 1, kBufferBytes);
  return device_->RegisterHost(mapped_.data(), mapped_.bytes());
}

absl::StatusOr<Ceilings> CpuCeilingProbe::Measure() {
  Ceilings ceilings;
  HEADROOM_ASSIGN_OR_RETURN(ceilings.gemm_flops, GemmFlops());
  ceilings.attention_flops = ceilings.gemm_flops;
  ceilings.read_bytes = HostReadRate(arena_buffer_, kBufferBytes, readers_, kFigureTime);
  ceilings.host_read_bytes = ceilings.read_bytes;
  HEADROOM_ASSIGN_OR_RETURN(ceilings.copy_bytes, CopyBytes());
  return ceilings;
}

absl::StatusOr<double> CpuCeilingProbe::GemmFlops() {
  double best = 0;
  for (const GemmShape& shape : kGemmShapes) {
    kernels::GemmArgs args;
    args.a = a_;
    args.a_stride = shape.k;
    args.w = {w_, shape.n, shape.k};
    args.c = c_;
    args.c_stride = shape.n;
    args.m = shape.m;
    const auto multiply = [&]() -> absl::Status {
      HEADROOM_RETURN_IF_ERROR(device_->Gemm(compute_, args));
      HEADROOM_RETURN_IF_ERROR(device_->Record(compute_, computed_));
      return device_->Synchronize(computed_, kCpuTimeout);
    };
    HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kFigureTime, multiply));
    best = std::max(best, 2.0 * static_cast<double>(shape.m * shape.n * shape.k) / seconds);
  }
  return best;
}

absl::StatusOr<double> CpuCeilingProbe::CopyBytes() {
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kFigureTime, [&]() -> absl::Status {
    for (int64_t at = 0; at < kBufferBytes; at += kCopyPieceBytes) {
      CopyArgs copy;
      copy.dst = arena_buffer_ + at;
      copy.src = mapped_.data() + at;
      copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = kCopyPieceBytes;
      HEADROOM_RETURN_IF_ERROR(device_->Copy(copy_, copy));
    }
    HEADROOM_RETURN_IF_ERROR(device_->Record(copy_, copied_));
    return device_->Synchronize(copied_, kCpuTimeout);
  }));
  return static_cast<double>(kBufferBytes) / seconds;
}

}  // namespace headroom
