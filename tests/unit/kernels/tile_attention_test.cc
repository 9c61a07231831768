// Attention with bfloat16 products on tiles, with AMX and without.
#include "kernels/cpu/tile_attention.h"

#include <cmath>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/kernels/attention_test_util.h"

namespace headroom::kernels {
namespace {

std::vector<const cpu::TileAttention*> AllTileAttention() {
  std::vector<const cpu::TileAttention*> all = {&cpu::kPortableTileAttention};
  if (cpu::HasAmx()) all.push_back(&cpu::kAmxAttention);
  return all;
}

// Scores that climb with the position for three queries of four, up to 12 a key, and fall for the fourth.
Sequence Climbing(const Shape& shape, int64_t tokens, uint32_t seed) {
  Sequence sequence(shape, tokens, seed);
  for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
  const int32_t d = shape.head_dim;
  for (size_t n = 0; n < sequence.q.size() / d; ++n) {
    constexpr float kSlopes[] = {64, -16, 4, 1};
    sequence.q[n * d] = kSlopes[n % 4];
  }
  for (size_t n = 0; n < sequence.k.size() / d; ++n) {
    const auto pos = static_cast<float>(n / shape.num_kv_heads);
    sequence.k[n * d] = ToBFloat16(1.5f * pos);
  }
  return sequence;
}

// What the tests below mean on this processor.
TEST(TileAttention, IsTriedWithAmx) {
  if (!cpu::HasAmx()) GTEST_SKIP() << "no AMX here: only the portable tiles are tried";
  EXPECT_EQ(cpu::BestTileAttention(), &cpu::kAmxAttention);
  EXPECT_EQ(AllTileAttention().back(), &cpu::kAmxAttention);
}

// Queries that bfloat16 holds, times a scale that is a power of two where head_dim is not 128: what
// is left are the rounded weights.
TEST(TileAttention, IsTheReferenceToWithinTheRoundingOfItsFactors) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 3, 4}) {
      Sequence sequence({2, group, head_dim}, 340, 31 * head_dim + group);
      for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
      for (const auto& [tokens, rows] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {64, 1}, {65, 2}, {256, 1}, {257, 5}, {340, 1}, {340, 19}}) {
        const Place place = Whole(sequence, tokens);
        Batch oracle(sequence.shape, rows);
        oracle.SetRows(sequence, 0, tokens - rows, rows);
        oracle.Add(0, rows, tokens - rows, true, true, {&place});
        oracle.LaunchReference();
        for (const cpu::TileAttention* tiles : AllTileAttention()) {
          Batch batch(sequence.shape, rows);
          batch.SetRows(sequence, 0, tokens - rows, rows);
          batch.Add(0, rows, tokens - rows, true, true, {&place});
          batch.Launch(tiles->attend, team);
          EXPECT_TRUE(Near(batch.out(), oracle.out(), head_dim == 128 ? 4e-2f : 8e-3f))
              << tiles->name << ", group " << group << ", head_dim " << head_dim << ", " << rows
              << " rows, " << tokens << " tokens";
        }
      }
    }
  }
}

// Weights are of a maximum so far, or near it: it moves while keys are behind it, and for some queries only.
TEST(TileAttention, FollowsScoresThatClimb) {
  CpuTeam team(1);
  for (const int32_t head_dim : {64, 256}) {
    const Sequence sequence = Climbing({1, 4, head_dim}, 700, 5 + head_dim);
    const Place place = Whole(sequence, 700);
    for (const int64_t rows : {1, 3, 8, 9, 40}) {
      for (const int64_t first : {0, 400, 660}) {
        Batch oracle(sequence.shape, rows);
        oracle.SetRows(sequence, 0, first, rows);
        oracle.Add(0, rows, first, true, true, {&place});
        oracle.LaunchReference();
        for (const cpu::TileAttention* tiles : AllTileAttention()) {
          Batch batch(sequence.shape, rows);
          batch.SetRows(sequence, 0, first, rows);
          batch.Add(0, rows, first, true, true, {&place});
          batch.Launch(tiles->attend, team);
          EXPECT_TRUE(Near(batch.out(), oracle.out(), 1.6e-2f))
              << tiles->name << ", head_dim " << head_dim << ", " << rows << " rows from " << first;
        }
      }
    }
  }
}

