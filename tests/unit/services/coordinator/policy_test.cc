// Leases, admission and the composition of steps: functions of numbers.
#include <gtest/gtest.h>

#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "common/extent_limit.h"
#include "services/coordinator/admission.h"
#include "services/coordinator/batch.h"
#include "services/coordinator/lease.h"

namespace headroom::coordinator {
namespace {

constexpr KvGeometry kSmallGeometry = {/*num_layers=*/4, /*num_kv_heads=*/3, /*head_dim=*/64};
constexpr int64_t kTokenBytes = 4 * 3 * 64 * 2 * 2;

// ---------------------------------------------------------------- leases

TEST(Lease, NeverLetsASealLackAnExtentNorTakesMoreThanReserved) {
  for (const int64_t prompt : {1, 63, 64, 65, 200, 1000, 5000}) {
    for (const int64_t max_tokens : {0, 1, 64, 300, 4000}) {
      const int64_t final_tokens = prompt + max_tokens;
      int64_t runs = 0;
      const int64_t reserved = ReservedTokens({kSmallGeometry}, 0, final_tokens, &runs);
      int64_t have = 0;
      for (int64_t pos = prompt; pos <= final_tokens; ++pos) {
        for (int64_t more;
             (more = NextLeaseTokens({kSmallGeometry}, have, pos, final_tokens, reserved)) > 0;
             have += more) {
          EXPECT_EQ(more & (more - 1), 0) << "capacities are powers of two";
          EXPECT_GE(more, kBlockTokens);
          EXPECT_LE(more, kSmallGeometry.MaxExtentTokens());
        }
        EXPECT_GE(have, FloorToBlock(std::min(final_tokens, pos + kLeaseAheadTokens)));
        EXPECT_LE(have, reserved);
      }
    }
  }
}

TEST(Lease, NothingMoreOnceThereIsRoom) {
  EXPECT_EQ(NextLeaseTokens({kSmallGeometry}, 512, 200, 10000, 16384), 0);
  EXPECT_GT(NextLeaseTokens({kSmallGeometry}, 512, 320, 10000, 16384), 0);
  EXPECT_EQ(NextLeaseTokens({kSmallGeometry}, 0, 10, 63, 0), 0)
      << "what is never sealed needs no extent";
}

TEST(Lease, ReservationsCountFromWhatIsKept) {
  EXPECT_EQ(ReservedTokens({kSmallGeometry}, 4096, 100), 4096);
  EXPECT_EQ(ReservedTokens({kSmallGeometry}, 4096, 4159), 4096);
  EXPECT_GT(ReservedTokens({kSmallGeometry}, 4096, 4160), 4096);
}

// How a sequence grows when leases, steps and commits come in an order that `seed` draws.
struct Growth {
  std::vector<int64_t> runs;  // capacities
  int64_t most_bytes = 0;     // that its extents took at any time
};

Growth Grow(const ExtentRules& rules, int64_t known_tokens, int64_t final_tokens, uint64_t seed) {
  const int64_t reserved = ReservedTokens(rules, 0, final_tokens);
  std::mt19937_64 random(seed);
  Growth growth;
  std::vector<int64_t> in_flight;  // where steps end
  int64_t have = 0, next_pos = 0, sealed = 0, committed = 0;
  const auto count_bytes = [&] {
    int64_t bytes = 0;
    for (int32_t layer = 0; layer < rules.geometry.num_layers; ++layer) {
      const int64_t kept_from =
          FirstKey(rules.windows, layer, std::max<int64_t>(0, committed - kBlockTokens));
      int64_t end = 0;
      for (const int64_t run : growth.runs) {
        end += run;
        if (end > kept_from) bytes += run * rules.geometry.BytesPerTokenPerLayer();
      }
    }
    growth.most_bytes = std::max(growth.most_bytes, bytes);
  };
  while (committed < FloorToBlock(final_tokens)) {
    switch (random() % 4) {
      case 0: {
        const int64_t from = LeaseFrom(rules, std::max(known_tokens, next_pos), committed);
        const int64_t more = NextLeaseTokens(rules, have, from, final_tokens, reserved);
        if (more == 0) break;
        growth.runs.push_back(more);
        have += more;
        EXPECT_LE(have, reserved);
        count_bytes();
        break;
      }
      case 1: {
        const int64_t count = next_pos < known_tokens
                                  ? std::min(rules.max_chunk_tokens, known_tokens - next_pos)
                                  : int64_t{next_pos < final_tokens};
        if (count == 0 || in_flight.size() == 2 || FloorToBlock(next_pos + count) > have) break;
        next_pos += count;
        in_flight.push_back(next_pos);
        break;
      }
      case 2:
        if (in_flight.empty()) break;
        sealed = FloorToBlock(in_flight.front());
        in_flight.erase(in_flight.begin());
        break;
      case 3:
        committed = sealed;
        break;
    }
  }
  return growth;
}

TEST(Lease, BehindWindowsNoMoreIsHeldThanIsReserved) {
  for (const int64_t window : {1, 64, 200, 1000, 5000}) {
    for (const int64_t chunk : {64, 100, 512}) {
      for (const int64_t prompt : {100, 9000}) {
        const ExtentRules rules = {kSmallGeometry, {window, 0, window, 0}, chunk};
        const int64_t final_tokens = prompt + 700;
        const int64_t most = MostHostBytes(rules, ReservedTokens(rules, 0, final_tokens));
        const Growth first = Grow(rules, prompt, final_tokens, 1);
        for (uint64_t seed = 1; seed <= 5; ++seed) {
          const Growth growth = Grow(rules, prompt, final_tokens, seed);
          EXPECT_LE(growth.most_bytes, most) << "window " << window << ", chunk " << chunk;
          EXPECT_EQ(growth.runs, first.runs) << "runs do not hang on who was faster";
        }
      }
    }
  }
}

TEST(Lease, WithWindowsExtentsAreNoLongerThanTheShortest) {
  EXPECT_EQ(MaxExtentTokens(kSmallGeometry, {5000, 0, 3000, 0}), 2048);
  EXPECT_EQ(MaxExtentTokens(kSmallGeometry, {64, 0, 64, 0}), 256);
  EXPECT_EQ(MaxExtentTokens(kSmallGeometry, {0, 0, 0, 0}), kSmallGeometry.MaxExtentTokens());
}

// ---------------------------------------------------------------- admission

Capacity SomeCapacity() {
  Capacity capacity;
  capacity.extents = {kSmallGeometry};
  capacity.host_bytes = 8192 * kSmallGeometry.BytesPerToken();
  capacity.max_extents = 1000;
  capacity.tail_bytes_per_sequence = 256 * kSmallGeometry.BytesPerToken();
  capacity.kv_pool_bytes = 3 * capacity.tail_bytes_per_sequence;
  capacity.max_sequences = 16;
  return capacity;
}

TEST(Admission, ReservesWhatTheRequestWillTake) {
  const Verdict verdict = Admit(SomeCapacity(), {}, {.final_tokens = 1000});
  EXPECT_EQ(verdict.kind, Verdict::kAdmit);
  EXPECT_EQ(verdict.reserved_tokens, 1024);
}

TEST(Admission, WaitsForMemoryThatRunningRequestsHold) {
  Commitments busy;
  busy.running_bytes = 8000 * kTokenBytes;
  busy.running_sequences = 1;
  const Verdict verdict = Admit(SomeCapacity(), busy, {.final_tokens = 1000});
  EXPECT_EQ(verdict.kind, Verdict::kWait);
  EXPECT_NE(verdict.reason.find(std::to_string(8000 * kTokenBytes)), std::string::npos) << verdict.reason;
}

TEST(Admission, RefusesWhatCanNeverFitWithTheNumbers) {
  const Verdict verdict = Admit(SomeCapacity(), {}, {.final_tokens = 9000});
  EXPECT_EQ(verdict.kind, Verdict::kNever);
  EXPECT_NE(verdict.reason.find("9000"), std::string::npos) << verdict.reason;
  EXPECT_NE(verdict.reason.find(std::to_string(8192 * kTokenBytes)), std::string::npos) << verdict.reason;
}

TEST(Admission, IdleSessionsDoNotGiveBackByWaiting) {
  Commitments idle;
  idle.idle_bytes = 8000 * kTokenBytes;
  EXPECT_EQ(Admit(SomeCapacity(), idle, {.final_tokens = 1000}).kind, Verdict::kNever);
  EXPECT_EQ(Admit(SomeCapacity(), idle, {.final_tokens = 128}).kind, Verdict::kAdmit);
}

TEST(Admission, ASessionsOwnExtentsAreNotTakenTwice) {
  Commitments idle;
  idle.idle_bytes = 4096 * kTokenBytes;
  Demand demand{.final_tokens = 4100, .kept_tokens = 4096, .kept_runs = 1};
  const Verdict verdict = Admit(SomeCapacity(), idle, demand);
  EXPECT_EQ(verdict.kind, Verdict::kAdmit);
  EXPECT_EQ(verdict.reserved_tokens, 4096);
  EXPECT_EQ(verdict.reserved_runs, 1);
}

TEST(Admission, ATailForEachAndNotMoreSequencesThanTheWorkerTakes) {
  Commitments busy;
  busy.running_sequences = 3;
  EXPECT_EQ(Admit(SomeCapacity(), busy, {.final_tokens = 10}).kind, Verdict::kWait);
  busy.running_sequences = 2;
  EXPECT_EQ(Admit(SomeCapacity(), busy, {.final_tokens = 10}).kind, Verdict::kAdmit);
  Capacity capacity = SomeCapacity();
  capacity.max_sequences = 2;
  EXPECT_EQ(Admit(capacity, busy, {.final_tokens = 10}).kind, Verdict::kWait);
  capacity.kv_pool_bytes = capacity.tail_bytes_per_sequence - 1;
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = 10}).kind, Verdict::kNever);
}

