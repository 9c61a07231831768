// Attention of many rows through cuDNN, against our own kernels (which attention_test.cc compares
// with the reference), against the reference for some rows, and against itself.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/attention_test_util.h"

namespace headroom {
namespace {

constexpr int64_t kMaxRows = 4096;
constexpr int64_t kPiece = kernels::kWidePieceTokens;

// q, p and each piece's result are rounded to bfloat16, which leaves out up to 2^-9 of each.
constexpr double kRelativeL2 = 1e-2;
constexpr float kLargestError = 4e-2f;  // of results up to 4.5: those of rows that see few keys

// Whether `a` is within bfloat16's accuracy of `b`, in the l2 norm and everywhere.
::testing::AssertionResult Close(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << a.size() << " values against " << b.size();
  }
  double errors = 0, squares = 0;
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    if (!std::isfinite(a[i])) return ::testing::AssertionFailure() << "value " << i << ": " << a[i];
    const double error = double{a[i]} - b[i];
    errors += error * error;
    squares += double{b[i]} * b[i];
    largest = std::max(largest, std::abs(a[i] - b[i]));
  }
  const double relative = std::sqrt(errors / squares);
  if (relative < kRelativeL2 && largest < kLargestError) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure()
         << "relative l2 error " << relative << ", largest error " << largest;
}

class WideAttentionTest : public AttentionTest {
 protected:
  // Plans for such heads, and the window and the cap that are set, once in the program.
  void Prepare(const Shape& shape) {
    using Key = std::tuple<int32_t, int32_t, int32_t, float, bool>;
    static auto* const prepared = new std::set<Key>;
    const kernels::WideShape wide = {kMaxRows,       shape.num_q_heads(), shape.num_kv_heads,
                                     shape.head_dim, soft_cap_,           window_ != 0};
    floats_ = kernels::WideAttendScratchFloats(wide);
    if (prepared->insert({shape.num_kv_heads, shape.group, shape.head_dim, soft_cap_, window_ != 0})
            .second) {
      float* const scratch = gpu_.Take<float>(floats_);
      const auto begin = absl::Now();
      ASSERT_OK(device_.PrepareWideAttend(wide, scratch, floats_));
      std::printf("%d x %d heads of %d: planned in %s, %.0f MB of scratch\n", shape.num_kv_heads,
                  shape.group, shape.head_dim,
                  absl::FormatDuration(absl::Now() - begin).c_str(), 4e-6 * floats_);
      gpu_.Reset();
    }
    before_ = device_.wide_attend_use();
  }
  // How often cuDNN was called since Prepare() or the last Calls(). No plan may have been made.
  int64_t Calls() {
    const WideAttendUse use = device_.wide_attend_use();
    EXPECT_EQ(use.plans_built, before_.plans_built);
    const int64_t calls = use.calls - before_.calls;
    before_ = use;
    return calls;
  }
  // The launches through cuDNN. With less scratch our own kernels run.
  std::vector<float> Wide(const Sequence& s, int64_t first_pos, int64_t rows,
                          std::vector<Launch> launches) {
    for (Launch& launch : launches) launch.scratch_floats = floats_;
    std::vector<float> out = Attend(s, first_pos, rows, launches);
    EXPECT_GT(Calls(), 0);
    return out;
  }
  std::vector<float> Own(const Sequence& s, int64_t first_pos, int64_t rows) {
    std::vector<float> out = Whole(s, first_pos, rows);
    EXPECT_EQ(Calls(), 0);
    return out;
  }
  // Some rows of `out`, among them the first and the last.
  void ExpectReference(const Sequence& s, int64_t first_pos, int64_t rows,
                       const std::vector<float>& out) {
    for (const int64_t row : {int64_t{0}, rows / 2, rows - 1}) {
      const auto from = out.begin() + row * s.q_width();
      EXPECT_TRUE(Close(std::vector<float>(from, from + s.q_width()),
                        Reference(s, first_pos + row, 1)))
          << "row " << row;
    }
  }

  // What a KV head's query heads have in `out`.
  static std::vector<float> Columns(const Sequence& s, int64_t rows, const std::vector<float>& out,
                                    int32_t kv_head) {
    const int64_t width = int64_t{s.shape.group} * s.shape.head_dim;
    std::vector<float> columns;
    for (int64_t row = 0; row < rows; ++row) {
      const auto from = out.begin() + row * s.q_width() + kv_head * width;
      columns.insert(columns.end(), from, from + width);
    }
    return columns;
  }

  int64_t floats_ = 0;
  WideAttendUse before_;
};

