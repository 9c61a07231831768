#include "common/device/cuda/cuda_device.h"

#include <cuda_runtime_api.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/event_clock.h"
#include "common/segment_format.h"
#include "common/steady_time.h"
#include "common/trace.h"
#include "tests/common/trace_file.h"
#include "tests/gpu/gpu_test_util.h"

namespace headroom {
namespace {

using kernels::BFloat16;

std::vector<float> Ramp(int64_t count, float first) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i);
  return values;
}

CopyArgs Plain(void* dst, const void* src, int64_t bytes) {
  CopyArgs copy;
  copy.dst = dst;
  copy.src = src;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = bytes;
  return copy;
}

// Registered memory of a test.
class Registered : public HostMemory {
 public:
  Registered(Device& device, int64_t bytes) : HostMemory(bytes), device_(device) {
    EXPECT_OK(device.RegisterHost(data(), bytes));
  }
  ~Registered() { EXPECT_OK(device_.UnregisterHost(data())); }

 private:
  Device& device_;
};

// A mailbox of one slot, and the step's status in another cache line.
class OneSlot : public Registered {
 public:
  explicit OneSlot(Device& device) : Registered(device, 16384) {}
  MailboxHeader& header() { return *reinterpret_cast<MailboxHeader*>(data()); }
  MailboxSlot& slot() { return *reinterpret_cast<MailboxSlot*>(data() + 4096); }
  std::atomic<uint32_t>& status() {
    return *reinterpret_cast<std::atomic<uint32_t>*>(data() + 8192);
  }
  float* queries() { return reinterpret_cast<float*>(data() + 12288); }
  // The answer to step 5, layer 3.
  void Answer(uint64_t count, uint32_t code = 0) {
    slot().answer.generation = 9;
    slot().answer.step = 5;
    slot().answer.layer = 3;
    slot().answer.code = code;
    slot().answered.store(count, std::memory_order_release);
  }
  kernels::AwaitPartialsArgs Await(uint64_t count, absl::Duration deadline) {
    kernels::AwaitPartialsArgs args;
    args.mailbox = &header();
    args.slot = &slot();
    args.count = count;
    args.generation = 9;
    args.step = 5;
    args.layer = 3;
    args.deadline_us = absl::ToInt64Microseconds(deadline);
    args.status = &status();
    return args;
  }
};

class CudaDeviceTest : public GpuTest {
 protected:
  StreamId other() {
    static const StreamId stream = device_.CreateStream("copy").value();
    return stream;
  }
  EventId NewEvent() { return device_.CreateEvent().value(); }
};

// ---- Arena, uploads
// --------------------------------------------------------------------------------

