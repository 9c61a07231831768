#include "kernels/attention.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/kernels/attention_test_util.h"

namespace headroom::kernels {
namespace {

// ---- Against the reference -----------------------------------------------------------------------

void ExpectMatchesReference(const Sequence& sequence, int64_t tokens, int64_t rows) {
  SCOPED_TRACE(::testing::Message() << "group " << sequence.shape.group << ", head_dim "
                                    << sequence.shape.head_dim << ", " << rows << " rows, "
                                    << tokens << " tokens");
  CpuTeam team(2);
  const Place place = Whole(sequence, tokens);
  Batch oracle(sequence.shape, rows);
  oracle.SetRows(sequence, 0, tokens - rows, rows);
  oracle.Add(0, rows, tokens - rows, true, true, {&place});
  oracle.LaunchReference();
  const std::vector<float> out = Plain(sequence, tokens, rows, BestKernels(), team);
  // Scores have a standard deviation near 2.3, so that few keys carry each result of size 1.
  EXPECT_TRUE(Near(out, oracle.out(), 2e-5f));
}

TEST(Attend, MatchesTheReferenceAtEveryGqaRatioAndLength) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 2, 3, 4, 5, 8}) {
      const Sequence sequence({2, group, head_dim}, 1001, 7 * head_dim + group);
      for (const int64_t tokens : {1, 2, 63, 64, 65, 255, 256, 257, 1001}) {
        for (const int64_t rows : {1, 3}) {
          if (rows <= tokens) ExpectMatchesReference(sequence, tokens, rows);
        }
      }
    }
  }
}

TEST(Attend, MatchesTheReferenceWithManyRows) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 3, 8}) {
      const Sequence sequence({2, group, head_dim}, 330, 11 * head_dim + group);
      ExpectMatchesReference(sequence, 65, 65);
      ExpectMatchesReference(sequence, 330, 70);
    }
  }
  ExpectMatchesReference(Sequence({3, 3, 64}, 700, 5), 700, 257);
}

// ---- With a window and a soft cap ----------------------------------------------------------------

TEST(Attend, MatchesTheReferenceWithAWindowAndASoftCap) {
  for (const int32_t head_dim : {64, 256}) {
    const Sequence sequence({2, 3, head_dim}, 700, 13 * head_dim);
    for (const int64_t window : kWindows) {
      for (const float soft_cap : {0.0f, 2.0f}) {
        for (const auto& [tokens, rows] : std::vector<std::pair<int64_t, int64_t>>{
                 {1, 1}, {65, 1}, {300, 3}, {513, 70}, {700, 300}}) {
          const auto wanted = Windowed(sequence, tokens, rows, window, soft_cap, nullptr);
          EXPECT_TRUE(Near(Windowed(sequence, tokens, rows, window, soft_cap,
                                    BestKernels().attend), wanted, 2e-5f))
              << "head_dim " << head_dim << ", window " << window
              << ", soft cap " << soft_cap << ", " << rows << " rows, " << tokens << " tokens";
        }
      }
    }
  }
}

// Where keys begin, how they are cut, whether rows come alone: a row's bits hang on what it sees.
TEST(Attend, WithAWindowARowHasTheSameBitsHoweverItIsComputed) {
  const Sequence sequence({2, 3, 64}, 700, 14);
  const int64_t width = sequence.shape.num_q_heads() * 64;
  for (const int64_t window : kWindows) {
    const auto whole = Windowed(sequence, 700, 300, window, 3.0f, BestKernels().attend);
    for (const cpu::KernelTable* kernels : AllAttention()) {
      for (const int64_t rows : {1, 40, 120}) {
        const int64_t first_key = FloorToBlock(FirstSeen(window, 700 - rows));
        const std::vector<float> wanted(whole.end() - rows * width, whole.end());
        for (const auto& cuts : std::vector<std::vector<int64_t>>{
                 {}, {448}, {192, 320, 576}}) {
          EXPECT_TRUE(SameBits(Windowed(sequence, 700, rows, window, 3.0f, kernels->attend,
                                        first_key, cuts), wanted))
              << kernels->name << ", window " << window << ", " << rows << " rows, "
              << cuts.size() << " cuts";
        }
      }
    }
  }
}

