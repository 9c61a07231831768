// The store's end of a mailbox: what it answers to a worker that keeps to the format, and to one
// that does not.
#include "services/kvstore/attend_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/segment/mailbox.h"
#include "kernels/attention.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

constexpr KvGeometry kGeometry = {2, 3, 64};
constexpr int32_t kGroup = 3;
constexpr int32_t kQHeads = 3 * kGroup;
constexpr int64_t kSegmentBytes = int64_t{8} << 20;
constexpr uint32_t kInvalidArgument = static_cast<uint32_t>(absl::StatusCode::kInvalidArgument);
constexpr absl::Duration kSoon = absl::Seconds(60);
// A pool that is not woken sleeps on: tests of what wakes it need no clock.
AttendPool::Patience Patience() {
  AttendPool::Patience patience;
  patience.sleep = absl::Hours(1);
  return patience;
}
// What nobody has written over.
constexpr float kUntouched = 12345.5f;
// That no table leads out of the segment is AddressSanitizer's to see; what ThreadSanitizer sees, the
// first hundred show, and 2,000 took it 36 s.
#if defined(__SANITIZE_THREAD__)
constexpr int kRandomTables = 200;
#else
constexpr int kRandomTables = 2000;
#endif

// What a worker says to the store: a post and the table that it names.
struct Question {
  MailboxPost post = {};
  MailboxTableHeader header = {};
  std::vector<MailboxLayer> layers;
  std::vector<MailboxItem> items;
  std::vector<MailboxSpan> spans;

  // Where items and spans lie, as a worker lays them out.
  void LayOut() {
    header.num_items = static_cast<uint32_t>(items.size());
    header.num_spans = static_cast<uint32_t>(spans.size());
    header.items_offset =
        static_cast<uint32_t>(sizeof(header) + layers.size() * sizeof(MailboxLayer));
    header.spans_offset =
        header.items_offset + static_cast<uint32_t>(items.size() * sizeof(MailboxItem));
  }
};

// One row of one sequence at position 704: KV heads 1 and 2 against 320 keys in two extents.
Question PlainQuestion() {
  Question q;
  q.post.step = 70;
  q.post.attempt = 2;
  q.post.layer = 1;
  q.post.table = 1;
  q.post.rows = 2;
  q.post.scale = 0.125f;
  q.layers = {{0, 0}, {0, 1}};
  MailboxItem item = {};
  item.row_begin = 1;
  item.row_count = 1;
  item.first_pos = 704;
  item.kv_head_begin = 1;
  item.kv_head_end = 3;
  item.span_count = 2;
  q.items = {item};
  q.spans = {{4096, 0, 256, 256}, {int64_t{1} << 20, 256, 64, 128}};
  q.LayOut();
  return q;
}

class AttendPoolTest : public testing::Test {
 protected:
  AttendPoolTest() : segment_(kSegmentBytes) {
    // Numbers from 0.5 to 2 of either sign.
    std::mt19937 random(7);
    for (int64_t i = 0; i < kSegmentBytes; i += 2) {
      const auto bits = static_cast<uint16_t>(0x3f00 | (random() & 0x80ff));
      std::memcpy(&segment_[i], &bits, sizeof(bits));
    }
  }

  std::shared_ptr<Mailbox> NewMailbox(const std::function<void(MailboxShape&)>& change = nullptr) {
    MailboxShape shape;
    shape.generation = ++mailboxes_;
    shape.geometry = kGeometry;
    shape.num_q_heads = kQHeads;
    shape.num_slots = 2;
    shape.tables_per_slot = 2;
    shape.max_rows = 128;
    shape.table_bytes = 16 << 10;
    if (change) change(shape);
    return Must(Mailbox::Create(dir_.path(), MailboxFile(mailboxes_, 1), shape));
  }
  // One mapping for both ends, so that ThreadSanitizer sees what orders them.
  void Start(int threads, std::shared_ptr<Mailbox> mailbox,
             const AttendPool::Patience& patience = Patience()) {
    pool_.reset();
    pool_ = std::make_unique<AttendPool>(
        segment_.data(), [this] { return ready_bytes_.load(); }, threads, patience);
    mailbox_ = std::move(mailbox);
    counts_[0] = counts_[1] = 0;
    pool_->Attach(mailbox_);
  }
  void Start(int threads = 1) { Start(threads, NewMailbox()); }