TEST(CudaDevice, HandsOutAZeroedArenaAndSaysWhatIsLeft) {
  auto device = CreateCudaDevice({.arena_bytes = 1 << 20});
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_FALSE((*device)->name().empty());
  auto first = (*device)->Allocate(1000, "weights");
  ASSERT_TRUE(first.ok());
  auto second = (*device)->Allocate(1000, "ring");
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(*second - *first, 1024);
  EXPECT_EQ((*device)->arena_use().used_bytes, 2048);
  EXPECT_EQ((*device)->arena_use().capacity_bytes, 1 << 20);
  const auto third = (*device)->Allocate(1 << 20, "tail");
  EXPECT_EQ(third.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(third.status().message().find("tail"), std::string::npos) << third.status();

  Registered host(**device, 4096);
  std::fill_n(host.data(), 4096, 0x5a);
  const StreamId stream = (*device)->CreateStream("copy").value();
  const EventId done = (*device)->CreateEvent().value();
  ASSERT_OK((*device)->Copy(stream, Plain(host.data(), *first, 2000)));
  ASSERT_OK((*device)->Record(stream, done));
  ASSERT_OK((*device)->Synchronize(done, absl::Seconds(10)));
  EXPECT_TRUE(std::all_of(host.data(), host.data() + 2000, [](uint8_t b) { return b == 0; }));
  EXPECT_EQ(host.data()[2000], 0x5a);
}

TEST(CudaDevice, SaysHowMuchMemoryTheCardHasWhenTheArenaDoesNotFit) {
  const auto device = CreateCudaDevice({.arena_bytes = int64_t{1} << 44});
  EXPECT_EQ(device.status().code(), absl::StatusCode::kResourceExhausted) << device.status();
  EXPECT_NE(device.status().message().find("17592186044416 bytes asked for"), std::string::npos)
      << device.status();
}

TEST_F(CudaDeviceTest, LoadsWeightRowsInAnyOrder) {
  const int64_t n = 5, k = 24;
  std::vector<BFloat16> matrix(n * k);
  for (int64_t i = 0; i < n * k; ++i) matrix[i].bits = static_cast<uint16_t>(i + 1);
  uint8_t* const packed = gpu_.Take(device_.PackedBytes(n, k));
  ASSERT_OK(device_.LoadWeightRows(&matrix[3 * k], 3, 2, n, k, packed));
  ASSERT_OK(device_.LoadWeightRows(&matrix[0], 0, 3, n, k, packed));
  const auto loaded = gpu_.Fetch(reinterpret_cast<const BFloat16*>(packed), n * k);
  for (int64_t i = 0; i < n * k; ++i) ASSERT_EQ(loaded[i].bits, matrix[i].bits) << i;
  EXPECT_EQ(device_.LoadWeightRows(matrix.data(), 4, 2, n, k, packed).code(),
            absl::StatusCode::kInternal);
}

// ---- Copies
// ----------------------------------------------------------------------------------------

TEST_F(CudaDeviceTest, CopiesRectanglesBothWaysAndCountsTheirBytes) {
  constexpr int64_t kRows = 7, kWidth = 96, kFromPitch = 160, kToPitch = 128;
  Registered host(device_, 1 << 16);
  for (int64_t i = 0; i < kRows * kFromPitch; ++i) host.data()[i] = static_cast<uint8_t>(i * 7);
  uint8_t* const there = gpu_.Take(kRows * kToPitch);
  OpAccount account;
  CopyArgs copy;
  copy.dst = there;
  copy.dst_pitch_bytes = kToPitch;
  copy.src = host.data();
  copy.src_pitch_bytes = kFromPitch;
  copy.width_bytes = kWidth;
  copy.height = kRows;
  ASSERT_OK(device_.Copy(gpu_.stream(), copy, &account));
  const std::vector<uint8_t> got = gpu_.Fetch(there, kRows * kToPitch);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < kToPitch; ++i) {
      const uint8_t want = i < kWidth ? static_cast<uint8_t>((row * kFromPitch + i) * 7) : 0xff;
      ASSERT_EQ(got[row * kToPitch + i], want) << "row " << row << ", byte " << i;
    }
  }
  EXPECT_EQ(account.bytes.load(), kRows * kWidth);
  EXPECT_GT(account.busy_ns.load(), 0);
  EXPECT_LT(account.busy_ns.load(), 1'000'000'000);
}

// As the ring's tiles are copied: keys and values of several runs, rows between rows, more than go to the
// driver at once; and some that are empty.
TEST_F(CudaDeviceTest, CopiesManyRectanglesAtOnce) {
  constexpr int kRectangles = 37;
  constexpr int64_t kPitch = 4096, kMostRows = 9;
  Registered host(device_, kRectangles * kMostRows * kPitch);
  for (int64_t i = 0; i < host.bytes(); ++i) host.data()[i] = static_cast<uint8_t>(i * 7 + i / 251);
  uint8_t* const there = gpu_.Take(host.bytes());
  std::vector<uint8_t> expected(static_cast<size_t>(host.bytes()), 0xff);
  std::vector<CopyArgs> copies;
  int64_t bytes = 0;
  for (int i = 0; i < kRectangles; ++i) {
    CopyArgs copy;
    const int64_t at = i * kMostRows * kPitch;
    copy.src = host.data() + at;
    copy.dst = there + at;
    copy.height = i % (kMostRows + 1);
    copy.width_bytes = i % 5 == 4 ? 0 : i % 3 == 0 ? kPitch / 2 : 16 * (i + 1);
    copy.src_pitch_bytes = kPitch;
    copy.dst_pitch_bytes = kPitch / 2 + 16 * (i % 2);
    for (int64_t row = 0; row < copy.height; ++row) {
      std::copy_n(host.data() + at + row * kPitch, copy.width_bytes,
                  expected.begin() + at + row * copy.dst_pitch_bytes);
    }
    bytes += copy.height * copy.width_bytes;
    copies.push_back(copy);
  }
  OpAccount account;
  ASSERT_OK(device_.CopyEach(gpu_.stream(), copies, &account));
  EXPECT_EQ(gpu_.Fetch(there, host.bytes()), expected);
  EXPECT_EQ(account.bytes.load(), bytes);
  EXPECT_GT(account.busy_ns.load(), 0);
  ASSERT_OK(device_.CopyEach(gpu_.stream(), {}, &account));
  // One that is refused: nothing of it is enqueued.
  std::vector<uint8_t> foreign(64);
  copies.push_back(Plain(there, foreign.data(), 64));
  EXPECT_EQ(device_.CopyEach(gpu_.stream(), copies, &account).code(), absl::StatusCode::kInternal);
  EXPECT_EQ(account.bytes.load(), bytes);
}

