// The team, and kernels on it: labelled tsan, so that a race between members is a report.
#include "kernels/cpu/team.h"

#include <sched.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <numeric>
#include <set>
#include <thread>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/attention.h"
#include "kernels/cpu/runs.h"
#include "kernels/gemm.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

TEST(CpuTeam, RunsEveryMemberOnce) {
  for (const int size : {1, 2, 3, 8}) {
    CpuTeam team(size);
    std::vector<int> calls(size, 0);
    for (int run = 0; run < 200; ++run) {
      team.Run([&](int member) { ++calls[member]; });
    }
    EXPECT_EQ(calls, std::vector<int>(size, 200));
  }
}

TEST(CpuTeam, TheCallerIsMemberZero) {
  CpuTeam team(3);
  std::vector<std::thread::id> ids(3);
  team.Run([&](int member) { ids[member] = std::this_thread::get_id(); });
  EXPECT_EQ(ids[0], std::this_thread::get_id());
  EXPECT_NE(ids[1], ids[0]);
  EXPECT_NE(ids[2], ids[1]);
}

// Where each member may run: its only processor, or -1 if there are several.
std::vector<int> OnlyProcessors(int size, CpuTeam::PinFrom from) {
  std::vector<int> only(size);
  std::thread([&] {  // what is bound stays bound
    CpuTeam team(size);
    team.Pin(from);
    team.Run([&only](int member) {
      cpu_set_t allowed;
      CPU_ZERO(&allowed);
      sched_getaffinity(0, sizeof(allowed), &allowed);
      only[member] = CPU_COUNT(&allowed) == 1 ? sched_getcpu() : -1;
    });
  }).join();
  return only;
}

TEST(CpuTeam, PinGivesEachMemberAProcessorOfItsOwn) {
  const int processors = CpuTeam::NumProcessors();
  if (processors == 1) GTEST_SKIP() << "there is one processor";
  std::vector<int> first = OnlyProcessors(processors, CpuTeam::PinFrom::kFirst);
  EXPECT_EQ(std::set<int>(first.begin(), first.end()).size(), static_cast<size_t>(processors));
  EXPECT_EQ(std::count(first.begin(), first.end(), -1), 0);
  std::reverse(first.begin(), first.end());
  EXPECT_EQ(OnlyProcessors(processors, CpuTeam::PinFrom::kLast), first);
  EXPECT_EQ(OnlyProcessors(processors + 1, CpuTeam::PinFrom::kFirst).back(), -1) << "one too many";
}

TEST(CpuTeam, ForEachTakesEveryIndexOnce) {
  for (const int size : {1, 2, 5}) {
    CpuTeam team(size);
    for (const int64_t count : {0, 1, 2, 7, 1000}) {
      std::vector<int> taken(count, 0);
      team.ForEach(count, [&](int64_t i) { ++taken[i]; });
      EXPECT_EQ(taken, std::vector<int>(count, 1)) << size << " threads";
    }
  }
}

// Plain memory handed from run to run and from member to member: each run reads what the others
// wrote in the one before.
TEST(CpuTeam, ARunSeesAllWritesOfTheRunBefore) {
  constexpr int kSize = 4;
  CpuTeam team(kSize);
  std::vector<int64_t> values(kSize, 1), next(kSize);
  for (int run = 0; run < 20000; ++run) {
    team.Run([&](int member) {
      next[member] = (std::accumulate(values.begin(), values.end(), int64_t{0}) + member) % 1000003;
    });
    values.swap(next);
  }
  std::vector<int64_t> expected(kSize, 1);
  for (int run = 0; run < 20000; ++run) {
    const int64_t sum = std::accumulate(expected.begin(), expected.end(), int64_t{0});
    for (int member = 0; member < kSize; ++member) expected[member] = (sum + member) % 1000003;
  }
  EXPECT_EQ(values, expected);
}

// A member that comes late must find its own run, a later one, or a closed gate: never the
// arguments of a run that has returned. Short ones, of both kinds in turn.
TEST(CpuTeam, OffersAndRunsFollowEachOther) {
  CpuTeam team(4);
  std::vector<int64_t> values(5, 1), next(5);
  int64_t expected = 1;
  for (int run = 0; run < 20000; ++run) {
    team.ForEach(5, [&](int64_t i) {
      next[i] = std::accumulate(values.begin(), values.end(), int64_t{0}) % 1000003;
    });
    values.swap(next);
    expected = 5 * expected % 1000003;
    if (run % 3 == 0) {
      std::vector<int> calls(4, 0);
      team.Run([&](int member) { ++calls[member]; });
      ASSERT_EQ(calls, std::vector<int>(4, 1));
    }
    ASSERT_EQ(values, std::vector<int64_t>(5, expected)) << run;
  }
}

TEST(CpuTeam, WakesFromSleep) {
  CpuTeam team(3);
  for (int run = 0; run < 20; ++run) {
    std::this_thread::sleep_for(std::chrono::milliseconds(run % 3));
    std::vector<int> calls(3, 0);
    team.Run([&](int member) { calls[member] = run; });
    EXPECT_EQ(calls, std::vector<int>(3, run));
  }
}