// What is not a number comes out as such, and only where it is seen.
TEST(TileAttention, ShowsAKeyThatIsNotANumber) {
  CpuTeam team(1);
  Sequence sequence({1, 4, 64}, 400, 12);
  sequence.k[300 * 64 + 5] = ToBFloat16(kNan);
  const Place place = Whole(sequence, 400);
  for (const int64_t rows : {1, 4, 9}) {
    for (const int64_t first : {200, 300}) {
      for (const cpu::TileAttention* tiles : AllTileAttention()) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, first, rows);
        batch.Add(0, rows, first, true, true, {&place});
        batch.Launch(tiles->attend, team);
        for (const float value : batch.out()) {
          ASSERT_EQ(std::isnan(value), first == 300)
              << tiles->name << ", " << rows << " rows from " << first;
        }
      }
    }
  }
}

TEST(TileAttention, SeesAWindowAndCapsItsScores) {
  Sequence sequence({2, 4, 64}, 700, 43);
  for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
  for (const int64_t window : kWindows) {
    for (const float soft_cap : {0.0f, 2.0f}) {
      for (const int64_t rows : {1, 7, 40}) {
        const auto wanted = Windowed(sequence, 700, rows, window, soft_cap, nullptr);
        const int64_t first_key = FloorToBlock(FirstSeen(window, 700 - rows));
        for (const cpu::TileAttention* tiles : AllTileAttention()) {
          EXPECT_TRUE(Near(Windowed(sequence, 700, rows, window, soft_cap, tiles->attend,
                                    first_key), wanted, 8e-3f))
              << tiles->name << ", window " << window << ", soft cap " << soft_cap << ", " << rows
              << " rows";
        }
      }
    }
  }
}

// The same roundings in another order of sums.
TEST(TileAttention, AgreesOnEveryInstructionSet) {
  CpuTeam team(2);
  const Sequence sequence({2, 4, 128}, 600, 41);
  for (const int64_t rows : {1, 3, 4, 8, 40}) {
    const Place place = Whole(sequence, 512);
    std::vector<float> expected;
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 512, rows);
      batch.Add(0, rows, 512, true, true, {&place});
      batch.Launch(tiles->attend, team);
      if (expected.empty()) expected = batch.out();
      EXPECT_TRUE(Near(batch.out(), expected, 4e-3f)) << tiles->name << ", " << rows << " rows";
    }
  }
}

// Up to 4 queries of a KV head, up to 16 and more are computed in different ways, of which the last sums
// in another order.
TEST(TileAttention, GivesARowTheSameBitsBesideOthers) {
  CpuTeam team(2);
  for (const auto& [head_dim, climbs] : std::vector<std::pair<int32_t, bool>>{
           {64, false}, {128, false}, {256, false}, {64, true}}) {
    const Shape shape{2, 4, head_dim};
    const Sequence sequence =
        climbs ? Climbing(shape, 1500, 77) : Sequence(shape, 1500, 77 + head_dim);
    const Place place = Whole(sequence, 1400);
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      const auto first_of = [&](int64_t rows) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, 1450, rows);
        batch.Add(0, rows, 1450, true, true, {&place});
        batch.Launch(tiles->attend, team);
        const std::vector<float> out = batch.out();
        return std::vector<float>(out.begin(), out.begin() + 2 * 4 * sequence.shape.head_dim);
      };
      for (const std::vector<int64_t>& rows : {std::vector<int64_t>{1, 2, 3, 4}, {5, 9, 36}}) {
        for (const int64_t count : rows) {
          EXPECT_TRUE(SameBits(first_of(count), first_of(rows[0])))
              << tiles->name << ", " << count << " rows, head_dim " << sequence.shape.head_dim
              << (climbs ? ", scores climb" : "");
        }
      }
    }
  }
}

