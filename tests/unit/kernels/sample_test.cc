#include "kernels/sample.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

class Sampling {
 public:
  Sampling(int64_t vocab, std::vector<float> logits, std::vector<SampleRow> the_rows)
      : rows(std::move(the_rows)), vocab_(vocab), logits_(std::move(logits)) {
    for (size_t i = 0; i < rows.size(); ++i) rows[i].result_index = static_cast<int32_t>(i);
  }

  std::vector<SampleResult> Run(const cpu::KernelTable& kernels = BestKernels()) {
    CpuTeam team(2);
    const SampleArgs args = Args();
    kernels.sample(args, team);
    return results_;
  }
  std::vector<SampleResult> RunReference() {
    reference::Sample(Args());
    return results_;
  }
  const std::vector<int32_t>& last_tokens() const { return last_tokens_; }

  std::vector<SampleRow> rows;

 private:
  SampleArgs Args() {
    results_.assign(rows.size(), SampleResult());
    last_tokens_.assign(4, -1);
    scratch_.assign(rows.size() * SampleScratchFloats(vocab_), kNan);
    SampleArgs args;
    args.logits = logits_.data();
    args.rows = DeviceTable(rows);
    args.results = results_.data();
    args.num_results = static_cast<int32_t>(rows.size());
    args.last_tokens = last_tokens_.data();
    args.num_slots = 4;
    args.vocab = vocab_;
    args.scratch = scratch_.data();
    return args;
  }

  int64_t vocab_;
  std::vector<float> logits_;
  std::vector<SampleResult> results_;
  std::vector<int32_t> last_tokens_;
  std::vector<float> scratch_;
};

SampleRow Tempered(float temperature, uint64_t seed, uint64_t counter) {
  SampleRow row;
  row.temperature = temperature;
  row.seed = seed;
  row.counter = counter;
  return row;
}

TEST(Sample, GreedyAndForcedRowsMatchTheReference) {
  for (const int64_t vocab : {1, 2, 15, 16, 17, 1000, 49152}) {
    Random random(1);
    std::vector<SampleRow> rows(5);
    rows[1].forced_token = static_cast<int32_t>(vocab / 2);
    rows[2].num_top_logprobs = 20;
    rows[3].num_top_logprobs = 1;
    rows[3].forced_token = static_cast<int32_t>(vocab - 1);
    rows[4].num_top_logprobs = 5;
    Sampling sampling(vocab, random.Floats(5 * vocab, 4), rows);
    const std::vector<SampleResult> expected = sampling.RunReference();
    for (const cpu::KernelTable* kernels : AllKernels()) {
      const std::vector<SampleResult> results = sampling.Run(*kernels);
      for (size_t i = 0; i < rows.size(); ++i) {
        EXPECT_EQ(results[i].token_id, expected[i].token_id);
        EXPECT_NEAR(results[i].logprob, expected[i].logprob, 1e-5);
        ASSERT_EQ(results[i].num_top, expected[i].num_top);
        for (int t = 0; t < results[i].num_top; ++t) {
          EXPECT_EQ(results[i].top_ids[t], expected[i].top_ids[t]);
          EXPECT_NEAR(results[i].top_logprobs[t], expected[i].top_logprobs[t], 1e-5);
        }
      }
    }
  }
}

TEST(Sample, TiesGoToTheLowestId) {
  std::vector<float> logits(100, 1.0f);
  logits[40] = logits[41] = logits[97] = 2.0f;
  std::vector<SampleRow> rows(1);
  rows[0].num_top_logprobs = 5;
  const std::vector<SampleResult> results = Sampling(100, logits, rows).Run();
  EXPECT_EQ(results[0].token_id, 40);
  EXPECT_EQ(std::vector<int32_t>(results[0].top_ids, results[0].top_ids + 5),
            (std::vector<int32_t>{40, 41, 97, 0, 1}));
}

