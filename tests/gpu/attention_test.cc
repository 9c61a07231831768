// The CUDA attention kernels against the plain reference, and against themselves: the same bits
// however keys are cut into launches, wherever they lie and whatever rows are beside a row.
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/attention_test_util.h"

namespace headroom {
namespace {

// q and p are split into two bfloat16 each, which leaves out 2^-17: of scores around 8 that is some
// 6e-5, of the results, which are of size 1, somewhat less.
constexpr float kTolerance = 6e-5f;

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

TEST_F(AttentionTest, MatchesTheReferenceWithAWindowAndASoftCap) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 4}) {
      const Sequence s({2, group, head_dim}, 700, 17 * head_dim + group);
      for (const int64_t window : {0, 1, 40, 64, 65, 300, 5000}) {
        for (const float soft_cap : {0.0f, 2.0f}) {
          window_ = window;
          soft_cap_ = soft_cap;
          for (const auto& [tokens, rows] : std::vector<std::pair<int64_t, int64_t>>{
                   {1, 1}, {65, 1}, {300, 3}, {513, 70}, {700, 300}}) {
            const int64_t first_pos = tokens - rows;
            EXPECT_TRUE(Near(Whole(s, first_pos, rows), Reference(s, first_pos, rows), kTolerance))
                << "head_dim " << head_dim << ", group " << group << ", window " << window
                << ", soft cap " << soft_cap << ", " << rows << " rows, " << tokens << " tokens";
          }
        }
      }
    }
  }
}

// Keys behind the window need not be there, nor lie where they lay.
TEST_F(AttentionTest, WithAWindowARowHasTheSameBitsWhereverItsKeysBegin) {
  const Sequence s({2, 3, 128}, 1000, 18);
  for (const int64_t window : {1, 40, 64, 300}) {
    window_ = window;
    for (const int64_t rows : {1, 20, 100}) {
      const int64_t first_pos = 1000 - rows;
      const std::vector<float> expected = Whole(s, first_pos, rows);
      const int64_t first = FloorToBlock(kernels::FirstSeen(window, first_pos));
      const Piece rest = {first, 1000 - first, FloorToBlock(first / 2), 1024};
      EXPECT_TRUE(SameBits(Attend(s, first_pos, rows, {{rest}}), expected))
          << "window " << window << ", " << rows << " rows";
      if (first + 64 >= 1000) continue;
      const Piece a = {first, 64, first, 64}, b = {first + 64, 1000 - first - 64, first + 64, 1024};
      EXPECT_TRUE(SameBits(Attend(s, first_pos, rows, {{a}, {b}}), expected))
          << "window " << window << ", " << rows << " rows, cut";
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

// Up to eight units need one kernel, but two where another launch goes on.
TEST_F(AttentionTest, AFewUnitsHaveTheSameBitsByOneKernelAndByTwo) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 4, 9}) {
      const Sequence s({2, group, head_dim}, 2049, 26);
      for (const int64_t tokens : {1, 64, 65, 256, 257, 700, 1024, 1300, 2047, 2048, 2049}) {
        for (const int64_t rows : {1, 3}) {
          if (rows > tokens) continue;
          const std::vector<float> expected =
              Attend(s, tokens - rows, rows, {{Everything(tokens)}, {}});
          EXPECT_TRUE(SameBits(Whole(s, tokens - rows, rows), expected))
              << "head_dim " << head_dim << ", group " << group << ", " << tokens << " tokens, " << rows
              << " rows";
        }
      }
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

// Rows of one sequence as sequences of their own, each head an item, so that there are several times as many
// units as blocks of threads at once, and more items than a launch takes: bits as of all rows together. What
// counts the units ends where it began, with scratch for a few of them or for all.
TEST_F(AttentionTest, BlocksShareManyUnits) {
  const Shape shape = {3, 3, 64};
  const int64_t rows = 100;
  const Sequence s(shape, 5000, 41);
  const int64_t first_pos = s.tokens - rows;
  const std::vector<float> expected = Whole(s, first_pos, rows);
  const Piece piece = Everything(s.tokens);
  uint8_t* const base = gpu_.Put(Lay(s, 0, s.tokens, 0, piece.capacity));
  std::vector<AttendItem> items;
  std::vector<KvSpan> spans;
  for (int32_t row = 0; row < rows; ++row) {
    spans.push_back({base, 0, 0, static_cast<int32_t>(first_pos + row + 1), piece.capacity, 0,
                     shape.num_kv_heads});
    for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
      AttendItem item = ItemOf(s, first_pos + row, 1, {spans.back()});
      item.row_begin = row;
      item.kv_head_begin = head;
      item.kv_head_end = head + 1;
      item.span_begin = row;
      item.reset = item.finish = 1;
      items.push_back(item);
    }
  }
  constexpr int64_t kLeast = kernels::kMinAttendScratchFloats;
  AttendArgs args = Args(s, first_pos, rows, 8 * kLeast);
  args.spans = gpu_.PutTable(spans);
  args.items = gpu_.PutTable(items);
  for (const int64_t scratch_floats : {kLeast, 8 * kLeast, kLeast, 8 * kLeast}) {
    args.scratch_floats = scratch_floats;
    EXPECT_OK(device_.Attend(gpu_.stream(), args));
    EXPECT_TRUE(SameBits(gpu_.Fetch(args.out.floats(), rows * s.q_width()), expected));
  }
}

// A ragged batch: sequences of other lengths, an item for all heads or for each, rows that only reset and are finished
// by a later launch. With the last sequence, and without: short ones alone need one kernel.
class BatchAttentionTest : public AttentionTest, public testing::WithParamInterface<int> {};
INSTANTIATE_TEST_SUITE_P(Sequences, BatchAttentionTest, testing::Values(4, 5));

TEST_P(BatchAttentionTest, ItemsOfABatchDoNotDisturbEachOther) {
  const Shape shape = {3, 3, 64};
  std::vector<Sequence> all = {{shape, 1, 31}, {shape, 64, 32}, {shape, 700, 33}, {shape, 130, 35},
                               {shape, 3000, 34}};
  all.erase(all.begin() + GetParam(), all.end());
  const std::vector<int64_t> rows = {1, 1, 4, 2, 1};
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
    const KvSpan span = {gpu_.Put(Lay(s, 0, s.tokens, 0, piece.capacity)), 0, 0,
                         static_cast<int32_t>(s.tokens), piece.capacity, 0, shape.num_kv_heads};
    const int32_t heads = n % 2 == 0 ? shape.num_kv_heads : 1;  // of an item
    for (int32_t head = 0; head < shape.num_kv_heads; head += heads) {
      AttendItem item = ItemOf(s, first_pos, rows[n], {span});
      item.row_begin = static_cast<int32_t>(total_rows);
      item.kv_head_begin = head;
      item.kv_head_end = head + heads;
      item.span_begin = static_cast<int32_t>(n);
      item.reset = item.finish = 1;
      items.push_back(item);
    }
    spans.push_back(span);
    total_rows += rows[n];
  }
  AttendArgs args = Args(all.back(), 0, total_rows, kernels::kMinAttendScratchFloats);
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
