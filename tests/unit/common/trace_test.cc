#include "common/trace.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>
#include <thread>
#include <vector>

#include "tests/common/trace_file.h"

namespace headroom {
namespace {

class TraceTest : public ::testing::Test {
 protected:
  TraceTest() : path_(testing::TempDir() + "/headroom_trace_test_" + std::to_string(getpid())) {
    unlink(path_.c_str());
  }
  ~TraceTest() override { unlink(path_.c_str()); }

  const std::string path_;
};

TEST_F(TraceTest, ATrackIsARowBesideTheThreads) {
  const TraceTrack copy = MakeTraceTrack("copy");  // before the trace begins, as a device's are
  TraceSliceOn(copy, "Lost", 1, 2);
  ASSERT_TRUE(StartTrace(path_, "worker").ok());
  const TraceTrack compute = MakeTraceTrack("compute");
  TraceSliceOn(copy, "Copy", 1'000'000'001, 1'000'002'003, "bytes", int64_t{1} << 40);
  TraceSliceOn(compute, "Gemm", 5'000, 5'000);
  TraceSlice("here", 7'000, 9'000);
  std::thread([&] { TraceSliceOn(copy, "Copy", 1'000'002'003, 1'000'002'004, "bytes", 3); }).join();
  StopTrace();
  TraceSliceOn(copy, "Late", 1, 2);

  const TraceFile trace = ReadTraceFile(path_, "bytes");
  ASSERT_EQ(trace.processes.size(), 1u);
  EXPECT_EQ(trace.processes.at(getpid()), "worker");
  EXPECT_EQ(trace.slices.size(), 4u);
  const std::vector<TracedSlice> copies = trace.OfRow("copy");
  ASSERT_EQ(copies.size(), 2u);
  EXPECT_EQ(copies[0].name, "Copy");
  EXPECT_EQ(copies[0].begin_ns, 1'000'000'001);
  EXPECT_EQ(copies[0].end_ns, 1'000'002'003);
  EXPECT_EQ(copies[0].arg, int64_t{1} << 40);
  EXPECT_EQ(copies[1].arg, 3);
  const std::vector<TracedSlice> products = trace.OfRow("compute");
  ASSERT_EQ(products.size(), 1u);
  EXPECT_EQ(products[0].end_ns, 5'000);
  EXPECT_EQ(products[0].arg, -1);
  for (const TracedSlice& slice : trace.slices) {
    EXPECT_EQ(slice.name == "here", slice.tid == gettid()) << slice.name;
  }
}

TEST_F(TraceTest, TracksOfOneNameAreTwoRows) {
  ASSERT_TRUE(StartTrace(path_, "worker").ok());
  TraceSliceOn(MakeTraceTrack("compute"), "a", 10, 20);
  TraceSliceOn(MakeTraceTrack("compute"), "b", 10, 20);
  StopTrace();
  const std::vector<TracedSlice> slices = ReadTraceFile(path_, "bytes").OfRow("compute");
  ASSERT_EQ(slices.size(), 2u);
  EXPECT_NE(slices[0].tid, slices[1].tid);
}

TEST_F(TraceTest, ThreadsMayTraceAndMakeTracksAtOnce) {
  constexpr int kThreads = 4;
  constexpr int64_t kSlices = 5'000;
  ASSERT_TRUE(StartTrace(path_, "worker").ok());
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([i] {
      const TraceTrack track = MakeTraceTrack("stream " + std::to_string(i));
      for (int64_t n = 0; n < kSlices; ++n) TraceSliceOn(track, "op", 10 * n, 10 * n + 5, "n", n);
    });
  }
  for (std::thread& thread : threads) thread.join();
  StopTrace();
  const TraceFile trace = ReadTraceFile(path_, "n");
  for (int i = 0; i < kThreads; ++i) {
    const std::vector<TracedSlice> slices = trace.OfRow("stream " + std::to_string(i));
    ASSERT_EQ(slices.size(), static_cast<size_t>(kSlices));
    for (int64_t n = 0; n < kSlices; ++n) ASSERT_EQ(slices[static_cast<size_t>(n)].arg, n);
  }
}

// More than fits between two writes is left out, and said.
TEST_F(TraceTest, WhatDoesNotFitIsLeftOut) {
  ASSERT_TRUE(StartTrace(path_, "worker").ok());
  const TraceTrack track = MakeTraceTrack("compute");
  constexpr int64_t kSlices = 300'000;
  testing::internal::CaptureStderr();
  for (int64_t n = 0; n < kSlices; ++n) TraceSliceOn(track, "op", n, n + 1, "n", n);
  StopTrace();
  const std::string log = testing::internal::GetCapturedStderr();
  const std::vector<TracedSlice> slices = ReadTraceFile(path_, "n").OfRow("compute");
  EXPECT_GE(slices.size(), size_t{1} << 16);
  if (slices.size() < static_cast<size_t>(kSlices)) {
    EXPECT_NE(log.find("events are left out"), std::string::npos) << log;
  }
}

TEST_F(TraceTest, SeveralProcessesAppendToOneFile) {
  const TraceTrack inherited = MakeTraceTrack("compute");
  std::vector<pid_t> children;
  for (const char* const name : {"worker", "kvstore"}) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      bool ok = StartTrace(path_, name).ok();
      for (int64_t n = 0; n < 2'000; ++n) TraceSliceOn(inherited, name, 2 * n, 2 * n + 1);
      StopTrace();
      _exit(ok ? 0 : 1);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int state = 0;
    ASSERT_EQ(waitpid(child, &state, 0), child);
    EXPECT_TRUE(WIFEXITED(state) && WEXITSTATUS(state) == 0) << state;
  }
  const TraceFile trace = ReadTraceFile(path_, "n");
  EXPECT_EQ(trace.processes.size(), 2u);
  EXPECT_EQ(trace.OfRow("compute").size(), 4'000u);
  for (const TracedSlice& slice : trace.slices) EXPECT_EQ(slice.name, trace.processes.at(slice.pid));
}

}  // namespace
}  // namespace headroom