TEST(CudaDevice, DelaysCopiesThatASeedIsGivenFor) {
  auto device = CreateCudaDevice({.arena_bytes = 1 << 20, .delay_seed = 5});
  ASSERT_TRUE(device.ok()) << device.status();
  uint8_t* const there = (*device)->Allocate(4096, "bytes").value();
  Registered host(**device, 4096);
  const StreamId stream = (*device)->CreateStream("copy").value();
  const EventId done = (*device)->CreateEvent().value();
  const absl::Time begin = absl::Now();
  for (int i = 0; i < 100; ++i) {
    host.data()[i] = static_cast<uint8_t>(i);
    ASSERT_OK((*device)->Copy(stream, Plain(there + i, host.data() + i, 1)));
    ASSERT_OK((*device)->CopyEach(stream, {Plain(host.data() + 1000 + i, there + i, 1)}));
  }
  ASSERT_OK((*device)->Record(stream, done));
  ASSERT_OK((*device)->Synchronize(done, absl::Seconds(10)));
  EXPECT_GT(absl::Now() - begin, absl::Milliseconds(15));  // 0.15 each on average
  for (int i = 0; i < 100; ++i) ASSERT_EQ(host.data()[1000 + i], i);
}

TEST_F(CudaDeviceTest, RegistersMoreThanOnePieceAndRefusesACopyAcrossTheirBorder) {
  constexpr int64_t kMore = 1 << 20;
  Registered host(device_, kRegistrationBytes + kMore);
  std::fill_n(host.data() + kRegistrationBytes - 64, 128, 0x21);
  uint8_t* const there = gpu_.Take(128);
  EXPECT_OK(device_.Copy(gpu_.stream(), Plain(there, host.data() + kRegistrationBytes - 64, 64)));
  EXPECT_OK(device_.Copy(gpu_.stream(), Plain(there + 64, host.data() + kRegistrationBytes, 64)));
  EXPECT_EQ(gpu_.Fetch(there, 128), std::vector<uint8_t>(128, 0x21));
  EXPECT_EQ(device_.Copy(gpu_.stream(), Plain(there, host.data() + kRegistrationBytes - 64, 128))
                .code(),
            absl::StatusCode::kInternal);
  EXPECT_EQ(device_.RegisterHost(host.data() + 4096, 4096).code(),
            absl::StatusCode::kAlreadyExists);
}

TEST_F(CudaDeviceTest, UnregisteredMemoryIsForeign) {
  HostMemory host(4096);
  EXPECT_EQ(device_.UnregisterHost(host.data()).code(), absl::StatusCode::kNotFound);
  ASSERT_OK(device_.RegisterHost(host.data(), 4096));
  uint8_t* const there = gpu_.Take(64);
  EXPECT_OK(device_.Copy(gpu_.stream(), Plain(there, host.data(), 64)));
  gpu_.Await();
  ASSERT_OK(device_.UnregisterHost(host.data()));
  EXPECT_EQ(device_.Copy(gpu_.stream(), Plain(there, host.data(), 64)).code(),
            absl::StatusCode::kInternal);
  EXPECT_OK(device_.status());  // a refusal is no failure of the device
}

// ---- What a launch refuses, in the words of the CPU device
// ------------------------------------------

