#include "services/coordinator/tokenizer_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/mutex.h"

namespace headroom::coordinator {
namespace {

constexpr int64_t kLong = TokenizerPool::kLongBytes + 1;

// Work that waits to be let go.
class Gate {
 public:
  void Open() {
    MutexLock lock(&mutex_);
    open_ = true;
    changed_.SignalAll();
  }
  void Pass() {
    MutexLock lock(&mutex_);
    ++arrived_;
    changed_.SignalAll();
    while (!open_) changed_.Wait(&mutex_);
  }
  void AwaitArrivals(int count) {
    MutexLock lock(&mutex_);
    while (arrived_ < count) changed_.Wait(&mutex_);
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  bool open_ = false;
  int arrived_ = 0;
};

TEST(TokenizerPool, ShortTextsDoNotWaitForLongOnes) {
  for (const int threads : {2, 4}) {
    Gate long_ones, short_ones;
    TokenizerPool pool(threads);
    for (int i = 0; i < 3; ++i) {
      ASSERT_TRUE(pool.Run(kLong, [&] { long_ones.Pass(); }).ok());
    }
    long_ones.AwaitArrivals(1);
    for (int i = 0; i < 8; ++i) ASSERT_TRUE(pool.Run(1, [&] { short_ones.Pass(); }).ok());
    short_ones.AwaitArrivals(threads - 1);
    short_ones.Open();
    short_ones.AwaitArrivals(8);
    long_ones.Open();
    long_ones.AwaitArrivals(3);
  }
}

// Their memory is that of one.
TEST(TokenizerPool, OneLongTextIsInWorkAtATime) {
  std::atomic<int> in_work{0}, most{0};
  {
    TokenizerPool pool(4);
    for (int i = 0; i < 20; ++i) {
      ASSERT_TRUE(pool.Run(kLong, [&] {
                        most.store(std::max(most.load(), ++in_work));
                        absl::SleepFor(absl::Milliseconds(1));
                        --in_work;
                      }).ok());
    }
  }
  EXPECT_EQ(most.load(), 1);
}

TEST(TokenizerPool, RunsWhatItHasTakenBeforeItEnds) {
  std::atomic<int> done{0};
  {
    TokenizerPool pool(2);
    for (int i = 0; i < 100; ++i) {
      ASSERT_TRUE(pool.Run(i % 2 == 0 ? 1 : kLong, [&] { ++done; }).ok());
    }
  }
  EXPECT_EQ(done.load(), 100);
}

TEST(TokenizerPool, RefusesMoreThanMayWait) {
  Gate gate, last;
  TokenizerPool pool(2);
  const auto pass = [&] { gate.Pass(); };
  ASSERT_TRUE(pool.Run(TokenizerPool::kMaxBytes, pass).ok());
  const absl::Status busy = pool.Run(1, pass);
  EXPECT_EQ(busy.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(busy), "TOKENIZER_BUSY");
  EXPECT_TRUE(RetryAfterOf(busy).has_value());
  for (int64_t i = 1; i < TokenizerPool::kMaxCalls; ++i) ASSERT_TRUE(pool.Run(0, pass).ok());
  EXPECT_EQ(ReasonOf(pool.Run(0, pass)), "TOKENIZER_BUSY");
  gate.Open();
  gate.AwaitArrivals(TokenizerPool::kMaxCalls);
  // Alone, none is too long.
  for (bool taken = false; !taken;) {
    taken = pool.Run(TokenizerPool::kMaxBytes + 1, [&] { last.Pass(); }).ok();
  }
  EXPECT_EQ(ReasonOf(pool.Run(1, pass)), "TOKENIZER_BUSY");
  last.Open();
}

}  // namespace
}  // namespace headroom::coordinator
