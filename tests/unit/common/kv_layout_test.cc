// The addresses that docs/segment.md shows, and what everything else relies on.
#include "common/kv_layout.h"

#include <gtest/gtest.h>

#include <set>

#include "common/segment_format.h"

namespace headroom {
namespace {

constexpr KvGeometry kSmolLm2 = {30, 3, 64};
constexpr KvGeometry kLlama3 = {32, 8, 128};

TEST(KvLayout, HeadsLieSideBySideKeysBeforeValues) {
  const KvLayout layout = {4096, 128};
  EXPECT_EQ(layout.RowBytes(), 256);
  EXPECT_EQ(layout.HeadBytes(), 2 << 20);
  EXPECT_EQ(layout.KeyOffset(0, 0), 0);
  EXPECT_EQ(layout.KeyOffset(0, 1), 256);
  EXPECT_EQ(layout.ValueOffset(0, 0), 1 << 20);
  EXPECT_EQ(layout.KeyOffset(1, 0), 2 << 20);
  EXPECT_EQ(layout.ValueOffset(7, 4095) + layout.RowBytes(), layout.BytesFor(8));
  EXPECT_EQ(layout.BytesFor(8), kMaxExtentBytes);
}

TEST(KvLayout, EveryRowHasItsOwnBytes) {
  const KvLayout layout = {64, 3};
  std::set<int64_t> offsets;
  for (int64_t kv_head = 0; kv_head < 5; ++kv_head) {
    for (int64_t row = 0; row < 64; ++row) {
      offsets.insert(layout.KeyOffset(kv_head, row));
      offsets.insert(layout.ValueOffset(kv_head, row));
    }
  }
  ASSERT_EQ(offsets.size(), 5u * 64 * 2);
  EXPECT_EQ(*offsets.rbegin() + layout.RowBytes(), layout.BytesFor(5));
  for (const int64_t offset : offsets) EXPECT_EQ(offset % layout.RowBytes(), 0);
}

TEST(KvGeometry, BytesAndExtentsOfModels) {
  EXPECT_EQ(kLlama3.BytesPerTokenPerLayer(), 4096);
  EXPECT_EQ(kLlama3.BytesPerToken(), 131072);
  EXPECT_EQ(kLlama3.MaxExtentTokens(), 4096);
  EXPECT_EQ(kSmolLm2.BytesPerTokenPerHead(), 256);
  EXPECT_EQ(kSmolLm2.BytesPerTokenPerLayer(), 768);
  EXPECT_EQ(kSmolLm2.MaxExtentTokens(), 16384);
  EXPECT_EQ(kSmolLm2.BytesPerToken(), 23040);
}

TEST(KvGeometry, ExtentsNeverExceedTheirLimitNorHalfOfIt) {
  for (int32_t heads = 1; heads <= 64; ++heads) {
    for (const int32_t head_dim : {64, 80, 96, 128, 256}) {
      const KvGeometry geometry = {1, heads, head_dim};
      ASSERT_TRUE(IsUsable(geometry));
      const int64_t bytes = geometry.MaxExtentTokens() * geometry.BytesPerTokenPerLayer();
      EXPECT_LE(bytes, kMaxExtentBytes);
      EXPECT_GT(2 * bytes, kMaxExtentBytes);
    }
  }
}

TEST(NextExtentTokens, DoublesUpToTheLargestAndKeepsTheWasteUnderHalf) {
  int64_t capacity = 0;
  for (int64_t tokens = 1; tokens <= 100'000; tokens += 37) {
    while (capacity < tokens) capacity += NextExtentTokens(kLlama3, capacity, 1);
    EXPECT_LE(capacity, std::max<int64_t>(kBlockTokens, 2 * tokens));
  }
  EXPECT_EQ(NextExtentTokens(kLlama3, 0, 1), 64);
  EXPECT_EQ(NextExtentTokens(kLlama3, 64, 1), 64);
  EXPECT_EQ(NextExtentTokens(kLlama3, 128, 1), 128);
  EXPECT_EQ(NextExtentTokens(kLlama3, 0, 100'000), 4096) << "a long prompt gets large ones at once";
  EXPECT_EQ(NextExtentTokens(kLlama3, 1 << 30, 1), 4096);
}

TEST(Blocks, FloorAndCeil) {
  EXPECT_EQ(FloorToBlock(0), 0);
  EXPECT_EQ(FloorToBlock(63), 0);
  EXPECT_EQ(FloorToBlock(64), 64);
  EXPECT_EQ(CeilToBlock(0), 0);
  EXPECT_EQ(CeilToBlock(1), 64);
  EXPECT_EQ(CeilToBlock(64), 64);
}

}  // namespace
}  // namespace headroom