// Two rows are few queries, nine many: those are folded by 1,024 keys, these by 4,096.
TEST(TileAttention, GoesOnFromAnOpenUnitAndHangsOnNoThread) {
  struct Case {
    int64_t rows, tokens, piece;
    std::vector<int64_t> cuts;
  };
  for (const Case& each : {Case{2, 2300, 1024, {0, 64, 192, 256, 576, 1024, 1280, 2048}},
                           Case{9, 4500, 4096, {0, 192, 1024, 4096, 4352}}}) {
    const Sequence sequence({2, 3, 64}, each.tokens, 25);
    const int64_t first = each.tokens - each.rows;
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      std::vector<float> expected;
      for (const int threads : {1, 2, 3}) {
        CpuTeam team(threads);
        for (const int64_t cut : each.cuts) {
          Batch batch(sequence.shape, each.rows);
          batch.SetRows(sequence, 0, first, each.rows);
          const auto places = CutPlaces(sequence, each.tokens, {cut});
          for (const auto& place : places) {
            batch.Add(0, each.rows, first, place == places.front(), place == places.back(),
                      {place.get()});
            batch.Launch(tiles->attend, team);
          }
          if (expected.empty()) expected = batch.out();
          EXPECT_TRUE(cut % each.piece == 0 ? SameBits(batch.out(), expected)
                                            : Near(batch.out(), expected, 8e-3f))
              << tiles->name << ", " << each.rows << " rows, cut at " << cut << ", " << threads
              << " threads";
        }
      }
    }
  }
}

// Blocks of several places are put together, of a unit while the one before is still read.
TEST(TileAttention, PlacesMayMeetWithinABlock) {
  CpuTeam team(1);
  const Sequence sequence({2, 4, 64}, 700, 47);
  const Place whole = Whole(sequence, 700);
  std::vector<Place> parts;
  std::vector<const Place*> all;
  int64_t first = 0;
  for (const int64_t end : {100, 230, 356, 600, 700}) {
    const int64_t origin = FloorToBlock(first);
    parts.emplace_back(sequence, first, end - first, origin,
                       static_cast<int32_t>(CeilToBlock(end - origin)), 0, 2);
    first = end;
  }
  for (const Place& part : parts) all.push_back(&part);
  for (const int64_t rows : {1, 3, 5, 9}) {
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      const auto with = [&](const std::vector<const Place*>& places) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, 700 - rows, rows);
        batch.Add(0, rows, 700 - rows, true, true, places);
        batch.Launch(tiles->attend, team);
        return batch.out();
      };
      EXPECT_TRUE(SameBits(with(all), with({&whole}))) << tiles->name << ", " << rows << " rows";
    }
  }
}

// As a worker does of what its store has attended to.
TEST(TileAttention, LeavesStatesThatOtherKernelsGoOnFrom) {
  CpuTeam team(2);
  Sequence sequence({2, 3, 64}, 2300, 26);
  for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
  const Place whole = Whole(sequence, 2300);
  for (const int64_t rows : {1, 2, 9}) {
    const int64_t first = 2300 - rows;
    Batch oracle(sequence.shape, rows);
    oracle.SetRows(sequence, 0, first, rows);
    oracle.Add(0, rows, first, true, true, {&whole});
    oracle.LaunchReference();
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      for (const int64_t cut : {64, 192, 256, 320, 512, 768, 960, 1024, 1088, 1280, 2048, 2240}) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, first, rows);
        const auto places = CutPlaces(sequence, 2300, {cut});
        batch.Add(0, rows, first, true, false, {places[0].get()});
        batch.Launch(tiles->attend, team);
        batch.Add(0, rows, first, false, true, {places[1].get()});
        batch.Launch(&cpu::Attend, team);
        EXPECT_TRUE(Near(batch.out(), oracle.out(), 8e-3f))
            << tiles->name << ", cut at " << cut << ", " << rows << " rows";
      }
    }
  }
}

}  // namespace
}  // namespace headroom::kernels