TEST_F(CudaDeviceTest, RefusesForeignPointersInTheWordsOfTheCpuDevice) {
  DeviceOptions options;
  options.kind = "cpu";
  options.memory_bytes = 1 << 20;
  auto cpu = CreateDevice(options);
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  const StreamId cpu_stream = (*cpu)->CreateStream("compute").value();
  uint8_t* const cpu_memory = (*cpu)->Allocate(1 << 16, "test").value();
  uint8_t* const gpu_memory = gpu_.Take(1 << 16);
  std::vector<float> foreign(1024);

  const auto both = [&](auto&& launch) {
    const absl::Status on_cpu = launch(**cpu, cpu_stream, cpu_memory);
    const absl::Status on_gpu = launch(device_, gpu_.stream(), gpu_memory);
    EXPECT_EQ(on_gpu.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(on_gpu.ToString(), on_cpu.ToString());
  };
  both([&](Device& device, StreamId stream, uint8_t* memory) {
    return device.Copy(stream, Plain(memory, foreign.data(), 64));
  });
  both([&](Device& device, StreamId stream, uint8_t* memory) {
    return device.Copy(stream, Plain(foreign.data(), memory, 64));
  });
  both([&](Device& device, StreamId stream, uint8_t* memory) {
    kernels::RmsNormArgs norm;
    norm.x = foreign.data();
    norm.x_rows = norm.rows = 1;
    norm.hidden = 64;
    norm.weight = reinterpret_cast<const BFloat16*>(memory);
    norm.out = reinterpret_cast<float*>(memory + 1024);
    return device.RmsNorm(stream, norm);
  });
  both([&](Device& device, StreamId stream, uint8_t* memory) {
    kernels::GemmArgs gemm;
    gemm.a = reinterpret_cast<const float*>(memory);
    gemm.a_stride = gemm.w.k = 8;
    gemm.w.n = 32;
    gemm.w.data = reinterpret_cast<const BFloat16*>(memory);
    gemm.c = foreign.data();
    gemm.c_stride = 32;
    gemm.m = 1;
    return device.Gemm(stream, gemm);
  });
  both([&](Device& device, StreamId stream, uint8_t*) {
    kernels::AwaitPartialsArgs await;
    await.mailbox = reinterpret_cast<MailboxHeader*>(foreign.data());
    return device.AwaitPartials(stream, await);
  });
}

// ---- Streams and events
// ------------------------------------------------------------------------------

TEST_F(CudaDeviceTest, EventsOrderStreams) {
  OneSlot mailbox(device_);
  uint8_t* const word = gpu_.Take(4);
  Registered host(device_, 8192);
  std::fill_n(host.data(), 4, 0x11);
  const EventId written = NewEvent();
  const EventId read = NewEvent();
  EXPECT_TRUE(device_.Done(written)) << "never recorded";
  EXPECT_OK(device_.Wait(other(), written));

  OpAccount waited;
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Seconds(20))));
  ASSERT_OK(device_.Copy(gpu_.stream(), Plain(word, host.data(), 4)));
  ASSERT_OK(device_.Record(gpu_.stream(), written));
  ASSERT_OK(device_.Wait(other(), written, &waited));
  ASSERT_OK(device_.Copy(other(), Plain(host.data() + 4096, word, 4)));
  ASSERT_OK(device_.Record(other(), read));

  EXPECT_EQ(device_.Synchronize(read, absl::Milliseconds(50)).code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(device_.Done(read));
  EXPECT_EQ(host.data()[4096], 0);
  mailbox.Answer(1);
  ASSERT_OK(device_.Synchronize(read, absl::Seconds(10)));
  EXPECT_TRUE(device_.Done(written));
  EXPECT_EQ(host.data()[4096], 0x11);
  EXPECT_EQ(mailbox.status().load(), 0u);
  EXPECT_GT(waited.busy_ns.load(), 30'000'000);
  EXPECT_LT(waited.busy_ns.load(), 10'000'000'000);
}

TEST_F(CudaDeviceTest, AnEventBelongsToOneStream) {
  const EventId event = NewEvent();
  ASSERT_OK(device_.Record(gpu_.stream(), event));
  ASSERT_OK(device_.Record(gpu_.stream(), event));
  EXPECT_EQ(device_.Record(other(), event).code(), absl::StatusCode::kInternal);
}

// ---- The mailbox
// ---------------------------------------------------------------------------------------

TEST_F(CudaDeviceTest, AwaitPartialsSeesADoorbellThatRangBefore) {
  OneSlot mailbox(device_);
  mailbox.Answer(7);
  const absl::Time begin = absl::Now();
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(7, absl::Seconds(20))));
  gpu_.Await();
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
  EXPECT_EQ(mailbox.status().load(), 0u);
}

