// Steady decode allocates nothing on the executor's, the completion and the device's threads.
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdlib>

#include "tests/common/worker_harness.h"

// Sanitizers interpose malloc themselves.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define HEADROOM_COUNT_ALLOCATIONS 1
#endif

#if defined(HEADROOM_COUNT_ALLOCATIONS)
// Counts every allocation of the process's other threads: libstdc++'s operator new comes here too.
extern "C" {
void* __libc_malloc(size_t bytes);
void* __libc_calloc(size_t count, size_t bytes);
void* __libc_realloc(void* data, size_t bytes);
void* __libc_memalign(size_t alignment, size_t bytes);
}

namespace {

std::atomic<bool> counting{false};
std::atomic<int64_t> allocations{0};
thread_local bool exempt = false;

void Count() {
  if (counting.load(std::memory_order_relaxed) && !exempt) allocations.fetch_add(1);
}

}  // namespace

extern "C" {
void* malloc(size_t bytes) {
  Count();
  return __libc_malloc(bytes);
}
void* calloc(size_t count, size_t bytes) {
  Count();
  return __libc_calloc(count, bytes);
}
void* realloc(void* data, size_t bytes) {
  Count();
  return __libc_realloc(data, bytes);
}
void* memalign(size_t alignment, size_t bytes) {
  Count();
  return __libc_memalign(alignment, bytes);
}
void* aligned_alloc(size_t alignment, size_t bytes) {
  Count();
  return __libc_memalign(alignment, bytes);
}
int posix_memalign(void** out, size_t alignment, size_t bytes) {
  Count();
  *out = __libc_memalign(alignment, bytes);
  return *out == nullptr ? ENOMEM : 0;
}
}
#endif  // HEADROOM_COUNT_ALLOCATIONS

namespace headroom {
namespace {

#if !defined(HEADROOM_COUNT_ALLOCATIONS)
TEST(Allocations, SteadyDecodeMakesNone) { GTEST_SKIP() << "not with a sanitizer's malloc"; }
#else

TEST(Allocations, SteadyDecodeMakesNone) {
  exempt = true;
  RandomModelSpec spec;
  spec.num_layers = 4;
  const auto folder = RandomModelFolder::Create(spec);
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.compute_threads = 2;
  options.segment_bytes = int64_t{32} << 20;
  auto created = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_TRUE(created.ok()) << created.status();
  WorkerHarness& harness = **created;
  ASSERT_TRUE(harness.executor()
                  .PreparePlan(WholeHeadPlan(1, harness.geometry(),
                                             [](int32_t, int32_t head) {
                                               return head == 1 ? Lane::kResident : Lane::kFetched;
                                             }))
                  .ok());
  // Three sequences, prefilled; every run they will need is granted at once.
  int64_t next_pos[3];
  for (uint64_t id = 1; id <= 3; ++id) {
    auto step = std::make_unique<Step>();
    step->plan_version = 1;
    OpenSequence open;
    open.sequence_id = id;
    open.runs.push_back(harness.NewRun(0, 512));
    open.runs.push_back(harness.NewRun(512, 512));
    step->open.push_back(std::move(open));
    StepSequence piece;
    piece.sequence_id = id;
    piece.token_ids = RandomTokens(id, 500 + id, harness.config().vocab);
    piece.draw = true;
    next_pos[id - 1] = piece.num_tokens();
    step->sequences.push_back(std::move(piece));
    const auto ended = harness.RunStep(std::move(step));
    ASSERT_TRUE(ended->result.status.ok()) << ended->result.status;
  }
  const auto submit = [&] {
    auto step = std::make_unique<Step>();
    step->plan_version = 1;
    for (uint64_t id = 1; id <= 3; ++id) {
      StepSequence piece;
      piece.sequence_id = id;
      piece.first_pos = next_pos[id - 1]++;
      piece.sealed_tokens = FloorToBlock(piece.first_pos);
      piece.draw = true;
      piece.sampling.temperature = id == 2 ? 0.7f : 0.0f;
      piece.sampling.top_p = 0.9f;
      piece.num_top_logprobs = 5;
      step->sequences.push_back(std::move(piece));
    }
    ASSERT_TRUE(harness.Submit(std::move(step)).ok());
  };
  // Two steps deep; blocks are finished and sealed on the way.
  int in_flight = 0;
  for (int i = 0; i < 66; ++i) {
    counting.store(i >= 8 && i < 60);
    submit();
    if (++in_flight < 2) continue;
    const auto ended = harness.Await();
    ASSERT_NE(ended, nullptr);
    ASSERT_TRUE(ended->result.status.ok()) << ended->result.status;
    --in_flight;
  }
  counting.store(false);
  ASSERT_NE(harness.Await(), nullptr);
  EXPECT_EQ(allocations.load(), 0);
}

#endif  // HEADROOM_COUNT_ALLOCATIONS

}  // namespace
}  // namespace headroom
