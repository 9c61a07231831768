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
#include "common/segment_format.h"
#include "tests/gpu/cuda_device_test_util.h"

namespace headroom {
namespace {

using kernels::BFloat16;

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