TEST_F(CudaDeviceTest, AwaitPartialsGivesUpAtItsDeadlineAndLaterWaitsReturnAtOnce) {
  OneSlot mailbox(device_);
  const absl::Time begin = absl::Now();
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Milliseconds(100))));
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Seconds(20))));
  }
  gpu_.Await();
  const absl::Duration took = absl::Now() - begin;
  EXPECT_GE(took, absl::Milliseconds(95));
  EXPECT_LT(took, absl::Seconds(3));
  EXPECT_EQ(mailbox.status().load(), kernels::kAwaitExpired);
  EXPECT_EQ(mailbox.header().retired.load(), 1u);
  // What has come since is not taken by a later step either.
  mailbox.Answer(1);
  mailbox.status().store(0);
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Seconds(20))));
  gpu_.Await();
  EXPECT_EQ(mailbox.status().load(), kernels::kAwaitRetired);
  EXPECT_OK(device_.status());
}

TEST_F(CudaDeviceTest, AwaitPartialsTakesTheAnswerToItsOwnQuestionOnly) {
  const std::vector<std::function<void(kernels::AwaitPartialsArgs&)>> others = {
      [](auto& a) { ++a.generation; }, [](auto& a) { ++a.step; }, [](auto& a) { ++a.attempt; },
      [](auto& a) { ++a.layer; }};
  for (const auto& other_question : others) {
    OneSlot mailbox(device_);
    mailbox.Answer(1);
    kernels::AwaitPartialsArgs await = mailbox.Await(1, absl::Seconds(20));
    other_question(await);
    ASSERT_OK(device_.AwaitPartials(gpu_.stream(), await));
    gpu_.Await();
    EXPECT_EQ(mailbox.status().load(), kernels::kAwaitMismatch);
    EXPECT_EQ(mailbox.header().retired.load(), 1u);
  }
  OneSlot mailbox(device_);
  mailbox.Answer(1, /*code=*/13);
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Seconds(20))));
  gpu_.Await();
  EXPECT_EQ(mailbox.status().load(), kernels::kAwaitRefused);
}

TEST_F(CudaDeviceTest, PostQueriesWritesRowsAndRecordBeforeTheCount) {
  constexpr int64_t kRows = 3, kFloats = 192, kStride = 320;
  Registered host(device_, 8192);
  auto* const from = reinterpret_cast<float*>(host.data());
  for (int i = 0; i < kRows * kStride; ++i) from[i] = static_cast<float>(i);
  auto* const q = gpu_.Take<float>(kRows * kStride);
  ASSERT_OK(device_.Copy(gpu_.stream(), Plain(q, from, kRows * kStride * sizeof(float))));
  OneSlot mailbox(device_);
  kernels::PostQueriesArgs post;
  post.q = q;
  post.q_stride = kStride;
  post.rows = kRows;
  post.row_floats = kFloats;
  post.queries = mailbox.queries();
  post.mailbox = &mailbox.header();
  post.slot = &mailbox.slot();
  post.post.step = 77;
  post.post.scale = 0.5f;
  post.count = 4;
  ASSERT_OK(device_.PostQueries(gpu_.stream(), post));
  while (mailbox.slot().posted.load(std::memory_order_acquire) != 4) {
  }
  EXPECT_EQ(mailbox.slot().post.step, 77u);
  EXPECT_EQ(mailbox.slot().post.scale, 0.5f);
  for (int64_t row = 0; row < kRows; ++row) {
    for (int64_t i = 0; i < kFloats; ++i) {
      ASSERT_EQ(mailbox.queries()[row * kFloats + i], static_cast<float>(row * kStride + i));
    }
  }
  gpu_.Await();
  // A store that has been given up may still read: nothing is written any more.
  mailbox.header().retired.store(1);
  post.count = 5;
  ASSERT_OK(device_.PostQueries(gpu_.stream(), post));
  gpu_.Await();
  EXPECT_EQ(mailbox.slot().posted.load(), 4u);
}

