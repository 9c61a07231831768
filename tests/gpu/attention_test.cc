// The CUDA attention kernels against the plain reference, and against themselves: the same bits
// however keys are cut into launches, wherever they lie and whatever rows are beside a row.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {
namespace {

using kernels::AttendArgs;
using kernels::AttendItem;
using kernels::AttentionStateFloats;
using kernels::BFloat16;
using kernels::KvSpan;
using kernels::Near;
using kernels::Random;
using kernels::SameBits;

struct Shape {
  int32_t num_kv_heads = 2;
  int32_t group = 3;
  int32_t head_dim = 64;
  int32_t num_q_heads() const { return num_kv_heads * group; }
};

// One sequence's q, K and V at positions [0, tokens).
struct Sequence {
  Sequence(const Shape& the_shape, int64_t the_tokens, uint32_t seed)
      : shape(the_shape), tokens(the_tokens) {
    Random random(seed);
    q = random.Floats(tokens * q_width(), 1.5f);
    k = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim, 1.5f);
    v = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim);
  }
  int64_t q_width() const { return int64_t{shape.num_q_heads()} * shape.head_dim; }

  // The positions [first, first + count) of all heads as they lie in `capacity` rows; the rest is
  // NaN.
  std::vector<uint8_t> Lay(int64_t first, int64_t count, int64_t origin, int32_t capacity) const {
    const int32_t d = shape.head_dim;
    const KvLayout layout{capacity, d};
    std::vector<uint8_t> bytes(static_cast<size_t>(layout.BytesFor(shape.num_kv_heads)), 0xff);
    for (int64_t pos = first; pos < first + count; ++pos) {
      const int64_t row = (pos - origin) % capacity;
      for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
        const int64_t from = (pos * shape.num_kv_heads + head) * d;
        std::memcpy(&bytes[layout.KeyOffset(head, row)], &k[from], d * 2);
        std::memcpy(&bytes[layout.ValueOffset(head, row)], &v[from], d * 2);
      }
    }
    return bytes;
  }

  Shape shape;
  int64_t tokens;
  std::vector<float> q;  // [token][q_head][d]
  std::vector<BFloat16> k, v;
};

// q and p are split into two bfloat16 each, which leaves out 2^-17: of scores around 8 that is some
// 6e-5, of the results, which are of size 1, somewhat less.
constexpr float kTolerance = 6e-5f;

// A place with keys: [first, first + count), row 0 being `origin`.
struct Piece {
  int64_t first;
  int64_t count;
  int64_t origin;
  int32_t capacity;
};

class AttentionTest : public GpuTest {
 protected:
  // Rows [first_pos, first_pos + rows) of the sequence against the pieces of each launch in turn.
  std::vector<float> Attend(const Sequence& s, int64_t first_pos, int64_t rows,
                            const std::vector<std::vector<Piece>>& launches,
                            int64_t scratch_floats = kernels::kMinAttendScratchFloats) {
    const Shape& shape = s.shape;
    AttendArgs args = Args(s, first_pos, rows, scratch_floats);
    for (size_t n = 0; n < launches.size(); ++n) {
      std::vector<KvSpan> spans;
      for (const Piece& piece : launches[n]) {
        KvSpan span = {gpu_.Put(s.Lay(piece.first, piece.count, piece.origin, piece.capacity)),
                       piece.origin, piece.first, static_cast<int32_t>(piece.count),
                       piece.capacity, 0, shape.num_kv_heads};
        spans.push_back(span);
      }
      AttendItem item = ItemOf(s, first_pos, rows, spans);
      item.reset = n == 0;
      item.finish = n + 1 == launches.size();
      const std::vector<AttendItem> items = {item};
      args.items = gpu_.PutTable(items);
      args.spans = gpu_.PutTable(spans);
      OpAccount account;
      EXPECT_OK(device_.Attend(gpu_.stream(), args, &account));
      gpu_.Await();
      int64_t tokens = 0;
      for (const Piece& piece : launches[n]) tokens += piece.count;
      EXPECT_EQ(account.bytes.load(), tokens * shape.num_kv_heads * shape.head_dim * 4);
    }
    std::vector<float> out = gpu_.Fetch(args.out.floats(), rows * s.q_width());
    gpu_.Reset();
    return out;
  }
  // ... all keys in one place, one launch.
  std::vector<float> Whole(const Sequence& s, int64_t first_pos, int64_t rows) {
    return Attend(s, first_pos, rows, {{Everything(first_pos + rows)}});
  }
  static Piece Everything(int64_t tokens) {
    return {0, tokens, 0, static_cast<int32_t>(CeilToBlock(tokens) + 64)};
  }