TEST(Sample, GivesTheSameBitsOnEveryInstructionSet) {
  Random random(2);
  const int64_t vocab = 3001;
  std::vector<SampleRow> rows(64);
  for (size_t i = 0; i < rows.size(); ++i) {
    rows[i] = Tempered(0.3f + 0.05f * static_cast<float>(i), 9, i);
    rows[i].top_p = i % 2 == 0 ? 0.9f : 1.0f;
    rows[i].top_k = i % 3 == 0 ? 40 : 0;
    rows[i].min_p = i % 5 == 0 ? 0.01f : 0.0f;
  }
  Sampling sampling(vocab, random.Floats(64 * vocab, 2), rows);
  const std::vector<SampleResult> expected = sampling.Run();
  for (const cpu::KernelTable* kernels : AllKernels()) {
    const std::vector<SampleResult> results = sampling.Run(*kernels);
    for (size_t i = 0; i < rows.size(); ++i) {
      EXPECT_EQ(results[i].token_id, expected[i].token_id) << kernels->name;
      EXPECT_EQ(results[i].logprob, expected[i].logprob) << kernels->name;
    }
  }
}

TEST(Sample, ARowIsDrawnTheSameAgainAndInAnyBatch) {
  Random random(3);
  const std::vector<float> logits = random.Floats(500, 2);
  std::vector<float> copies;
  std::vector<SampleRow> rows;
  for (int i = 0; i < 7; ++i) {
    copies.insert(copies.end(), logits.begin(), logits.end());
    rows.push_back(Tempered(1.0f, 5, 17));
  }
  const std::vector<SampleResult> results = Sampling(500, copies, rows).Run();
  const SampleResult alone = Sampling(500, logits, {Tempered(1.0f, 5, 17)}).Run()[0];
  for (const SampleResult& result : results) EXPECT_EQ(result.token_id, alone.token_id);
}

// Frequencies of the tokens over `draws` draws from the same logits.
std::vector<double> Frequencies(const std::vector<float>& logits, SampleRow row, int draws) {
  const auto vocab = static_cast<int64_t>(logits.size());
  std::vector<float> copies;
  std::vector<SampleRow> rows;
  for (int i = 0; i < draws; ++i) {
    copies.insert(copies.end(), logits.begin(), logits.end());
    row.counter = static_cast<uint64_t>(i);
    rows.push_back(row);
  }
  std::vector<double> frequencies(vocab, 0);
  for (const SampleResult& result : Sampling(vocab, copies, rows).Run()) {
    frequencies[result.token_id] += 1.0 / draws;
  }
  return frequencies;
}

TEST(Sample, DrawsTokensAsOftenAsTheTemperedDistributionSays) {
  const std::vector<float> logits = {0.0f, 1.0f, 2.0f, -1.0f, 3.0f};
  for (const float temperature : {0.5f, 1.0f, 2.0f}) {
    double total = 0;
    for (const float logit : logits) total += std::exp(logit / temperature);
    const std::vector<double> seen = Frequencies(logits, Tempered(temperature, 1, 0), 40000);
    for (size_t id = 0; id < logits.size(); ++id) {
      // Four standard deviations of 40,000 draws are at most 0.01.
      EXPECT_NEAR(seen[id], std::exp(logits[id] / temperature) / total, 0.01);
    }
  }
}

std::vector<int32_t> Drawn(const std::vector<double>& frequencies) {
  std::vector<int32_t> ids;
  for (size_t id = 0; id < frequencies.size(); ++id) {
    if (frequencies[id] > 0) ids.push_back(static_cast<int32_t>(id));
  }
  return ids;
}