TEST_F(CudaDeviceTest, AwaitPartialsAnswersWithinMicroseconds) {
  OneSlot mailbox(device_);
  Registered echo(device_, 4096);
  uint8_t* const word = gpu_.Take(8);
  auto& answer = *reinterpret_cast<std::atomic<uint64_t>*>(echo.data());
  auto& question = *reinterpret_cast<std::atomic<uint64_t>*>(echo.data() + 64);
  absl::Duration best = absl::Hours(1);
  for (uint64_t round = 1; round <= 20; ++round) {
    question.store(round);
    ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(round, absl::Seconds(20))));
    ASSERT_OK(device_.Copy(gpu_.stream(), Plain(word, &question, 8)));
    ASSERT_OK(device_.Copy(gpu_.stream(), Plain(&answer, word, 8)));
    absl::SleepFor(absl::Milliseconds(2));  // the kernel waits by now
    const absl::Time begin = absl::Now();
    mailbox.Answer(round);
    while (answer.load(std::memory_order_acquire) != round) {
      ASSERT_LT(absl::Now() - begin, absl::Seconds(10));
    }
    best = std::min(best, absl::Now() - begin);
  }
  RecordProperty("round_trip_us", static_cast<int>(absl::ToInt64Microseconds(best)));
  std::printf("doorbell to two copies' end: %s\n", absl::FormatDuration(best).c_str());
  EXPECT_LT(best, absl::Milliseconds(1));
}

// ---- Record and replay
// ---------------------------------------------------------------------------------

