#include "services/headroom/bench/ceilings.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/device/cpu/cpu_device.h"
#include "common/fd.h"
#include "common/status.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headroom {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
// Larger than the last-level cache of any processor this runs on.
constexpr int64_t kBufferBytes = 256 * kMiB;
constexpr int64_t kReadPieceBytes = 1 * kMiB;
constexpr int64_t kCopyPieceBytes = 4 * kMiB;
constexpr absl::Duration kTimeout = absl::Minutes(2);

struct GemmShape {
  int64_t m, n, k;
};
// Wide in every dimension; the shapes of small and of middling models.
constexpr GemmShape kGemmShapes[] = {{960, 3072, 576}, {960, 4096, 1024}, {480, 4096, 2048}};

// Seconds of the fastest of the runs that fit into a quarter of a second, at least 3.
template <typename Fn>
absl::StatusOr<double> BestSeconds(Fn&& fn) {
  using Clock = std::chrono::steady_clock;
  double best = 1e9;
  double total = 0;
  for (int run = 0; run < 3 || total < 0.25; ++run) {
    const auto begin = Clock::now();
    HEADROOM_RETURN_IF_ERROR(fn());
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    best = std::min(best, seconds);
    total += seconds;
  }
  return best;
}

// Reads every byte, as fast as a core can; the sum keeps the reads from being left out.
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t ReadAll(const uint8_t* data, int64_t bytes) {
  constexpr int kChains = 8;
  __m256i sums[kChains];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t at = 0; at < bytes; at += kChains * 32) {
    for (int line = 0; line < kChains / 2; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(data + at + 4096 + 64 * line), _MM_HINT_T0);
    }
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm256_add_epi64(
          sums[i], _mm256_load_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i)));
    }
  }
  for (int i = 1; i < kChains; ++i) sums[0] = _mm256_add_epi64(sums[0], sums[i]);
  return static_cast<uint64_t>(_mm256_extract_epi64(sums[0], 0));
}
#else
uint64_t ReadAll(const uint8_t* data, int64_t bytes) {
  uint64_t sums[8] = {};
  for (int64_t at = 0; at < bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, data + at, sizeof(words));
    for (int i = 0; i < 8; ++i) sums[i] += words[i];
  }
  for (int i = 1; i < 8; ++i) sums[0] += sums[i];
  return sums[0];
}
#endif

}  // namespace

absl::StatusOr<MappedRegion> MapSharedMemory(int64_t bytes, absl::string_view what) {
  const Fd fd(memfd_create(std::string(what).c_str(), MFD_CLOEXEC));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, absl::StrCat("shared memory for ", what));
  if (ftruncate(fd.get(), bytes) != 0) {
    return absl::ErrnoToStatus(errno, absl::StrCat(bytes, " bytes of shared memory for ", what));
  }
  return MappedRegion::Map(fd.get(), bytes, MappedRegion::Access::kReadWrite, /*huge_pages=*/true,
                           what);
}

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
  options.arena_bytes = kBufferBytes + a_bytes + w_bytes + c_bytes + kMiB;
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
  std::memset(mapped_.data(), 1, kBufferBytes);
  return device_->RegisterHost(mapped_.data(), mapped_.bytes());
}

absl::StatusOr<Ceilings> CpuCeilingProbe::Measure() {
  Ceilings ceilings;
  HEADROOM_ASSIGN_OR_RETURN(ceilings.gemm_flops, GemmFlops());
  ceilings.read_bytes = ReadBytes();
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
    HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds([&]() -> absl::Status {
                                HEADROOM_RETURN_IF_ERROR(device_->Gemm(compute_, args));
                                HEADROOM_RETURN_IF_ERROR(device_->Record(compute_, computed_));
                                return device_->Synchronize(computed_, kTimeout);
                              }));
    best = std::max(best, 2.0 * static_cast<double>(shape.m * shape.n * shape.k) / seconds);
  }
  return best;
}

double CpuCeilingProbe::ReadBytes() {
  std::vector<uint64_t> sums(kBufferBytes / kReadPieceBytes);
  const auto seconds = BestSeconds([&] {
    // Small pieces, so that all threads end together even on a machine that does other things too.
    readers_.ForEach(static_cast<int64_t>(sums.size()), [&](int64_t i) {
      sums[i] = ReadAll(arena_buffer_ + i * kReadPieceBytes, kReadPieceBytes);
    });
    return absl::OkStatus();
  });
  return static_cast<double>(kBufferBytes) / *seconds;
}

absl::StatusOr<double> CpuCeilingProbe::CopyBytes() {
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds([&]() -> absl::Status {
    for (int64_t at = 0; at < kBufferBytes; at += kCopyPieceBytes) {
      CopyArgs copy;
      copy.dst = arena_buffer_ + at;
      copy.src = mapped_.data() + at;
      copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = kCopyPieceBytes;
      HEADROOM_RETURN_IF_ERROR(device_->Copy(copy_, copy));
    }
    HEADROOM_RETURN_IF_ERROR(device_->Record(copy_, copied_));
    return device_->Synchronize(copied_, kTimeout);
  }));
  return static_cast<double>(kBufferBytes) / seconds;
}

}  // namespace headroom