TEST(Admission, HistoriesTakeOfTheSamePool) {
  Capacity capacity = SomeCapacity();
  capacity.draw_state_bytes = capacity.tail_bytes_per_sequence / 2;  // the pool: three tails
  const Demand plain{.final_tokens = 10};
  const Demand with{.final_tokens = 10, .has_history = true};
  EXPECT_EQ(Admit(capacity, {.running_sequences = 1}, with).kind, Verdict::kAdmit);
  EXPECT_EQ(Admit(capacity, {.running_sequences = 2}, with).kind, Verdict::kWait);
  EXPECT_EQ(Admit(capacity, {.running_sequences = 2}, plain).kind, Verdict::kAdmit);
  const Commitments two{.running_sequences = 2, .running_histories = 1};
  EXPECT_EQ(Admit(capacity, two, plain).kind, Verdict::kWait);
  capacity.kv_pool_bytes = capacity.tail_bytes_per_sequence;
  EXPECT_EQ(Admit(capacity, {}, plain).kind, Verdict::kAdmit);
  EXPECT_EQ(Admit(capacity, {}, with).kind, Verdict::kNever);
}

TEST(Admission, DescriptorsAreCountedToo) {
  Capacity capacity = SomeCapacity();
  capacity.max_extents = 4;  // one run of all layers
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = 64}).kind, Verdict::kAdmit);
  EXPECT_EQ(Admit(capacity, {.running_runs = 1}, {.final_tokens = 64}).kind, Verdict::kWait);
  EXPECT_EQ(Admit(capacity, {.idle_runs = 1}, {.final_tokens = 64}).kind, Verdict::kNever);
}

