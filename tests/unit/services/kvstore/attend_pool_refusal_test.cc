// What the store's end of a mailbox says to a worker that does not keep to the format.
#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "common/segment/mailbox.h"
#include "kernels/attention.h"
#include "tests/unit/services/kvstore/attend_pool_test_util.h"

namespace headroom::kvstore {
namespace {

// That no table leads out of the segment is AddressSanitizer's to see; what ThreadSanitizer sees, the
// first hundred show, and 2,000 took it 36 s.
#if defined(__SANITIZE_THREAD__)
constexpr int kRandomTables = 200;
#else
constexpr int kRandomTables = 2000;
#endif

class AttendPoolRefusalTest : public AttendPoolTest {};

TEST_F(AttendPoolRefusalTest, PostsWithWrongNumbersAreRefused) {
  Start();
  WriteQueries(0, 1);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  ExpectRefused([](Question& q) { q.post.rows = 0; });
  ExpectRefused([](Question& q) { q.post.rows = 0, q.layers[1] = {0, 0}; });
  ExpectRefused([](Question& q) { q.post.rows = 1; });  // the item's row is the second
  ExpectRefused([](Question& q) { q.post.rows = 129; });
  ExpectRefused([](Question& q) { q.post.rows = UINT32_MAX; });
  ExpectRefused([](Question& q) { q.post.rows = uint32_t{1} << 31; });
  ExpectRefused([](Question& q) { q.post.layer = 2; });
  ExpectRefused([](Question& q) { q.post.layer = uint32_t{1} << 31; });
  ExpectRefused([](Question& q) { q.post.layer = UINT32_MAX; });
  ExpectRefused([](Question& q) { q.post.table = 2; });
  ExpectRefused([](Question& q) { q.post.table = UINT32_MAX; });
  ExpectRefused([](Question& q) { q.post.scale = std::nanf(""); });
  ExpectRefused([](Question& q) { q.post.scale = kInfinity; });
  ExpectRefused([](Question& q) { q.post.scale = -kInfinity; });
  ExpectRefused([](Question& q) { q.post.soft_cap = -1; });
  ExpectRefused([](Question& q) { q.post.soft_cap = std::nanf(""); });
  ExpectRefused([](Question& q) { q.post.window = -1; });
}

TEST_F(AttendPoolRefusalTest, TablesThatLeaveTheirPlaceAreRefused) {
  Start();
  WriteQueries(0, 1);
  const auto table_bytes = static_cast<uint32_t>(mailbox_->shape().table_bytes);
  const auto ends_too_late = [&](uint32_t bytes) { return table_bytes - bytes + 8; };
  ExpectRefused([&](Question& q) { q.header.items_offset = ends_too_late(sizeof(MailboxItem)); });
  ExpectRefused([&](Question& q) { q.header.items_offset = table_bytes; });
  ExpectRefused([](Question& q) { q.header.items_offset += 1; });
  ExpectRefused([](Question& q) { q.header.items_offset += 4; });
  ExpectRefused([](Question& q) { q.header.items_offset = UINT32_MAX - 7; });
  ExpectRefused([](Question& q) { q.header.items_offset = UINT32_MAX; });
  ExpectRefused([](Question& q) { q.header.num_items = 0; });
  ExpectRefused([&](Question& q) { q.header.num_items = table_bytes / sizeof(MailboxItem) + 1; });
  // 2^32 / 40 items take 2^32 bytes, and so none in 32 bits.
  ExpectRefused([](Question& q) { q.header.num_items = UINT32_MAX / 40 + 1; });
  ExpectRefused([](Question& q) { q.header.num_items = UINT32_MAX; });
  ExpectRefused(
      [&](Question& q) { q.header.spans_offset = ends_too_late(2 * sizeof(MailboxSpan)); });
  ExpectRefused([&](Question& q) { q.header.spans_offset = table_bytes; });
  ExpectRefused([](Question& q) { q.header.spans_offset += 4; });
  ExpectRefused([](Question& q) { q.header.spans_offset = UINT32_MAX - 7; });
  ExpectRefused([](Question& q) { q.header.num_spans = 0; });
  ExpectRefused([](Question& q) { q.header.num_spans = 1; });
  ExpectRefused([&](Question& q) { q.header.num_spans = table_bytes / sizeof(MailboxSpan) + 1; });
  ExpectRefused([](Question& q) { q.header.num_spans = UINT32_MAX / 24 + 1; });
  ExpectRefused([](Question& q) { q.header.num_spans = UINT32_MAX; });
  // The last bytes of the table are still its own.
  Question q = PlainQuestion();
  q.header.spans_offset = table_bytes - 2 * sizeof(MailboxSpan);
  ExpectServed(0, q);
}

TEST_F(AttendPoolRefusalTest, LayersThatNameNoItemsOfTheTableAreRefused) {
  Start();
  WriteQueries(0, 1);
  ExpectRefused([](Question& q) { q.layers[1] = {1, 1}; });
  ExpectRefused([](Question& q) { q.layers[1] = {0, 2}; });
  ExpectRefused([](Question& q) { q.layers[1] = {0, UINT32_MAX}; });
  ExpectRefused([](Question& q) { q.layers[1] = {2, UINT32_MAX}; });  // 1 in 32 bits
  ExpectRefused([](Question& q) { q.layers[1] = {UINT32_MAX, 1}; });
  ExpectRefused([](Question& q) { q.layers[1] = {UINT32_MAX, 2}; });
}

TEST_F(AttendPoolRefusalTest, ItemsWithWrongRowsOrHeadsAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int32_t row : {-1, 2, 128, INT32_MAX, INT32_MIN}) {
    ExpectRefused([row](Question& q) { q.items[0].row_begin = row; });
  }
  for (const int32_t rows : {0, -1, 2, INT32_MAX, INT32_MIN}) {
    ExpectRefused([rows](Question& q) { q.items[0].row_count = rows; });
  }
  ExpectRefused([](Question& q) { q.items[0].row_begin = -1, q.items[0].row_count = 2; });
  for (const int64_t pos : {int64_t{-1}, INT64_MIN, INT64_MAX}) {
    ExpectRefused([pos](Question& q) { q.items[0].first_pos = pos; });
  }
  for (const int32_t head : {-1, 3, 4, INT32_MAX, INT32_MIN}) {
    ExpectRefused([head](Question& q) { q.items[0].kv_head_begin = head; });
  }
  for (const int32_t head : {-1, 0, 1, 4, INT32_MAX, INT32_MIN}) {
    ExpectRefused([head](Question& q) { q.items[0].kv_head_end = head; });
  }
}

TEST_F(AttendPoolRefusalTest, ItemsThatNameNoSpansOfTheTableAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const uint32_t begin : {1u, 2u, UINT32_MAX, UINT32_MAX - 1}) {
    ExpectRefused([begin](Question& q) { q.items[0].span_begin = begin; });
  }
  for (const uint32_t count : {0u, 3u, uint32_t{1} << 31, UINT32_MAX}) {
    ExpectRefused([count](Question& q) { q.items[0].span_count = count; });
  }
  ExpectRefused([](Question& q) {
    q.items[0].span_begin = 2;
    q.items[0].span_count = UINT32_MAX;
  });
}

