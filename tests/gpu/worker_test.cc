// The whole step executor on a GPU: the same bits however a sequence is computed, and close to the
// CPU device, which computes in float32.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/time/time.h"
#include "common/device/device_factory.h"
#include "gtest/gtest.h"
#include "kernels/wide_shape.h"
#include "tests/common/worker_harness.h"
#include "tests/gpu/require.h"

namespace headroom {
namespace {

constexpr uint64_t kResident = 1;
constexpr uint64_t kFetched = 2;
constexpr uint64_t kMixed = 3;
constexpr uint64_t kInPlace = 4;
constexpr uint64_t kThreeLanes = 5;

// For WorkerHarnessOptions::wrap_device: the GPU instead of what the harness has made.
std::function<std::unique_ptr<Device>(std::unique_ptr<Device>)> GpuOf(int64_t memory_bytes) {
  return [memory_bytes](std::unique_ptr<Device>) -> std::unique_ptr<Device> {
    DeviceOptions options;
    options.kind = "cuda";
    options.memory_bytes = memory_bytes;
    auto made = CreateDevice(options);
    Require(made.status());  // nothing here can go on without it
    return *std::move(made);
  };
}

class WorkerOnGpu : public ::testing::Test {
 protected:
  void Start(const RandomModelSpec& spec) {
    auto folder = RandomModelFolder::Create(spec);
    ASSERT_TRUE(folder.ok()) << folder.status();
    folder_ = *std::move(folder);
    WorkerHarnessOptions options;
    options.attend_threads = 4;
    options.in_place_deadline = absl::Milliseconds(500);
    options.wrap_device = GpuOf(options.budget_bytes);
    gpu_ = Make(options);
    options.wrap_device = nullptr;
    cpu_ = Make(options);
  }
  std::unique_ptr<WorkerHarness> Make(const WorkerHarnessOptions& options) {
    auto harness = WorkerHarness::Create(folder_->path(), options);
    EXPECT_TRUE(harness.ok()) << harness.status();
    if (!harness.ok()) return nullptr;
    StepExecutor& executor = (*harness)->executor();
    const KvGeometry geometry = (*harness)->geometry();
    EXPECT_TRUE(executor.PreparePlan(ResidentPlan(kResident, geometry)).ok());
    EXPECT_TRUE(executor.PreparePlan(FetchedPlan(kFetched, geometry)).ok());
    EXPECT_TRUE(executor.PreparePlan(InPlacePlan(kInPlace, geometry)).ok());
    EXPECT_TRUE(executor
                    .PreparePlan(WholeHeadPlan(kThreeLanes, geometry,
                                               [](int32_t layer, int32_t head) {
                                                 return static_cast<Lane>((layer + head) % 3);
                                               }))
                    .ok());
    EXPECT_TRUE(
        executor
            .PreparePlan(WholeHeadPlan(
                kMixed, geometry,
                [](int32_t layer, int32_t head) {
                  return (layer + head) % 2 == 0 ? Lane::kResident : Lane::kFetched;
                }))
            .ok());
    return *std::move(harness);
  }
  static TestRequest Request(uint64_t seed, int64_t prompt_tokens, int num_draws) {
    TestRequest request;
    request.prompt = RandomTokens(seed, prompt_tokens, 211);
    request.num_draws = num_draws;
    request.num_top_logprobs = 3;
    request.max_run_tokens = 128;
    return request;
  }
  static TestOutput Run(WorkerHarness& harness, const TestRequest& request, uint64_t plan) {
    harness.set_segment_used(0);
    RunOptions options;
    options.plan_version = plan;
    auto output = harness.RunOne(request, options);
    EXPECT_TRUE(output.ok()) << output.status();
    return output.ok() ? *std::move(output) : TestOutput();
  }