TEST(Admission, HugeNumbersDoNotOverflow) {
  Capacity capacity = SomeCapacity();
  capacity.host_bytes = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = int64_t{1} << 33}).kind, Verdict::kNever);
  capacity.extents.windows = {8192, 0, std::numeric_limits<int64_t>::max(), 8192};
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = int64_t{1} << 33}).kind, Verdict::kNever);
  EXPECT_EQ(MostHostBytes(capacity.extents, int64_t{1} << 60), std::numeric_limits<int64_t>::max());
}

TEST(Admission, BehindWindowsNothingIsReserved) {
  Capacity capacity = SomeCapacity();  // 8,192 tokens of all layers
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = 12000}).kind, Verdict::kNever);
  capacity.extents = {kSmallGeometry, {300, 300, 0, 300}, /*max_chunk_tokens=*/128};
  const Verdict verdict = Admit(capacity, {}, {.final_tokens = 12000});
  EXPECT_EQ(verdict.kind, Verdict::kAdmit) << verdict.reason;
  EXPECT_GE(verdict.reserved_tokens, 12000 - 63) << "positions, of which one layer keeps all";
  EXPECT_LT(verdict.reserved_bytes, 5000 * kTokenBytes);
  EXPECT_GT(verdict.reserved_bytes, (12000 + 3 * 300) / 4 * kTokenBytes);
  // Every layer has one: what is served has no end but the descriptors'.
  capacity.extents.windows = {300, 300, 300, 300};
  capacity.max_extents = 1 << 20;
  EXPECT_EQ(Admit(capacity, {}, {.final_tokens = 1 << 20}).kind, Verdict::kAdmit);
}

