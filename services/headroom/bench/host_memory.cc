#include "services/headroom/bench/host_memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/fd.h"
#include "kernels/types.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headroom {
namespace {

constexpr int64_t kPieceBytes = int64_t{1} << 20;

// Reads every byte, as fast as a core can; the sum keeps the reads from being left out.
#if defined(__x86_64__)
__attribute__((target("avx2"))) uint64_t ReadAll(const uint8_t* data, int64_t bytes) {
  constexpr int kChains = 8;
  __m256i sums[kChains];
  for (__m256i& sum : sums) sum = _mm256_setzero_si256();
  for (int64_t at = 0; at < bytes; at += kChains * 32) {
    for (int line = 0; line < kChains / 2; ++line) {
      _mm_prefetch(reinterpret_cast<const char*>(data + at + 16384 + 64 * line), _MM_HINT_T0);
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

int64_t AvailableHostBytes() {
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);) {
    int64_t kib = 0;
    if (std::sscanf(line.c_str(), "MemAvailable: %ld kB", &kib) == 1) return kib << 10;
  }
  return std::numeric_limits<int64_t>::max();
}

void FillWithKeys(uint8_t* data, int64_t bytes, kernels::CpuTeam& team) {
  std::vector<kernels::BFloat16> values(kPieceBytes / sizeof(kernels::BFloat16));
  std::mt19937 random(1);
  for (kernels::BFloat16& value : values) {
    value = kernels::ToBFloat16(static_cast<float>(random()) * 0x1p-31f - 1.0f);
  }
  team.ForEach((bytes + kPieceBytes - 1) / kPieceBytes, [&](int64_t i) {
    const int64_t at = i * kPieceBytes;
    std::memcpy(data + at, values.data(), static_cast<size_t>(std::min(kPieceBytes, bytes - at)));
  });
}

void ReadHost(const uint8_t* data, int64_t bytes, kernels::CpuTeam& team) {
  std::atomic<uint64_t> sum = 0;
  // Small pieces, so that all threads end together even on a machine that does other things too.
  team.ForEach(bytes / kPieceBytes, [&](int64_t i) {
    sum.fetch_add(ReadAll(data + i * kPieceBytes, kPieceBytes), std::memory_order_relaxed);
  });
}

double HostReadRate(const uint8_t* data, int64_t bytes, kernels::CpuTeam& team,
                    double least_seconds) {
  const auto seconds = BestSeconds(least_seconds, [&] {
    ReadHost(data, bytes, team);
    return absl::OkStatus();
  });
  return static_cast<double>(bytes / kPieceBytes * kPieceBytes) / *seconds;
}

}  // namespace headroom
