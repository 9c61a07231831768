// A pool, the worker's end of its mailbox, and questions that are put to it.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_ATTEND_POOL_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_ATTEND_POOL_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/segment/mailbox.h"
#include "kernels/attention.h"
#include "services/kvstore/attend_pool.h"
#include "tests/common/eventually.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {

inline constexpr KvGeometry kGeometry = {2, 3, 64};
inline constexpr int32_t kGroup = 3;
inline constexpr int32_t kQHeads = 3 * kGroup;
inline constexpr int64_t kSegmentBytes = int64_t{8} << 20;
inline constexpr uint32_t kInvalidArgument = static_cast<uint32_t>(absl::StatusCode::kInvalidArgument);
inline constexpr absl::Duration kSoon = absl::Seconds(60);
// A pool that is not woken sleeps on: tests of what wakes it need no clock.
inline AttendPool::Patience Patience() {
  AttendPool::Patience patience;
  patience.sleep = absl::Hours(1);
  return patience;
}
// What nobody has written over.
inline constexpr float kUntouched = 12345.5f;

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
inline Question PlainQuestion() {
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

// A question of some sequences: rows side by side, heads in one item or two, keys in extents of
// many sizes anywhere in the segment.
inline Question RandomQuestion(std::mt19937& random, uint32_t max_rows) {
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

}  // namespace headroom::kvstore

#endif  // HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_ATTEND_POOL_TEST_UTIL_H_