TEST_F(WideAttentionTest, MatchesOurOwnKernelsAndTheReference) {
  for (const int32_t head_dim : {64, 128}) {
    for (const int32_t group : {1, 2, 4, 8}) {
      const Shape shape = {2, group, head_dim};
      ASSERT_NO_FATAL_FAILURE(Prepare(shape));
      const Sequence s(shape, kPiece + 904 + kMaxRows, 100 * head_dim + group);
      for (const int64_t rows : {128, 129, 1000, 1024, 4096}) {
        for (const int64_t past : {int64_t{0}, int64_t{1}, int64_t{63}, kPiece, kPiece + 904}) {
          SCOPED_TRACE(testing::Message() << "head_dim " << head_dim << ", group " << group << ", "
                                          << rows << " rows at " << past);
          const std::vector<float> out = Wide(s, past, rows, {{{Everything(past + rows)}}});
          EXPECT_TRUE(Close(out, Own(s, past, rows)));
          if (rows == 1000) ExpectReference(s, past, rows, out);
        }
      }
    }
  }
}

// Gemma-2's heads, with its cap and such that bend more, and Qwen2's groups; pieces that are whole, and
// others.
TEST_F(WideAttentionTest, MatchesWithEveryFamilysHeads) {
  const struct {
    Shape shape;
    float soft_cap;
  } families[] = {{{2, 2, 256}, 50}, {{2, 2, 256}, 1.5f}, {{2, 2, 256}, 0},
                  {{2, 3, 64}, 2},   {{2, 4, 128}, 5},    {{4, 7, 128}, 0}};
  for (const auto& [shape, soft_cap] : families) {
    soft_cap_ = soft_cap;
    ASSERT_NO_FATAL_FAILURE(Prepare(shape));
    const Sequence s(shape, kPiece + 1100, 58);
    for (const int64_t rows : {200, 1000}) {
      for (const int64_t past : {int64_t{0}, int64_t{100}, kPiece + 100}) {
        SCOPED_TRACE(testing::Message() << shape.num_kv_heads << " x " << shape.group
                                        << " heads of " << shape.head_dim << ", cap " << soft_cap
                                        << ", " << rows << " rows at " << past);
        const std::vector<float> out = Wide(s, past, rows, {{{Everything(past + rows)}}});
        EXPECT_TRUE(Close(out, Own(s, past, rows)));
        if (rows == 200 && past == 100) ExpectReference(s, past, rows, out);
      }
    }
  }
}

// Rows around the window's end, windows that end in pieces and between them, launches that begin with the
// window, and such that end inside it.
TEST_F(WideAttentionTest, MatchesWithWindows) {
  const auto piece = [](int64_t begin, int64_t end) {
    return Piece{begin, end - begin, begin, static_cast<int32_t>(CeilToBlock(end - begin))};
  };
  const struct {
    Shape shape;
    float soft_cap;
  } families[] = {{{2, 4, 128}, 0}, {{2, 2, 256}, 3}};
  for (const auto& [shape, soft_cap] : families) {
    const Sequence s(shape, kPiece + 3000, 59);
    soft_cap_ = soft_cap;
    for (const int64_t window : {1024, 1500, 4096}) {
      window_ = window;
      ASSERT_NO_FATAL_FAILURE(Prepare(shape));
      for (const int64_t rows : {129, 3000}) {
        for (const int64_t past : {int64_t{0}, int64_t{700}, int64_t{5000}, kPiece}) {
          SCOPED_TRACE(testing::Message() << "heads of " << shape.head_dim << ", window " << window
                                          << ", " << rows << " rows at " << past);
          const int64_t end = past + rows;
          const std::vector<float> own = Own(s, past, rows);
          const std::vector<float> out = Wide(s, past, rows, {{{Everything(end)}}});
          EXPECT_TRUE(Close(out, own));
          if (rows == 129 && past == 5000) ExpectReference(s, past, rows, out);
          const int64_t first = kernels::FirstSeen(window, past) / 64 * 64;
          EXPECT_TRUE(Close(Wide(s, past, rows, {{{piece(first, end)}}}), own));
          const int64_t cut = (end - window / 2) / 64 * 64;
          if (cut > first) {
            EXPECT_TRUE(Close(Wide(s, past, rows, {{{piece(first, cut)}}, {{piece(cut, end)}}}), own));
          }
        }
      }
    }
  }
}

TEST_F(WideAttentionTest, SmallWindowsGoThroughOurOwnKernels) {
  window_ = kernels::kWideWindow - 1;
  const Shape shape = {2, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, 3000, 60);
  Attend(s, 0, 3000, {{{Everything(3000)}, false, -1, floats_}});
  EXPECT_EQ(Calls(), 0);
}

