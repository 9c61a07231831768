// The worker's end of a mailbox on the CPU device: what it posts, what it waits for and takes.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/segment/mailbox.h"
#include "tests/unit/common/device/cpu_device_test_util.h"

namespace headroom {
namespace {

class CpuMailboxTest : public CpuDeviceTest {};

TEST_F(CpuMailboxTest, AwaitPartialsReturnsWhenTheDoorbellHasRung) {
  const EventId event = Must(device_->CreateEvent());
  OpAccount account;
  ASSERT_OK(device_->AwaitPartials(compute_, Await(5), &account));
  ASSERT_OK(device_->Record(compute_, event));
  Answer(4);
  EXPECT_TRUE(StaysPending(event));
  Answer(6);  // beyond it will do
  EXPECT_OK(device_->Synchronize(event, kSoon));
  EXPECT_EQ(words_.status, kernels::kAwaitOk);
  EXPECT_EQ(words_.header.retired, 0u);
  EXPECT_GT(account.busy_ns, 0);  // how much hangs on when the stream's thread got a processor
  EXPECT_EQ(account.bytes, 0);
}

TEST_F(CpuMailboxTest, AwaitPartialsGivesUpAndLaterWaitsReturnAtOnce) {
  const absl::Time begin = absl::Now();
  ASSERT_OK(device_->AwaitPartials(compute_, Await(5, absl::Milliseconds(20))));
  for (int i = 0; i < 100; ++i) {
    ASSERT_OK(device_->AwaitPartials(compute_, Await(5, absl::Minutes(10))));
  }
  kernels::AwaitPartialsArgs of_another_step = Await(5, absl::Minutes(10));
  of_another_step.status = &words_.other_status;
  ASSERT_OK(device_->AwaitPartials(compute_, of_another_step));
  Drain(compute_);
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(20));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(30));
  EXPECT_EQ(words_.status, kernels::kAwaitExpired) << "the first result stays";
  EXPECT_EQ(words_.other_status, kernels::kAwaitRetired);
  EXPECT_EQ(words_.header.retired, 1u);
  EXPECT_OK(device_->status());
}

TEST_F(CpuMailboxTest, RetiringAMailboxEndsAWaitThatHasBegun) {
  const EventId event = Must(device_->CreateEvent());
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1)));
  ASSERT_OK(device_->Record(compute_, event));
  EXPECT_TRUE(StaysPending(event));
  const absl::Time begin = absl::Now();
  words_.header.retired.store(1);
  EXPECT_OK(device_->Synchronize(event, kSoon));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(words_.status, kernels::kAwaitRetired);
}

TEST_F(CpuMailboxTest, ARetiredMailboxIsNotTakenAlthoughTheAnswerIsThere) {
  Answer(1);
  words_.header.retired.store(1);
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1)));
  Drain(compute_);
  EXPECT_EQ(words_.status, kernels::kAwaitRetired);
}

TEST_F(CpuMailboxTest, AStatusThatIsSetStays) {
  words_.status.store(77);
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1, absl::Milliseconds(1))));
  Drain(compute_);
  EXPECT_EQ(words_.status, 77u);
  EXPECT_EQ(words_.header.retired, 1u);
}

TEST_F(CpuMailboxTest, AwaitPartialsTakesOnlyTheAnswerToItsOwnQuestion) {
  const std::vector<std::pair<kernels::AwaitResult, std::function<void(MailboxAnswer&)>>> lies = {
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { ++a.generation; }},
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { --a.step; }},
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { a.step += uint64_t{1} << 32; }},
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { ++a.attempt; }},
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { ++a.layer; }},
      {kernels::kAwaitRefused, [](MailboxAnswer& a) { a.code = 3; }},
      {kernels::kAwaitMismatch, [](MailboxAnswer& a) { a.code = 3, ++a.layer; }},
  };
  for (size_t i = 0; i < lies.size(); ++i) {
    ResetMailbox();
    Answer(1, lies[i].second);
    ASSERT_OK(device_->AwaitPartials(compute_, Await(1)));
    Drain(compute_);
    EXPECT_EQ(words_.status, lies[i].first) << i;
    EXPECT_EQ(words_.header.retired, 1u) << i;
  }
  ResetMailbox();
  Answer(1);
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1)));
  Drain(compute_);
  EXPECT_EQ(words_.status, kernels::kAwaitOk);
  EXPECT_EQ(words_.header.retired, 0u);
}