TEST(Sample, TruncationKeepsExactlyTheLikeliest) {
  // Probabilities 0.4, 0.05, 0.3, 0.2, 0.05.
  std::vector<float> logits;
  for (const float p : {0.4f, 0.05f, 0.3f, 0.2f, 0.05f}) logits.push_back(std::log(p));
  const auto drawn = [&](float top_p, int32_t top_k, float min_p) {
    SampleRow row = Tempered(1.0f, 3, 0);
    row.top_p = top_p;
    row.top_k = top_k;
    row.min_p = min_p;
    return Drawn(Frequencies(logits, row, 4000));
  };
  using Ids = std::vector<int32_t>;
  EXPECT_EQ(drawn(1, 0, 0), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(drawn(1, 3, 0), (Ids{0, 2, 3}));
  EXPECT_EQ(drawn(1, 4, 0), (Ids{0, 1, 2, 3}));  // the tie goes to the lower id
  EXPECT_EQ(drawn(1, 9, 0), (Ids{0, 1, 2, 3, 4}));
  EXPECT_EQ(drawn(0.65f, 0, 0), (Ids{0, 2}));
  EXPECT_EQ(drawn(0.75f, 0, 0), (Ids{0, 2, 3}));
  EXPECT_EQ(drawn(0.0f, 0, 0), (Ids{0}));
  EXPECT_EQ(drawn(1, 0, 0.4f), (Ids{0, 2, 3}));
  EXPECT_EQ(drawn(1, 0, 1.0f), (Ids{0}));
  // top-p is of what top-k left: 0.4 / 0.7 = 0.57.
  EXPECT_EQ(drawn(0.55f, 2, 0), (Ids{0}));
  EXPECT_EQ(drawn(0.6f, 2, 0), (Ids{0, 2}));
  EXPECT_EQ(drawn(0.95f, 0, 0.6f), (Ids{0, 2}));
}

// The nucleus of a large vocabulary, against a full sort in float64.
TEST(Sample, TheNucleusOfALargeVocabularyIsComplete) {
  Random random(4);
  const int64_t vocab = 2000;
  const std::vector<float> logits = random.Floats(vocab, 1.5f);
  std::vector<int32_t> order(vocab);
  for (int32_t id = 0; id < vocab; ++id) order[id] = id;
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
  double total = 0;
  for (const float logit : logits) total += std::exp(static_cast<double>(logit));
  std::vector<int32_t> nucleus;
  for (double reached = 0; reached < 0.3 * total;) {
    reached += std::exp(static_cast<double>(logits[order[nucleus.size()]]));
    nucleus.push_back(order[nucleus.size()]);
  }
  std::sort(nucleus.begin(), nucleus.end());
  SampleRow row = Tempered(1.0f, 6, 0);
  row.top_p = 0.3f;
  EXPECT_EQ(Drawn(Frequencies(logits, row, 20000)), nucleus);
}

TEST(Sample, ReportsLogitsThatAreNotFinite) {
  for (const float bad : {kNan, kInfinity, -kInfinity}) {
    for (const int at : {0, 7, 16, 40}) {
      Random random(5);
      std::vector<float> logits = random.Floats(3 * 41);
      logits[41 + at] = bad;
      std::vector<SampleRow> rows(3);
      rows[1] = Tempered(1.0f, 1, 1);
      rows[1].slot = 2;
      Sampling sampling(41, logits, rows);
      for (const cpu::KernelTable* kernels : AllKernels()) {
        const std::vector<SampleResult> results = sampling.Run(*kernels);
        EXPECT_EQ(results[0].non_finite, 0);
        EXPECT_EQ(results[1].non_finite, 1);
        EXPECT_EQ(results[1].token_id, 0);
        EXPECT_EQ(results[2].non_finite, 0);
      }
    }
  }
}

TEST(Sample, StoresTheDrawnTokenInItsSlot) {
  Random random(6);
  std::vector<SampleRow> rows(3);
  rows[0].slot = 3;
  rows[2].slot = 0;
  rows[2].forced_token = 11;
  Sampling sampling(50, random.Floats(150), rows);
  const std::vector<SampleResult> results = sampling.Run();
  EXPECT_EQ(sampling.last_tokens(), (std::vector<int32_t>{11, -1, -1, results[0].token_id}));
}

TEST(Sample, WritesResultsWhereTheRowsSay) {
  Random random(7);
  const std::vector<float> logits = random.Floats(150);
  Sampling straight(50, logits, std::vector<SampleRow>(3));
  const std::vector<SampleResult> expected = straight.Run();
  Sampling turned(50, logits, std::vector<SampleRow>(3));
  for (int32_t i = 0; i < 3; ++i) turned.rows[i].result_index = 2 - i;
  const std::vector<SampleResult> results = turned.Run();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(results[2 - i].token_id, expected[i].token_id);
}

// Philox-4x32-10's published vectors begin with key 0, counter 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
// The first word's upper 24 bits over 2^24 are 0.39905..., which among equal tokens names one.
TEST(Sample, TheUniformNumberIsPhilox) {
  const std::vector<SampleResult> results =
      Sampling(1000, std::vector<float>(1000, 0.0f), {Tempered(1.0f, 0, 0)}).Run();
  EXPECT_EQ(results[0].token_id, static_cast<int32_t>(0x6627e8 / 16777216.0 * 1000));
}

// A state in plain memory.
class State {
 public:
  explicit State(int64_t vocab) : memory_((DrawStateBytes(vocab) + 7) / 8) {
    new (memory_.data()) DrawState();
  }
  DrawState* operator->() { return get(); }
  DrawState* get() { return reinterpret_cast<DrawState*>(memory_.data()); }
  uint32_t& count(int32_t id) { return DrawCounts(get())[id]; }
  // The token at `pos` was drawn.
  void Drew(uint64_t pos, int32_t id) { get()->recent[pos % kRecentTokens] = id; }

 private:
  std::vector<uint64_t> memory_;
};

// Every token drawn greedily, one after the other, with its own state: each kernel against the
// reference, tokens and states.
TEST(Sample, PenaltiesAndBiasMatchTheReference) {
  for (const int64_t vocab : {3, 17, 1000}) {
    const auto run = [&](auto&& sample) {
      Random random(8);
      State state(vocab);
      for (int32_t id = 0; id < vocab; id += 3) state.count(id) = kInPrompt;
      state.count(0) = 3;
      state->num_bias = 2;
      state->bias[0] = {1, -1.5f};
      state->bias[1] = {2, 0.75f};
      state->num_held_back = 1;
      state->held_back[0] = static_cast<int32_t>(vocab - 1);
      state->held_back_end = 120;
      std::vector<int32_t> story;
      for (uint64_t pos = 100; pos < 140; ++pos) {
        SampleRow row;
        row.counter = pos;
        row.state = state.get();
        row.repetition_penalty = 1.3f;
        row.frequency_penalty = 0.25f;
        row.presence_penalty = 0.5f;
        row.num_recent = static_cast<int32_t>(std::min<uint64_t>(pos - 100, 2));
        row.num_settled = pos > 102 ? 1 : 0;
        Sampling sampling(vocab, random.Floats(vocab, 1), {row});
        story.push_back(sample(sampling)[0].token_id);
      }
      for (int32_t id = 0; id < vocab; ++id) story.push_back(static_cast<int32_t>(state.count(id)));
      return story;
    };
    const std::vector<int32_t> expected = run([](Sampling& s) { return s.RunReference(); });
    for (const cpu::KernelTable* kernels : AllKernels()) {
      EXPECT_EQ(run([=](Sampling& s) { return s.Run(*kernels); }), expected) << kernels->name;
    }
  }
}

// Logits and what is expected of them, by hand.
TEST(Sample, PenaltiesAreThoseOfTheirDefinitions) {
  const auto greedy = [](std::vector<float> logits, State& state, SampleRow row) {
    row.state = state.get();
    row.counter = 50;
    const auto vocab = static_cast<int64_t>(logits.size());
    return Sampling(vocab, std::move(logits), {row}).Run()[0].token_id;
  };
  State prompt(3);
  prompt.count(0) = kInPrompt;
  SampleRow row;
  row.repetition_penalty = 2;
  EXPECT_EQ(greedy({4, 1.9f, 0}, prompt, row), 0);     // 4 / 2
  EXPECT_EQ(greedy({4, 2.1f, 0}, prompt, row), 1);
  EXPECT_EQ(greedy({-1, -1.9f, -9}, prompt, row), 1);  // -1 * 2
  EXPECT_EQ(greedy({-1, -2.1f, -9}, prompt, row), 0);
  row = SampleRow();
  row.frequency_penalty = row.presence_penalty = 2;
  EXPECT_EQ(greedy({1, 0.9f, 0}, prompt, row), 0) << "the prompt does not count";
  State answer(3);
  answer.count(0) = 3;
  row = SampleRow();
  row.frequency_penalty = 0.5f;
  EXPECT_EQ(greedy({3, 1.4f, 0}, answer, row), 0);  // 3 - 3 * 0.5
  EXPECT_EQ(greedy({3, 1.6f, 0}, answer, row), 1);
  row.presence_penalty = 1;
  EXPECT_EQ(greedy({3, 0.4f, 0}, answer, row), 0);  // ... - 1
  EXPECT_EQ(greedy({3, 0.6f, 0}, answer, row), 1);
  row.repetition_penalty = 2;
  EXPECT_EQ(greedy({3, -0.9f, -2}, answer, row), 1);  // 3 / 2 - 1.5 - 1
  EXPECT_EQ(greedy({3, -1.1f, -2}, answer, row), 0);
  answer->num_bias = 1;
  answer->bias[0] = {2, 1.5f};
  EXPECT_EQ(greedy({3, -1.1f, -2}, answer, row), 2);
  answer->num_held_back = 1;
  answer->held_back[0] = 2;
  answer->held_back_end = 51;  // the row draws position 50
  EXPECT_EQ(greedy({3, -1.1f, -2}, answer, row), 0);
  answer->held_back_end = 50;
  EXPECT_EQ(greedy({3, -1.1f, -2}, answer, row), 2);
}

TEST(Sample, RecentTokensCountOnceHoweverOftenTheRowIsRun) {
  State state(4);
  for (uint64_t pos = 30; pos < 33; ++pos) state.Drew(pos, pos == 31 ? 2 : 1);
  SampleRow row;
  row.counter = 33;
  row.state = state.get();
  row.frequency_penalty = 1;
  row.num_recent = 3;
  for (int again = 0; again < 3; ++again) {
    EXPECT_EQ(Sampling(4, {0.9f, 3, 2, -5}, {row}).Run()[0].token_id, 1);  // 3 - 2, 2 - 1
    EXPECT_EQ(state->recent[33 % kRecentTokens], 1);
    EXPECT_EQ(state.count(1), 0u);
  }
  row.num_recent = 1;
  row.num_settled = 2;  // positions 30 and 31
  EXPECT_EQ(Sampling(4, {1.1f, 3, 2, -5}, {row}).Run()[0].token_id, 0);
  EXPECT_EQ(state.count(1), 1u);
  EXPECT_EQ(state.count(2), 1u);
}

TEST(Sample, LogProbabilitiesStayTheModelsOwn) {
  State state(5);
  state->num_bias = 1;
  state->bias[0] = {3, 100};
  const std::vector<float> logits = {0, 1, 2, -1, 3};
  for (const float temperature : {0.0f, 1.0f}) {
    SampleRow row = Tempered(temperature, 1, 7);
    row.num_top_logprobs = 2;
    const SampleResult plain = Sampling(5, logits, {row}).Run()[0];
    row.state = state.get();
    const SampleResult biased = Sampling(5, logits, {row}).Run()[0];
    EXPECT_EQ(biased.token_id, 3);
    EXPECT_EQ(biased.top_ids[0], 4);
    EXPECT_EQ(biased.top_logprobs[0], plain.top_logprobs[0]);
    EXPECT_NEAR(biased.logprob, plain.top_logprobs[0] - 4, 1e-6);
  }
}

TEST(Sample, TokensHeldBackAreNeverDrawn) {
  State state(5);
  state->num_held_back = 2;
  state->held_back[0] = 4;
  state->held_back[1] = 2;
  state->held_back_end = uint64_t{1} << 40;
  for (const float temperature : {0.3f, 1.0f, 100.0f}) {
    SampleRow row = Tempered(temperature, 2, 0);
    row.state = state.get();
    for (row.counter = 0; row.counter < 300; ++row.counter) {
      row.top_p = row.counter % 2 == 0 ? 1.0f : 0.9f;
      const int32_t drawn = Sampling(5, {0, 1, 2, -1, 3}, {row}).Run()[0].token_id;
      EXPECT_TRUE(drawn != 4 && drawn != 2) << drawn;
    }
  }
}

}  // namespace
}  // namespace headroom::kernels