TEST_F(AttendPoolRefusalTest, SpansThatAreNoExtentsAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int32_t capacity : {0, -256, 1, 32, 63, 65, 192, 255, 257, 1 << 30, INT32_MAX,
                                 INT32_MIN, static_cast<int>(2 * kGeometry.MaxExtentTokens())}) {
    ExpectRefused([capacity](Question& q) { q.spans[0].capacity = capacity; });
  }
  for (const int32_t count : {0, -64, 1, 63, 65, 255, 257, 320, INT32_MAX, INT32_MIN,
                              INT32_MAX - 63}) {
    ExpectRefused([count](Question& q) { q.spans[0].count = count; });
  }
  ExpectRefused([](Question& q) { q.spans[1].count = 192; });  // of 128
}

TEST_F(AttendPoolRefusalTest, AnExtentLargerThanAnyIsRefusedWhereThereIsRoomForIt) {
  const int64_t capacity = 2 * kGeometry.MaxExtentTokens();
  segment_.resize(capacity * kGeometry.BytesPerTokenPerLayer());
  ready_bytes_.store(static_cast<int64_t>(segment_.size()));
  Start();
  WriteQueries(0, 1);
  for (const int64_t tokens : {capacity / 2, capacity}) {
    Question q = PlainQuestion();
    q.spans[0].data_offset = 0;
    q.spans[0].capacity = static_cast<int32_t>(tokens);
    EXPECT_EQ(Ask(0, q), tokens == capacity ? kInvalidArgument : 0);
  }
}