TEST_F(CpuMailboxTest, AWaitThatSleepsEndsWithItsAnswer) {
  for (uint64_t round = 1; round <= 15; ++round) {
    const EventId event = Must(device_->CreateEvent());
    words_.slot.worker_sleeps.store(0);
    ASSERT_OK(device_->AwaitPartials(compute_, Await(round)));
    ASSERT_OK(device_->Record(compute_, event));
    while (words_.slot.worker_sleeps.load() == 0) std::this_thread::yield();
    absl::SleepFor(absl::Milliseconds(1));
    Answer(round);
    ASSERT_OK(device_->Synchronize(event, kSoon));
  }
  EXPECT_EQ(words_.status, kernels::kAwaitOk);
}

TEST_F(CpuMailboxTest, PostQueriesCopiesRowsThatLieApartAndNothingBesideThem) {
  auto* const q = reinterpret_cast<float*>(Must(device_->Allocate(4096, "q")));
  std::vector<float> values(4096 / sizeof(float));
  std::iota(values.begin(), values.end(), 1.0f);
  ASSERT_OK(device_->Upload(reinterpret_cast<uint8_t*>(q), values.data(), 4096));
  auto* const queries = reinterpret_cast<float*>(to_.data());
  kernels::PostQueriesArgs args;
  args.q = q;
  args.q_stride = 100;
  args.rows = 3;
  args.row_floats = 64;
  args.queries = queries;
  args.mailbox = &words_.header;
  args.slot = &words_.slot;
  args.post.step = 5;
  args.post.attempt = 7;
  args.post.layer = 11;
  args.post.table = 1;
  args.post.rows = 3;
  args.post.scale = 0.125f;
  args.count = 9;
  ASSERT_OK(device_->PostQueries(compute_, args));
  Drain(compute_);
  for (int64_t row = 0; row < 3; ++row) {
    EXPECT_TRUE(std::equal(queries + row * 64, queries + (row + 1) * 64,
                           values.begin() + row * 100));
  }
  EXPECT_EQ(to_[3 * 64], 0u);
  EXPECT_EQ(words_.slot.posted, 9u);
  EXPECT_EQ(std::memcmp(&words_.slot.post, &args.post, sizeof(args.post)), 0);
}

// Whoever sees the count sees the post and the queries that belong to it, and answers by them.
TEST_F(CpuMailboxTest, APostIsWholeBeforeItIsCounted) {
  constexpr uint64_t kPosts = 300;
  constexpr int64_t kFloats = 512;
  auto* const q = reinterpret_cast<float*>(Must(device_->Allocate(kFloats * 4, "q")));
  auto* const queries = reinterpret_cast<float*>(to_.data());
  std::thread store([&] {
    for (uint64_t count = 1; count <= kPosts; ++count) {
      while (words_.slot.posted.load(std::memory_order_acquire) != count) {
        if (words_.header.retired.load() != 0) return;  // the device has given up
        std::this_thread::yield();
      }
      MailboxAnswer answer = {};
      answer.generation = 3;
      answer.step = words_.slot.post.step;
      answer.attempt = 7;
      answer.layer = words_.slot.post.layer;
      for (int64_t i = 0; i < kFloats; ++i) {
        answer.code += queries[i] != static_cast<float>(count + i);
      }
      words_.slot.answer = answer;
      RingAnswered(words_.slot, count);
    }
  });
  std::vector<float> rows(kPosts * kFloats);
  for (uint64_t count = 1; count <= kPosts; ++count) {
    float* const row = &rows[(count - 1) * kFloats];
    for (int64_t i = 0; i < kFloats; ++i) row[i] = static_cast<float>(count + i);
  }
  EXPECT_OK(device_->RegisterHost(rows.data(), static_cast<int64_t>(rows.size()) * 4));
  for (uint64_t count = 1; count <= kPosts; ++count) {
    EXPECT_OK(device_->Copy(compute_, Plain(q, &rows[(count - 1) * kFloats], kFloats * 4)));
    kernels::PostQueriesArgs post;
    post.q = q;
    post.q_stride = post.row_floats = kFloats;
    post.rows = 1;
    post.queries = queries;
    post.mailbox = &words_.header;
    post.slot = &words_.slot;
    post.post.step = 1000 + count;
    post.post.layer = static_cast<uint32_t>(count);
    post.count = count;
    EXPECT_OK(device_->PostQueries(compute_, post));
    kernels::AwaitPartialsArgs await = Await(count);
    await.step = 1000 + count;
    await.layer = static_cast<uint32_t>(count);
    EXPECT_OK(device_->AwaitPartials(compute_, await));
  }
  Drain(compute_);
  EXPECT_EQ(words_.status, kernels::kAwaitOk);
  store.join();
}