  static int64_t PartialFloats(const Mailbox& mailbox) {
    return mailbox.shape().max_rows * mailbox.shape().partial_floats();
  }
  // Queries of all rows, drawn from `seed`.
  void WriteQueries(uint32_t slot, uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    float* const to = mailbox_->queries(slot);
    const int64_t floats = mailbox_->shape().max_rows * mailbox_->shape().query_floats();
    for (int64_t i = 0; i < floats; ++i) to[i] = 1.5f * normal(random);
  }
  void WriteTable(uint32_t slot, uint32_t table, const Question& q) {
    uint8_t* const to = mailbox_->table(slot, table);
    const int64_t limit = mailbox_->shape().table_bytes;
    std::memset(to, 0, limit);
    const auto write = [&](int64_t offset, const void* data, size_t bytes) {
      if (offset + static_cast<int64_t>(bytes) <= limit) std::memcpy(to + offset, data, bytes);
    };
    write(0, &q.header, sizeof(q.header));
    write(sizeof(q.header), q.layers.data(), q.layers.size() * sizeof(MailboxLayer));
    write(q.header.items_offset, q.items.data(), q.items.size() * sizeof(MailboxItem));
    write(q.header.spans_offset, q.spans.data(), q.spans.size() * sizeof(MailboxSpan));
  }
  // Rings, without waiting.
  void Post(uint32_t slot, const Question& q) {
    const uint32_t table = std::min(q.post.table, mailbox_->shape().tables_per_slot - 1);
    WriteTable(slot, table, q);
    std::fill_n(mailbox_->partials(slot), PartialFloats(*mailbox_), kUntouched);
    mailbox_->slot(slot).post = q.post;
    RingPosted(mailbox_->header(), mailbox_->slot(slot), ++counts_[slot]);
  }
  bool Answered(uint32_t slot, absl::Duration timeout = kSoon) {
    return AwaitAnswered(mailbox_->header(), mailbox_->slot(slot), counts_[slot], timeout);
  }
  // The code of the answer, which must bear the post's tag.
  uint32_t Ask(uint32_t slot, const Question& q) {
    Post(slot, q);
    if (!Answered(slot)) {
      ADD_FAILURE() << "no answer";
      return UINT32_MAX;
    }
    const MailboxAnswer& answer = mailbox_->slot(slot).answer;
    EXPECT_EQ(answer.generation, mailbox_->shape().generation);
    EXPECT_EQ(answer.step, q.post.step);
    EXPECT_EQ(answer.attempt, q.post.attempt);
    EXPECT_EQ(answer.layer, q.post.layer);
    return answer.code;
  }
  std::vector<float> Partials(uint32_t slot) const {
    const float* const from = mailbox_->partials(slot);
    return std::vector<float>(from, from + PartialFloats(*mailbox_));
  }