  std::vector<float> Reference(const Sequence& s, int64_t first_pos, int64_t rows) {
    const Piece piece = Everything(first_pos + rows);
    std::vector<uint8_t> bytes = s.Lay(piece.first, piece.count, piece.origin, piece.capacity);
    const std::vector<KvSpan> spans = {{bytes.data(), 0, 0, static_cast<int32_t>(piece.count),
                                        piece.capacity, 0, s.shape.num_kv_heads}};
    AttendItem item = ItemOf(s, first_pos, rows, spans);
    item.reset = item.finish = 1;
    const std::vector<AttendItem> items = {item};
    std::vector<float> out(static_cast<size_t>(rows * s.q_width()));
    AttendArgs args;
    Fill(s, rows, args);
    args.q = s.q.data() + first_pos * s.q_width();
    args.out = out.data();
    args.items = kernels::DeviceTable(items);
    args.spans = kernels::DeviceTable(spans);
    kernels::reference::Attend(args);
    return out;
  }

  static void Fill(const Sequence& s, int64_t rows, AttendArgs& args) {
    args.q_stride = s.q_width();
    args.rows = rows;
    args.scale = 1 / std::sqrt(static_cast<float>(s.shape.head_dim));
    args.num_q_heads = s.shape.num_q_heads();
    args.num_kv_heads = s.shape.num_kv_heads;
    args.head_dim = s.shape.head_dim;
  }
  AttendArgs Args(const Sequence& s, int64_t first_pos, int64_t rows, int64_t scratch_floats) {
    AttendArgs args;
    Fill(s, rows, args);
    const auto q = s.q.begin() + first_pos * s.q_width();
    args.q = gpu_.Put(std::vector<float>(q, q + rows * s.q_width()));
    args.state = gpu_.Take<float>(rows * s.shape.num_q_heads() *
                                  AttentionStateFloats(s.shape.head_dim));
    args.out = gpu_.Take<float>(rows * s.q_width());
    args.scratch_floats = scratch_floats;
    args.scratch = gpu_.Take<float>(scratch_floats);
    return args;
  }
  static AttendItem ItemOf(const Sequence& s, int64_t first_pos, int64_t rows,
                           const std::vector<KvSpan>& spans) {
    AttendItem item;
    item.row_count = static_cast<int32_t>(rows);
    item.first_pos = first_pos;
    item.kv_head_end = s.shape.num_kv_heads;
    item.span_count = static_cast<int32_t>(spans.size());
    return item;
  }
};

TEST_F(AttentionTest, MatchesTheReferenceAtEveryGqaRatioAndLength) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 2, 3, 4, 5, 8}) {
      const Sequence s({2, group, head_dim}, 1001, 7 * head_dim + group);
      for (const int64_t tokens : {1, 2, 63, 64, 65, 255, 256, 257, 1001}) {
        for (const int64_t rows : {1, 3, 41}) {
          if (rows > tokens) continue;
          const int64_t first_pos = tokens - rows;
          EXPECT_TRUE(Near(Whole(s, first_pos, rows), Reference(s, first_pos, rows), kTolerance))
              << "head_dim " << head_dim << ", group " << group << ", " << rows << " rows, "
              << tokens << " tokens";
        }
      }
    }
  }
}

TEST_F(AttentionTest, ARowHasTheSameBitsAloneAndAmongAFew) {
  for (const int32_t group : {1, 4, 9}) {
    for (const int32_t head_dim : {64, 128, 256}) {
      const Sequence s({2, group, head_dim}, 900, 23);
      const int64_t rows = 64 / group;
      const std::vector<float> together = Whole(s, 600, rows);
      for (const int64_t row : {int64_t{0}, int64_t{1}, rows / 2, rows - 1}) {
        const auto from = together.begin() + row * s.q_width();
        const std::vector<float> expected(from, from + s.q_width());
        EXPECT_TRUE(SameBits(Whole(s, 600 + row, 1), expected))
            << "group " << group << ", head_dim " << head_dim << ", row " << row;
      }
    }
  }
}

