#include "common/segment_format.h"

#include <xxhash.h>

namespace headroom {
namespace {

// Bounds far above any model's, so that products stay far from overflow.
constexpr int32_t kMaxLayers = 4096;
constexpr int32_t kMaxKvHeads = 4096;
constexpr int32_t kMaxHeadDim = 4096;

}  // namespace

uint64_t ChecksumOf(const IndexHeader& header) {
  const uint64_t hash = XXH3_64bits(&header, offsetof(IndexHeader, checksum));
  return hash == 0 ? 1 : hash;
}

uint64_t CommitWordOf(const ExtentDescriptor& descriptor) {
  constexpr size_t kBegin = offsetof(ExtentDescriptor, sequence_id);
  constexpr size_t kEnd = offsetof(ExtentDescriptor, sealed);
  return XXH3_64bits(reinterpret_cast<const char*>(&descriptor) + kBegin, kEnd - kBegin) | 1;
}

uint64_t SealedWord(int64_t tokens) {
  const auto low = static_cast<uint32_t>(tokens);
  return uint64_t{~low} << 32 | low;
}

std::optional<int64_t> SealedTokens(uint64_t word) {
  const auto low = static_cast<uint32_t>(word);
  if (static_cast<uint32_t>(word >> 32) != ~low) return std::nullopt;
  return low;
}

bool IsUsable(const KvGeometry& geometry) {
  return geometry.num_layers >= 1 && geometry.num_layers <= kMaxLayers &&
         geometry.num_kv_heads >= 1 && geometry.num_kv_heads <= kMaxKvHeads &&
         geometry.head_dim >= 1 && geometry.head_dim <= kMaxHeadDim &&
         kBlockTokens * geometry.BytesPerTokenPerLayer() <= kMaxExtentBytes;
}

}  // namespace headroom