  // The slot's partials if exactly the question's layer is attended to: other rows and heads stay
  // as they were.
  std::vector<float> Expected(uint32_t slot, const Question& q) {
    std::vector<kernels::AttendItem> items;
    std::vector<kernels::KvSpan> spans;
    const MailboxLayer& layer = q.layers[q.post.layer];
    for (uint32_t i = layer.item_begin; i < layer.item_begin + layer.item_count; ++i) {
      const MailboxItem& from = q.items[i];
      kernels::AttendItem item;
      item.row_begin = from.row_begin;
      item.row_count = from.row_count;
      item.first_pos = from.first_pos;
      item.kv_head_begin = from.kv_head_begin;
      item.kv_head_end = from.kv_head_end;
      item.span_begin = static_cast<int32_t>(spans.size());
      item.span_count = static_cast<int32_t>(from.span_count);
      item.reset = 1;
      items.push_back(item);
      for (uint32_t s = from.span_begin; s < from.span_begin + from.span_count; ++s) {
        kernels::KvSpan span;
        span.base = &segment_[q.spans[s].data_offset];
        span.origin_pos = span.first_pos = q.spans[s].first_pos;
        span.count = q.spans[s].count;
        span.capacity = q.spans[s].capacity;
        span.kv_head_end = kGeometry.num_kv_heads;
        spans.push_back(span);
      }
    }
    std::vector<float> state(PartialFloats(*mailbox_), kUntouched);
    std::vector<float> scratch(kernels::kMinAttendScratchFloats);
    kernels::AttendArgs args;
    args.q = mailbox_->queries(slot);
    args.q_stride = mailbox_->shape().query_floats();
    args.state = state.data();
    args.rows = q.post.rows;
    args.items = {items.data(), items.data(), static_cast<int32_t>(items.size())};
    args.spans = {spans.data(), spans.data(), static_cast<int32_t>(spans.size())};
    args.scratch = scratch.data();
    args.scratch_floats = static_cast<int64_t>(scratch.size());
    args.scale = q.post.scale;
    args.num_q_heads = kQHeads;
    args.num_kv_heads = kGeometry.num_kv_heads;
    args.head_dim = kGeometry.head_dim;
    kernels::CpuTeam team(1);
    kernels::cpu::Attend(args, team);
    return state;
  }
  static bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
  }
  static int64_t BytesOf(const Question& q) {
    int64_t bytes = 0;
    const MailboxLayer& layer = q.layers[q.post.layer];
    for (uint32_t i = layer.item_begin; i < layer.item_begin + layer.item_count; ++i) {
      const MailboxItem& item = q.items[i];
      for (uint32_t s = item.span_begin; s < item.span_begin + item.span_count; ++s) {
        bytes += q.spans[s].count * (item.kv_head_end - item.kv_head_begin) *
                 kGeometry.BytesPerTokenPerHead();
      }
    }
    return bytes;
  }
  void ExpectServed(uint32_t slot, const Question& q) {
    EXPECT_EQ(Ask(slot, q), 0u);
    EXPECT_TRUE(SameBits(Partials(slot), Expected(slot, q)));
  }
  // `change` makes a good question one that is answered with `code`; after it the pool goes on.
  void ExpectRefused(const std::function<void(Question&)>& change,
                     uint32_t code = kInvalidArgument, const Question& good = PlainQuestion()) {
    Question q = good;
    change(q);
    const AttendPool::Counters before = pool_->counters();
    EXPECT_EQ(Ask(0, q), code);
    const std::vector<float> partials = Partials(0);
    EXPECT_EQ(std::count(partials.begin(), partials.end(), kUntouched),
              static_cast<ptrdiff_t>(partials.size()))
        << "partials were written";
    EXPECT_EQ(pool_->counters().refused, before.refused + 1);
    EXPECT_EQ(pool_->counters().posts, before.posts);
    ExpectServed(0, good);
    EXPECT_EQ(pool_->counters().posts, before.posts + 1);
  }
  template <typename Condition>
  static bool Eventually(Condition condition) {
    for (int i = 0; i < 6000 && !condition(); ++i) absl::SleepFor(absl::Milliseconds(5));
    return condition();
  }
  bool Sleeps() {
    return Eventually([this] { return mailbox_->header().store_sleeps.load() != 0; });
  }

  const TempSegmentDir dir_;
  std::vector<uint8_t> segment_;
  std::atomic<int64_t> ready_bytes_{kSegmentBytes};
  uint64_t mailboxes_ = 0;
  std::shared_ptr<Mailbox> mailbox_;
  uint64_t counts_[2] = {0, 0};
  std::unique_ptr<AttendPool> pool_;
};

// ---------------------------------------------------------------- good posts

