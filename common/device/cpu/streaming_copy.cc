#include "common/device/cpu/streaming_copy.h"

#include <cstddef>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headroom {

#if defined(__x86_64__)

namespace {

constexpr int64_t kLine = 64;
constexpr int64_t kPieceBytes = 4 * kLine;
// Below this a copy is likely to be read again from the cache: tables, results, rows.
constexpr int64_t kLeastBytes = 16 << 10;
// How far ahead lines are asked for; 1 to 4 KiB are alike.
constexpr int64_t kAhead = 2048;

// Whole pieces of kPieceBytes, to a line's border. The CPU device asks for AVX2.
__attribute__((target("avx"))) void StreamPieces(uint8_t* dst, const uint8_t* src, int64_t bytes) {
  constexpr int kVectors = kPieceBytes / sizeof(__m256i);
  for (int64_t at = 0; at < bytes; at += kPieceBytes) {
    auto* const to = reinterpret_cast<__m256i*>(dst + at);
    const auto* const from = reinterpret_cast<const __m256i*>(src + at);
#pragma GCC unroll 8
    for (int64_t line = 0; line < kPieceBytes; line += kLine) {
      _mm_prefetch(reinterpret_cast<const char*>(src + at + kAhead + line), _MM_HINT_NTA);
    }
    __m256i piece[kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) piece[i] = _mm256_loadu_si256(from + i);
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) _mm256_stream_si256(to + i, piece[i]);
  }
  // Such stores are ordered by nothing else, not even a release.
  _mm_sfence();
}

}  // namespace

void StreamingCopy(void* dst, const void* src, int64_t bytes) {
  if (bytes == 0) return;  // then the pointers may be null
  if (bytes < kLeastBytes) {
    std::memcpy(dst, src, static_cast<size_t>(bytes));
    return;
  }
  auto* const to = static_cast<uint8_t*>(dst);
  const auto* const from = static_cast<const uint8_t*>(src);
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(dst) % kLine);
  const int64_t head = past == 0 ? 0 : kLine - past;
  const int64_t pieces = (bytes - head) / kPieceBytes * kPieceBytes;
  const int64_t tail = bytes - head - pieces;
  std::memcpy(to, from, static_cast<size_t>(head));
  StreamPieces(to + head, from + head, pieces);
  std::memcpy(to + head + pieces, from + head + pieces, static_cast<size_t>(tail));
}

#else

void StreamingCopy(void* dst, const void* src, int64_t bytes) {
  std::memcpy(dst, src, static_cast<size_t>(bytes));
}

#endif

}  // namespace headroom