// ---------------------------------------------------------------- pieces

constexpr StepLimits kLimits = {.max_chunk_tokens = 512, .max_decode_rows = 4, .max_results = 128};

SequenceProgress PromptOf(int64_t tokens, int64_t max_tokens = 10) {
  SequenceProgress progress;
  progress.known_tokens = progress.prompt_tokens = tokens;
  progress.end_pos = tokens + std::max<int64_t>(0, max_tokens - 1);
  progress.capacity_tokens = CeilToBlock(progress.end_pos);
  progress.chunk_tokens = kLimits.max_chunk_tokens;
  progress.draws = max_tokens > 0;
  return progress;
}

// Sends pieces until the prompt is through.
std::vector<Piece> Chunks(SequenceProgress progress) {
  std::vector<Piece> pieces;
  while (progress.next_pos < progress.prompt_tokens) {
    const std::optional<Piece> piece = NextPiece(progress, kLimits);
    if (!piece.has_value()) break;
    Advance(progress, *piece);
    pieces.push_back(*piece);
  }
  return pieces;
}

TEST(NextPiece, ChunksFollowEachOtherAndTheLastDraws) {
  const std::vector<Piece> pieces = Chunks(PromptOf(1100));
  ASSERT_EQ(pieces.size(), 3u);
  EXPECT_EQ(pieces[0].end_pos(), 512);
  EXPECT_EQ(pieces[1].end_pos(), 1024);
  EXPECT_EQ(pieces[2].end_pos(), 1100);
  EXPECT_FALSE(pieces[1].draw);
  EXPECT_TRUE(pieces[2].draw);
  EXPECT_EQ(pieces[1].sealed_tokens, 512) << "what the chunk in flight will have sealed";
}

TEST(NextPiece, ChunksOfAnySizeNameWholeBlocksAndFitTheTail) {
  for (const int64_t chunk : {1, 2, 7, 63, 64, 65, 300}) {
    SequenceProgress progress = PromptOf(1000);
    progress.chunk_tokens = chunk;
    int64_t next = 0;
    for (const Piece& piece : Chunks(progress)) {
      EXPECT_EQ(piece.first_pos, next);
      EXPECT_LE(piece.count, chunk);
      EXPECT_EQ(piece.sealed_tokens % kBlockTokens, 0);
      EXPECT_LE(piece.sealed_tokens, piece.first_pos);
      EXPECT_LT(piece.first_pos - piece.sealed_tokens, kTailTokens);
      if (piece.count == 1) {
        EXPECT_LE(piece.end_pos() - piece.sealed_tokens, kTailTokens);
      }
      next = piece.end_pos();
    }
    EXPECT_EQ(next, 1000);
  }
}