// ---- The same bits -------------------------------------------------------------------------------

TEST(Attend, GivesTheSameBitsOnEveryInstructionSet) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    const Sequence sequence({2, 3, head_dim}, 300, 21);
    for (const int64_t rows : {1, 2, 5, 100}) {
      const std::vector<float> expected = Plain(sequence, 300, rows, BestKernels(), team);
      for (const cpu::KernelTable* kernels : AllAttention()) {
        EXPECT_TRUE(SameBits(Plain(sequence, 300, rows, *kernels, team), expected))
            << kernels->name << ", " << rows << " rows";
      }
    }
  }
}

// Where a block ends, and as many queries as one pass may take.
TEST(Attend, GivesTheSameBitsAtEveryLengthOfABlock) {
  CpuTeam team(1);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 2, 4, 6, 7}) {
      const Sequence sequence({1, group, head_dim}, 200, head_dim + group);
      for (const int64_t tokens : {1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 129, 200}) {
        const std::vector<float> expected = Plain(sequence, tokens, 1, cpu::kPortableKernels, team);
        for (const cpu::KernelTable* kernels : AllAttention()) {
          EXPECT_TRUE(SameBits(Plain(sequence, tokens, 1, *kernels, team), expected))
              << kernels->name << ", head_dim " << head_dim << ", group " << group << ", "
              << tokens << " tokens";
        }
      }
    }
  }
}

TEST(Attend, GivesTheSameBitsWithOneThreadAndSeveral) {
  const Sequence sequence({3, 3, 64}, 1500, 22);
  CpuTeam one(1);
  for (const int64_t rows : {1, 2, 20, 33, 64, 90, 200}) {
    const std::vector<float> expected = Plain(sequence, 1500, rows, BestKernels(), one);
    for (const int size : {2, 3}) {
      CpuTeam team(size);
      EXPECT_TRUE(SameBits(Plain(sequence, 1500, rows, BestKernels(), team), expected))
          << rows << " rows, " << size << " threads";
    }
  }
}

// Rows alone take the decode form, rows together the prefill form; and a row alone has no key after
// its own, where in the batch the keys of later rows lie in its last block.
TEST(Attend, ARowAloneHasTheBitsOfTheRowInAChunk) {
  CpuTeam team(2);
  for (const int32_t group : {1, 3, 4, 8}) {
    for (const int32_t head_dim : {64, 128, 256}) {
      const Sequence sequence({2, group, head_dim}, 600, 23);
      const std::vector<float> together = Plain(sequence, 600, 300, BestKernels(), team);
      const int64_t width = sequence.shape.num_q_heads() * head_dim;
      for (const int64_t pos : {300, 319, 320, 383, 511, 512, 513, 599}) {
        const std::vector<float> alone = Plain(sequence, pos + 1, 1, BestKernels(), team);
        const auto begin = together.begin() + (pos - 300) * width;
        EXPECT_TRUE(SameBits(alone, std::vector<float>(begin, begin + width)))
            << "group " << group << ", head_dim " << head_dim << ", position " << pos;
      }
    }
  }
}

TEST(Attend, ChunksOfAnySizeGiveTheBitsOfTheWholePrompt) {
  CpuTeam team(2);
  const Sequence sequence({3, 3, 64}, 450, 24);
  const std::vector<float> whole = Plain(sequence, 450, 450, BestKernels(), team);
  const int64_t width = 9 * 64;
  for (const int64_t chunk : {7, 64, 100}) {
    for (int64_t first = 0; first < 450; first += chunk) {
      const int64_t rows = std::min<int64_t>(chunk, 450 - first);
      const std::vector<float> part = Plain(sequence, first + rows, rows, BestKernels(), team);
      ASSERT_TRUE(SameBits(part, std::vector<float>(whole.begin() + first * width,
                                                    whole.begin() + (first + rows) * width)))
          << "chunk of " << chunk << " at " << first;
    }
  }
}