// Llama-3-8B's heads: calls of one to eight KV heads.
TEST_F(WideAttentionTest, MatchesWithManyHeads) {
  const Shape shape = {8, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, kPiece + 300 + kMaxRows, 51);
  for (const int64_t rows : {200, 1500, 3000, 4096}) {
    for (const int64_t past : {int64_t{0}, int64_t{100}, kPiece + 300}) {
      SCOPED_TRACE(testing::Message() << rows << " rows at " << past);
      EXPECT_TRUE(Close(Wide(s, past, rows, {{{Everything(past + rows)}}}), Own(s, past, rows)));
    }
  }
}

// More than kWidePartials pieces, so that states are written and read between folds.
TEST_F(WideAttentionTest, MatchesOverManyPieces) {
  const Shape shape = {2, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const int64_t past = 5 * kPiece + 100;
  const Sequence s(shape, past + 1000, 52);
  EXPECT_TRUE(Close(Wide(s, past, 1000, {{{Everything(past + 1000)}}}), Own(s, past, 1000)));
}

TEST_F(WideAttentionTest, RunsTheSameTwice) {
  const Shape shape = {8, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, 8500, 53);
  for (const int64_t rows : {500, 4096}) {
    const std::vector<Launch> launches = {{{Everything(4200 + rows)}}};
    const std::vector<float> once = Wide(s, 4200, rows, launches);
    EXPECT_TRUE(SameBits(Wide(s, 4200, rows, launches), once)) << rows << " rows";
  }
}

// What a chunk sees in the lanes: resident copies of extents that grew, head by head; one tile of
// fetched keys, or several; then the tokens that were not sealed yet and the chunk's own.
TEST_F(WideAttentionTest, KeysGiveTheSameBitsInEveryLane) {
  for (const Shape& shape : {Shape{8, 4, 128}, Shape{2, 2, 64}}) {
    ASSERT_NO_FATAL_FAILURE(Prepare(shape));
    const Sequence s(shape, 2 * kPiece + 37 + kMaxRows, 54);
    for (const int64_t rows : {300, 1024, 4096}) {
      SCOPED_TRACE(testing::Message() << shape.num_kv_heads << " heads, " << rows << " rows");
      const int64_t sealed = 2 * kPiece, first_pos = sealed + 37;
      const Piece own = {sealed, rows + 37, sealed, static_cast<int32_t>(CeilToBlock(rows + 37))};
      std::vector<Piece> extents;
      for (int64_t pos = 0, capacity = 64; pos < sealed; pos += capacity) {
        if (pos >= 2 * capacity) capacity = std::min<int64_t>(2 * capacity, 4096);
        const int64_t count = std::min(capacity, sealed - pos);
        extents.push_back({pos, count, pos, static_cast<int32_t>(capacity)});
      }
      std::vector<Piece> resident = extents;
      resident.push_back(own);
      const std::vector<float> expected = Wide(s, first_pos, rows, {{resident, true}});
      EXPECT_TRUE(Close(expected, Own(s, first_pos, rows)));
      const Piece tile = {0, sealed, 0, static_cast<int32_t>(sealed)}, low = {0, kPiece, 0, kPiece};
      const Piece high = {kPiece, kPiece, kPiece, kPiece};
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{tile, own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{tile}}, {{own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{tile}, true}, {{own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{low}}, {{high}, true}, {{own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{extents, true}, {{own}, true}}), expected));
      // Fetched or resident for itself.
      const int32_t head = 1;
      const std::vector<float> alone = Wide(s, first_pos, rows, {{{tile}, true, head}, {{own}}});
      const std::vector<float> there = Wide(s, first_pos, rows, {{resident, true, head}});
      EXPECT_TRUE(SameBits(Columns(s, rows, alone, head), Columns(s, rows, expected, head)));
      EXPECT_TRUE(SameBits(Columns(s, rows, there, head), Columns(s, rows, expected, head)));
    }
  }
}

TEST_F(WideAttentionTest, KeysOfAWindowGiveTheSameBitsInEveryLane) {
  window_ = 4096;
  const Shape shape = {8, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, kPiece + 37 + kMaxRows, 61);
  for (const int64_t rows : {300, 1024, 4096}) {
    for (const int64_t past : {37, 0}) {
      const int64_t first_pos = kPiece + past;
      const Piece own = {kPiece, rows + past, kPiece, static_cast<int32_t>(CeilToBlock(rows + past))};
      const int64_t first = kernels::FirstSeen(window_, first_pos) / 64 * 64;
      const Piece seen = {first, kPiece - first, first, static_cast<int32_t>(kPiece - first)};
      const Piece all = {0, kPiece, 0, kPiece};
      const std::vector<float> expected = Wide(s, first_pos, rows, {{{seen, own}}});
      EXPECT_TRUE(Close(expected, Own(s, first_pos, rows)));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{all, own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{seen}}, {{own}}}), expected));
      EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{seen}, true}, {{own}}}), expected));
    }
  }
}