TEST(NextPiece, AfterTheKnownTokensComesTheLastDrawn) {
  SequenceProgress progress = PromptOf(100, 3);
  Advance(progress, *NextPiece(progress, kLimits));
  const std::optional<Piece> ahead = NextPiece(progress, kLimits);
  ASSERT_TRUE(ahead.has_value());
  EXPECT_TRUE(ahead->last_drawn);
  EXPECT_TRUE(ahead->draw);
  EXPECT_EQ(ahead->first_pos, 100);
  Advance(progress, *ahead);
  EXPECT_EQ(NextPiece(progress, kLimits)->first_pos, 101);
  Advance(progress, *NextPiece(progress, kLimits));
  EXPECT_FALSE(NextPiece(progress, kLimits).has_value()) << "three tokens come of 102 positions";
}

TEST(NextPiece, OnlyThePromptWhereNothingIsDrawn) {
  SequenceProgress progress = PromptOf(100, 0);
  EXPECT_FALSE(NextPiece(progress, kLimits)->draw);
  Advance(progress, *NextPiece(progress, kLimits));
  EXPECT_FALSE(NextPiece(progress, kLimits).has_value());
}

TEST(NextPiece, TokensDrawnBeforeALossAreComputedAgainInChunks) {
  SequenceProgress progress = PromptOf(100, 200);
  progress.known_tokens = 170;  // 70 were drawn
  progress.next_pos = progress.sealed_tokens = progress.tail_begin = 128;
  const Piece piece = *NextPiece(progress, kLimits);
  EXPECT_EQ(piece.first_pos, 128);
  EXPECT_EQ(piece.count, 42);
  EXPECT_TRUE(piece.draw);
  EXPECT_FALSE(piece.last_drawn);
}

TEST(NextPiece, ScoresEachPromptTokenButTheFirstOnce) {
  SequenceProgress progress = PromptOf(1000);
  progress.scores = true;
  int64_t scored = 1;  // the first has no score
  for (const Piece& piece : Chunks(progress)) {
    EXPECT_LE(piece.num_scores + (piece.draw ? 1 : 0), kLimits.max_results);
    EXPECT_EQ(piece.first_pos + 1, scored);
    scored += piece.num_scores;
  }
  EXPECT_EQ(scored, 1000);
}

TEST(NextPiece, ATokenIsAttendedInALaneOnceTheStoreKnowsOfIt) {
  SequenceProgress progress = PromptOf(100, 1000);
  progress.next_pos = 195;
  progress.known_tokens = 196;
  EXPECT_EQ(NextPiece(progress, kLimits)->sealed_tokens, 0) << "all in the tail";
  progress.sealed_tokens = 192;
  EXPECT_EQ(NextPiece(progress, kLimits)->sealed_tokens, 0);
  progress.committed_tokens = 64;
  EXPECT_EQ(NextPiece(progress, kLimits)->sealed_tokens, 64);
}

TEST(NextPiece, WhatAStepReadsWhereDoesNotHangOnTheStoresHaste) {
  for (int64_t pos = 100; pos < 1000; ++pos) {
    SequenceProgress progress = PromptOf(100, 1000);
    progress.next_pos = pos;
    progress.known_tokens = pos + 1;
    progress.sealed_tokens = FloorToBlock(pos);
    progress.committed_tokens = FloorToBlock(pos);  // at once
    const int64_t at_once = NextPiece(progress, kLimits)->sealed_tokens;
    progress.committed_tokens = std::max<int64_t>(0, FloorToBlock(pos) - 64);  // 64 tokens later
    EXPECT_EQ(NextPiece(progress, kLimits)->sealed_tokens, at_once) << pos;
    EXPECT_LE(pos + 1 - at_once, 128);
  }
}

TEST(NextPiece, AStoreThatIsAwayDoesNotOverflowTheTail) {
  SequenceProgress progress = PromptOf(100, 1000);
  progress.sealed_tokens = 320;  // none of it acknowledged
  progress.next_pos = 383;
  progress.known_tokens = 384;
  const Piece piece = *NextPiece(progress, kLimits);
  EXPECT_EQ(piece.sealed_tokens, 128);
  EXPECT_LE(piece.end_pos() - piece.sealed_tokens, kTailTokens);
}