TEST_F(CpuMailboxTest, APostRingsForAStoreThatSleeps) {
  auto* const q = reinterpret_cast<float*>(Must(device_->Allocate(256, "q")));
  kernels::PostQueriesArgs args;
  args.q = q;
  args.q_stride = args.row_floats = 64;
  args.rows = 1;
  args.queries = reinterpret_cast<float*>(to_.data());
  args.mailbox = &words_.header;
  args.slot = &words_.slot;
  args.count = 1;
  ASSERT_OK(device_->PostQueries(compute_, args));
  Drain(compute_);
  EXPECT_EQ(words_.header.wake, 1u);
  words_.header.store_sleeps.store(1);
  args.count = 2;
  ASSERT_OK(device_->PostQueries(compute_, args));
  Drain(compute_);
  EXPECT_EQ(words_.header.wake, 2u);
}

TEST_F(CpuMailboxTest, NothingIsPostedToARetiredMailbox) {
  auto* const q = reinterpret_cast<float*>(Must(device_->Allocate(256, "q")));
  const float one = 1;
  ASSERT_OK(device_->Upload(reinterpret_cast<uint8_t*>(q), &one, sizeof(one)));
  kernels::PostQueriesArgs args;
  args.q = q;
  args.q_stride = args.row_floats = 64;
  args.rows = 1;
  args.queries = reinterpret_cast<float*>(to_.data());
  args.mailbox = &words_.header;
  args.slot = &words_.slot;
  args.post.step = 5;
  args.count = 1;
  words_.header.retired.store(1);
  ASSERT_OK(device_->PostQueries(compute_, args));
  Drain(compute_);
  EXPECT_EQ(words_.slot.posted, 0u);
  EXPECT_EQ(words_.slot.post.step, 0u);
  EXPECT_EQ(to_[0], 0u) << "a late store may be reading them";
}

std::string HexOf(const void* address) {
  return absl::StrCat(absl::Hex(reinterpret_cast<uintptr_t>(address)));
}

