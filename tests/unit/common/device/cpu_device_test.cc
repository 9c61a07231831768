#include "common/device/cpu/cpu_device.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/segment/mailbox.h"

namespace headroom {
namespace {

constexpr int64_t kArenaBytes = 1 << 20;
constexpr int64_t kHostBytes = 64 << 10;
constexpr absl::Duration kSoon = absl::Seconds(60);

#define ASSERT_OK(expression)                                \
  do {                                                       \
    const absl::Status assert_ok_status = (expression);      \
    ASSERT_TRUE(assert_ok_status.ok()) << assert_ok_status;  \
  } while (false)
#define EXPECT_OK(expression)                                \
  do {                                                       \
    const absl::Status expect_ok_status = (expression);      \
    EXPECT_TRUE(expect_ok_status.ok()) << expect_ok_status;  \
  } while (false)

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    ADD_FAILURE() << value.status();
    std::abort();
  }
  return *std::move(value);
}

CopyArgs Plain(void* dst, const void* src, int64_t bytes) {
  return {.dst = dst, .dst_pitch_bytes = bytes, .src = src, .src_pitch_bytes = bytes,
          .width_bytes = bytes};
}

bool Says(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  return status.code() == code && std::string(status.message()).find(part) != std::string::npos;
}

std::unique_ptr<Device> MakeDevice(int64_t arena_bytes = kArenaBytes,
                                   std::optional<uint64_t> delay_seed = std::nullopt) {
  CpuDeviceOptions options;
  options.arena_bytes = arena_bytes;
  options.compute_threads = 2;
  options.delay_seed = delay_seed;
  return Must(CreateCpuDevice(options));
}

// A device with two streams and registered host memory: numbers 0, 1, 2 ... to copy from, zeros to
// copy to, a mailbox, and another one whose answer holds a stream back until it comes.
class CpuDeviceTest : public testing::Test {
 protected:
  CpuDeviceTest() : device_(MakeDevice()) {
    std::iota(from_.begin(), from_.end(), uint32_t{0});
    EXPECT_OK(device_->RegisterHost(from_.data(), kHostBytes));
    EXPECT_OK(device_->RegisterHost(to_.data(), kHostBytes));
    EXPECT_OK(device_->RegisterHost(&words_, sizeof(words_)));
    compute_ = Must(device_->CreateStream("compute"));
    copy_ = Must(device_->CreateStream("copy"));
  }
  ~CpuDeviceTest() override { Open(); }

  // Later work of `stream` waits for Open().
  void HoldBack(StreamId stream) {
    ASSERT_OK(device_->AwaitPartials(stream, {.mailbox = &words_.gate_header,
                                              .slot = &words_.gate,
                                              .count = 1,
                                              .deadline_us = absl::ToInt64Microseconds(kSoon),
                                              .status = &words_.gate_status}));
  }
  void Open() { RingAnswered(words_.gate, 1); }

  // Records an event at the end of `stream` and waits for it.
  void Drain(StreamId stream) {
    const EventId event = Must(device_->CreateEvent());
    ASSERT_OK(device_->Record(stream, event));
    ASSERT_OK(device_->Synchronize(event, kSoon));
  }
  // Whether the event fires in a time in which an unordered one would have.
  bool StaysPending(EventId event) {
    absl::SleepFor(absl::Milliseconds(30));
    return !device_->Done(event);
  }

  // A wait for `count` answers, of which the last must bear the tag that Answer() gives it.
  kernels::AwaitPartialsArgs Await(uint64_t count, absl::Duration deadline = kSoon) {
    kernels::AwaitPartialsArgs args;
    args.mailbox = &words_.header;
    args.slot = &words_.slot;
    args.count = count;
    args.generation = 3;
    args.step = 5;
    args.attempt = 7;
    args.layer = 11;
    args.deadline_us = absl::ToInt64Microseconds(deadline);
    args.status = &words_.status;
    return args;
  }
  // As a store answers; `lie` changes what the answer says.
  void Answer(uint64_t count, const std::function<void(MailboxAnswer&)>& lie = nullptr) {
    MailboxAnswer answer = {};
    answer.generation = 3;
    answer.step = 5;
    answer.attempt = 7;
    answer.layer = 11;
    if (lie) lie(answer);
    words_.slot.answer = answer;
    RingAnswered(words_.slot, count);
  }
  // A mailbox as it is when it has been made.
  void ResetMailbox() {
    words_.slot.posted.store(0);
    words_.slot.answered.store(0);
    words_.header.retired.store(0);
    words_.status.store(0);
  }

