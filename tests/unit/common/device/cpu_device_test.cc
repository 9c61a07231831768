// Streams, events, copies, memory, recordings and queues of the CPU device.
#include "common/device/cpu/cpu_device.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "tests/unit/common/device/cpu_device_test_util.h"

namespace headroom {
namespace {

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