TEST_F(CudaDeviceTest, AReplayRunsWhatWasRecordedOnTheInputOfItsTime) {
  constexpr int64_t kWidth = 256;
  Registered host(device_, 1 << 16);
  auto* const in = reinterpret_cast<float*>(host.data());
  auto* const out = reinterpret_cast<float*>(host.data() + (1 << 15));
  auto* const gate_up = gpu_.Take<float>(2 * kWidth);
  auto* const result = gpu_.Take<float>(kWidth);
  kernels::SwiGluArgs swiglu;
  swiglu.gate_up = gate_up;
  swiglu.out = result;
  swiglu.rows = 1;
  swiglu.width = kWidth;
  OpAccount account;
  const EventId inside = NewEvent();
  const EventId done = NewEvent();

  ASSERT_OK(device_.BeginRecording(gpu_.stream()));
  EXPECT_EQ(device_.BeginRecording(gpu_.stream()).code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_OK(device_.Copy(gpu_.stream(), Plain(gate_up, in, 2 * kWidth * 4), &account));
  ASSERT_OK(device_.Record(gpu_.stream(), inside));
  ASSERT_OK(device_.Wait(gpu_.stream(), inside));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));
  ASSERT_OK(device_.Copy(gpu_.stream(), Plain(out, result, kWidth * 4), &account));
  EXPECT_EQ(device_.Synchronize(done, absl::Seconds(1)).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(device_.Wait(gpu_.stream(), done).code(), absl::StatusCode::kFailedPrecondition);
  std::vector<float> foreign(4);
  EXPECT_EQ(device_.Copy(gpu_.stream(), Plain(gate_up, foreign.data(), 16)).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(device_.Replay(gpu_.stream(), {0}).code(), absl::StatusCode::kFailedPrecondition);
  const auto recording = device_.EndRecording(gpu_.stream());
  ASSERT_TRUE(recording.ok()) << recording.status();
  EXPECT_EQ(device_.EndRecording(gpu_.stream()).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(device_.Wait(other(), inside).code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(account.bytes.load(), 0) << "recorded, not run";

  for (const float first : {1.0f, -3.0f}) {
    const std::vector<float> values = Ramp(2 * kWidth, first);
    std::copy(values.begin(), values.end(), in);
    ASSERT_OK(device_.Replay(gpu_.stream(), *recording));
    ASSERT_OK(device_.Record(gpu_.stream(), done));
    ASSERT_OK(device_.Synchronize(done, absl::Seconds(10)));
    for (int64_t i = 0; i < kWidth; ++i) {
      const double gate = values[i], up = values[kWidth + i];
      const double expected = gate / (1 + std::exp(-gate)) * up;
      ASSERT_NEAR(out[i], expected, 1e-5 * std::abs(expected) + 1e-6) << i;
    }
  }
  EXPECT_EQ(account.bytes.load(), 2 * 3 * kWidth * 4);
  EXPECT_EQ(device_.Replay(gpu_.stream(), {1000}).code(), absl::StatusCode::kInternal);
  EXPECT_OK(device_.status());
}

// ---- A trace
// ---------------------------------------------------------------------------------------

// How far apart a time of the GPU and one of the host may be said to be: half of what passes between an
// event's record and the moment when the host sees it fired.
constexpr int64_t kClocksNs = 100'000;

TEST_F(CudaDeviceTest, ATraceShowsEachStreamsOperationsAtTheirTimes) {
  constexpr int64_t kBytes = 16 << 20;
  constexpr int64_t kWidth = 4096;
  constexpr int kCopies = 8;
  const std::string path = testing::TempDir() + "/headroom_gpu_trace_" + std::to_string(getpid());
  unlink(path.c_str());
  Registered host(device_, kBytes);
  OneSlot mailbox(device_);
  uint8_t* const there = gpu_.Take(kBytes);
  kernels::SwiGluArgs swiglu;
  swiglu.gate_up = gpu_.Take<float>(2 * kWidth);
  swiglu.out = gpu_.Take<float>(kWidth);
  swiglu.rows = 1;
  swiglu.width = kWidth;
  const EventId copied = NewEvent();
  OpAccount plain, traced, waited;
  const auto copy_all = [&](OpAccount* account) {
    for (int i = 0; i < kCopies; ++i) {
      ASSERT_OK(device_.Copy(other(), Plain(there, host.data(), kBytes), account));
    }
    ASSERT_OK(device_.Record(other(), copied));
  };
  copy_all(&plain);
  ASSERT_OK(device_.Synchronize(copied, absl::Seconds(10)));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));  // not traced
  gpu_.Await();

  ASSERT_OK(StartTrace(path, "test"));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));  // the first has the events made
  gpu_.Await();
  ASSERT_OK(device_.BeginRecording(gpu_.stream()));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));
  const auto recording = device_.EndRecording(gpu_.stream());
  ASSERT_TRUE(recording.ok()) << recording.status();
  const int64_t begin_ns = SteadyNs();
  copy_all(&traced);
  ASSERT_OK(device_.AwaitPartials(gpu_.stream(), mailbox.Await(1, absl::Seconds(20))));
  ASSERT_OK(device_.Wait(gpu_.stream(), copied, &waited));
  ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));
  ASSERT_OK(device_.Replay(gpu_.stream(), *recording));
  absl::SleepFor(absl::Milliseconds(20));
  const int64_t answered_ns = SteadyNs();
  mailbox.Answer(1);
  gpu_.Await();
  const int64_t end_ns = SteadyNs();
  StopTrace();
  const TraceFile trace = ReadTraceFile(path, "bytes");
  unlink(path.c_str());

  const auto in_order = [&](const std::vector<TracedSlice>& slices) {
    int64_t last_ns = 0;
    for (const TracedSlice& slice : slices) {
      EXPECT_GE(slice.begin_ns, last_ns) << slice.name;
      EXPECT_GE(slice.end_ns, slice.begin_ns) << slice.name;
      last_ns = slice.end_ns;
    }
    EXPECT_LE(last_ns, end_ns + kClocksNs);
  };
  const std::vector<TracedSlice> copies = trace.OfRow("copy");
  ASSERT_EQ(copies.size(), static_cast<size_t>(kCopies));
  in_order(copies);
  EXPECT_GE(copies.front().begin_ns, begin_ns - kClocksNs);
  int64_t copies_ns = 0;
  for (const TracedSlice& slice : copies) {
    EXPECT_EQ(slice.name, "Copy");
    EXPECT_EQ(slice.arg, kBytes);
    copies_ns += slice.end_ns - slice.begin_ns;
  }
  // What each took is what its account got, once.
  EXPECT_EQ(traced.bytes.load(), plain.bytes.load());
  EXPECT_EQ(traced.ops.load(), plain.ops.load());
  EXPECT_EQ(traced.timed_ops.load(), plain.timed_ops.load());
  EXPECT_LE(copies_ns, traced.busy_ns.load());
  EXPECT_GE(copies_ns, traced.busy_ns.load() - kCopies * 2'000);

  const std::vector<TracedSlice> computed = trace.OfRow("compute");
  in_order(computed);
  std::vector<std::string> names;
  for (const TracedSlice& slice : computed) names.push_back(slice.name);
  // Of a recording the replay alone.
  ASSERT_EQ(names, (std::vector<std::string>{"SwiGlu", "AwaitPartials", "Wait", "SwiGlu", "Replay"}));
  EXPECT_LE(computed[0].end_ns, begin_ns + kClocksNs);
  EXPECT_GE(computed[1].end_ns, answered_ns - kClocksNs);
  EXPECT_LE(computed[1].end_ns, answered_ns + 5'000'000);
  EXPECT_EQ(computed[1].arg, -1);
  EXPECT_GT(computed[1].end_ns - computed[1].begin_ns, 15'000'000);
  EXPECT_EQ(waited.timed_ops.load(), 1);
}