std::vector<std::vector<int64_t>> SomeCuts() {
  return {{64},       {128},           {192},           {256},      {320},
          {64, 128},  {256, 512},      {192, 320, 576}, {448, 640}, {64, 192, 256, 384, 512, 640},
          {512, 640}, {128, 256, 704}, {576, 640, 704}};
}

TEST(Attend, SpansCutAtAnyBlockBorderGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 761, 25);
  for (const int64_t rows : {1, 2, 61, 200}) {
    const std::vector<float> expected = Plain(sequence, 761, rows, BestKernels(), team);
    for (const std::vector<int64_t>& cuts : SomeCuts()) {
      const auto places = CutPlaces(sequence, 761, cuts);
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 761 - rows, rows);
      std::vector<const Place*> pointers;
      for (const auto& place : places) pointers.push_back(place.get());
      batch.Add(0, rows, 761 - rows, true, true, pointers);
      batch.Launch(BestKernels(), team);
      EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows, first cut " << cuts[0];
    }
  }
}

TEST(Attend, LaunchesSplitAtAnyBlockBorderGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 761, 26);
  for (const int64_t rows : {1, 2, 61, 200, 761}) {
    const std::vector<float> expected = Plain(sequence, 761, rows, BestKernels(), team);
    for (const std::vector<int64_t>& cuts : SomeCuts()) {
      const auto places = CutPlaces(sequence, 761, cuts);
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 761 - rows, rows);
      for (size_t i = 0; i < places.size(); ++i) {
        batch.Add(0, rows, 761 - rows, i == 0, i + 1 == places.size(), {places[i].get()});
        batch.Launch(BestKernels(), team);
      }
      EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows, first cut " << cuts[0];
    }
  }
}

// Each KV head (or run of heads) may come in launches of its own, in any order, with other cuts.
TEST(Attend, HeadsInLaunchesOfTheirOwnGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({5, 2, 64}, 500, 27);
  for (const int64_t rows : {1, 50, 120}) {
    const std::vector<float> expected = Plain(sequence, 500, rows, BestKernels(), team);
    const Place low(sequence, 0, 320, 0, 512, 0, 5);
    const Place high(sequence, 320, 180, 320, 192, 0, 5);
    const Place fetched(sequence, 0, 320, 0, 320, 2, 4);  // heads 2 and 3 only
    Batch batch(sequence.shape, rows);
    batch.SetRows(sequence, 0, 500 - rows, rows);
    batch.Add(0, rows, 500 - rows, true, false, {&low}, 0, 2);
    batch.Add(0, rows, 500 - rows, true, false, {&low}, 4, 5);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, true, false, {&fetched}, 3, 4);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, true, false, {&fetched}, 2, 3);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, false, true, {&high});
    batch.Launch(BestKernels(), team);
    EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows";
  }
}

TEST(Attend, ASequenceInARaggedBatchHasTheBitsOfTheSequenceAlone) {
  CpuTeam team(2);
  const Shape shape{3, 3, 64};
  const std::vector<int64_t> tokens = {1, 300, 77, 1100, 64};
  const std::vector<int64_t> rows = {1, 130, 1, 40, 64};
  std::vector<Sequence> sequences;
  std::vector<Place> places;
  int64_t total = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    sequences.emplace_back(shape, tokens[i], static_cast<uint32_t>(30 + i));
    places.push_back(Whole(sequences[i], tokens[i]));
    total += rows[i];
  }
  Batch batch(shape, total);
  for (size_t i = 0, row = 0; i < tokens.size(); row += rows[i++]) {
    batch.SetRows(sequences[i], row, tokens[i] - rows[i], rows[i]);
    batch.Add(row, rows[i], tokens[i] - rows[i], true, true, {&places[i]});
  }
  batch.Launch(BestKernels(), team);
  const int64_t width = shape.num_q_heads() * shape.head_dim;
  for (size_t i = 0, row = 0; i < tokens.size(); row += rows[i++]) {
    const auto begin = batch.out().begin() + row * width;
    EXPECT_TRUE(SameBits(std::vector<float>(begin, begin + rows[i] * width),
                         Plain(sequences[i], tokens[i], rows[i], BestKernels(), team)))
        << "sequence " << i;
  }
}