TEST_F(AttentionTest, KeysGiveTheSameBitsHoweverTheyAreCutAndWhereverTheyLie) {
  for (const int32_t head_dim : {64, 128}) {
    const Sequence s({2, 3, head_dim}, 2000, 24);
    for (const int64_t rows : {1, 5, 60}) {
      const int64_t first_pos = 1950 - rows;
      const std::vector<float> expected = Whole(s, first_pos, rows);
      // Extents that grow, then the tail's ring; in one launch, in one each, and tiles cut apart.
      const Piece a = {0, 64, 0, 64}, b = {64, 192, 64, 192}, c = {256, 1024, 256, 1024};
      const Piece d = {1280, 576, 1280, 1024}, tail = {1856, 94, 0, 256};
      EXPECT_TRUE(SameBits(Attend(s, first_pos, rows, {{a, b, c, d, tail}}), expected)) << rows;
      EXPECT_TRUE(SameBits(Attend(s, first_pos, rows, {{a}, {b}, {c}, {d}, {tail}}), expected))
          << rows;
      const Piece c1 = {256, 128, 256, 128}, c2 = {384, 896, 384, 896};
      EXPECT_TRUE(SameBits(Attend(s, first_pos, rows, {{a, b, c1}, {c2}, {d, tail}}), expected))
          << rows;
    }
  }
}

TEST_F(AttentionTest, LittleScratchGivesTheSameBits) {
  const Sequence s({4, 2, 128}, 6000, 25);
  const std::vector<float> expected = Whole(s, 5999, 1);
  EXPECT_TRUE(Near(expected, Reference(s, 5999, 1), kTolerance));
  const int64_t a_unit = 4 * 2 * 130;
  for (const int64_t units : {1, 4, 5, 23}) {
    EXPECT_TRUE(SameBits(Attend(s, 5999, 1, {{Everything(6000)}}, units * a_unit), expected))
        << units;
  }
}

// A ragged batch: sequences of other lengths, heads in items of their own, a row that only resets
// and is finished by a later launch.
TEST_F(AttentionTest, ItemsOfABatchDoNotDisturbEachOther) {
  const Shape shape = {3, 3, 64};
  const std::vector<Sequence> all = {{shape, 1, 31}, {shape, 64, 32}, {shape, 700, 33},
                                     {shape, 3000, 34}, {shape, 130, 35}};
  const std::vector<int64_t> rows = {1, 1, 4, 1, 2};
  int64_t total_rows = 0;
  std::vector<float> q, expected;
  std::vector<AttendItem> items;
  std::vector<KvSpan> spans;
  for (size_t n = 0; n < all.size(); ++n) {
    const Sequence& s = all[n];
    const int64_t first_pos = s.tokens - rows[n];
    const std::vector<float> alone = Whole(s, first_pos, rows[n]);
    expected.insert(expected.end(), alone.begin(), alone.end());
  }
  for (size_t n = 0; n < all.size(); ++n) {
    const Sequence& s = all[n];
    const int64_t first_pos = s.tokens - rows[n];
    q.insert(q.end(), s.q.begin() + first_pos * s.q_width(), s.q.end());
    const Piece piece = Everything(s.tokens);
    const KvSpan span = {gpu_.Put(s.Lay(0, s.tokens, 0, piece.capacity)), 0, 0,
                         static_cast<int32_t>(s.tokens), piece.capacity, 0, shape.num_kv_heads};
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      AttendItem item = ItemOf(s, first_pos, rows[n], {span});
      item.row_begin = static_cast<int32_t>(total_rows);
      item.kv_head_begin = head;
      item.kv_head_end = head + 1;
      item.span_begin = static_cast<int32_t>(n);
      item.reset = item.finish = 1;
      items.push_back(item);
    }
    spans.push_back(span);
    total_rows += rows[n];
  }
  AttendArgs args = Args(all[3], 0, total_rows, kernels::kMinAttendScratchFloats);
  args.q = gpu_.Put(q);
  args.spans = gpu_.PutTable(spans);
  args.items = gpu_.PutTable(items);
  EXPECT_OK(device_.Attend(gpu_.stream(), args));
  EXPECT_TRUE(SameBits(gpu_.Fetch(args.out.floats(), total_rows * all[0].q_width()), expected));

  // Reset without keys; all keys; finish without keys.
  std::vector<AttendItem> only_reset = items, keys = items, only_finish = items;
  for (size_t i = 0; i < items.size(); ++i) {
    only_reset[i].span_count = only_finish[i].span_count = 0;
    only_reset[i].finish = only_finish[i].reset = 0;
    keys[i].reset = keys[i].finish = 0;
  }
  args.out = gpu_.Take<float>(total_rows * all[0].q_width());
  for (const auto* list : {&only_reset, &keys, &only_finish}) {
    args.items = gpu_.PutTable(*list);
    EXPECT_OK(device_.Attend(gpu_.stream(), args));
  }
  EXPECT_TRUE(SameBits(gpu_.Fetch(args.out.floats(), total_rows * all[0].q_width()), expected));
}

}  // namespace
}  // namespace headroom