// A question of some sequences: rows side by side, heads in one item or two, keys in extents of
// many sizes anywhere in the segment.
Question RandomQuestion(std::mt19937& random, uint32_t max_rows) {
  const auto below = [&](int64_t n) { return static_cast<int64_t>(random() % n); };
  Question q;
  q.post.step = random();
  q.post.attempt = random() % 3;
  q.post.layer = random() % 2;
  q.post.table = random() % 2;
  q.post.scale = 0.05f + static_cast<float>(below(100)) / 500;
  const auto add_item = [&](int32_t row, int32_t rows, int64_t first_pos, int64_t keys,
                            int32_t head_begin, int32_t head_end) {
    MailboxItem item = {};
    item.row_begin = row;
    item.row_count = rows;
    item.first_pos = first_pos;
    item.kv_head_begin = head_begin;
    item.kv_head_end = head_end;
    item.span_begin = static_cast<uint32_t>(q.spans.size());
    for (int64_t pos = 0; pos < keys; ++item.span_count) {
      MailboxSpan span = {};
      span.capacity = 64 << below(5);
      span.count = static_cast<int32_t>(std::min(keys - pos, 64 * (1 + below(span.capacity / 64))));
      span.first_pos = pos;
      const int64_t bytes = span.capacity * kGeometry.BytesPerTokenPerLayer();
      span.data_offset = static_cast<uint64_t>(64 * below((kSegmentBytes - bytes) / 64 + 1));
      pos += span.count;
      q.spans.push_back(span);
    }
    q.items.push_back(item);
  };
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const auto begin = static_cast<uint32_t>(q.items.size());
    int32_t row = 0;
    for (int part = 0; part < 3; ++part) {
      const auto rows = static_cast<int32_t>(part == 0 ? 1 : 1 + below(max_rows / 3));
      const int64_t keys = 64 * (1 + below(part == 2 ? 3 : 20));
      const int64_t first_pos = keys + below(100);
      const auto cut = static_cast<int32_t>(below(4));
      if (cut > 0) add_item(row, rows, first_pos, keys, 0, cut);
      // The last heads are left out now and then.
      if (cut < 3 && below(3) > 0) add_item(row, rows, first_pos, keys, cut, 3);
      row += rows;
    }
    q.post.rows = std::max(q.post.rows, static_cast<uint32_t>(row));
    q.layers.push_back({begin, static_cast<uint32_t>(q.items.size()) - begin});
  }
  q.LayOut();
  return q;
}

TEST_F(AttendPoolTest, PartialsHaveTheBitsOfAttentionOverTheSameKeys) {
  std::mt19937 random(3);
  for (const int threads : {1, 2}) {
    Start(threads);
    EXPECT_EQ(pool_->threads(), threads);
    uint64_t bytes = 0;
    for (int round = 0; round < 25; ++round) {
      const Question q = RandomQuestion(random, round % 2 == 0 ? 12 : 120);
      const uint32_t slot = round % 2;
      WriteQueries(slot, 100 + round);
      ASSERT_EQ(Ask(slot, q), 0u) << "round " << round;
      ASSERT_TRUE(SameBits(Partials(slot), Expected(slot, q)))
          << "round " << round << ", " << threads << " threads";
      // The table's totals are the step's, and begin with what the worker has zeroed.
      MailboxTotals totals;
      std::memcpy(&totals, mailbox_->table(slot, q.post.table), sizeof(totals));
      EXPECT_EQ(totals.posts, 1u);
      EXPECT_EQ(totals.bytes, static_cast<uint64_t>(BytesOf(q)));
      EXPECT_GT(totals.busy_ns, 0u);
      bytes += totals.bytes;
      EXPECT_EQ(pool_->counters().bytes, bytes);
    }
    EXPECT_EQ(pool_->counters().posts, 25u);
    EXPECT_EQ(pool_->counters().refused, 0u);
    EXPECT_EQ(pool_->counters().late_partials, 0u);
    EXPECT_GT(pool_->counters().busy_ns, 0u);
  }
}