TEST_F(CudaDeviceTest, ATraceOfMoreOperationsThanThereAreEventsIsWhole) {
  constexpr int kRounds = 40;
  constexpr int kOfRound = 500;
  const std::string path = testing::TempDir() + "/headroom_gpu_trace_" + std::to_string(getpid());
  unlink(path.c_str());
  kernels::SwiGluArgs swiglu;
  swiglu.gate_up = gpu_.Take<float>(512);
  swiglu.out = gpu_.Take<float>(256);
  swiglu.rows = 1;
  swiglu.width = 256;
  gpu_.Await();
  ASSERT_OK(StartTrace(path, "test"));
  for (int round = 0; round < kRounds; ++round) {
    for (int i = 0; i < kOfRound; ++i) ASSERT_OK(device_.SwiGlu(gpu_.stream(), swiglu));
    gpu_.Await();
  }
  StopTrace();
  EXPECT_EQ(ReadTraceFile(path, "bytes").OfRow("compute").size(), size_t{kRounds * kOfRound});
  unlink(path.c_str());
}

// A trace of minutes: the anchor has moved many times, and an event may be older than it.
TEST_F(CudaDeviceTest, EventsHaveTheTimeThatTheHostSawThemFire) {
  EventClock clock;
  ASSERT_OK(clock.Init());
  cudaStream_t raw = nullptr;
  ASSERT_EQ(cudaStreamCreateWithFlags(&raw, cudaStreamNonBlocking), cudaSuccess);
  const CudaStream stream(raw);
  struct Fired {
    CudaEvent event;
    int64_t begin_ns, end_ns;
  };
  std::vector<Fired> fired;
  int moved = 0;
  for (int i = 0; i < 200; ++i) {
    cudaEvent_t made = nullptr;
    ASSERT_EQ(cudaEventCreate(&made), cudaSuccess);
    fired.push_back({CudaEvent(made), SteadyNs(), 0});
    ASSERT_EQ(cudaEventRecord(made, stream.get()), cudaSuccess);
    while (cudaEventQuery(made) == cudaErrorNotReady) {
    }
    fired.back().end_ns = SteadyNs();
    if (clock.MoveAnchor()) ++moved;
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_GT(moved, 20);  // on a busy host fewer than on an idle one
  clock.Refresh();
  for (const Fired& one : fired) {
    int64_t at_ns = 0;
    ASSERT_TRUE(clock.TimeOf(one.event.get(), &at_ns));
    EXPECT_GE(at_ns, one.begin_ns - kClocksNs);
    EXPECT_LE(at_ns, one.end_ns + kClocksNs);
  }
}

// ---- The factory
// -----------------------------------------------------------------------------------------

TEST(DeviceFactory, AutoTakesTheGpu) {
  EXPECT_EQ(ChooseDevice("auto"), "cuda");
  EXPECT_EQ(ChooseDevice("cpu"), "cpu");
  DeviceOptions options;
  options.memory_bytes = 1 << 20;
  const auto device = CreateDevice(options);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_NE((*device)->name(), "cpu");
}

}  // namespace
}  // namespace headroom