  struct Words {
    MailboxHeader gate_header = {};
    MailboxSlot gate = {};
    MailboxHeader header = {};
    MailboxSlot slot = {};
    std::atomic<uint32_t> gate_status{0};
    std::atomic<uint32_t> status{0};
    std::atomic<uint32_t> other_status{0};
  };
  Words words_;
  std::vector<uint32_t> from_ = std::vector<uint32_t>(kHostBytes / sizeof(uint32_t));
  std::vector<uint32_t> to_ = std::vector<uint32_t>(kHostBytes / sizeof(uint32_t));
  std::unique_ptr<Device> device_;
  StreamId compute_;
  StreamId copy_;
};

// ---------------------------------------------------------------- streams and events

TEST_F(CpuDeviceTest, OperationsOfAStreamRunInOrder) {
  uint8_t* const a = Must(device_->Allocate(4096, "a"));
  // Each copy overwrites what the one before it wrote, and one more place reads it.
  for (int i = 0; i < 300; ++i) {
    ASSERT_OK(device_->Copy(copy_, Plain(a, &from_[i], sizeof(uint32_t))));
    ASSERT_OK(device_->Copy(copy_, Plain(&to_[i], a, sizeof(uint32_t))));
  }
  Drain(copy_);
  for (uint32_t i = 0; i < 300; ++i) EXPECT_EQ(to_[i], i);
}

TEST_F(CpuDeviceTest, AnEventHoldsAnotherStreamBack) {
  uint8_t* const a = Must(device_->Allocate(4096, "a"));
  const EventId filled = Must(device_->CreateEvent());
  const EventId read = Must(device_->CreateEvent());
  HoldBack(copy_);
  ASSERT_OK(device_->Copy(copy_, Plain(a, from_.data() + 7, 4096)));
  ASSERT_OK(device_->Record(copy_, filled));
  ASSERT_OK(device_->Wait(compute_, filled));
  ASSERT_OK(device_->Copy(compute_, Plain(to_.data(), a, 4096)));
  ASSERT_OK(device_->Record(compute_, read));
  EXPECT_TRUE(StaysPending(read));
  EXPECT_FALSE(device_->Done(filled));
  Open();
  ASSERT_OK(device_->Synchronize(read, kSoon));
  EXPECT_TRUE(device_->Done(filled));
  EXPECT_EQ(std::memcmp(to_.data(), from_.data() + 7, 4096), 0);
}

TEST_F(CpuDeviceTest, WaitMeansTheLatestRecordBeforeIt) {
  const EventId event = Must(device_->CreateEvent());
  const EventId early = Must(device_->CreateEvent());
  const EventId late = Must(device_->CreateEvent());
  ASSERT_OK(device_->Record(copy_, event));
  ASSERT_OK(device_->Wait(compute_, event));
  ASSERT_OK(device_->Record(compute_, early));
  HoldBack(copy_);
  ASSERT_OK(device_->Record(copy_, event));
  EXPECT_OK(device_->Synchronize(early, kSoon));
  ASSERT_OK(device_->Wait(compute_, event));
  ASSERT_OK(device_->Record(compute_, late));
  EXPECT_TRUE(StaysPending(late));
  Open();
  EXPECT_OK(device_->Synchronize(late, kSoon));
}

TEST_F(CpuDeviceTest, AnEventThatWasNeverRecordedDoesNotBlock) {
  const EventId event = Must(device_->CreateEvent());
  EXPECT_TRUE(device_->Done(event));
  EXPECT_OK(device_->Synchronize(event, absl::ZeroDuration()));
  ASSERT_OK(device_->Wait(compute_, event));
  Drain(compute_);
}

TEST_F(CpuDeviceTest, AnEventBelongsToOneStream) {
  const EventId event = Must(device_->CreateEvent());
  ASSERT_OK(device_->Record(copy_, event));
  EXPECT_TRUE(Says(device_->Record(compute_, event), absl::StatusCode::kInternal, "two streams"));
}