TEST_F(AttendPoolRefusalTest, ExtentsOutsideTheSegmentAreRefused) {
  Start();
  WriteQueries(0, 1);
  const int64_t extent_bytes = 256 * kGeometry.BytesPerTokenPerLayer();
  for (const uint64_t offset :
       {uint64_t{4097}, uint64_t{4096 + 8}, uint64_t{4096 + 32},
        static_cast<uint64_t>(kSegmentBytes - extent_bytes + 64),
        static_cast<uint64_t>(kSegmentBytes - 64), static_cast<uint64_t>(kSegmentBytes),
        static_cast<uint64_t>(kSegmentBytes + 64), uint64_t{1} << 32, uint64_t{1} << 62,
        uint64_t{1} << 63, (uint64_t{1} << 63) - 64, UINT64_MAX, UINT64_MAX - 63,
        UINT64_MAX - static_cast<uint64_t>(extent_bytes) + 1}) {
    ExpectRefused([offset](Question& q) { q.spans[0].data_offset = offset; });
  }
  // The last extent of the segment is one.
  Question q = PlainQuestion();
  q.spans[0].data_offset = static_cast<uint64_t>(kSegmentBytes - extent_bytes);
  ExpectServed(0, q);
}

// Bytes above are not backed by memory yet: reading them would allocate, or end the store.
TEST_F(AttendPoolRefusalTest, ExtentsThatAreNotReadyAreRefusedUntilTheyAre) {
  Start();
  WriteQueries(0, 1);
  Question q = PlainQuestion();
  q.spans[0].data_offset = kSegmentBytes / 2;
  for (const int64_t ready : {int64_t{0}, kSegmentBytes / 2,
                              kSegmentBytes / 2 + 256 * kGeometry.BytesPerTokenPerLayer() - 1}) {
    ready_bytes_.store(ready);
    EXPECT_EQ(Ask(0, q), kInvalidArgument) << ready;
  }
  ready_bytes_.store(kSegmentBytes / 2 + 256 * kGeometry.BytesPerTokenPerLayer());
  ExpectServed(0, q);
}

TEST_F(AttendPoolRefusalTest, KeysOutOfOrderAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int64_t pos : {int64_t{-64}, int64_t{1}, int64_t{63}, kMaxPositions, INT64_MAX - 63,
                            INT64_MAX, INT64_MIN}) {
    ExpectRefused([pos](Question& q) { q.spans[0].first_pos = pos; });
  }
  // Alone, so that nothing else is wrong.
  for (const int64_t pos : {int64_t{-64}, int64_t{1}, int64_t{32}, int64_t{63}}) {
    ExpectRefused([pos](Question& q) {
      q.items[0].span_count = 1;
      q.spans[0].first_pos = pos;
    });
  }
  // The second extent's keys begin before the first's end.
  for (const int64_t pos : {int64_t{0}, int64_t{64}, int64_t{192}, int64_t{-256}}) {
    ExpectRefused([pos](Question& q) { q.spans[1].first_pos = pos; });
  }
  ExpectRefused([](Question& q) { std::swap(q.spans[0], q.spans[1]); });
}