// The states, too: a launch may be followed by one that divides its work the other way.
TEST(Attend, BothFormsLeaveTheSameState) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 700, 28);
  const int64_t width = sequence.shape.num_q_heads() * AttentionStateFloats(64);
  for (const int64_t end : {64, 256, 300, 512, 700}) {
    const Place place(sequence, 0, end, 0, 704, 0, 2);
    Batch together(sequence.shape, 300);
    together.SetRows(sequence, 0, 150, 300);
    together.Add(0, 300, 150, true, false, {&place});
    together.Launch(BestKernels(), team);
    for (const int64_t row : {0, 105, 106, 150, 299}) {
      Batch alone(sequence.shape, 1);
      alone.SetRows(sequence, 0, 150 + row, 1);
      alone.Add(0, 1, 150 + row, true, false, {&place});
      alone.Launch(BestKernels(), team);
      const auto begin = together.state().begin() + row * width;
      EXPECT_TRUE(SameBits(alone.state(), std::vector<float>(begin, begin + width)))
          << "keys to " << end << ", row " << row;
    }
  }
}

TEST(Attend, GoesInPassesWhereTheScratchIsSmall) {
  CpuTeam team(2);
  // 32 rows x 8 heads x 258 floats a unit: 3 units fill the least scratch of 2^18 floats.
  const Sequence sequence({1, 8, 256}, 1700, 29);
  const std::vector<float> together = Plain(sequence, 1700, 32, BestKernels(), team);
  const std::vector<float> alone = Plain(sequence, 1700, 1, BestKernels(), team);
  EXPECT_TRUE(SameBits(alone, std::vector<float>(together.end() - 8 * 256, together.end())));
}

// ---- What is not a key ---------------------------------------------------------------------------

// Every place above is NaN where no key lies. Here the keys that a row must not see are NaN as well.
TEST(Attend, KeysAfterARowLeaveNoTrace) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 200, 31);
  Sequence poisoned = sequence;
  const int64_t kv_width = 2 * 64;
  for (int64_t i = 150 * kv_width; i < 200 * kv_width; ++i) {
    poisoned.k[i] = ToBFloat16(kNan);
    poisoned.v[i] = ToBFloat16(i % 2 == 0 ? kNan : kInfinity);
  }
  const int64_t width = 6 * 64;
  for (const int64_t first : {0, 149}) {  // the prefill form and the decode form
    const std::vector<float> clean = Plain(sequence, 200, 200 - first, BestKernels(), team);
    const std::vector<float> out = Plain(poisoned, 200, 200 - first, BestKernels(), team);
    const int64_t seen = (150 - first) * width;
    EXPECT_TRUE(SameBits(std::vector<float>(out.begin(), out.begin() + seen),
                         std::vector<float>(clean.begin(), clean.begin() + seen)));
    EXPECT_TRUE(std::isnan(out[seen]));
  }
}

