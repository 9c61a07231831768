#include "services/coordinator/session_table.h"

#include <gtest/gtest.h>

#include <vector>

#include "services/coordinator/stop_finder.h"

namespace headroom::coordinator {
namespace {

constexpr KvGeometry kOneLayer = {1, 1, 64};

v1::ExtentRun MakeRun(int64_t first_pos, int64_t capacity, uint32_t extent_id) {
  v1::ExtentRun run;
  run.set_first_pos(first_pos);
  run.set_capacity_tokens(capacity);
  run.add_extents()->set_extent_id(extent_id);
  return run;
}

// 500 tokens, 448 of them sealed, in runs of 256 and 512 positions.
Sequence SomeSequence() {
  Sequence sequence;
  sequence.id = 7;
  for (int32_t i = 0; i < 500; ++i) sequence.token_ids.push_back(i);
  sequence.runs = {MakeRun(0, 256, 1), MakeRun(256, 512, 2)};
  sequence.sealed_tokens = 448;
  sequence.committed_tokens = 384;
  return sequence;
}

std::vector<int32_t> Ids(int32_t count) {
  std::vector<int32_t> ids;
  for (int32_t i = 0; i < count; ++i) ids.push_back(i);
  return ids;
}

// ---------------------------------------------------------------- prefixes

TEST(CachedTokens, WholeBlocksOfTheCommonPrefixThatAreSealed) {
  const Sequence sequence = SomeSequence();
  EXPECT_EQ(CachedTokens(sequence, Ids(600)), 448) << "what is not sealed has no keys";
  EXPECT_EQ(CachedTokens(sequence, Ids(300)), 256);
  std::vector<int32_t> other = Ids(600);
  other[130] = -1;
  EXPECT_EQ(CachedTokens(sequence, other), 128);
  other[0] = -1;
  EXPECT_EQ(CachedTokens(sequence, other), 0);
  EXPECT_EQ(CachedTokens(Sequence(), Ids(600)), 0);
}

TEST(CachedTokens, LeavesTheLastPromptTokenToCompute) {
  const Sequence sequence = SomeSequence();
  EXPECT_EQ(CachedTokens(sequence, Ids(64)), 0);
  EXPECT_EQ(CachedTokens(sequence, Ids(65)), 64);
  EXPECT_EQ(CachedTokens(sequence, Ids(128)), 64);
  EXPECT_EQ(CachedTokens(sequence, Ids(1)), 0);
}

TEST(Truncate, FreesRunsThatBeginThereAndLowersTheCounts) {
  Sequence sequence = SomeSequence();
  Truncate(sequence, 320);
  EXPECT_EQ(sequence.runs.size(), 2u) << "the second run holds positions 256 to 319";
  EXPECT_EQ(sequence.sealed_tokens, 320);
  EXPECT_EQ(sequence.committed_tokens, 320);
  EXPECT_EQ(sequence.token_ids.size(), 320u);
  Truncate(sequence, 256);
  EXPECT_EQ(sequence.runs.size(), 1u);
  EXPECT_EQ(sequence.capacity_tokens(), 256);
  Truncate(sequence, 0);
  EXPECT_TRUE(sequence.runs.empty());
}

// ---------------------------------------------------------------- windows

// Of two layers the first sees 100 tokens; 768 tokens, all sealed, in runs of 128 positions.
constexpr KvGeometry kTwoLayers = {2, 1, 64};
const LayerWindows kShortWindow = {100, 0};

Sequence WindowedSequence() {
  Sequence sequence;
  sequence.id = 7;
  for (int32_t i = 0; i < 768; ++i) sequence.token_ids.push_back(i);
  for (uint32_t run = 0; run < 6; ++run) {
    v1::ExtentRun& made = sequence.runs.emplace_back();
    made.set_first_pos(128 * run);
    made.set_capacity_tokens(128);
    for (int32_t layer = 0; layer < 2; ++layer) {
      v1::Extent* const extent = made.add_extents();
      extent->set_layer(layer);
      extent->set_extent_id(10 * run + layer);
      extent->set_data_offset(1000 * (10 * run + layer));
    }
  }
  sequence.sealed_tokens = 768;
  return sequence;
}

TEST(TakeSealed, GivesBackWhatNoPositionSeesFromABlockBeforeTheEndOn) {
  Sequence sequence = WindowedSequence();
  const int64_t before = HostBytes(sequence, kTwoLayers);
  const v1::SealedSequence sealed = TakeSealed(sequence, kTwoLayers, kShortWindow);
  EXPECT_EQ(sealed.sealed_tokens(), 768);
  // Position 704 sees from 605 on, which lies in the block from 576 on.
  ASSERT_EQ(sealed.kept_from_size(), 2);
  EXPECT_EQ(sealed.kept_from(0), 576);
  EXPECT_EQ(sealed.kept_from(1), 0);
  for (int run = 0; run < 6; ++run) {
    EXPECT_EQ(sequence.runs[run].extents(0).vacated(), run < 4) << run;
    EXPECT_EQ(sequence.runs[run].extents(0).has_data_offset(), run >= 4) << run;
    EXPECT_FALSE(sequence.runs[run].extents(1).vacated());
  }
  EXPECT_EQ(before - HostBytes(sequence, kTwoLayers), 4 * 128 * kTwoLayers.BytesPerTokenPerLayer());
  EXPECT_EQ(TakeSealed(sequence, kTwoLayers, kShortWindow).SerializeAsString(), sealed.SerializeAsString());
  EXPECT_EQ(TakeSealed(sequence, kTwoLayers, {}).kept_from_size(), 0);
}

TEST(CachedTokens, NoneWhereTheWindowOfTheNextPositionIsGone) {
  Sequence sequence = WindowedSequence();
  EXPECT_EQ(CachedTokens(sequence, Ids(500), kShortWindow), 448);
  TakeSealed(sequence, kTwoLayers, kShortWindow);
  EXPECT_EQ(CachedTokens(sequence, Ids(800), kShortWindow), 768);
  EXPECT_EQ(CachedTokens(sequence, Ids(768), kShortWindow), 704) << "a block before the end";
  // Position 640 sees from 541 on, in the block from 512 on, which is there.
  EXPECT_EQ(CachedTokens(sequence, Ids(641), kShortWindow), 640);
  EXPECT_EQ(CachedTokens(sequence, Ids(640), kShortWindow), 0);
  EXPECT_EQ(CachedTokens(sequence, Ids(100), kShortWindow), 0);
}

// ---------------------------------------------------------------- a store that came back

v1::StoredSequence Stored(int64_t sealed, std::vector<v1::ExtentRun> runs) {
  v1::StoredSequence stored;
  stored.set_sequence_id(7);
  stored.set_sealed_tokens(sealed);
  stored.mutable_runs()->Add(runs.begin(), runs.end());
  return stored;
}

TEST(Reconcile, KeysInTheSameExtentsStayThoughUncommitted) {
  Sequence sequence = SomeSequence();
  const v1::StoredSequence stored = Stored(384, {MakeRun(0, 256, 1), MakeRun(256, 512, 2)});
  Reconcile(sequence, &stored);
  EXPECT_EQ(sequence.sealed_tokens, 448);
  EXPECT_EQ(sequence.committed_tokens, 384);
  EXPECT_EQ(sequence.capacity_tokens(), 768);
}

TEST(Reconcile, AVacatedExtentIsTheSameAsBeforeOnEitherSide) {
  Sequence sequence = WindowedSequence();
  const Sequence whole = sequence;
  TakeSealed(sequence, kTwoLayers, kShortWindow);
  const v1::StoredSequence not_heard = Stored(704, whole.runs);
  const v1::StoredSequence heard = Stored(704, sequence.runs);
  Sequence other = sequence;
  Reconcile(other, &not_heard);
  EXPECT_EQ(other.sealed_tokens, 768);
  EXPECT_EQ(other.committed_tokens, 704);
  EXPECT_FALSE(other.runs[0].extents(0).vacated()) << "its keys are still there";
  Reconcile(other, &heard);
  EXPECT_EQ(other.sealed_tokens, 768);
  EXPECT_TRUE(other.runs[0].extents(0).vacated());
  EXPECT_TRUE(CanGoOnFrom(other, kShortWindow, 768));
  EXPECT_FALSE(CanGoOnFrom(other, kShortWindow, 576));
}

TEST(Reconcile, WhatTheStoreLostIsLost) {
  Sequence sequence = SomeSequence();
  const v1::StoredSequence stored = Stored(256, {MakeRun(0, 256, 1)});
  Reconcile(sequence, &stored);
  EXPECT_EQ(sequence.sealed_tokens, 256);
  EXPECT_EQ(sequence.capacity_tokens(), 256);
  EXPECT_EQ(sequence.token_ids.size(), 500u) << "ids are kept: the keys can be computed again";
  Reconcile(sequence, nullptr);
  EXPECT_EQ(sequence.sealed_tokens, 0);
  EXPECT_TRUE(sequence.runs.empty());
}

TEST(Reconcile, OtherExtentsAreNotTrusted) {
  Sequence sequence = SomeSequence();
  const v1::StoredSequence stored = Stored(448, {MakeRun(0, 256, 1), MakeRun(256, 512, 9)});
  Reconcile(sequence, &stored);
  EXPECT_EQ(sequence.sealed_tokens, 256);
  EXPECT_EQ(sequence.runs[1].extents(0).extent_id(), 9u);
}

TEST(Reconcile, ARunThatTheTableDoesNotKnowOfIsTakenOver) {
  Sequence sequence = SomeSequence();
  const v1::StoredSequence stored =
      Stored(448, {MakeRun(0, 256, 1), MakeRun(256, 512, 2), MakeRun(768, 512, 3)});
  Reconcile(sequence, &stored);
  EXPECT_EQ(sequence.sealed_tokens, 448);
  EXPECT_EQ(sequence.capacity_tokens(), 1280);
}

TEST(Reconcile, ATruncationThatTheStoreMissedHolds) {
  Sequence sequence = SomeSequence();
  Truncate(sequence, 128);
  const v1::StoredSequence stored = Stored(448, {MakeRun(0, 256, 1), MakeRun(256, 512, 2)});
  Reconcile(sequence, &stored);
  EXPECT_EQ(sequence.sealed_tokens, 128);
  EXPECT_EQ(sequence.committed_tokens, 128);
}

// ---------------------------------------------------------------- sessions

TEST(SessionTable, IdsAreCheckedAndSessionsCounted) {
  EXPECT_TRUE(SessionTable::IsValidId("A-z_0.9"));
  EXPECT_TRUE(SessionTable::IsValidId(std::string(128, 'a')));
  for (const std::string& id : {std::string(), std::string("a b"), std::string("a/b"),
                                std::string(129, 'a'), std::string("\xc3\xa4")}) {
    EXPECT_FALSE(SessionTable::IsValidId(id)) << id;
  }
  SessionTable table(2);
  const absl::Time now = absl::UnixEpoch();
  Session* const a = *table.FindOrMake("a", now);
  EXPECT_TRUE(table.FindOrMake("b", now).ok());
  EXPECT_EQ(table.FindOrMake("c", now).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(*table.FindOrMake("a", now), a) << "one that is there is found";
  table.Erase("b");
  EXPECT_TRUE(table.FindOrMake("c", now).ok());
}

TEST(SessionTable, ExpiresIdleSessionsThatAreNotPinned) {
  SessionTable table(10);
  const absl::Time now = absl::UnixEpoch();
  for (const char* id : {"short", "long", "pinned", "busy", "kept"}) {
    Session* const session = *table.FindOrMake(id, now);
    session->sequence = SomeSequence();
    session->ttl = absl::Seconds(id[0] == 'l' ? 100 : 10);
  }
  table.Find("pinned")->pinned = true;
  table.Find("busy")->busy = true;
  table.Find("kept")->ttl.reset();
  EXPECT_TRUE(table.TakeExpired(now + absl::Seconds(9)).empty());
  EXPECT_EQ(table.TakeExpired(now + absl::Seconds(11)).size(), 1u);
  EXPECT_EQ(table.Find("short"), nullptr);
  EXPECT_EQ(table.size(), 4);
  EXPECT_EQ(table.idle_bytes(kOneLayer), 3 * 768 * kOneLayer.BytesPerToken());
  EXPECT_EQ(table.idle_runs(), 6);
  EXPECT_EQ(table.TakeIdle().size(), 3u) << "all but the busy one";
}

TEST(SessionTable, ListsInOrderOfIdFromAGivenOneOn) {
  SessionTable table(10);
  for (const char* id : {"c", "a", "b"}) ASSERT_TRUE(table.FindOrMake(id, {}).ok());
  const auto ids = [&](const std::string& after, size_t most) {
    std::string all;
    for (const Session* session : table.List(after, most)) all += session->id;
    return all;
  };
  EXPECT_EQ(ids("", 10), "abc");
  EXPECT_EQ(ids("", 2), "ab");
  EXPECT_EQ(ids("a", 10), "bc");
  EXPECT_EQ(ids("c", 10), "");
}

// ---------------------------------------------------------------- stop strings

// The text that comes out, with the stop in brackets.
std::string Stopped(std::vector<std::string> stops, const std::vector<std::string>& pieces,
                    bool include_stop = false) {
  StopFinder finder(std::move(stops), include_stop);
  std::string out;
  for (const std::string& piece : pieces) {
    const StopFinder::Found found = finder.Push(piece);
    out += found.text;
    if (found.stop.has_value()) return out + "[" + *found.stop + "]";
  }
  return out + finder.Finish();
}

TEST(StopFinder, FindsAStopWhereverPiecesEnd) {
  const std::string text = "one two STOP three";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    EXPECT_EQ(Stopped({"STOP"}, {text.substr(0, cut), text.substr(cut)}), "one two [STOP]");
  }
  std::vector<std::string> letters;
  for (const char c : text) letters.push_back(std::string(1, c));
  EXPECT_EQ(Stopped({"STOP"}, letters), "one two [STOP]");
  EXPECT_EQ(Stopped({"STOP"}, letters, /*include_stop=*/true), "one two STOP[STOP]");
}

TEST(StopFinder, TheFirstStopInTheTextCounts) {
  EXPECT_EQ(Stopped({"late", "early"}, {"an early and a late"}), "an [early]");
  EXPECT_EQ(Stopped({"ab", "abc"}, {"xabc"}), "x[ab]");
  EXPECT_EQ(Stopped({"abc", "ab"}, {"xabc"}), "x[abc]");
}

TEST(StopFinder, NeverShowsPartOfAStop) {
  StopFinder finder({"aab"}, false);
  EXPECT_EQ(finder.Push("xa").text, "x");
  EXPECT_EQ(finder.Push("a").text, "");
  EXPECT_EQ(finder.Push("a").text, "a") << "aaa: the last two may still begin the stop";
  EXPECT_EQ(finder.Push("b").stop, "aab");
}

TEST(StopFinder, GivesOutWhatWasHeldBackInTheEnd) {
  EXPECT_EQ(Stopped({"STOP"}, {"almost ST", "O"}), "almost STO");
  EXPECT_EQ(Stopped({}, {"any ", "text"}), "any text");
}

}  // namespace
}  // namespace headroom::coordinator