TEST_F(CpuMailboxTest, MailboxOperationsNameTheMemoryThatIsNotRegistered) {
  constexpr absl::StatusCode kRefused = absl::StatusCode::kInternal;
  float* const q = reinterpret_cast<float*>(Must(device_->Allocate(1024, "q")));
  float* const queries = reinterpret_cast<float*>(to_.data());
  MailboxHeader header = {};
  MailboxSlot slot = {};
  std::atomic<uint32_t> status{0};
  const auto await = [&](auto change) {
    kernels::AwaitPartialsArgs args = Await(1);
    change(args);
    return device_->AwaitPartials(compute_, args);
  };
  EXPECT_TRUE(Says(await([&](auto& a) { a.mailbox = &header; }), kRefused, HexOf(&header)));
  EXPECT_TRUE(Says(await([&](auto& a) { a.slot = &slot; }), kRefused, HexOf(&slot)));
  EXPECT_TRUE(Says(await([&](auto& a) { a.status = &status; }), kRefused, HexOf(&status)));
  EXPECT_TRUE(Says(await([&](auto& a) { a.mailbox = nullptr; }), kRefused, "AwaitPartials"));
  EXPECT_TRUE(Says(await([&](auto& a) { a.slot = nullptr; }), kRefused, "AwaitPartials"));
  EXPECT_TRUE(Says(await([&](auto& a) { a.status = nullptr; }), kRefused, "AwaitPartials"));

  const auto post = [&](auto change) {
    kernels::PostQueriesArgs args;
    args.q = q;
    args.q_stride = args.row_floats = 64;
    args.rows = 4;
    args.queries = queries;
    args.mailbox = &words_.header;
    args.slot = &words_.slot;
    args.count = 1;
    change(args);
    return device_->PostQueries(compute_, args);
  };
  std::vector<float> stranger(256);
  EXPECT_TRUE(Says(post([&](auto& a) { a.q = stranger.data(); }), kRefused,
                   HexOf(stranger.data())));
  EXPECT_TRUE(Says(post([&](auto& a) { a.q = queries; }), kRefused, HexOf(queries)))
      << "queries come from the arena";
  EXPECT_TRUE(Says(post([&](auto& a) { a.queries = stranger.data(); }), kRefused,
                   HexOf(stranger.data())));
  EXPECT_TRUE(Says(post([&](auto& a) { a.queries = q; }), kRefused, HexOf(q)))
      << "and go to the host";
  EXPECT_TRUE(Says(post([&](auto& a) { a.queries = queries + kHostBytes / 4 - 255; }), kRefused,
                   "PostQueries")) << "a float too far";
  EXPECT_TRUE(Says(post([&](auto& a) { a.mailbox = &header; }), kRefused, HexOf(&header)));
  EXPECT_TRUE(Says(post([&](auto& a) { a.slot = &slot; }), kRefused, HexOf(&slot)));
  EXPECT_TRUE(Says(post([&](auto& a) { a.q_stride = 63; }), kRefused, "63 apart"));
  EXPECT_TRUE(Says(post([&](auto& a) { a.rows = -1; }), kRefused, "-1 rows"));
  EXPECT_TRUE(Says(post([&](auto& a) { a.row_floats = -1; }), kRefused, "-1 floats"));
  Drain(compute_);
  EXPECT_EQ(words_.slot.posted, 0u);
  EXPECT_OK(post([](auto&) {}));
  Drain(compute_);
  EXPECT_EQ(words_.slot.posted, 1u);
}

TEST_F(CpuMailboxTest, MergePartialsReadsPartialsWhereTheyLie) {
  constexpr int32_t kHeadDim = 64;
  const int64_t state_bytes = kernels::AttentionStateFloats(kHeadDim) * 4;
  uint8_t* const state = Must(device_->Allocate(state_bytes, "state"));
  uint8_t* const out = Must(device_->Allocate(kHeadDim * 4, "out"));
  uint8_t* const table = Must(device_->Allocate(sizeof(kernels::MergeItem), "table"));
  // The finished part holds l = 2 and o = 6 everywhere, the open one nothing.
  auto* const partials = reinterpret_cast<float*>(to_.data());
  std::fill_n(partials, kHeadDim, 6.0f);
  partials[kHeadDim + 1] = 2;
  kernels::MergeItem item;
  item.row_count = item.kv_head_end = item.reset = item.finish = 1;
  ASSERT_OK(device_->Upload(table, &item, sizeof(item)));
  kernels::MergePartialsArgs args;
  args.partials = partials;
  args.state = reinterpret_cast<float*>(state);
  args.out = reinterpret_cast<float*>(out);
  args.rows = 1;
  args.items = {reinterpret_cast<kernels::MergeItem*>(table), &item, 1};
  args.num_q_heads = args.num_kv_heads = 1;
  args.head_dim = kHeadDim;
  ASSERT_OK(device_->MergePartials(compute_, args));
  ASSERT_OK(device_->Copy(compute_, Plain(from_.data(), out, kHeadDim * 4)));
  Drain(compute_);
  for (int i = 0; i < kHeadDim; ++i) {
    EXPECT_EQ(reinterpret_cast<const float*>(from_.data())[i], 3.0f);
  }
  std::vector<float> stranger(state_bytes / 4);
  args.partials = stranger.data();
  EXPECT_TRUE(Says(device_->MergePartials(compute_, args), absl::StatusCode::kInternal,
                   HexOf(stranger.data())));
}

}  // namespace
}  // namespace headroom