// 96 of 128 rows of K and of V, each 4 pages long: the fourth page of both cannot be read.
TEST(Attend, ReadsNoRowPastTheCount) {
  constexpr int64_t kPage = 4096;
  ASSERT_EQ(sysconf(_SC_PAGESIZE), kPage);
  void* const memory =
      mmap(nullptr, 8 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Sequence sequence({1, 3, 64}, 96, 36);
  const Place place(sequence, 0, 96, 0, 128, 0, 1);
  std::memcpy(memory, place.span().base, 8 * kPage);
  KvSpan span = place.span();
  span.base = static_cast<uint8_t*>(memory);
  ASSERT_EQ(mprotect(span.base + 3 * kPage, kPage, PROT_NONE), 0);
  ASSERT_EQ(mprotect(span.base + 7 * kPage, kPage, PROT_NONE), 0);
  CpuTeam team(1);
  for (const cpu::KernelTable* kernels : AllAttention()) {
    for (const int64_t rows : {1, 30, 96}) {
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 96 - rows, rows);
      batch.AddSpan(0, rows, 96 - rows, true, true, span);
      batch.Launch(*kernels, team);
      EXPECT_TRUE(SameBits(batch.out(), Plain(sequence, 96, rows, *kernels, team)));
    }
  }
  munmap(memory, 8 * kPage);
}

TEST(Attend, ANanInAVisibleKeyReachesTheOutput) {
  CpuTeam team(2);
  for (const cpu::KernelTable* kernels : AllAttention()) {
    for (const int64_t rows : {1, 40}) {
      Sequence sequence({1, 3, 64}, 100, 32);
      sequence.k[17 * 64 + 5] = ToBFloat16(kNan);
      const std::vector<float> out = Plain(sequence, 100, rows, *kernels, team);
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }))
          << kernels->name << ", " << rows << " rows";
    }
  }
}

TEST(Attend, AnItemWithoutKeysResetsAndFinishes) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 100, 33);
  const Place place = Whole(sequence, 100);
  Batch batch(sequence.shape, 1);
  batch.SetRows(sequence, 0, 99, 1);
  batch.Add(0, 1, 99, true, false, {});
  batch.Launch(BestKernels(), team);
  batch.Add(0, 1, 99, false, false, {&place});
  batch.Launch(BestKernels(), team);
  batch.Add(0, 1, 99, false, true, {});
  batch.Launch(BestKernels(), team);
  EXPECT_TRUE(SameBits(batch.out(), Plain(sequence, 100, 1, BestKernels(), team)));
}

TEST(Attend, LargeScoresDoNotOverflow) {
  CpuTeam team(2);
  Sequence sequence({1, 1, 64}, 130, 34);
  for (float& x : sequence.q) x *= 400;
  const std::vector<float> out = Plain(sequence, 130, 130, BestKernels(), team);
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
}

TEST(Attend, DeclaresEveryByteThatItReadsOfASpan) {
  const Sequence sequence({3, 1, 64}, 300, 35);
  const Place tail(sequence, 200, 100, 0, 256, 0, 3);  // rows 200..255 and 0..43
  std::vector<AttendItem> items(1);
  items[0].row_count = 1;
  items[0].kv_head_begin = 1;
  items[0].kv_head_end = 2;
  items[0].span_count = 1;
  const std::vector<KvSpan> spans = {tail.span()};
  AttendArgs args;
  args.rows = 1;
  args.num_q_heads = args.num_kv_heads = 3;
  args.head_dim = 64;
  args.items = {items.data(), items.data(), 1};
  args.spans = {spans.data(), spans.data(), 1};
  std::vector<std::pair<int64_t, int64_t>> runs;
  ForEachRange(args, [&](const void* p, int64_t bytes, Access access) {
    const int64_t offset = static_cast<const uint8_t*>(p) - spans[0].base;
    if (access == Access::kRead && offset >= 0 && offset < 3 * 2 * 256 * 128) {
      runs.emplace_back(offset, bytes);
    }
  });
  const int64_t head = 2 * 256 * 128;
  const std::vector<std::pair<int64_t, int64_t>> expected = {{head + 200 * 128, 56 * 128},
                                                             {head + 456 * 128, 56 * 128},
                                                             {head, 44 * 128},
                                                             {head + 256 * 128, 44 * 128}};
  EXPECT_EQ(runs, expected);
}

}  // namespace
}  // namespace headroom::kernels