TEST_F(AttendPoolTest, TheLayersOfAStepAddUpInItsTable) {
  Start();
  Question q = PlainQuestion();
  q.layers[0] = {0, 1};
  WriteQueries(0, 1);
  WriteTable(0, 1, q);
  for (uint32_t layer = 0; layer < 2; ++layer) {
    q.post.layer = layer;
    mailbox_->slot(0).post = q.post;
    RingPosted(mailbox_->header(), mailbox_->slot(0), ++counts_[0]);
    ASSERT_TRUE(Answered(0));
  }
  MailboxTotals totals;
  std::memcpy(&totals, mailbox_->table(0, 1), sizeof(totals));
  EXPECT_EQ(totals.posts, 2u);
  EXPECT_EQ(totals.bytes, static_cast<uint64_t>(2 * BytesOf(q)));
}

TEST_F(AttendPoolTest, ALayerWithoutKeysIsAnsweredAndTouchesNothing) {
  Start();
  Question q = PlainQuestion();
  q.post.layer = 0;
  ExpectServed(0, q);
  EXPECT_EQ(pool_->counters().bytes, 0u);
}

TEST_F(AttendPoolTest, SlotsAreServedSideBySide) {
  Start(2);
  WriteQueries(0, 1);
  WriteQueries(1, 2);
  Question q = PlainQuestion();
  Question other = PlainQuestion();
  other.post.step = 71;
  other.items[0].kv_head_begin = 0;
  for (int round = 0; round < 50; ++round) {
    Post(0, q);
    Post(1, other);
    ASSERT_TRUE(Answered(0));
    ASSERT_TRUE(Answered(1));
    ASSERT_TRUE(SameBits(Partials(0), Expected(0, q)));
    ASSERT_TRUE(SameBits(Partials(1), Expected(1, other)));
  }
  EXPECT_EQ(pool_->counters().posts, 100u);
}

// ---------------------------------------------------------------- hostile posts

