// Who waits for a post or an answer is woken by it.
#include "common/segment/mailbox.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <thread>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/futex.h"
#include "common/segment_format.h"
#include "tests/unit/common/segment/mailbox_fixture.h"

namespace headroom {
namespace {

// Two mappings, as two processes have them.
class MailboxBells : public MailboxTest {
 protected:
  MailboxBells() : worker_(Create(SmallShape())), store_(Open().value()) {}
  const std::unique_ptr<Mailbox> worker_;
  const std::unique_ptr<Mailbox> store_;
};

TEST_F(MailboxBells, AnAnswerThatIsThereIsNotWaitedFor) {
  RingAnswered(store_->slot(1), 3);
  for (const uint64_t count : {0, 1, 3}) {
    EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(1), count, absl::ZeroDuration()));
  }
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(1), 4, absl::ZeroDuration()));
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::ZeroDuration()));
}

TEST_F(MailboxBells, AWaitEndsAtItsTimeoutOrWhenTheMailboxIsRetired) {
  const absl::Time begin = absl::Now();
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Milliseconds(30)));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(30));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  std::thread other([this] {
    absl::SleepFor(absl::Milliseconds(20));
    store_->header().retired.store(1);
  });
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Minutes(10)));
  other.join();
}

TEST_F(MailboxBells, AWaitThatSleepsIsWokenThroughTheOtherMapping) {
  for (uint64_t count = 1; count <= 15; ++count) {
    std::thread waiter([&] {
      const absl::Time begin = absl::Now();
      EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(0), count, absl::Minutes(1),
                                absl::Minutes(1)));
      EXPECT_LT(absl::Now() - begin, absl::Minutes(1)) << "nobody woke it";
    });
    while (store_->slot(0).worker_sleeps.load() == 0) std::this_thread::yield();
    absl::SleepFor(absl::Milliseconds(1));
    RingAnswered(store_->slot(0), count);
    waiter.join();
  }
}

// The low half of the count is what is slept on: one that passes 2^32 ends the wait all the same.
TEST_F(MailboxBells, CountsMayPassTheWordThatIsSleptOn) {
  const uint64_t before = uint64_t{1} << 32;
  store_->slot(0).answered.store(before - 1);
  std::thread store([&] {
    absl::SleepFor(absl::Milliseconds(10));
    RingAnswered(store_->slot(0), before);
  });
  EXPECT_TRUE(AwaitAnswered(worker_->header(), worker_->slot(0), before, absl::Minutes(1)));
  store.join();
}

// A store that looks at `wake` before it says that it sleeps misses no rise of it.
TEST_F(MailboxBells, EveryPostAndEveryBeginOfAStepRaisesTheWordThatAStoreSleepsOn) {
  RingPosted(worker_->header(), worker_->slot(1), 1);
  EXPECT_EQ(store_->slot(1).posted, 1u);
  EXPECT_EQ(store_->slot(0).posted, 0u);
  EXPECT_EQ(store_->header().wake, 1u);
  WakeStore(worker_->header());
  EXPECT_EQ(store_->header().wake, 2u);
  store_->header().store_sleeps.store(1);
  RingPosted(worker_->header(), worker_->slot(1), 2);
  EXPECT_EQ(store_->header().wake, 3u);
  WakeStore(worker_->header());
  EXPECT_EQ(store_->header().wake, 4u);
}

// A bell may be late: what it tells has been seen, served and answered, and who sleeps again by then
// waits for the next one. It must find the flag as it was set.
TEST_F(MailboxBells, ALateBellDoesNotTakeTheNextOnes) {
  store_->header().store_sleeps.store(1);
  WakeStore(worker_->header());
  RingPosted(worker_->header(), worker_->slot(0), 1);
  EXPECT_EQ(store_->header().store_sleeps, 1u);
  worker_->slot(0).worker_sleeps.store(1);
  RingAnswered(store_->slot(0), 1);
  EXPECT_EQ(worker_->slot(0).worker_sleeps, 1u);
}

// Who no longer waits costs nobody a call to the kernel.
TEST_F(MailboxBells, AWaitThatIsOverSleepsNoMore) {
  EXPECT_FALSE(AwaitAnswered(worker_->header(), worker_->slot(0), 1, absl::Milliseconds(30)));
  EXPECT_EQ(worker_->slot(0).worker_sleeps, 0u);
}

// Each side asks and answers by turns; what either sleeps through is lost time, never a post.
TEST_F(MailboxBells, NoPostAndNoAnswerIsMissed) {
  constexpr uint64_t kPosts = 3000;
  std::thread store([this] {
    for (uint64_t count = 1; count <= kPosts; ++count) {
      MailboxHeader& header = store_->header();
      while (store_->slot(0).posted.load() < count) {
        const uint32_t wake = header.wake.load();
        header.store_sleeps.store(1);
        if (store_->slot(0).posted.load() < count) {
          SharedFutexWait(header.wake, wake, absl::Seconds(10));
        }
        header.store_sleeps.store(0);
      }
      RingAnswered(store_->slot(0), count);
    }
  });
  const absl::Time begin = absl::Now();
  for (uint64_t count = 1; count <= kPosts; ++count) {
    RingPosted(worker_->header(), worker_->slot(0), count);
    if (AwaitAnswered(worker_->header(), worker_->slot(0), count, absl::Minutes(1))) continue;
    ADD_FAILURE() << "post " << count << " was not answered";
    RingPosted(worker_->header(), worker_->slot(0), kPosts);  // so that the other thread ends
    break;
  }
  store.join();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10)) << "a bell was not heard";
}

}  // namespace
}  // namespace headroom