TEST(CpuTeam, UsesNoProcessorWhileIdle) {
  CpuTeam team(4);
  team.Run([](int) {});
  const auto used = [] {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_utime.tv_sec + usage.ru_stime.tv_sec +
           1e-6 * static_cast<double>(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
  };
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  const double before = used();
  std::this_thread::sleep_for(std::chrono::milliseconds(300));
  EXPECT_LT(used() - before, 0.03);
}

TEST(CpuTeam, MayEndWithoutARunAndAsleep) {
  { CpuTeam team(3); }
  {
    CpuTeam team(3);
    team.Run([](int) {});
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

// ---- Kernels: members write disjoint parts -------------------------------------------------------

// Of the tasks [0, total), how often each came; fn(begin, end, left_end) is called for each part besides.
template <typename Fn>
std::vector<int> StreamedTasks(CpuTeam& team, int64_t total, Fn&& fn) {
  std::vector<int> calls(total, 0);
  const auto count = [&](int64_t begin, int64_t end, int64_t left_end) {
    for (int64_t task = begin; task < end; ++task) ++calls[task];
    fn(begin, end, left_end);
  };
  cpu::HEADROOM_ISA_NAMESPACE::ForEachStream(team, total, count);
  return calls;
}

TEST(ForEachStream, TakesEveryTaskOnce) {
  for (const int size : {1, 2, 3, 8, 70}) {
    CpuTeam team(size);
    for (const int64_t total : {0, 1, 2, 3, 7, 18, 96, 1536}) {
      for (int run = 0; run < 20; ++run) {
        const auto check = [&](int64_t begin, int64_t end, int64_t left_end) {
          EXPECT_LT(begin, end);
          EXPECT_LE(end, left_end);
          EXPECT_LE(left_end, total);
        };
        EXPECT_EQ(StreamedTasks(team, total, check), std::vector<int>(total, 1));
      }
    }
  }
}

TEST(ForEachStream, OthersTakeWhatAMemberDoesNotGetTo) {
  CpuTeam team(2);
  const int64_t total = 64;
  std::vector<std::thread::id> by(total);
  std::atomic<int> done{0};
  const auto calls = StreamedTasks(team, total, [&](int64_t begin, int64_t end, int64_t) {
    std::fill(by.begin() + begin, by.begin() + end, std::this_thread::get_id());
    done += static_cast<int>(end - begin);
    // The first task's member is held up until the other has done all but this part, if there is another.
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(5);
    while (begin == 0 && done < total && std::chrono::steady_clock::now() < until) {
      std::this_thread::yield();
    }
  });
  EXPECT_EQ(calls, std::vector<int>(total, 1));
  // A part is a quarter of what is left of the share of 32.
  EXPECT_EQ(std::count(by.begin(), by.end(), by[0]), 8);
}

TEST(CpuTeam, GemmMembersDoNotRace) {
  CpuTeam team(3), one(1);
  const int64_t n = 200, k = 96;
  Random random(1);
  std::vector<BFloat16> packed(PackedWeightBytes(n, k) / 2);
  cpu::PackWeightRows(random.Bf16(n * k).data(), 0, n, n, k, packed.data());
  for (const int64_t m : {1, 2, 30}) {
    const std::vector<float> a = random.Floats(m * k);
    std::vector<float> c(m * n), expected(m * n);
    cpu::Gemm({a.data(), k, {packed.data(), n, k}, c.data(), n, m, false}, team);
    cpu::Gemm({a.data(), k, {packed.data(), n, k}, expected.data(), n, m, false}, one);
    EXPECT_TRUE(SameBits(c, expected));
  }
}

TEST(CpuTeam, AttendMembersDoNotRace) {
  CpuTeam team(3), one(1);
  const int32_t tokens = 600, d = 64;
  Random random(2);
  const std::vector<BFloat16> kv = random.Bf16(640 * 2 * 2 * d);
  KvSpan span;
  span.base = reinterpret_cast<uint8_t*>(const_cast<BFloat16*>(kv.data()));
  span.count = tokens;
  span.capacity = 640;
  span.kv_head_end = 2;
  for (const int32_t rows : {1, 130}) {
    const std::vector<float> q = random.Floats(int64_t{rows} * 4 * d);
    std::vector<float> state(rows * 4 * AttentionStateFloats(d)), scratch(kMinAttendScratchFloats);
    AttendItem item;
    item.row_count = rows;
    item.first_pos = tokens - rows;
    item.kv_head_end = 2;
    item.span_count = item.reset = item.finish = 1;
    AttendArgs args;
    args.q = q.data();
    args.q_stride = 4 * d;
    args.state = state.data();
    args.rows = rows;
    args.items = {&item, &item, 1};
    args.spans = {&span, &span, 1};
    args.scratch = scratch.data();
    args.scratch_floats = kMinAttendScratchFloats;
    args.scale = 0.125f;
    args.num_q_heads = 4;
    args.num_kv_heads = 2;
    args.head_dim = d;
    std::vector<float> out(q.size()), expected(q.size());
    args.out = out.data();
    cpu::Attend(args, team);
    args.out = expected.data();
    cpu::Attend(args, one);
    EXPECT_TRUE(SameBits(out, expected));
  }
}

}  // namespace
}  // namespace headroom::kernels
