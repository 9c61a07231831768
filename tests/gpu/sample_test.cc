// The draw of a token on the GPU: log-probabilities against the reference, draws against the CPU's kernel.
#include <cmath>
#include <vector>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/team.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {
namespace {

using namespace kernels;  // NOLINT: every name here is a kernel's

class SampleTest : public GpuTest {
 protected:
  static constexpr int kSlots = 8;

  std::vector<SampleResult> Run(const std::vector<float>& logits,
                                const std::vector<SampleRow>& rows,
                                std::vector<int32_t>* last = nullptr) {
    const auto vocab = static_cast<int64_t>(logits.size() / rows.size());
    const auto count = static_cast<int64_t>(rows.size());
    SampleArgs args;
    args.logits = gpu_.Put(logits);
    args.rows = gpu_.PutTable(rows);
    args.results = gpu_.Take<SampleResult>(count);
    args.num_results = static_cast<int32_t>(count);
    args.last_tokens = gpu_.Put(std::vector<int32_t>(kSlots, -7));
    args.num_slots = kSlots;
    args.vocab = vocab;
    args.scratch = gpu_.Take<float>(count * SampleScratchFloats(vocab));
    std::vector<SampleResult> results =
        After(device_.Sample(gpu_.stream(), args), args.results, count);
    if (last != nullptr) *last = gpu_.Fetch(args.last_tokens, kSlots);
    gpu_.Reset();
    return results;
  }
  std::vector<SampleResult> OnHost(const std::vector<float>& logits,
                                   const std::vector<SampleRow>& rows, bool oracle) {
    SampleArgs args;
    args.logits = logits.data();
    args.rows = DeviceTable(rows);
    std::vector<SampleResult> results(rows.size());
    args.results = results.data();
    args.num_results = static_cast<int32_t>(rows.size());
    std::vector<int32_t> last(kSlots);
    args.last_tokens = last.data();
    args.num_slots = kSlots;
    args.vocab = static_cast<int64_t>(logits.size() / rows.size());
    std::vector<float> scratch(rows.size() * SampleScratchFloats(args.vocab));
    args.scratch = scratch.data();
    CpuTeam team(1);
    if (oracle) {
      reference::Sample(args);
    } else {
      BestKernels().sample(args, team);
    }
    return results;
  }
};

TEST_F(SampleTest, GreedyForcedAndTopLogprobsMatchTheReference) {
  Random random(8);
  for (const int64_t vocab : {1, 2, 31, 1000, 49152, 128256}) {
    std::vector<SampleRow> rows(4);
    for (int32_t i = 0; i < 4; ++i) rows[i].result_index = 3 - i;
    rows[1].forced_token = static_cast<int32_t>(vocab / 2);
    rows[2].num_top_logprobs = 5;
    rows[3].num_top_logprobs = kMaxTopLogprobs;
    rows[3].slot = 6;
    std::vector<float> logits = random.Floats(4 * vocab, 3);
    for (int64_t i = 0; i < vocab; i += 3) logits[2 * vocab + i] = 11.5f;  // ties: the lower id
    std::vector<int32_t> last;
    const auto got = Run(logits, rows, &last);
    const auto want = OnHost(logits, rows, /*oracle=*/true);
    for (int32_t i = 0; i < 4; ++i) {
      ASSERT_EQ(got[i].token_id, want[i].token_id) << vocab << ", result " << i;
      ASSERT_EQ(got[i].non_finite, 0);
      ASSERT_NEAR(got[i].logprob, want[i].logprob, 2e-5f);
      ASSERT_EQ(got[i].num_top, want[i].num_top);
      for (int32_t t = 0; t < got[i].num_top; ++t) {
        ASSERT_EQ(got[i].top_ids[t], want[i].top_ids[t]) << vocab << ", top " << t;
        ASSERT_NEAR(got[i].top_logprobs[t], want[i].top_logprobs[t], 2e-5f);
      }
    }
    EXPECT_EQ(last[6], got[0].token_id);
    EXPECT_EQ(last[0], -7);
  }
}

TEST_F(SampleTest, SaysWhichRowsAreNotFinite) {
  std::vector<float> logits(3 * 100, 0.5f);
  logits[99] = kNan;
  logits[100] = kInfinity;
  logits[200] = -3e38f;
  std::vector<SampleRow> rows(3);
  for (int32_t i = 0; i < 3; ++i) rows[i].result_index = i;
  rows[0].slot = 1;
  std::vector<int32_t> last;
  const auto results = Run(logits, rows, &last);
  EXPECT_EQ(results[0].non_finite, 1);
  EXPECT_EQ(results[1].non_finite, 1);
  EXPECT_EQ(results[2].non_finite, 0);
  EXPECT_EQ(results[0].token_id, 0);
  EXPECT_EQ(last[1], 0);
}

// The same draws as the CPU's kernel, whose distribution its own test proves. A draw may differ
// where the uniform number falls within rounding of a border between two tokens.
TEST_F(SampleTest, DrawsWhatTheCpuDraws) {
  Random random(9);
  const struct {
    float temperature, top_p, min_p;
    int32_t top_k;
  } ways[] = {{1, 1, 0, 0},      {0.3f, 1, 0, 0},    {1.5f, 0.9f, 0, 0}, {1, 1, 0.05f, 0},
              {1, 1, 0, 1},      {1, 1, 0, 40},      {0.8f, 0.7f, 0.02f, 50},
              {1, 0.0f, 0, 0},   {2, 0.999f, 0, 3},  {1, 1, 1.0f, 0},    {1, 1, 0, 5000}};
  // Some of few different logits, so that tokens tie.
  const struct {
    int64_t vocab;
    int32_t rows;
    bool ties;
  } sizes[] = {{3, 400, false}, {211, 400, false}, {211, 400, true}, {3001, 400, false}, {49153, 20, true},
               {128256, 20, false}, {128256, 20, true}};
  for (const auto& [vocab, num_rows, ties] : sizes) {
    for (const auto& way : ways) {
      std::vector<float> logits = random.Floats(num_rows * vocab, 2);
      if (ties) {
        for (float& logit : logits) logit = std::round(2 * logit) / 2;
      }
      std::vector<SampleRow> rows(static_cast<size_t>(num_rows));
      for (int32_t i = 0; i < num_rows; ++i) {
        rows[i].seed = 1000 + static_cast<uint64_t>(i % 7) * 0x123456789abcull;
        rows[i].counter = static_cast<uint64_t>(i);
        rows[i].temperature = way.temperature;
        rows[i].top_p = way.top_p;
        rows[i].min_p = way.min_p;
        rows[i].top_k = way.top_k;
        rows[i].result_index = i;
      }
      const auto got = Run(logits, rows);
      const auto want = OnHost(logits, rows, /*oracle=*/false);
      int differ = 0;
      for (int i = 0; i < num_rows; ++i) differ += got[i].token_id != want[i].token_id;
      EXPECT_LE(differ, 2) << "vocab " << vocab << (ties ? " with ties" : "") << ", temperature " << way.temperature << ", top_p "
                           << way.top_p << ", min_p " << way.min_p << ", top_k " << way.top_k;
    }
  }
}

// Rows with a state each: what is drawn, and what the states come to.
TEST_F(SampleTest, PenaltiesAndBiasAreTheCpus) {
  Random random(10);
  constexpr int kRows = 48;
  constexpr int64_t kVocab = 3001;
  std::vector<std::vector<uint64_t>> states;
  std::vector<SampleRow> rows(kRows);
  for (int32_t i = 0; i < kRows; ++i) {
    std::vector<uint64_t>& memory = states.emplace_back((DrawStateBytes(kVocab) + 7) / 8);
    DrawState& state = *new (memory.data()) DrawState();
    uint32_t* const counts = DrawCounts(&state);
    for (int64_t id = i; id < kVocab; id += 5) counts[id] = id % 2 == 0 ? kInPrompt : id % 4;
    for (int32_t at = 0; at < kRecentTokens; ++at) state.recent[at] = (at / 2) * 7 + i;
    state.num_bias = i % 3 == 0 ? kMaxLogitBias : 0;
    for (int32_t b = 0; b < kMaxLogitBias; ++b) {
      state.bias[b] = {b * 2, 0.001f * static_cast<float>(b)};
    }
    state.num_held_back = 2;
    state.held_back[0] = 2046;  // it has the largest bias
    state.held_back[1] = 5;
    state.held_back_end = i % 2 == 0 ? 1000 : 0;
    rows[i].seed = 5;
    rows[i].counter = static_cast<uint64_t>(100 + i);
    rows[i].temperature = i % 4 == 0 ? 0.0f : 0.8f;
    rows[i].top_p = i % 4 == 1 ? 0.9f : 1.0f;
    rows[i].result_index = i;
    rows[i].num_settled = i % 5;
    rows[i].num_recent = i % 7;
    rows[i].repetition_penalty = 1.2f;
    rows[i].frequency_penalty = 0.3f;
    rows[i].presence_penalty = 0.2f;
  }
  const std::vector<float> logits = random.Floats(kRows * kVocab, 2);
  std::vector<SampleRow> on_device = rows;
  for (int i = 0; i < kRows; ++i) {
    on_device[i].state = reinterpret_cast<DrawState*>(gpu_.Put(states[i]));
    rows[i].state = reinterpret_cast<DrawState*>(states[i].data());
  }
  const auto got = Run(logits, on_device);
  const auto want = OnHost(logits, rows, /*oracle=*/false);
  int differ = 0;
  for (int i = 0; i < kRows; ++i) {
    if (got[i].token_id != want[i].token_id) ++differ;
    if (got[i].token_id != want[i].token_id) continue;
    EXPECT_NEAR(got[i].logprob, want[i].logprob, 2e-5f) << i;
    const auto after = gpu_.Fetch(reinterpret_cast<const uint64_t*>(on_device[i].state),
                                  static_cast<int64_t>(states[i].size()));
    EXPECT_EQ(after, states[i]) << i;
  }
  EXPECT_LE(differ, 1);
}

}  // namespace
}  // namespace headroom