TEST_F(AttendPoolTest, PostsWithWrongNumbersAreRefused) {
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

TEST_F(AttendPoolTest, TablesThatLeaveTheirPlaceAreRefused) {
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

TEST_F(AttendPoolTest, LayersThatNameNoItemsOfTheTableAreRefused) {
  Start();
  WriteQueries(0, 1);
  ExpectRefused([](Question& q) { q.layers[1] = {1, 1}; });
  ExpectRefused([](Question& q) { q.layers[1] = {0, 2}; });
  ExpectRefused([](Question& q) { q.layers[1] = {0, UINT32_MAX}; });
  ExpectRefused([](Question& q) { q.layers[1] = {2, UINT32_MAX}; });  // 1 in 32 bits
  ExpectRefused([](Question& q) { q.layers[1] = {UINT32_MAX, 1}; });
  ExpectRefused([](Question& q) { q.layers[1] = {UINT32_MAX, 2}; });
}

TEST_F(AttendPoolTest, ItemsWithWrongRowsOrHeadsAreRefused) {
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

TEST_F(AttendPoolTest, ItemsThatNameNoSpansOfTheTableAreRefused) {
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

TEST_F(AttendPoolTest, SpansThatAreNoExtentsAreRefused) {
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

TEST_F(AttendPoolTest, AnExtentLargerThanAnyIsRefusedWhereThereIsRoomForIt) {
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

TEST_F(AttendPoolTest, ExtentsOutsideTheSegmentAreRefused) {
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
TEST_F(AttendPoolTest, ExtentsThatAreNotReadyAreRefusedUntilTheyAre) {
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

TEST_F(AttendPoolTest, KeysOutOfOrderAreRefused) {
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

TEST_F(AttendPoolTest, KeysAtAndAfterTheQueriesAreRefused) {
  Start();
  WriteQueries(0, 1);
  for (const int64_t pos : {0, 255, 256, 319}) {
    ExpectRefused([pos](Question& q) { q.items[0].first_pos = pos; });
  }
  Question q = PlainQuestion();
  q.items[0].first_pos = 320;
  ExpectServed(0, q);
}

TEST_F(AttendPoolTest, KeysBelowTheWindowAreRefused) {
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
TEST_F(AttendPoolTest, AWindowEndsWhatIsReadAndASoftCapIsApplied) {
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
TEST_F(AttendPoolTest, AHoleBetweenKeysIsRefused) {
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
TEST_F(AttendPoolTest, ItemsThatShareSpansAreRefused) {
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
TEST_F(AttendPoolTest, ItemsThatMeetInARowAndHeadAreRefused) {
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
TEST_F(AttendPoolTest, AHeadSizeThatTheKernelsDoNotHaveIsRefused) {
  Start(1, NewMailbox([](MailboxShape& shape) { shape.geometry.head_dim = 96; }));
  WriteQueries(0, 1);
  EXPECT_NE(Ask(0, PlainQuestion()), 0u);
  EXPECT_EQ(pool_->counters().posts, 0u);
}

TEST_F(AttendPoolTest, ARefusedPostHasReadNoKeys) {
  Start();
  WriteQueries(0, 1);
  Question q = PlainQuestion();
  q.spans[1].count = 65;
  EXPECT_EQ(Ask(0, q), kInvalidArgument);
  EXPECT_EQ(pool_->counters().bytes, 0u);
}

TEST_F(AttendPoolTest, RandomTablesAreAnsweredAndHurtNothing) {
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

// ---------------------------------------------------------------- mailboxes come and go

TEST_F(AttendPoolTest, ItSaysInTheMailboxThatItLooks) {
  Start();
  EXPECT_EQ(mailbox_->header().attached, mailbox_->shape().generation);
}

TEST_F(AttendPoolTest, APostThatIsThereBeforeThePoolIsServed) {
  mailbox_ = NewMailbox();
  WriteQueries(0, 1);
  Post(0, PlainQuestion());
  const std::shared_ptr<Mailbox> mailbox = mailbox_;
  const uint64_t count = counts_[0];
  Start(1, mailbox);
  counts_[0] = count;
  ASSERT_TRUE(Answered(0));
  EXPECT_TRUE(SameBits(Partials(0), Expected(0, PlainQuestion())));
}

TEST_F(AttendPoolTest, AnotherMailboxIsServedAtOnceAndTheOldOneNoMore) {
  for (const bool poster_wakes : {true, false}) {
    const auto shape = [poster_wakes](MailboxShape& s) { s.poster_wakes = poster_wakes; };
    Start(1, NewMailbox(shape));
    WriteQueries(0, 1);
    ExpectServed(0, PlainQuestion());
    for (int round = 0; round < 3; ++round) {
      ASSERT_TRUE(Sleeps());
      const std::shared_ptr<Mailbox> old = mailbox_;
      const uint64_t old_count = counts_[0];
      mailbox_ = NewMailbox(shape);
      counts_[0] = 0;
      WriteQueries(0, 2 + round);
      pool_->Attach(mailbox_);
      Post(0, PlainQuestion());
      ASSERT_TRUE(Answered(0)) << "it was not woken";
      EXPECT_TRUE(SameBits(Partials(0), Expected(0, PlainQuestion())));
      RingPosted(old->header(), old->slot(0), old_count + 1);
      EXPECT_FALSE(AwaitAnswered(old->header(), old->slot(0), old_count + 1,
                                 absl::Milliseconds(30)));
    }
  }
}

// A coordinator that connects again, or tells twice, attaches the mailbox that there is. Its posts
// have been answered, and whoever has asked may be reading the partials.
TEST_F(AttendPoolTest, AMailboxThatIsAttachedAgainIsNotAnsweredAgain) {
  Start();
  WriteQueries(0, 1);
  ExpectServed(0, PlainQuestion());
  std::fill_n(mailbox_->partials(0), PartialFloats(*mailbox_), kUntouched);
  pool_->Attach(mailbox_);
  ExpectServed(1, PlainQuestion());
  EXPECT_EQ(pool_->counters().posts, 2u);
  const std::vector<float> partials = Partials(0);
  EXPECT_EQ(std::count(partials.begin(), partials.end(), kUntouched),
            static_cast<ptrdiff_t>(partials.size()));
}

TEST_F(AttendPoolTest, ARetiredMailboxGetsNoAnswerAndTheNextOneDoes) {
  Start();
  WriteQueries(0, 1);
  ExpectServed(0, PlainQuestion());
  mailbox_->header().retired.store(1);
  Post(0, PlainQuestion());
  ASSERT_TRUE(Eventually([this] { return pool_->counters().late_partials == 1; }));
  EXPECT_EQ(mailbox_->slot(0).answered, 1u);
  EXPECT_EQ(pool_->counters().posts, 1u);
  mailbox_ = NewMailbox();
  counts_[0] = 0;
  pool_->Attach(mailbox_);
  WriteQueries(0, 2);
  ExpectServed(0, PlainQuestion());
}

// ---------------------------------------------------------------- sleeping

// Left alone it would look again after half a second.
TEST_F(AttendPoolTest, APoolThatSleepsIsWokenByAPost) {
  Start();
  WriteQueries(0, 1);
  for (int round = 0; round < 5; ++round) {
    ASSERT_TRUE(Sleeps());
    ExpectServed(0, PlainQuestion());
  }
}

// A GPU raises the count and rings no bell. Between the layers of a step the pool spins; for a
// while after it, it naps.
TEST_F(AttendPoolTest, PostsOfWhoCanWakeNobodyAreFoundWhileAStepRuns) {
  for (const bool naps : {false, true}) {
    AttendPool::Patience patience = Patience();
    patience.spin = naps ? absl::ZeroDuration() : absl::Hours(1);
    patience.naps = absl::Hours(1);
    Start(1, NewMailbox([](MailboxShape& shape) { shape.poster_wakes = false; }), patience);
    WriteQueries(0, 1);
    ExpectServed(0, PlainQuestion());
    for (uint64_t round = 0; round < 3; ++round) {
      ASSERT_TRUE(!naps || Sleeps());
      mailbox_->slot(0).post.step = 900 + round;
      mailbox_->slot(0).posted.store(++counts_[0]);
      ASSERT_TRUE(Answered(0)) << naps;
      EXPECT_EQ(mailbox_->slot(0).answer.step, 900 + round);
    }
  }
}

// ... and between steps it sleeps deeply, until the worker's host says that one begins.
TEST_F(AttendPoolTest, TheBeginOfAStepWakesAPoolThatHasBeenQuietForLong) {
  Start(1, NewMailbox([](MailboxShape& shape) { shape.poster_wakes = false; }));
  WriteQueries(0, 1);
  ExpectServed(0, PlainQuestion());
  absl::SleepFor(Patience().naps + absl::Milliseconds(200));
  ASSERT_TRUE(Sleeps());
  WakeStore(mailbox_->header());
  mailbox_->slot(0).posted.store(++counts_[0]);
  ASSERT_TRUE(Answered(0));
}

// A pool that did not hear of its end would sleep for an hour, and the test with it.
TEST_F(AttendPoolTest, APoolWithoutAMailboxEnds) {
  for (const int threads : {1, 2}) {
    for (const int begun_ms : {20, 0}) {  // also before its thread has begun
      AttendPool pool(segment_.data(), [] { return kSegmentBytes; }, threads, Patience());
      absl::SleepFor(absl::Milliseconds(begun_ms));
    }
  }
}

TEST_F(AttendPoolTest, APoolThatSleepsEnds) {
  for (int round = 0; round < 3; ++round) {
    Start(2);
    WriteQueries(0, 1);
    ExpectServed(0, PlainQuestion());
    EXPECT_TRUE(Sleeps());
    pool_.reset();
  }
}

TEST_F(AttendPoolTest, APoolThatSpinsOrNapsEnds) {
  AttendPool::Patience spins = Patience();
  spins.spin = absl::Hours(1);
  AttendPool::Patience naps = Patience();
  naps.spin = absl::ZeroDuration();
  naps.naps = absl::Hours(1);
  for (const AttendPool::Patience& patience : {spins, naps}) {
    Start(2, NewMailbox([](MailboxShape& s) { s.poster_wakes = false; }), patience);
    WriteQueries(0, 1);
    ExpectServed(0, PlainQuestion());
    pool_.reset();
  }
}

}  // namespace
}  // namespace headroom::kvstore