TEST_F(CpuDeviceTest, SynchronizeGivesUpAtItsTimeout) {
  const EventId event = Must(device_->CreateEvent());
  HoldBack(copy_);
  ASSERT_OK(device_->Record(copy_, event));
  EXPECT_FALSE(device_->Done(event));
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(absl::IsDeadlineExceeded(device_->Synchronize(event, absl::Milliseconds(20))));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(20));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(20));
  Open();
  EXPECT_OK(device_->Synchronize(event, kSoon));
  EXPECT_TRUE(device_->Done(event));
}

TEST_F(CpuDeviceTest, StreamsAreNumbered) {
  absl::Status status;
  int made = 2;
  while (status.ok() && made < 1000) {
    status = device_->CreateStream("more").status();
    made += status.ok();
  }
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_GE(made, 8);
}

// ---------------------------------------------------------------- copies

TEST_F(CpuDeviceTest, CopiesARectangleAndNothingBesideIt) {
  uint8_t* const a = Must(device_->Allocate(1024, "a"));
  // 5 rows of 12 bytes, 32 apart in the source, 20 apart in the arena, 16 apart in the end.
  CopyArgs in = {.dst = a + 4, .dst_pitch_bytes = 20, .src = from_.data(), .src_pitch_bytes = 32,
                 .width_bytes = 12, .height = 5};
  CopyArgs out = {.dst = to_.data() + 1, .dst_pitch_bytes = 16, .src = a + 4,
                  .src_pitch_bytes = 20, .width_bytes = 12, .height = 5};
  ASSERT_OK(device_->Copy(copy_, in));
  ASSERT_OK(device_->Copy(copy_, out));
  Drain(copy_);
  for (uint32_t row = 0; row < 5; ++row) {
    for (uint32_t i = 0; i < 3; ++i) EXPECT_EQ(to_[1 + 4 * row + i], 8 * row + i);
    EXPECT_EQ(to_[4 * row], 0u);
  }
  EXPECT_EQ(to_[20], 0u);
}

TEST_F(CpuDeviceTest, AccountsCountBytesAndTime) {
  uint8_t* const a = Must(device_->Allocate(8192, "a"));
  OpAccount account;
  CopyArgs rectangle = Plain(a, from_.data(), 100);
  rectangle.height = 7;
  rectangle.src_pitch_bytes = 128;
  rectangle.dst_pitch_bytes = 256;
  ASSERT_OK(device_->Copy(copy_, rectangle, &account));
  ASSERT_OK(device_->Copy(copy_, Plain(a, from_.data(), 8192), &account));
  Drain(copy_);
  EXPECT_EQ(account.bytes, 700 + 8192);
  EXPECT_GT(account.busy_ns, 0);
}

TEST_F(CpuDeviceTest, AccountsCountTheTimeAStreamWaited) {
  const EventId event = Must(device_->CreateEvent());
  OpAccount account;
  HoldBack(copy_);
  ASSERT_OK(device_->Record(copy_, event));
  ASSERT_OK(device_->Wait(compute_, event, &account));
  absl::SleepFor(absl::Milliseconds(50));
  Open();
  Drain(compute_);
  EXPECT_GE(account.busy_ns, 20'000'000);
  EXPECT_EQ(account.bytes, 0);
}

TEST_F(CpuDeviceTest, SealingCountsTheKeysAndValuesItMoved) {
  constexpr int32_t kHeadDim = 64;
  uint8_t* const tail = Must(device_->Allocate(KvLayout{256, kHeadDim}.BytesFor(2), "tail"));
  uint8_t* const table = Must(device_->Allocate(sizeof(kernels::CopyKvItem), "table"));
  ASSERT_OK(device_->Upload(tail, from_.data(), KvLayout{16, kHeadDim}.BytesFor(1)));
  kernels::CopyKvItem item;
  item.from = {.base = tail, .first_pos = 0, .count = 16, .capacity = 256, .kv_head_end = 2};
  item.to = {.base = reinterpret_cast<uint8_t*>(to_.data()), .first_pos = 0, .count = 16,
             .capacity = 64, .kv_head_end = 2};
  ASSERT_OK(device_->Upload(table, &item, sizeof(item)));
  OpAccount account;
  kernels::CopyKvRowsArgs args;
  args.items = {reinterpret_cast<kernels::CopyKvItem*>(table), &item, 1};
  args.head_dim = kHeadDim;
  ASSERT_OK(device_->CopyKvRows(compute_, args, &account));
  Drain(compute_);
  EXPECT_EQ(account.bytes, 16 * 2 * 2 * kHeadDim * 2);
  EXPECT_EQ(std::memcmp(to_.data(), from_.data(), 16 * kHeadDim * 2), 0);
}