TEST_F(WideAttentionTest, ReadsOwnKeysFromTheTailsRing) {
  const Shape shape = {2, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, 9000, 55);
  const int64_t first_pos = 8192 + 190, rows = 130;  // rows 128 to 255 of the ring, then 0 to 63
  const Piece sealed = {0, 8320, 0, 8320}, tail = {8320, 192, 0, 256}, own = {8320, 192, 8320, 192};
  const std::vector<float> out = Wide(s, first_pos, rows, {{{sealed, tail}}});
  EXPECT_TRUE(Close(out, Own(s, first_pos, rows)));
  EXPECT_TRUE(SameBits(Wide(s, first_pos, rows, {{{sealed, own}}}), out));
}

// Launches that end between the rows' own positions: some rows lie before their keys, some behind.
TEST_F(WideAttentionTest, LaunchesMayEndAnywhere) {
  for (const Shape& shape : {Shape{8, 4, 128}, Shape{2, 8, 64}}) {
    ASSERT_NO_FATAL_FAILURE(Prepare(shape));
    const Sequence s(shape, 7600, 56);
    const int64_t first_pos = 4500, rows = 3000;
    const Piece a = {0, 4544, 0, 4544}, b = {4544, 1408, 4544, 1408}, c = {5952, 1548, 5952, 1600};
    const std::vector<float> own = Own(s, first_pos, rows);
    EXPECT_TRUE(Close(Wide(s, first_pos, rows, {{{a}}, {{b}}, {{c}}}), own));
    EXPECT_TRUE(Close(Wide(s, first_pos, rows, {{{}}, {{a, b}}, {{c}, true}, {{}}}), own));
    // Our own kernels leave an open unit at 4544: the rows go on from it.
    std::vector<Launch> launches = {{{a}}, {{b, c}}};
    launches[1].scratch_floats = floats_;
    EXPECT_TRUE(Close(Attend(s, first_pos, rows, launches), own));
    EXPECT_GT(Calls(), 0);
    // ... and go on from the states of the others.
    launches = {{{a}}, {{b, c}}};
    launches[0].scratch_floats = floats_;
    EXPECT_TRUE(Close(Attend(s, first_pos, rows, launches), own));
    EXPECT_GT(Calls(), 0);
  }
}

TEST_F(WideAttentionTest, FewRowsKeepTheirBitsBesideMany) {
  const Shape shape = {2, 4, 128};
  ASSERT_NO_FATAL_FAILURE(Prepare(shape));
  const Sequence s(shape, 2000, 57);
  const std::vector<int64_t> counts = {1, 300, 127, 128};
  std::vector<float> few, many;
  for (const int64_t rows : counts) {
    const int64_t first_pos = 2000 - rows;
    const std::vector<float> alone =
        rows < kernels::kWideRows ? Own(s, first_pos, rows)
                                  : Wide(s, first_pos, rows, {{{Everything(2000)}}});
    std::vector<float>& to = rows < kernels::kWideRows ? few : many;
    to.insert(to.end(), alone.begin(), alone.end());
  }
  const Piece piece = Everything(2000);
  const std::vector<KvSpan> spans = {{gpu_.Put(Lay(s, 0, 2000, 0, piece.capacity)), 0, 0, 2000,
                                      piece.capacity, 0, shape.num_kv_heads}};
  std::vector<AttendItem> items;
  std::vector<float> q;
  int64_t total = 0;
  for (const int64_t rows : counts) {
    AttendItem item = ItemOf(s, 2000 - rows, rows, spans);
    item.row_begin = static_cast<int32_t>(total);
    item.reset = item.finish = 1;
    items.push_back(item);
    q.insert(q.end(), s.q.begin() + (2000 - rows) * s.q_width(), s.q.end());
    total += rows;
  }
  AttendArgs args = Args(s, 0, total, floats_);
  args.q = gpu_.Put(q);
  args.spans = gpu_.PutTable(spans);
  args.items = gpu_.PutTable(items);
  EXPECT_OK(device_.Attend(gpu_.stream(), args));
  EXPECT_GT(Calls(), 0);
  const std::vector<float> out = gpu_.FetchActivations(args.out, total * s.q_width());
  std::vector<float> out_few, out_many;
  auto from = out.begin();
  for (const int64_t rows : counts) {
    std::vector<float>& to = rows < kernels::kWideRows ? out_few : out_many;
    to.insert(to.end(), from, from + rows * s.q_width());
    from += rows * s.q_width();
  }
  EXPECT_TRUE(SameBits(out_few, few));
  EXPECT_TRUE(SameBits(out_many, many));
}

}  // namespace
}  // namespace headroom
