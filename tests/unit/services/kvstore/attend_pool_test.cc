// The store's end of a mailbox: what it answers, and how it comes, sleeps and goes.
#include "services/kvstore/attend_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/segment/mailbox.h"
#include "kernels/attention.h"
#include "tests/unit/services/kvstore/attend_pool_test_util.h"

namespace headroom::kvstore {
namespace {

// ---------------------------------------------------------------- good posts

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