TEST_F(AttendPoolRefusalTest, KeysAtAndAfterTheQueriesAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int64_t pos : {0, 255, 256, 319}) {
    ExpectRefused([pos](Question& q) { q.items[0].first_pos = pos; });
  }
  Question q = PlainQuestion();
  q.items[0].first_pos = 320;
  ExpectServed(0, q);
}

TEST_F(AttendPoolRefusalTest, KeysBelowTheWindowAreRefused) {
  Start();
  WriteQueries(0, 1);
  // Not a block's border, negative, and behind all keys of the first span: 256.
  for (const int64_t pos : {int64_t{1}, int64_t{63}, int64_t{256}, INT64_MAX, int64_t{-1},
                            int64_t{-64}, INT64_MIN}) {
    ExpectRefused([pos](Question& q) { q.items[0].first_valid_pos = pos; });
  }
  for (const int64_t pos : {int64_t{0}, int64_t{64}, int64_t{192}}) {
    Question q = PlainQuestion();
    q.items[0].first_valid_pos = pos;
    EXPECT_EQ(Ask(0, q), 0u) << pos;
  }
}

// Keys behind the window are masked; those that the item leaves out are not even read.
TEST_F(AttendPoolRefusalTest, AWindowEndsWhatIsReadAndASoftCapIsApplied) {
  Start();
  WriteQueries(0, 1);
  const auto ask = [&](int64_t window, float soft_cap, int64_t first_valid_pos) {
    const uint64_t before = pool_->counters().bytes;
    Question q = PlainQuestion();
    q.post.window = window;
    q.post.soft_cap = soft_cap;
    q.items[0].first_valid_pos = first_valid_pos;
    EXPECT_EQ(Ask(0, q), 0u);
    const float* const partials = mailbox_->partials(0);
    return std::pair(std::vector<float>(partials, partials + PartialFloats(*mailbox_)),
                     pool_->counters().bytes - before);
  };
  const auto all = ask(0, 0, 0);
  // Position 704 sees 105 and on.
  const auto windowed = ask(600, 0, 0);
  const auto cut = ask(600, 0, 64);
  EXPECT_NE(all.first, windowed.first);
  EXPECT_EQ(windowed.first, cut.first);
  EXPECT_EQ(all.second, windowed.second);
  EXPECT_EQ(all.second - cut.second, uint64_t{64 * 2 * 64 * 4});  // tokens, heads, dimensions, K and V
  EXPECT_NE(ask(600, 30, 64).first, cut.first);
}

// Attention takes the keys of an item as one run of positions, and counts its units from the first
// to the last: over a hole of 2^39 positions it would not end.
TEST_F(AttendPoolRefusalTest, AHoleBetweenKeysIsRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int64_t hole : {int64_t{64}, int64_t{256}, int64_t{1} << 30}) {
    ExpectRefused([hole](Question& q) {
      q.spans[1].first_pos += hole;
      q.items[0].first_pos += hole;
    });
  }
}

// What a post takes of memory and time is bounded by its table: the spans of a table belong to one
// item each, so that items do not multiply them.
TEST_F(AttendPoolRefusalTest, ItemsThatShareSpansAreRefused) {
  Start();
  WriteQueries(0, 1);
  Question many = PlainQuestion();
  many.post.rows = 100;
  many.spans.clear();
  for (int64_t pos = 0; pos < 300 * 64; pos += 64) many.spans.push_back({4096, pos, 64, 64});
  many.items[0].first_pos = 300 * 64;
  many.items[0].span_count = 300;
  many.items[0].row_begin = 0;
  many.LayOut();
  ExpectRefused(
      [](Question& q) {
        for (int32_t row = 1; row < 100; ++row) {
          q.items.push_back(q.items[0]);
          q.items.back().row_begin = row;
        }
        q.layers[1].item_count = 100;
        q.LayOut();
      },
      kInvalidArgument, many);
}

