// A stream's operations at their times, on the host's clock.
#include <cuda_runtime_api.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "common/device/cuda/cuda_handles.h"
#include "common/device/cuda/event_clock.h"
#include "common/steady_time.h"
#include "common/trace.h"
#include "tests/common/trace_file.h"
#include "tests/gpu/cuda_device_test_util.h"

namespace headroom {
namespace {

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

}  // namespace
}  // namespace headroom