  // Log-probabilities of the prompt's tokens; prints how far they are apart.
  static void ExpectClose(const TestOutput& a, const TestOutput& b, double most_mean,
                          double most_worst) {
    ASSERT_EQ(a.scored.size(), b.scored.size());
    double sum = 0, worst = 0;
    for (size_t i = 0; i < a.scored.size(); ++i) {
      const double apart = std::abs(a.scored[i].logprob - b.scored[i].logprob);
      sum += apart;
      worst = apart <= worst ? worst : apart;  // NaN stays
    }
    const double mean = sum / static_cast<double>(a.scored.size());
    std::printf("mean difference %.2g, worst %.2g\n", mean, worst);
    EXPECT_LT(mean, most_mean);
    EXPECT_LT(worst, most_worst);
  }

  std::unique_ptr<RandomModelFolder> folder_;
  std::unique_ptr<WorkerHarness> gpu_, cpu_;
};

// How a prompt is cut into chunks shows, other than on the CPU: products of a few rows and of many are
// different kernels. Where its keys lie does not.
TEST_F(WorkerOnGpu, ResidentIsFetchedToTheBitInEveryChunking) {
  const struct {
    int64_t q_heads, kv_heads, head_dim;
  } shapes[] = {{6, 3, 64}, {4, 4, 64}, {8, 2, 128}, {5, 1, 128}};
  for (const auto& shape : shapes) {
    Start(SmallModel(shape.q_heads, shape.kv_heads, shape.head_dim));
    ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
    TestRequest request = Request(1, 700, 20);
    const TestOutput whole = Run(*gpu_, request, kResident);
    for (const int64_t chunk : {7, 64, 130, 300, 100000}) {
      request.chunk_tokens = chunk;
      const TestOutput resident = Run(*gpu_, request, kResident);
      ASSERT_EQ(resident.scored.size(), 699u);
      ASSERT_EQ(resident.drawn.size(), 20u);
      for (const uint64_t plan : {kResident, kFetched, kMixed}) {
        EXPECT_EQ(Difference(resident, Run(*gpu_, request, plan)), "")
            << "chunks of " << chunk << ", plan " << plan;
      }
      ExpectClose(resident, whole, 0.05, 0.4);
    }
  }
}

TEST_F(WorkerOnGpu, BytesMovedAreTheGeometrysBytes) {
  Start(SmallModel(6, 3, 64));
  ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
  const TestRequest request = Request(2, 400, 8);
  for (const uint64_t plan : {kResident, kFetched, kMixed}) {
    Run(*gpu_, request, plan);
    Run(*cpu_, request, plan);
    ASSERT_EQ(gpu_->steps().size(), cpu_->steps().size());
    for (size_t i = 0; i < gpu_->steps().size(); ++i) {
      const StepResult& on_gpu = gpu_->steps()[i].result;
      const StepResult& on_cpu = cpu_->steps()[i].result;
      for (int lane = 0; lane < kNumLanes; ++lane) {
        EXPECT_EQ(on_gpu.lanes[lane].bytes, on_cpu.lanes[lane].bytes) << "step " << i;
      }
      EXPECT_EQ(on_gpu.sealed_bytes, on_cpu.sealed_bytes) << "step " << i;
    }
  }
}

TEST_F(WorkerOnGpu, LogProbabilitiesAreThoseOfTheCpu) {
  const struct {
    int64_t q_heads, kv_heads, head_dim;
  } shapes[] = {{6, 3, 64}, {4, 4, 64}, {8, 1, 128}, {5, 1, 64}};
  for (const auto& shape : shapes) {
    Start(SmallModel(shape.q_heads, shape.kv_heads, shape.head_dim));
    ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
    const TestRequest request = Request(3, 600, 1);
    const TestOutput on_gpu = Run(*gpu_, request, kFetched);
    const TestOutput on_cpu = Run(*cpu_, request, kResident);
    std::printf("%d query heads on %d, head_dim %d: ", static_cast<int>(shape.q_heads),
                static_cast<int>(shape.kv_heads), static_cast<int>(shape.head_dim));
    // Activations rounded to bfloat16 move a logit (of size 2.5) this much.
    ExpectClose(on_gpu, on_cpu, 0.05, 0.4);
  }
}

// What the families have beside a Llama, with keys in every lane.
TEST_F(WorkerOnGpu, EachFamilyIsAsOnTheCpu) {
  for (const char* architecture : {"MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
                                   "Gemma2ForCausalLM"}) {
    const std::string name = architecture;
    RandomModelSpec spec = SmallModel(6, 3, name == "Gemma2ForCausalLM" ? 256 : 64);
    spec.architecture = name;
    if (name == "MistralForCausalLM") spec.sliding_window = 100;
    if (name == "Gemma2ForCausalLM") {
      spec.sliding_window = 150;
      spec.attn_logit_softcapping = 4;
      spec.final_logit_softcapping = 6;
      spec.query_pre_attn_scalar = 144;
    }
    Start(spec);
    ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
    TestRequest request = Request(3, 600, 6);
    const TestOutput on_cpu = Run(*cpu_, request, kResident);
    for (const int64_t chunk : {64, 300}) {
      request.chunk_tokens = chunk;
      const TestOutput on_gpu = Run(*gpu_, request, kResident);
      std::printf("%s, chunks of %d: ", architecture, static_cast<int>(chunk));
      ExpectClose(on_gpu, on_cpu, 0.05, 0.4);
      for (const uint64_t plan : {kFetched, kMixed}) {
        EXPECT_EQ(Difference(on_gpu, Run(*gpu_, request, plan)), "") << name << ", plan " << plan;
      }
      const TestOutput in_place = Run(*gpu_, request, kInPlace);
      EXPECT_EQ(gpu_->retries(), 0) << name;
      ExpectClose(in_place, on_gpu, 0.02, 0.1);
    }
  }
}

TEST_F(WorkerOnGpu, SequencesSideBySideHaveTheBitsOfSequencesAlone) {
  Start(SmallModel(6, 3, 64));
  ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
  std::vector<TestRequest> requests;
  for (const int64_t tokens : {3, 90, 200, 333, 513, 1, 64, 65, 255, 256, 257, 300, 77, 12, 128, 500}) {
    requests.push_back(Request(40 + static_cast<uint64_t>(tokens), tokens, 12));
    requests.back().chunk_tokens = 100;
    requests.back().temperature = tokens == 200 ? 0.8f : 0;
    requests.back().seed = 5;
  }
  RunOptions options;
  options.plan_version = kMixed;
  gpu_->set_segment_used(0);
  const auto together = gpu_->Run(requests, options);
  ASSERT_TRUE(together.ok()) << together.status();
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(Difference((*together)[i], Run(*gpu_, requests[i], kFetched)), "") << i;
  }
}

// Four layers of Llama-3-8B behind 128K tokens: chunks as long as cuDNN gets them, tiles that fill the
// ring, runs of 16 MiB.
TEST(WorkerOnGpuAtLength, ResidentIsFetchedIsMixed) {
  constexpr int64_t kPrompt = 131'072 - 40;
  RandomModelSpec spec;
  spec.num_layers = 4;
  spec.hidden_size = 4096;
  spec.num_q_heads = 32;
  spec.num_kv_heads = 8;
  spec.head_dim = 128;
  spec.intermediate_size = 14336;
  spec.vocab_size = 1024;
  spec.max_position_embeddings = 131'072;
  spec.rope_theta = 500'000;
  auto folder = RandomModelFolder::Create(spec);
  ASSERT_TRUE(folder.ok()) << folder.status();
  WorkerHarnessOptions options;
  options.budget_bytes = int64_t{8} << 30;
  options.chunk_limit_tokens = 8192;
  options.max_context_tokens = 131'072;
  options.segment_bytes = int64_t{5} << 29;
  options.wrap_device = GpuOf(options.budget_bytes);
  auto harness = WorkerHarness::Create((*folder)->path(), options);
  ASSERT_TRUE(harness.ok()) << harness.status();
  const KvGeometry geometry = (*harness)->geometry();
  StepExecutor& executor = (*harness)->executor();
  ASSERT_TRUE(executor.PreparePlan(ResidentPlan(kResident, geometry)).ok());
  ASSERT_TRUE(executor.PreparePlan(FetchedPlan(kFetched, geometry)).ok());
  ASSERT_TRUE(executor
                  .PreparePlan(WholeHeadPlan(kMixed, geometry,
                                             [](int32_t layer, int32_t head) {
                                               return (layer + head) % 3 == 0 ? Lane::kResident
                                                                              : Lane::kFetched;
                                             }))
                  .ok());
  // A head in the middle of whose piece of keys the lane changes; those beside it are of one lane each.
  constexpr uint64_t kCut = 100;
  constexpr int64_t kBorder = 11 * 4096;
  static_assert(kBorder % kernels::kWidePieceTokens != 0);
  ASSERT_TRUE(executor
                  .PreparePlan(SplitHeadPlan(kCut, geometry, 3, kBorder, Lane::kFetched,
                                             Lane::kResident))
                  .ok());
  TestRequest request;
  request.prompt = RandomTokens(9, kPrompt, spec.vocab_size);
  request.chunk_tokens = 8192;
  request.num_draws = 30;
  request.num_top_logprobs = 3;
  request.score = false;
  std::vector<TestOutput> outputs;
  for (const uint64_t plan : {kResident, kFetched, kMixed, kCut}) {
    (*harness)->set_segment_used(0);
    RunOptions run;
    run.plan_version = plan;
    auto output = (*harness)->RunOne(request, run);
    ASSERT_TRUE(output.ok()) << output.status();
    EXPECT_EQ((*harness)->steps().back().result.lanes[static_cast<int>(Lane::kFetched)].bytes > 0,
              plan != kResident);
    outputs.push_back(*std::move(output));
  }
  EXPECT_EQ(Difference(outputs[0], outputs[1]), "") << "fetched";
  EXPECT_EQ(Difference(outputs[0], outputs[2]), "") << "mixed";
  EXPECT_EQ(Difference(outputs[0], outputs[3]), "") << "a head that is cut";
}

// The store's processors compute in float32 with another order of sums than the GPU: close, and the same
// bits each time.
TEST_F(WorkerOnGpu, KeysInPlaceAreWithinRounding) {
  Start(SmallModel(6, 3, 64));
  ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
  TestRequest request = Request(6, 600, 1);
  request.chunk_tokens = 20;  // few enough to go in place
  const TestOutput resident = Run(*gpu_, request, kResident);
  KvGeometry geometry = gpu_->geometry();
  ASSERT_TRUE(gpu_->executor()
                  .PreparePlan(SplitHeadPlan(9, geometry, 1, 256, Lane::kInPlace, Lane::kFetched))
                  .ok());
  for (const uint64_t plan : {kInPlace, kThreeLanes, uint64_t{9}}) {
    const TestOutput in_place = Run(*gpu_, request, plan);
    EXPECT_GT(gpu_->steps().back().result.lanes[static_cast<int>(Lane::kInPlace)].bytes, 0);
    EXPECT_EQ(gpu_->retries(), 0);
    std::printf("plan %d: ", static_cast<int>(plan));
    ExpectClose(in_place, resident, 0.02, 0.1);
    EXPECT_EQ(Difference(in_place, Run(*gpu_, request, plan)), "") << "run again";
  }
}

TEST_F(WorkerOnGpu, AStoreThatDiesCostsNoToken) {
  Start(SmallModel(6, 3, 64));
  ASSERT_TRUE(gpu_ != nullptr && cpu_ != nullptr);
  const TestRequest request = Request(7, 300, 30);
  const TestOutput expected = Run(*gpu_, request, kFetched);
  gpu_->set_segment_used(0);
  RunOptions options;
  options.plan_version = kInPlace;
  options.on_step = [&](int steps) {
    if (steps == 6) gpu_->KillPool();
  };
  const auto output = gpu_->RunOne(request, options);
  ASSERT_TRUE(output.ok()) << output.status();
  EXPECT_GT(gpu_->retries(), 0);
  ASSERT_EQ(output->drawn.size(), expected.drawn.size());
  for (size_t i = 0; i < expected.drawn.size(); ++i) {
    EXPECT_EQ(output->drawn[i].token_id, expected.drawn[i].token_id) << i;
  }
}

}  // namespace
}  // namespace headroom