// Two members of the team would write one state at a time.
TEST_F(AttendPoolRefusalTest, ItemsThatMeetInARowAndHeadAreRefused) {
  Start(2);
  WriteQueries(0, 1);
  // A second item with spans of its own: the first row, for the head that the first item leaves.
  Question two = PlainQuestion();
  two.items.push_back(two.items[0]);
  two.items[1].row_begin = 0;
  two.items[1].kv_head_begin = 0;
  two.items[1].kv_head_end = 1;
  two.items[1].span_begin = 2;
  two.spans.insert(two.spans.end(), two.spans.begin(), two.spans.begin() + 2);
  two.layers[1].item_count = 2;
  two.LayOut();
  ExpectServed(0, two);
  ExpectRefused([](Question& q) { q.items[1] = q.items[0], q.items[1].span_begin = 2; },
                kInvalidArgument, two);
  // Rows 0 and 1 for the last head; row 1 and all heads.
  ExpectRefused(
      [](Question& q) {
        q.items[1].row_count = 2;
        q.items[1].kv_head_begin = 2;
        q.items[1].kv_head_end = 3;
      },
      kInvalidArgument, two);
  ExpectRefused(
      [](Question& q) {
        q.items[1].row_begin = 1;
        q.items[1].kv_head_end = 3;
      },
      kInvalidArgument, two);
  // Side by side they may touch.
  for (const int32_t row : {0, 1}) {
    Question q = two;
    q.items[1].row_begin = row;
    q.items[1].kv_head_end = row == 0 ? 3 : 1;
    ExpectServed(0, q);
  }
}

// The kernels have three head sizes; a store is bound to whatever geometry its coordinator names.
TEST_F(AttendPoolRefusalTest, AHeadSizeThatTheKernelsDoNotHaveIsRefused) {
  Start(1, NewMailbox([](MailboxShape& shape) { shape.geometry.head_dim = 96; }));
  WriteQueries(0, 1);
  EXPECT_NE(Ask(0, PlainQuestion()), 0u);
  EXPECT_EQ(pool_->counters().posts, 0u);
}

TEST_F(AttendPoolRefusalTest, ARefusedPostHasReadNoKeys) {
  Start();
  WriteQueries(0, 1);
  Question q = PlainQuestion();
  q.spans[1].count = 65;
  EXPECT_EQ(Ask(0, q), kInvalidArgument);
  EXPECT_EQ(pool_->counters().bytes, 0u);
}

TEST_F(AttendPoolRefusalTest, RandomTablesAreAnsweredAndHurtNothing) {
  Start(2);
  WriteQueries(0, 1);
  std::mt19937_64 random(11);
  for (int round = 0; round < kRandomTables; ++round) {
    Question q = PlainQuestion();
    // Some bytes of what a worker writes become anything.
    const auto scramble = [&](auto& what) {
      auto* const bytes = reinterpret_cast<uint8_t*>(&what);
      bytes[random() % sizeof(what)] = static_cast<uint8_t>(random());
    };
    for (int i = 0; i < 2; ++i) {
      switch (random() % 5) {
        case 0: scramble(q.post); break;
        case 1: scramble(q.header); break;
        case 2: scramble(q.layers[1]); break;
        case 3: scramble(q.items[0]); break;
        // Positions stay near each other: holes have a test of their own.
        default: scramble(q.spans[0].data_offset), scramble(q.spans[1].capacity); break;
      }
    }
    Ask(0, q);
    if (HasFailure()) FAIL() << "round " << round;
  }
  ExpectServed(0, PlainQuestion());
}

}  // namespace
}  // namespace headroom::kvstore
