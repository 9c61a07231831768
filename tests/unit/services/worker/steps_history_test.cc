// Draws that the tokens before them have a say in: penalties, and steps that are run again.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "tests/unit/services/worker/steps_test_util.h"

namespace headroom {
namespace {

class HistorySteps : public Steps {};

// What `prompt` and the tokens of `drawn` make of it.
DrawHistory HistoryOf(const std::vector<int32_t>& prompt,
                      const std::vector<kernels::SampleResult>& drawn = {}) {
  DrawHistory history;
  history.prompt_token_ids = prompt;
  for (const auto& token : drawn) history.drawn_token_ids.push_back(token.token_id);
  history.known_tokens = static_cast<int64_t>(prompt.size() + drawn.size());
  return history;
}

// The token of each step is the likeliest one less the penalties for those before it, also where it
// was drawn before the one in front of it was known.
TEST_F(HistorySteps, PenaltiesCountWhatHasJustBeenDrawn) {
  TestRequest request;
  request.prompt = RandomTokens(3, 100, harness_->config().vocab);
  request.num_draws = 60;
  request.num_top_logprobs = 20;
  const auto plain = harness_->RunOne(request);
  ASSERT_TRUE(plain.ok()) << plain.status();
  request.frequency_penalty = 1.5f;
  request.history = HistoryOf(request.prompt);
  RunOptions one_at_a_time;
  one_at_a_time.depth = 1;
  const auto answer = harness_->RunOne(request, one_at_a_time);
  ASSERT_TRUE(answer.ok()) << answer.status();
  EXPECT_NE(Difference(*plain, *answer), "");
  std::map<int32_t, int> counts;
  for (const kernels::SampleResult& token : answer->drawn) {
    const auto adjusted = [&](int32_t id, float logprob) {
      return logprob - 1.5f * static_cast<float>(counts[id]);
    };
    for (int32_t i = 0; i < token.num_top; ++i) {
      EXPECT_GE(adjusted(token.token_id, token.logprob),
                adjusted(token.top_ids[i], token.top_logprobs[i]) - 1e-4f);
    }
    ++counts[token.token_id];
  }
  const auto two_deep = harness_->RunOne(request);
  ASSERT_TRUE(two_deep.ok()) << two_deep.status();
  EXPECT_EQ(Difference(*answer, *two_deep), "");
  // Beside others, each with a history of its own, in one batch.
  TestRequest other = request;
  other.prompt = RandomTokens(4, 70, harness_->config().vocab);
  other.history = HistoryOf(other.prompt);
  other.repetition_penalty = 1.2f;
  other.temperature = 0.8f;
  const auto alone = harness_->RunOne(other);
  const auto together = harness_->Run({other, request});
  ASSERT_TRUE(alone.ok() && together.ok()) << together.status();
  EXPECT_EQ(Difference(*alone, (*together)[0]), "");
  EXPECT_EQ(Difference(*answer, (*together)[1]), "");
}

// As after a loss: the answer so far comes back with the opening.
TEST_F(HistorySteps, AnAnswerGoesOnUnderItsPenalties) {
  TestRequest request;
  request.prompt = RandomTokens(5, 90, harness_->config().vocab);
  request.score = false;
  request.num_draws = 30;
  request.temperature = 0.9f;
  request.seed = 11;
  request.frequency_penalty = 1.0f;
  request.repetition_penalty = 1.3f;
  request.history = HistoryOf(request.prompt);
  request.history->held_back_token_ids = {1, 2, 3};
  request.history->held_back_end = 110;
  const auto whole = harness_->RunOne(request);
  ASSERT_TRUE(whole.ok()) << whole.status();
  const std::vector<kernels::SampleResult> first(whole->drawn.begin(), whole->drawn.begin() + 12);
  TestRequest rest = request;
  rest.history = HistoryOf(request.prompt, first);
  rest.history->held_back_token_ids = request.history->held_back_token_ids;
  rest.history->held_back_end = 110;
  for (const kernels::SampleResult& token : first) rest.prompt.push_back(token.token_id);
  rest.num_draws = 18;
  const auto second = harness_->RunOne(rest);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(Difference({whole->drawn.begin() + 12, whole->drawn.end()}, second->drawn), "");
}

TEST_F(HistorySteps, ARepeatedDrawCountsOnce) {
  const auto run = [&](uint64_t id, bool repeat) {
    std::vector<kernels::SampleResult> drawn;
    for (int64_t pos = 100; pos < 140; ++pos) {
      std::unique_ptr<Step> step = pos == 100 ? Opening(id, 640, 100) : StepOf(Piece(id, 0, 1));
      StepSequence& piece = step->sequences[0];
      if (pos == 100) {
        piece.token_ids = RandomTokens(6, 100, harness_->config().vocab);
        step->open[0].history = HistoryOf(piece.token_ids);
      } else {
        piece.first_pos = pos - 1;
        piece.sealed_tokens = FloorToBlock(pos - 1);
        piece.token_ids = {drawn.back().token_id};
      }
      piece.known_tokens = std::max<int64_t>(100, pos - 1);
      piece.num_top_logprobs = 5;
      piece.sampling.frequency_penalty = 2;
      piece.sampling.repetition_penalty = 1.1f;
      auto again = std::make_unique<Step>(*step);
      step->number = again->number = harness_->NewStepNumber();
      const auto tokens = Tokens(std::move(step));
      again->attempt = 1;
      if (repeat) {
        EXPECT_EQ(Difference(tokens, Tokens(std::move(again))), "") << pos;
      }
      if (tokens.empty()) return drawn;
      drawn.push_back(tokens[0]);
    }
    return drawn;
  };
  const auto once = run(1, false);
  EXPECT_EQ(once.size(), 40u);
  EXPECT_EQ(Difference(once, run(2, true)), "");
}

TEST_F(HistorySteps, HistoriesThatAreWrongAreNamed) {
  const auto opening = [&](DrawHistory history) {
    auto step = Opening(7, 128, 10);
    step->open[0].history = std::move(history);
    step->sequences[0].known_tokens = 10;
    return step;
  };
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  const auto vocab = static_cast<int32_t>(harness_->config().vocab);
  DrawHistory wrong;
  wrong.bias.push_back({vocab, 1.0f});
  ExpectFails(opening(wrong), kInvalid, "of a vocabulary of");
  wrong = DrawHistory();
  wrong.drawn_token_ids = {-1};
  ExpectFails(opening(wrong), kInvalid, "token id -1");
  auto two = opening(DrawHistory());
  two->open.push_back(two->open[0]);
  two->open[1].sequence_id = 8;
  ExpectFails(std::move(two), kInvalid, "more than one sequence with a history");
  DrawHistory right;
  right.known_tokens = 10;
  ASSERT_EQ(Tokens(opening(right)).size(), 1u);
  auto draw = StepOf(Piece(7, 10, 20));
  draw->sequences[0].known_tokens = 31;
  ExpectFails(std::move(draw), kInvalid, "a draw at position 30 with known_tokens 31");
  draw = StepOf(Piece(7, 10, 20));
  ExpectFails(std::move(draw), kInvalid, "of which 10 are counted");
  auto plain = Opening(9, 128, 10);
  plain->sequences[0].sampling.presence_penalty = 1;
  ExpectFails(std::move(plain), kInvalid, "opened without a history");
}

}  // namespace
}  // namespace headroom