// ---------------------------------------------------------------- what a launch refuses

TEST_F(CpuDeviceTest, CopiesTakeOnlyTheArenaAndRegisteredMemory) {
  uint8_t* const a = Must(device_->Allocate(kArenaBytes, "all of it"));
  std::vector<uint8_t> stranger(4096);
  const auto refused = [&](const CopyArgs& args) {
    return Says(device_->Copy(copy_, args), absl::StatusCode::kInternal, "Copy");
  };
  EXPECT_TRUE(refused(Plain(a, stranger.data(), 64)));
  EXPECT_TRUE(refused(Plain(stranger.data(), a, 64)));
  EXPECT_TRUE(refused(Plain(a, nullptr, 64)));
  EXPECT_TRUE(refused(Plain(to_.data(), from_.data(), 64))) << "neither side in the arena";
  EXPECT_TRUE(refused(Plain(a + kArenaBytes - 63, from_.data(), 64))) << "a byte too far";
  EXPECT_TRUE(refused(Plain(a - 1, from_.data(), 64)));
  EXPECT_TRUE(refused(Plain(a, reinterpret_cast<uint8_t*>(from_.data()) + kHostBytes - 63, 64)));
  EXPECT_TRUE(refused(Plain(a, from_.data(), -64)));
  EXPECT_TRUE(refused(Plain(a, from_.data(), INT64_MAX)));
  CopyArgs rows = Plain(a, from_.data(), 64);
  rows.height = -1;
  EXPECT_TRUE(refused(rows));
  rows.height = INT64_MAX;
  EXPECT_TRUE(refused(rows));
  rows.height = kHostBytes / 64 + 1;
  EXPECT_TRUE(refused(rows)) << "the last row is outside";
  rows.height = 2;
  rows.dst_pitch_bytes = 63;
  EXPECT_TRUE(refused(rows)) << "rows that overlap";
  EXPECT_OK(device_->Copy(copy_, Plain(a + kArenaBytes - 64, from_.data(), 64)));
  EXPECT_OK(device_->Copy(copy_, Plain(nullptr, nullptr, 0)));
  Drain(copy_);
}

TEST_F(CpuDeviceTest, ARectangleMustLieInOneRegisteredRange) {
  uint8_t* const a = Must(device_->Allocate(8192, "a"));
  std::vector<uint8_t> memory(8192);
  ASSERT_OK(device_->RegisterHost(memory.data(), 4096));
  ASSERT_OK(device_->RegisterHost(memory.data() + 4096, 4096));
  CopyArgs rows = {.dst = a, .dst_pitch_bytes = 64, .src = memory.data(), .src_pitch_bytes = 4096,
                   .width_bytes = 64, .height = 2};
  EXPECT_TRUE(Says(device_->Copy(copy_, rows), absl::StatusCode::kInternal, "Copy"));
}

TEST_F(CpuDeviceTest, OperationsTakeOnlyTheArena) {
  float* const a = reinterpret_cast<float*>(Must(device_->Allocate(kArenaBytes, "all of it")));
  const auto* const weight = reinterpret_cast<const kernels::BFloat16*>(a);
  auto* const host = reinterpret_cast<float*>(to_.data());  // registered, and still not allowed
  const kernels::SwiGluArgs swiglu = {.gate_up = a, .out = host, .rows = 1, .width = 4};
  EXPECT_TRUE(Says(device_->SwiGlu(compute_, swiglu), absl::StatusCode::kInternal, "SwiGlu"));
  kernels::RmsNormArgs norm;
  norm.x = host;
  norm.x_rows = norm.rows = 1;
  norm.weight = weight;
  norm.out = a;
  norm.hidden = 8;
  EXPECT_TRUE(Says(device_->RmsNorm(compute_, norm), absl::StatusCode::kInternal, "RmsNorm"));
  norm.x = a;
  EXPECT_OK(device_->RmsNorm(compute_, norm));
  norm.hidden = kArenaBytes;
  EXPECT_TRUE(Says(device_->RmsNorm(compute_, norm), absl::StatusCode::kInternal, "RmsNorm"));
  Drain(compute_);
}

