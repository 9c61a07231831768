// A device that delays each operation by 0 to 5 ms, drawn from a seed, computes the same bits: what
// one stream must not do before another is said by events, not by the usual timing.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "tests/common/worker_harness.h"

namespace headroom {
namespace {

#if defined(__SANITIZE_THREAD__)
constexpr int kSeeds = 12;
constexpr int kThreads = 3;
#elif defined(__SANITIZE_ADDRESS__)
constexpr int kSeeds = 40;
constexpr int kThreads = 8;
#else
constexpr int kSeeds = 200;
constexpr int kThreads = 20;  // they sleep
#endif

constexpr int64_t kStoredTokens = 192;

RandomModelSpec TinyModel() {
  RandomModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 64;
  spec.num_q_heads = 4;
  spec.num_kv_heads = 2;
  spec.head_dim = 64;
  spec.intermediate_size = 72;
  spec.vocab_size = 67;
  return spec;
}

// What every seed computes: one sequence goes on from stored keys and decodes across a block's border,
// another is prefilled beside it in chunks of which one is longer than the tail.
class DelayCase {
 public:
  explicit DelayCase(std::string model_dir) : model_dir_(std::move(model_dir)) {
    requests_.resize(2);
    requests_[0].prompt = RandomTokens(1, kStoredTokens + 60, TinyModel().vocab_size);
    requests_[0].num_draws = 8;
    requests_[0].score = false;
    requests_[1].prompt = RandomTokens(2, 310, TinyModel().vocab_size);
    requests_[1].chunk_tokens = 280;
    requests_[1].num_draws = 2;
    requests_[1].score = false;
    requests_[1].max_run_tokens = 128;
  }

  // Fills the stored keys and computes what all seeds must give.
  void ComputeExpected() {
    auto harness = Start(std::nullopt);
    TestRequest store;
    store.prompt = requests_[0].prompt;
    store.prompt.resize(kStoredTokens);
    store.score = false;
    store.max_run_tokens = 64;
    const auto stored = harness->RunOne(store);
    ASSERT_TRUE(stored.ok()) << stored.status();
    requests_[0].runs = stored->runs;
    requests_[0].sealed_tokens = kStoredTokens;
    stored_bytes_.assign(harness->segment().begin(),
                         harness->segment().begin() + harness->segment_used());
    auto expected = harness->Run(requests_);
    ASSERT_TRUE(expected.ok()) << expected.status();
    expected_ = *std::move(expected);
  }

  // "" or what went wrong.
  std::string Check(uint64_t seed) const {
    auto harness = Start(seed);
    std::copy(stored_bytes_.begin(), stored_bytes_.end(), harness->segment().begin());
    harness->set_segment_used(static_cast<int64_t>(stored_bytes_.size()));
    RunOptions options;
    const uint64_t plans[][2] = {{1, 1}, {2, 2}, {3, 3}, {2, 1}, {3, 2},
                                 {4, 4}, {5, 5}, {4, 5}, {5, 1}, {2, 5}};
    constexpr uint64_t kCycles = std::size(plans);
    options.plan_cycle.assign(std::begin(plans[seed % kCycles]), std::end(plans[seed % kCycles]));
    options.sealed = seed / kCycles % 2 == 0 ? SealedRule::kCoordinator : SealedRule::kAtOnce;
    const auto outputs = harness->Run(requests_, options);
    if (!outputs.ok()) return outputs.status().ToString();
    for (size_t i = 0; i < requests_.size(); ++i) {
      std::string difference = Difference(expected_[i], (*outputs)[i]);
      if (!difference.empty()) return "sequence " + std::to_string(i) + ": " + difference;
    }
    return "";
  }

 private:
  std::unique_ptr<WorkerHarness> Start(std::optional<uint64_t> seed) const {
    WorkerHarnessOptions options;
    options.budget_bytes = int64_t{48} << 20;
    options.segment_bytes = int64_t{2} << 20;
    options.chunk_limit_tokens = 512;
    options.max_context_tokens = 1024;
    options.max_sequences = 4;
    options.delay_seed = seed;
    options.attend_threads = seed.has_value() && *seed % 3 == 0 ? 2 : 1;
    // Tiles of two blocks of one head: three tiles a layer and head, two of which fit.
    const KvGeometry geometry{2, 2, 64};
    options.ring_bytes =
        kNumContexts * 2 * 2 * kBlockTokens * geometry.BytesPerTokenPerHead();
    auto harness = WorkerHarness::Create(model_dir_, options);
    if (!harness.ok()) ADD_FAILURE() << harness.status();
    const KvGeometry g = (*harness)->geometry();
    for (Plan plan : {ResidentPlan(1, g), FetchedPlan(2, g), InPlacePlan(4, g),
                      WholeHeadPlan(5, g, [](int32_t layer, int32_t head) {
                        return layer != head ? Lane::kInPlace
                               : head == 0   ? Lane::kFetched
                                             : Lane::kResident;
                      }),
                      WholeHeadPlan(3, g, [](int32_t layer, int32_t head) {
                        return layer == head ? Lane::kResident : Lane::kFetched;
                      })}) {
      const absl::Status status = (*harness)->executor().PreparePlan(std::move(plan));
      if (!status.ok()) ADD_FAILURE() << status;
    }
    return *std::move(harness);
  }

  const std::string model_dir_;
  std::vector<TestRequest> requests_;
  std::vector<uint8_t> stored_bytes_;
  std::vector<TestOutput> expected_;
};

TEST(Delays, DoNotShow) {
  const auto folder = RandomModelFolder::Create(TinyModel());
  ASSERT_TRUE(folder.ok()) << folder.status();
  DelayCase test((*folder)->path());
  ASSERT_NO_FATAL_FAILURE(test.ComputeExpected());
  std::vector<std::string> wrong(kSeeds);
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int seed; (seed = next.fetch_add(1)) < kSeeds;) wrong[seed] = test.Check(seed);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int seed = 0; seed < kSeeds; ++seed) EXPECT_EQ(wrong[seed], "") << "seed " << seed;
}

}  // namespace
}  // namespace headroom
