// How items of many rows are cut: every row meets every key up to its own position once, in order.
#include "common/device/cuda/wide_jobs.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "gtest/gtest.h"

namespace headroom {
namespace {

using kernels::AttendArgs;
using kernels::AttendItem;
using kernels::KvSpan;
using kernels::WideClasses;
using kernels::WideShape;

struct Launch {
  std::vector<KvSpan> spans;
  std::vector<AttendItem> items;

  AttendArgs args() const {
    AttendArgs a;
    a.items = {nullptr, items.data(), static_cast<int32_t>(items.size())};
    a.spans = {nullptr, spans.data(), static_cast<int32_t>(spans.size())};
    return a;
  }
  // An item of one head with the keys at the borders.
  void Add(int64_t first_pos, int32_t rows, const std::vector<int64_t>& borders) {
    AttendItem item;
    item.row_count = rows;
    item.first_pos = first_pos;
    item.kv_head_begin = static_cast<int32_t>(items.size());
    item.kv_head_end = item.kv_head_begin + 1;
    item.span_begin = static_cast<int32_t>(spans.size());
    for (size_t i = 1; i < borders.size(); ++i) {
      KvSpan span;
      span.first_pos = borders[i - 1];
      span.count = static_cast<int32_t>(borders[i] - borders[i - 1]);
      spans.push_back(span);
      ++item.span_count;
    }
    items.push_back(item);
  }
};

// Each row's pieces, in order, and of squares and edges what the row sees of them.
std::vector<std::vector<WidePiece>> PiecesOf(const Launch& launch, int64_t most_rows,
                                             int64_t window = 0) {
  using Of = WidePiece::Of;
  AttendArgs a = launch.args();
  a.window = window;
  const AttendItem& item = launch.items[0];
  const WideJob job = JobAt(a, 0, 1);
  std::vector<std::vector<WidePiece>> pieces(item.row_count);
  std::vector<int> blocks(item.row_count);
  EXPECT_TRUE(ForEachBlock(item, job, most_rows, [&](const WideBlock& block) {
                EXPECT_LE(block.rows, most_rows);
                for (int64_t row = block.row; row < block.row + block.rows; ++row) ++blocks[row];
                return ForEachPiece(job, block, [&](const WidePiece& piece) {
                  EXPECT_LE(piece.count,
                            piece.of == Of::kAllRows ? kernels::kWidePieceTokens : most_rows);
                  for (int64_t row = block.row; row < block.row + block.rows; ++row) {
                    WidePiece its = piece;
                    if (piece.of == Of::kSquare) {
                      EXPECT_EQ(piece.begin, item.first_pos + block.row);
                      its.count = row - block.row + 1;
                    }
                    if (piece.of == Of::kEdge) {
                      EXPECT_EQ(piece.count, block.rows - 1);
                      its.begin += row - block.row;
                      its.count -= row - block.row;
                    }
                    if (its.count > 0) pieces[row].push_back(its);
                  }
                  return absl::OkStatus();
                });
              }).ok());
  for (const int times : blocks) EXPECT_EQ(times, 1);
  return pieces;
}

TEST(WideJobs, EveryRowSeesEachKeyOnce) {
  for (const int64_t window : {0, 1, 2, 100, 1024, 4096, 8192, 9000, 100000}) {
    for (const int64_t first_pos : {0, 1, 63, 4096, 8192, 10000}) {
      for (const int32_t rows : {128, 129, 1000, 3000}) {
        for (const std::vector<int64_t>& cuts :
             {std::vector<int64_t>{0, 20000}, {0, 4992}, {4992, 9024}, {64, 5056, 5504}, {}}) {
          Launch launch;
          const int64_t end = first_pos + rows;
          std::vector<int64_t> borders;
          for (const int64_t cut : cuts) {
            if (cut < end) borders.push_back(cut);
          }
          if (borders.size() < cuts.size() && !borders.empty()) borders.push_back(end);
          launch.Add(first_pos, rows, borders);
          const auto pieces = PiecesOf(launch, 1024, window);
          for (int32_t row = 0; row < rows; ++row) {
            const int64_t position = first_pos + row;
            const auto within = [&](int64_t pos) {
              return borders.empty() ? 0 : std::clamp(pos, borders.front(), borders.back());
            };
            int64_t pos = within(kernels::FirstSeen(window, position));
            for (const WidePiece& piece : pieces[row]) {
              ASSERT_EQ(piece.begin, pos) << "row " << row;
              ASSERT_GT(piece.count, 0);
              pos += piece.count;
            }
            ASSERT_EQ(pos, within(position + 1))
                << "row " << row << " of " << rows << " at " << first_pos << ", window " << window;
          }
        }
      }
    }
  }
}

// With windows: the pieces of each row, what it sees of them and where they begin as a whole, are the
// same in one launch as in two, whichever key in front of the window's the first begins with.
TEST(WideJobs, LaunchesThatEndAtBordersCutRowsAlike) {
  for (const int64_t window : {1024, 4096, 8192, 9000}) {
    for (const int64_t first_pos : {16384, 16384 + 37, 20580}) {
      constexpr int32_t kRows = 4096;
      const int64_t end = first_pos + kRows;
      const int64_t own = first_pos / 64 * 64;
      const int64_t begin = kernels::FirstSeen(window, first_pos) / 64 * 64;
      const auto begins = [&](const std::vector<std::vector<int64_t>>& launches) {
        std::vector<std::vector<std::pair<int64_t, int64_t>>> all(kRows);
        for (const std::vector<int64_t>& borders : launches) {
          Launch launch;
          launch.Add(first_pos, kRows, borders);
          const auto pieces = PiecesOf(launch, 2048, window);
          for (int32_t row = 0; row < kRows; ++row) {
            for (const WidePiece& its : pieces[row]) all[row].emplace_back(its.begin, its.count);
          }
        }
        return all;
      };
      const auto expected = begins({{begin, own, end}});
      EXPECT_EQ(begins({{begin, own}, {own, end}}), expected);
      const int64_t border = own / kernels::kWidePieceTokens * kernels::kWidePieceTokens;
      if (begin < border && border < own) {
        EXPECT_EQ(begins({{begin, border}, {border, own}, {own, end}}), expected);
      }
    }
  }
}

// Where chunks, windows and pieces have the same borders, a window's rows are one edge and one square.
TEST(WideJobs, RowsOfAWholeWindowAreTwoSquares) {
  Launch launch;
  launch.Add(8192, 8192, {4096, 8192, 16384});
  AttendArgs a = launch.args();
  a.window = 4096;
  const WideJob job = JobAt(a, 0, 1);
  int blocks = 0;
  EXPECT_TRUE(ForEachBlock(launch.items[0], job, 8192, [&](const WideBlock& block) {
                EXPECT_EQ(block.row, 4096 * blocks++);
                EXPECT_EQ(block.rows, 4096);
                EXPECT_EQ(block.edge, 4095);
                EXPECT_EQ(block.seen_begin, block.seen_end);
                EXPECT_TRUE(block.square);
                return absl::OkStatus();
              }).ok());
  EXPECT_EQ(blocks, 2);
}

// Spans' borders are no pieces', but for the one before the rows' own keys.
TEST(WideJobs, PiecesDoNotDependOnWhereKeysLie) {
  const auto borders_of = [](const std::vector<int64_t>& spans) {
    Launch launch;
    launch.Add(20000, 500, spans);
    const std::vector<WidePiece> pieces = PiecesOf(launch, 1024)[499];
    std::vector<int64_t> borders;
    for (const WidePiece& piece : pieces) borders.push_back(piece.begin);
    return borders;
  };
  const std::vector<int64_t> expected = {0, 8192, 16384, 19968, 20000};
  EXPECT_EQ(borders_of({0, 19968, 20500}), expected);
  EXPECT_EQ(borders_of({0, 64, 128, 512, 4096, 8192, 12288, 19968, 20500}), expected);
}

TEST(WideJobs, JoinsItemsThatDifferInTheirHeadsOnly) {
  Launch launch;
  launch.Add(1000, 200, {0, 960, 1200});
  launch.Add(1000, 200, {0, 64, 960, 1200});  // other spans, the same keys
  launch.Add(1000, 200, {960, 1200});
  launch.Add(1000, 200, {960, 1200});
  launch.items[3].finish = 1;
  const AttendArgs a = launch.args();
  EXPECT_EQ(JobAt(a, 0, 4).num_items, 2);
  EXPECT_EQ(JobAt(a, 0, 4).kv_head_end, 2);
  EXPECT_EQ(JobAt(a, 0, 1).num_items, 1);
  EXPECT_EQ(JobAt(a, 2, 4).num_items, 1);
  EXPECT_TRUE(KeysFollow(a, launch.items[1]));
  launch.spans[3].first_pos += 64;
  EXPECT_FALSE(KeysFollow(a, launch.items[1]));
}

TEST(WideShape, ClassesHaveOneVolumeAndTakeRowsOfAnyNumber) {
  for (const int32_t group : {1, 2, 3, 4, 8, 64}) {
    for (const int32_t kv_heads : {1, 2, 3, 8, 32}) {
      for (const int64_t max_rows : {128, 500, 4096, 8192}) {
        const WideShape shape = {max_rows, kv_heads * group, kv_heads, 128};
        const WideClasses classes(shape);
        ASSERT_GE(classes.most_heads, classes.least_heads);
        ASSERT_GE(classes.least_heads, 1);
        ASSERT_LE(classes.most_heads, kv_heads);
        for (const int64_t rows : {int64_t{128}, int64_t{129}, max_rows, 2 * max_rows}) {
          const kernels::WideClass its = classes.For(rows);
          EXPECT_EQ(its.rows * its.heads, classes.volume);
          EXPECT_EQ(its.square_heads % its.heads, 0);
          EXPECT_LE(its.square_heads, kv_heads);
          EXPECT_LE(its.square_heads, kernels::kMaxWideHeads);
          EXPECT_LE(its.rows * its.square_heads, classes.SquareVolume());
          EXPECT_GE(its.rows, std::min(rows, classes.Of(classes.least_heads).rows));
        }
        EXPECT_GT(kernels::WideAttendScratchFloats(shape), 0);
      }
    }
  }
  EXPECT_EQ(kernels::WideAttendScratchFloats({127, 32, 8, 128}), 0);
  // Llama-3-8B: a chunk of 8,192 rows goes head by head, one of 1,024 with all heads at once.
  const WideClasses llama(WideShape{8192, 32, 8, 128});
  EXPECT_EQ(llama.For(8192).heads, 1);
  EXPECT_EQ(llama.For(1024).heads, 8);
  // Its square always with all heads.
  EXPECT_EQ(llama.For(8192).square_heads, 8);
  EXPECT_EQ(llama.For(1024).square_heads, 8);
}

}  // namespace
}  // namespace headroom