TEST_F(CpuDeviceTest, WeightsAndUploadsStayInsideTheirPlace) {
  uint8_t* const packed = Must(device_->Allocate(kArenaBytes, "all of it"));
  const std::vector<kernels::BFloat16> rows(16 * 32);
  EXPECT_OK(device_->LoadWeightRows(rows.data(), 0, 16, 16, 32, packed));
  for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{1, 16}, {-1, 2}, {0, -1}, {17, 0}}) {
    EXPECT_TRUE(Says(device_->LoadWeightRows(rows.data(), begin, count, 16, 32, packed),
                     absl::StatusCode::kInternal, "LoadWeightRows"));
  }
  EXPECT_TRUE(Says(device_->LoadWeightRows(rows.data(), 0, 16, 16, 32, packed + kArenaBytes - 64),
                   absl::StatusCode::kInternal, "LoadWeightRows"));
  EXPECT_TRUE(Says(device_->Upload(packed + kArenaBytes - 4, from_.data(), 8),
                   absl::StatusCode::kInternal, "Upload"));
}

// ---------------------------------------------------------------- memory

TEST_F(CpuDeviceTest, TheArenaSaysWhatDidNotFit) {
  uint8_t* const a = Must(device_->Allocate(1000, "weights"));
  uint8_t* const b = Must(device_->Allocate(1, "tails"));
  EXPECT_EQ(reinterpret_cast<uintptr_t>(a) % 256, 0u);
  EXPECT_EQ(b - a, 1024);
  EXPECT_TRUE(std::all_of(a, a + 1000, [](uint8_t byte) { return byte == 0; }));
  EXPECT_EQ(device_->arena_use().used_bytes, 1280);
  EXPECT_EQ(device_->arena_use().high_water_bytes, 1280);
  EXPECT_EQ(device_->arena_use().capacity_bytes, kArenaBytes);
  for (const int64_t bytes : {kArenaBytes, INT64_MAX, int64_t{-1}}) {
    const absl::Status status = device_->Allocate(bytes, "staging ring").status();
    EXPECT_TRUE(Says(status, absl::StatusCode::kResourceExhausted, "staging ring")) << status;
    EXPECT_TRUE(Says(status, absl::StatusCode::kResourceExhausted, std::to_string(bytes)));
    EXPECT_TRUE(
        Says(status, absl::StatusCode::kResourceExhausted, std::to_string(kArenaBytes - 1280)));
  }
  EXPECT_EQ(device_->arena_use().used_bytes, 1280);
  EXPECT_TRUE(device_->Allocate(kArenaBytes - 1280, "the rest").ok());
}

TEST(CpuDevice, AnArenaThatCannotBeMappedIsAnError) {
  for (const int64_t bytes : {int64_t{1} << 60, int64_t{0}, int64_t{-1}}) {
    CpuDeviceOptions options;
    options.arena_bytes = bytes;
    const absl::Status status = CreateCpuDevice(options).status();
    EXPECT_TRUE(Says(status, absl::StatusCode::kResourceExhausted, std::to_string(bytes)));
  }
}

TEST_F(CpuDeviceTest, AHostRangeIsRegisteredOnce) {
  auto* const begin = reinterpret_cast<uint8_t*>(from_.data());
  EXPECT_TRUE(absl::IsAlreadyExists(device_->RegisterHost(begin, kHostBytes)));
  EXPECT_TRUE(absl::IsAlreadyExists(device_->RegisterHost(begin + kHostBytes - 1, 1)));
  EXPECT_TRUE(absl::IsAlreadyExists(device_->RegisterHost(begin + 100, 100)));
  EXPECT_TRUE(absl::IsInvalidArgument(device_->RegisterHost(nullptr, 100)));
  std::vector<uint8_t> other(100);
  EXPECT_TRUE(absl::IsInvalidArgument(device_->RegisterHost(other.data(), 0)));
  EXPECT_TRUE(absl::IsNotFound(device_->UnregisterHost(other.data())));
  EXPECT_TRUE(absl::IsNotFound(device_->UnregisterHost(begin + 4))) << "not where it begins";
  uint8_t* const a = Must(device_->Allocate(64, "a"));
  EXPECT_OK(device_->UnregisterHost(begin));
  EXPECT_TRUE(absl::IsNotFound(device_->UnregisterHost(begin)));
  EXPECT_TRUE(absl::IsInternal(device_->Copy(copy_, Plain(a, begin, 64))));
  EXPECT_OK(device_->RegisterHost(begin, kHostBytes));
  EXPECT_OK(device_->Copy(copy_, Plain(a, begin, 64)));
  Drain(copy_);
}