TEST(NextPiece, AfterAChunkLongerThanTheTailOnlyItsRestIsThere) {
  SequenceProgress progress = PromptOf(500, 10);
  Advance(progress, *NextPiece(progress, kLimits));
  EXPECT_EQ(progress.tail_begin, 448);
  EXPECT_EQ(NextPiece(progress, kLimits)->sealed_tokens, 448);
}

TEST(NextPiece, WaitsForTheExtentThatABlockGoesTo) {
  SequenceProgress progress = PromptOf(100, 100);
  progress.capacity_tokens = 128;
  progress.next_pos = 190;
  progress.known_tokens = 191;
  EXPECT_TRUE(NextPiece(progress, kLimits).has_value());
  progress.next_pos = 191;
  progress.known_tokens = 192;
  EXPECT_FALSE(NextPiece(progress, kLimits).has_value()) << "position 191 would seal 128..191";
  progress.capacity_tokens = 192;
  EXPECT_TRUE(NextPiece(progress, kLimits).has_value());
}

TEST(NextPiece, AChunkIsNotCutWhereAnExtentIsStillToCome) {
  SequenceProgress progress = PromptOf(1000);
  progress.capacity_tokens = 448;
  EXPECT_FALSE(NextPiece(progress, kLimits).has_value());
  progress.capacity_tokens = 512;
  EXPECT_EQ(NextPiece(progress, kLimits)->count, 512);
}

TEST(NextPiece, NothingWhilePaused) {
  SequenceProgress progress = PromptOf(100);
  progress.may_run = false;
  EXPECT_FALSE(NextPiece(progress, kLimits).has_value());
}

// ---------------------------------------------------------------- steps

SequenceProgress Decoding(int64_t pos) {
  SequenceProgress progress = PromptOf(pos, 100);
  progress.next_pos = pos - 1;
  return progress;
}

TEST(Compose, AllSingleTokensGoTogetherAndOneChunkBeside) {
  const std::vector<SequenceProgress> sequences = {Decoding(10), PromptOf(400), Decoding(20),
                                                   PromptOf(300)};
  const std::vector<BatchEntry> tokens = ComposeTokenStep(sequences, kLimits, 0);
  ASSERT_EQ(tokens.size(), 2u);
  EXPECT_EQ(tokens[0].index, 0);
  EXPECT_EQ(tokens[1].index, 2);
  const std::vector<BatchEntry> chunk = ComposeChunkStep(sequences, kLimits);
  ASSERT_EQ(chunk.size(), 1u);
  EXPECT_EQ(chunk[0].index, 1) << "the first admitted";
}

TEST(Compose, TurnsGoRoundBeyondTheWorkersRows) {
  const std::vector<SequenceProgress> sequences(6, Decoding(10));
  std::set<int> served;
  for (const BatchEntry& entry : ComposeTokenStep(sequences, kLimits, 0))
    served.insert(entry.index);
  EXPECT_EQ(served.size(), 4u);
  for (const BatchEntry& entry : ComposeTokenStep(sequences, kLimits, 4))
    served.insert(entry.index);
  EXPECT_EQ(served.size(), 6u);
}

TEST(Compose, NobodyWaitsForAnothersChunk) {
  std::vector<SequenceProgress> sequences = {Decoding(10), Decoding(20)};
  sequences[0].chunk_in_flight = true;
  std::vector<BatchEntry> step = ComposeTokenStep(sequences, kLimits, 0);
  ASSERT_EQ(step.size(), 1u);
  EXPECT_EQ(step[0].index, 1);
  sequences.pop_back();
  EXPECT_EQ(ComposeTokenStep(sequences, kLimits, 0).size(), 1u) << "alone it goes ahead";
}

TEST(Compose, NothingOfNothing) {
  EXPECT_TRUE(ComposeTokenStep({}, kLimits, 0).empty());
  EXPECT_TRUE(ComposeChunkStep({}, kLimits).empty());
}

}  // namespace
}  // namespace headroom::coordinator