// ---------------------------------------------------------------- record and replay

TEST_F(CpuDeviceTest, AReplayRunsWhatWasRecordedAndAccountsForIt) {
  uint8_t* const a = Must(device_->Allocate(64, "a"));
  OpAccount account;
  ASSERT_OK(device_->BeginRecording(copy_));
  ASSERT_OK(device_->Copy(copy_, Plain(a, from_.data() + 5, 64), &account));
  ASSERT_OK(device_->Copy(copy_, Plain(to_.data(), a, 64)));
  const RecordingId recording = Must(device_->EndRecording(copy_));
  Drain(copy_);
  EXPECT_EQ(to_[0], 0u) << "recorded, not run";
  EXPECT_EQ(account.bytes, 0);
  for (uint32_t round = 1; round <= 3; ++round) {
    from_[5] = 100 * round;
    ASSERT_OK(device_->Replay(copy_, recording));
    Drain(copy_);
    EXPECT_EQ(to_[0], 100 * round);
    EXPECT_EQ(to_[1], 6u);
    EXPECT_EQ(account.bytes, 64 * round);
    EXPECT_GT(account.busy_ns, 0);
    account.busy_ns = 0;
  }
}

TEST_F(CpuDeviceTest, RecordingRefusesWhatACaptureRefuses) {
  constexpr absl::StatusCode kRefused = absl::StatusCode::kFailedPrecondition;
  uint8_t* const a = Must(device_->Allocate(64, "a"));
  const EventId outside = Must(device_->CreateEvent());
  const EventId inside = Must(device_->CreateEvent());
  std::vector<uint8_t> stranger(64);
  EXPECT_EQ(device_->EndRecording(copy_).status().code(), kRefused);
  ASSERT_OK(device_->Record(compute_, outside));
  ASSERT_OK(device_->BeginRecording(copy_));
  const RecordingId empty = Must(device_->EndRecording(copy_));
  ASSERT_OK(device_->BeginRecording(copy_));
  EXPECT_EQ(device_->BeginRecording(copy_).code(), kRefused);
  EXPECT_EQ(device_->Synchronize(outside, kSoon).code(), kRefused);
  EXPECT_EQ(device_->Wait(copy_, outside).code(), kRefused);
  EXPECT_EQ(device_->Copy(copy_, Plain(a, stranger.data(), 64)).code(), kRefused);
  EXPECT_EQ(device_->Replay(copy_, empty).code(), kRefused);
  ASSERT_OK(device_->Record(copy_, inside));
  EXPECT_OK(device_->Wait(copy_, inside));
  const RecordingId recording = Must(device_->EndRecording(copy_));
  // What was refused is not in it, and the device goes on.
  ASSERT_OK(device_->Replay(copy_, recording));
  Drain(copy_);
  EXPECT_OK(device_->Synchronize(outside, kSoon));
  EXPECT_TRUE(Says(device_->Replay(copy_, RecordingId{99}), absl::StatusCode::kInternal, "99"));
}

TEST_F(CpuDeviceTest, AnEventOfARecordingOrdersNothingOutside) {
  const EventId event = Must(device_->CreateEvent());
  ASSERT_OK(device_->BeginRecording(copy_));
  ASSERT_OK(device_->Record(copy_, event));
  const RecordingId recording = Must(device_->EndRecording(copy_));
  ASSERT_OK(device_->Replay(copy_, recording));
  EXPECT_TRUE(absl::IsFailedPrecondition(device_->Wait(compute_, event)));
  EXPECT_TRUE(absl::IsFailedPrecondition(device_->Synchronize(event, kSoon)));
  // Recorded outside again it works as ever, whatever the replays do.
  ASSERT_OK(device_->Record(copy_, event));
  ASSERT_OK(device_->Replay(copy_, recording));
  ASSERT_OK(device_->Wait(compute_, event));
  Drain(compute_);
  EXPECT_OK(device_->Synchronize(event, kSoon));
  EXPECT_TRUE(device_->Done(event));
}

// ---------------------------------------------------------------- the mailbox

TEST_F(CpuDeviceTest, AwaitPartialsReturnsWhenTheDoorbellHasRung) {
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
  EXPECT_GE(account.busy_ns, 20'000'000);
  EXPECT_EQ(account.bytes, 0);
}

TEST_F(CpuDeviceTest, AwaitPartialsGivesUpAndLaterWaitsReturnAtOnce) {
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

TEST_F(CpuDeviceTest, RetiringAMailboxEndsAWaitThatHasBegun) {
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

TEST_F(CpuDeviceTest, ARetiredMailboxIsNotTakenAlthoughTheAnswerIsThere) {
  Answer(1);
  words_.header.retired.store(1);
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1)));
  Drain(compute_);
  EXPECT_EQ(words_.status, kernels::kAwaitRetired);
}

TEST_F(CpuDeviceTest, AStatusThatIsSetStays) {
  words_.status.store(77);
  ASSERT_OK(device_->AwaitPartials(compute_, Await(1, absl::Milliseconds(1))));
  Drain(compute_);
  EXPECT_EQ(words_.status, 77u);
  EXPECT_EQ(words_.header.retired, 1u);
}

TEST_F(CpuDeviceTest, AwaitPartialsTakesOnlyTheAnswerToItsOwnQuestion) {
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

TEST_F(CpuDeviceTest, AWaitThatSleepsEndsWithItsAnswer) {
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

TEST_F(CpuDeviceTest, PostQueriesCopiesRowsThatLieApartAndNothingBesideThem) {
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
TEST_F(CpuDeviceTest, APostIsWholeBeforeItIsCounted) {
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

TEST_F(CpuDeviceTest, APostRingsForAStoreThatSleeps) {
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

TEST_F(CpuDeviceTest, NothingIsPostedToARetiredMailbox) {
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

TEST_F(CpuDeviceTest, MailboxOperationsNameTheMemoryThatIsNotRegistered) {
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

TEST_F(CpuDeviceTest, MergePartialsReadsPartialsWhereTheyLie) {
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

// ---------------------------------------------------------------- queues

TEST_F(CpuDeviceTest, AFullQueueMakesThePusherWaitAndLosesNothing) {
  uint8_t* const a = Must(device_->Allocate(64, "a"));
  HoldBack(copy_);
  std::thread opener([this] {
    absl::SleepFor(absl::Milliseconds(50));
    Open();
  });
  constexpr int kOps = 2000;
  OpAccount account;
  const absl::Time begin = absl::Now();
  for (int i = 0; i < kOps; ++i) {
    ASSERT_OK(device_->Copy(copy_, Plain(a, &from_[i], sizeof(uint32_t)), &account));
    ASSERT_OK(device_->Copy(copy_, Plain(&to_[i], a, sizeof(uint32_t))));
  }
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(25)) << "the queue is bounded";
  Drain(copy_);
  opener.join();
  EXPECT_EQ(account.bytes, kOps * 4);
  EXPECT_TRUE(std::equal(to_.begin(), to_.begin() + kOps, from_.begin()));
}

TEST_F(CpuDeviceTest, TheEndOfADeviceRunsWhatIsEnqueued) {
  uint8_t* const a = Must(device_->Allocate(64, "a"));
  const EventId filled = Must(device_->CreateEvent());
  HoldBack(copy_);
  ASSERT_OK(device_->Copy(copy_, Plain(a, from_.data() + 3, 64)));
  ASSERT_OK(device_->Record(copy_, filled));
  ASSERT_OK(device_->Wait(compute_, filled));  // the first stream waits for the second
  ASSERT_OK(device_->Copy(compute_, Plain(to_.data(), a, 64)));
  std::thread opener([this] {
    absl::SleepFor(absl::Milliseconds(30));
    Open();
  });
  device_.reset();
  EXPECT_EQ(to_[0], 3u);
  opener.join();
}

// ---------------------------------------------------------------- delays

// A ring of two slots, filled on one stream and read on the other, with the waits that it needs.
std::vector<uint32_t> RunRing(std::optional<uint64_t> delay_seed) {
  constexpr int kSlots = 2, kRounds = 12;
  std::vector<uint32_t> from(kRounds * 16), to(kRounds * 16);
  std::iota(from.begin(), from.end(), uint32_t{1});
  const std::unique_ptr<Device> device = MakeDevice(kArenaBytes, delay_seed);
  EXPECT_OK(device->RegisterHost(from.data(), kRounds * 64));
  EXPECT_OK(device->RegisterHost(to.data(), kRounds * 64));
  const StreamId copy = Must(device->CreateStream("copy"));
  const StreamId compute = Must(device->CreateStream("compute"));
  uint8_t* const ring = Must(device->Allocate(kSlots * 64, "ring"));
  EventId filled[kSlots], freed[kSlots];
  for (int slot = 0; slot < kSlots; ++slot) {
    filled[slot] = Must(device->CreateEvent());
    freed[slot] = Must(device->CreateEvent());
  }
  for (int round = 0; round < kRounds; ++round) {
    const int slot = round % kSlots;
    EXPECT_OK(device->Wait(copy, freed[slot]));
    EXPECT_OK(device->Copy(copy, Plain(ring + slot * 64, &from[round * 16], 64)));
    EXPECT_OK(device->Record(copy, filled[slot]));
    EXPECT_OK(device->Wait(compute, filled[slot]));
    EXPECT_OK(device->Copy(compute, Plain(&to[round * 16], ring + slot * 64, 64)));
    EXPECT_OK(device->Record(compute, freed[slot]));
  }
  EXPECT_OK(device->Synchronize(freed[(kRounds - 1) % kSlots], kSoon));
  EXPECT_EQ(to, from);
  return to;
}

TEST(CpuDevice, DelaysChangeNothing) {
  const std::vector<uint32_t> expected = RunRing(std::nullopt);
  const absl::Time begin = absl::Now();
  for (uint64_t seed = 0; seed < 4; ++seed) EXPECT_EQ(RunRing(seed), expected);
  // 4 x 36 operations of a stream, 2.5 ms each on average.
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(150)) << "no delay";
}

// ---------------------------------------------------------------- races

#if defined(__SANITIZE_THREAD__)

// What ThreadSanitizer is shown, in a process of its own: a copy and its consumer, with the wait
// between them or without.
void CopyAndConsume(bool wait) {
  std::vector<float> from(64);
  const std::unique_ptr<Device> device = MakeDevice();
  ASSERT_OK(device->RegisterHost(from.data(), 256));
  const StreamId copy = Must(device->CreateStream("copy"));
  const StreamId compute = Must(device->CreateStream("compute"));
  const EventId filled = Must(device->CreateEvent());
  const EventId consumed = Must(device->CreateEvent());
  auto* const tile = reinterpret_cast<float*>(Must(device->Allocate(256, "tile")));
  auto* const out = reinterpret_cast<float*>(Must(device->Allocate(256, "out")));
  ASSERT_OK(device->Copy(copy, Plain(tile, from.data(), 256)));
  ASSERT_OK(device->Record(copy, filled));
  if (wait) ASSERT_OK(device->Wait(compute, filled));
  ASSERT_OK(device->SwiGlu(compute, {.gate_up = tile, .out = out, .rows = 1, .width = 32}));
  // Both must run before the device ends its streams: ending one after the other orders them.
  ASSERT_OK(device->Record(compute, consumed));
  ASSERT_OK(device->Synchronize(filled, kSoon));
  ASSERT_OK(device->Synchronize(consumed, kSoon));
}

TEST(DISABLED_Planted, WaitIsThere) { CopyAndConsume(true); }
TEST(DISABLED_Planted, WaitIsMissing) { CopyAndConsume(false); }

// The exit code of this program with only that test.
int RunPlanted(const std::string& test) {
  const std::string filter = "--gtest_filter=DISABLED_Planted." + test;
  const pid_t child = fork();
  if (child == 0) {
    setenv("TSAN_OPTIONS", "exitcode=66:halt_on_error=0", 1);
    execl("/proc/self/exe", "cpu_device_test", filter.c_str(), "--gtest_also_run_disabled_tests",
          static_cast<char*>(nullptr));
    _exit(127);
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST(Races, AMissingWaitBetweenACopyAndItsConsumerIsReported) {
  EXPECT_EQ(RunPlanted("WaitIsThere"), 0);
  EXPECT_EQ(RunPlanted("WaitIsMissing"), 66);
}

#endif

}  // namespace
}  // namespace headroom
