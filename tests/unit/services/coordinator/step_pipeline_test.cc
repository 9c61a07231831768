// Steps in flight and what becomes of them, answer by answer: a worker that is this file.
#include "services/coordinator/step_pipeline.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/kv_layout.h"

namespace headroom::coordinator {
namespace {

class Client : public RequestSink {
 public:
  void OnAccepted() override {}
  void OnDelta(v1::Delta delta) override {
    for (const v1::TokenRecord& token : delta.tokens()) tokens.push_back(token.token_id());
  }
  void OnFinished(const absl::Status& status, v1::Finished finished) override {
    ++ends;
    end_status = status;
    end = std::move(finished);
  }
  bool CanTake() const override { return true; }

  std::vector<int32_t> tokens;
  int ends = 0;
  absl::Status end_status;
  v1::Finished end;
};

// The token that follows position `pos - 1`.
int32_t TokenAt(int64_t pos) { return static_cast<int32_t>(1000 + pos); }

class StepPipelineTest : public testing::Test {
 protected:
  StepPipelineTest()
      : pipeline_([this](v1::StepRequest step) { sent_.push_back(std::move(step)); }) {
    pipeline_.set_limits({128, 8, 64});
  }

  RunningRequest& Add(int64_t prompt_tokens, int64_t max_tokens, bool score = false,
                      float frequency_penalty = 0) {
    auto request = std::make_unique<Request>();
    request->sampling.set_frequency_penalty(frequency_penalty);
    request->logit_bias[5] = -1;
    if (frequency_penalty == 0) request->logit_bias.clear();
    request->id = absl::StrCat("request-", requests_.size());
    request->prompt.assign(prompt_tokens, 7);
    request->max_tokens = max_tokens;
    request->score_prompt = score;
    request->chunk_tokens = 128;
    Sequence sequence;
    sequence.id = 1 + requests_.size();
    clients_.push_back(std::make_shared<Client>());
    requests_.push_back(std::make_unique<RunningRequest>(std::move(request), clients_.back(),
                                                         nullptr, std::move(sequence), 0));
    v1::ExtentRun run;
    run.set_capacity_tokens(2048);
    requests_.back()->AddRun(std::move(run));
    return *requests_.back();
  }
  // As the scheduler's loop does after whatever has happened.
  void Pump() {
    for (auto& request : requests_) {
      request->set_may_run(!request->ended() && !request->taking_back());
    }
    pipeline_.Pump(requests_, 1);
  }
  const v1::StepRequest& Sent(uint64_t number) { return sent_.at(number - 1); }
  StepPipeline::Returned Answer(uint64_t number) {
    const v1::StepRequest& step = Sent(number);
    v1::StepResponse response;
    response.set_number(number);
    for (const v1::StepSequence& sequence : step.sequences()) {
      const int64_t end = sequence.first_pos() + std::max(1, sequence.token_ids_size());
      v1::StepSequenceResult* const result = response.add_results();
      result->set_sequence_id(sequence.sequence_id());
      result->set_sealed_tokens(FloorToBlock(end));
      if (sequence.has_sampling()) result->mutable_token()->set_token_id(TokenAt(end));
      for (const int32_t id : sequence.score_token_ids()) {
        result->add_scored()->set_token_id(id);
      }
    }
    return pipeline_.Receive(response, absl::Now());
  }
  StepPipeline::Returned Retry(uint64_t number, int code = 14) {
    v1::StepResponse response;
    response.set_number(number);
    response.set_code(code);
    response.set_message("keys in place were not attended to in time");
    response.set_retry(true);
    return pipeline_.Receive(response, absl::Now());
  }
  // "sequence@first_pos+count" of each sequence of a step; '?' for a token that is not known yet.
  std::string Of(uint64_t number) {
    std::string text;
    for (const v1::StepSequence& sequence : Sent(number).sequences()) {
      absl::StrAppend(&text, text.empty() ? "" : " ", sequence.sequence_id(), "@",
                      sequence.first_pos(), "+",
                      sequence.token_ids().empty() ? "?" : absl::StrCat(sequence.token_ids_size()));
    }
    return text;
  }

  std::vector<v1::StepRequest> sent_;
  std::vector<std::shared_ptr<Client>> clients_;
  StepPipeline::Requests requests_;
  StepPipeline pipeline_;
};

TEST_F(StepPipelineTest, ADiscardedTokenIsSentAgainWhenWhatWentOnFromItHasReturned) {
  const RunningRequest& request = Add(100, 10);
  Pump();
  ASSERT_EQ(sent_.size(), 3u) << "a chunk, and two tokens after it";
  EXPECT_EQ(Of(1), "1@0+100");
  EXPECT_EQ(Of(2), "1@100+?");
  EXPECT_EQ(Of(3), "1@101+?");
  EXPECT_TRUE(Answer(1).status.ok());
  const StepPipeline::Returned returned = Retry(2);
  EXPECT_TRUE(returned.status.ok()) << returned.status;
  EXPECT_TRUE(returned.retry);
  EXPECT_TRUE(returned.failed.empty());
  EXPECT_TRUE(request.taking_back());
  EXPECT_EQ(request.progress().next_pos, 100);
  Pump();
  EXPECT_EQ(sent_.size(), 3u) << "another step of the sequence is still in flight";
  EXPECT_TRUE(Retry(3).retry);
  EXPECT_FALSE(request.taking_back());
  EXPECT_EQ(request.progress().next_pos, 100);
  EXPECT_EQ(request.rows_in_flight(), 0);
  EXPECT_TRUE(pipeline_.idle());
  Pump();
  ASSERT_EQ(sent_.size(), 5u) << "two in flight again";
  ASSERT_EQ(Of(4), "1@100+1");
  EXPECT_EQ(Sent(4).sequences(0).token_ids(0), TokenAt(100)) << "it is known by now";
  EXPECT_EQ(Of(5), "1@101+?");
  EXPECT_EQ(Sent(4).open_sequences_size(), 0) << "the worker still has it";
  EXPECT_EQ(Sent(4).grants_size(), 0);
  Answer(4);
  Answer(5);
  EXPECT_EQ(clients_[0]->tokens, (std::vector<int32_t>{TokenAt(100), TokenAt(101), TokenAt(102)}));
}

TEST_F(StepPipelineTest, AStepThatIsDiscardedAgainIsSentAgain) {
  const RunningRequest& request = Add(100, 3);
  Pump();
  Answer(1);
  Pump();
  for (uint64_t number = 2; number < 20; number += 2) {
    EXPECT_EQ(Of(number), number == 2 ? "1@100+?" : "1@100+1");
    EXPECT_EQ(Of(number + 1), "1@101+?");
    Retry(number);
    Retry(number + 1);
    Pump();
  }
  Answer(20);
  Answer(21);
  EXPECT_TRUE(request.ended());
  EXPECT_EQ(clients_[0]->ends, 1);
  EXPECT_TRUE(clients_[0]->end_status.ok());
  EXPECT_EQ(clients_[0]->tokens, (std::vector<int32_t>{TokenAt(100), TokenAt(101), TokenAt(102)}));
}

// Once the first of a pair has worked, two go out at a time as ever: nothing is left taken back.
TEST_F(StepPipelineTest, AfterADiscardedStepItRunsTwoAheadAgain) {
  Add(100, 50);
  Pump();
  Answer(1);
  Pump();
  Retry(2);
  Retry(3);
  Pump();
  for (uint64_t number = 4; number < 20; ++number) {
    ASSERT_EQ(sent_.size(), number + 1) << "two are in flight";
    Answer(number);
    Pump();
  }
}

TEST_F(StepPipelineTest, DiscardedChunksAreSentAgainFromTheFirst) {
  const RunningRequest& request = Add(400, 10);
  Pump();
  ASSERT_EQ(sent_.size(), 2u);
  Answer(1);
  Pump();
  ASSERT_EQ(sent_.size(), 3u);
  EXPECT_EQ(Of(2), "1@128+128");
  EXPECT_EQ(Of(3), "1@256+128");
  EXPECT_TRUE(Retry(2).retry);
  EXPECT_TRUE(request.progress().chunk_in_flight);
  EXPECT_EQ(request.progress().next_pos, 128);
  Pump();
  EXPECT_EQ(sent_.size(), 3u);
  EXPECT_TRUE(Retry(3).retry);
  EXPECT_FALSE(request.progress().chunk_in_flight);
  EXPECT_EQ(request.progress().next_pos, 128);
  Pump();
  EXPECT_EQ(Of(4), "1@128+128");
  EXPECT_EQ(Of(5), "1@256+128");
  EXPECT_EQ(Sent(4).sequences(0).sealed_tokens(), 128);
  EXPECT_EQ(request.sequence().sealed_tokens, 128) << "what was discarded has sealed nothing";
  Answer(4);
  Answer(5);
  EXPECT_EQ(request.sequence().sealed_tokens, 384);
}

// The last chunk draws, and tokens go out behind it: all are taken back.
TEST_F(StepPipelineTest, ADiscardedChunkTakesTheTokensBehindItAlong) {
  const RunningRequest& request = Add(200, 10);
  Pump();
  Answer(1);
  ASSERT_EQ(sent_.size(), 4u);
  EXPECT_EQ(Of(2), "1@128+72");
  EXPECT_EQ(Of(3), "1@200+?");
  EXPECT_EQ(Of(4), "1@201+?");
  Retry(2);
  Retry(3);
  EXPECT_TRUE(request.taking_back());
  Retry(4);
  EXPECT_FALSE(request.taking_back());
  Pump();
  ASSERT_EQ(sent_.size(), 7u);
  EXPECT_EQ(Of(5), "1@128+72");
  EXPECT_TRUE(Sent(5).sequences(0).has_sampling());
  EXPECT_EQ(Of(6), "1@200+?");
  Answer(5);
  Answer(6);
  EXPECT_EQ(clients_[0]->tokens, (std::vector<int32_t>{TokenAt(200), TokenAt(201)}));
}

TEST_F(StepPipelineTest, TheOpeningChunkIsNotOpenedTwice) {
  Add(100, 2);
  Pump();
  EXPECT_EQ(Sent(1).open_sequences_size(), 1);
  for (const uint64_t number : {1, 2}) Retry(number);
  Pump();
  EXPECT_EQ(Of(3), "1@0+100");
  EXPECT_EQ(Sent(3).open_sequences_size(), 0);
}

// What a discarded step has brought beside its work has been done: runs are granted, sequences are
// closed.
TEST_F(StepPipelineTest, GrantsAndClosesOfADiscardedStepHaveBeenDone) {
  RunningRequest& request = Add(100, 10);
  Pump();
  Answer(1);
  v1::ExtentRun run;
  run.set_first_pos(2048);
  run.set_capacity_tokens(64);
  request.AddRun(std::move(run));
  pipeline_.Close(77);
  Answer(2);
  Pump();
  ASSERT_EQ(sent_.size(), 4u);
  ASSERT_EQ(Sent(4).grants_size(), 1);
  ASSERT_EQ(Sent(4).close_sequence_ids_size(), 1);
  EXPECT_TRUE(Retry(3).closed.empty());
  const StepPipeline::Returned returned = Retry(4);
  EXPECT_TRUE(returned.retry);
  EXPECT_EQ(returned.closed, std::vector<uint64_t>{77});
  Pump();
  ASSERT_GE(sent_.size(), 5u);
  EXPECT_EQ(Of(5), "1@101+1");
  EXPECT_EQ(Sent(5).grants_size(), 0);
  EXPECT_EQ(Sent(5).close_sequence_ids_size(), 0);
}

TEST_F(StepPipelineTest, EveryRequestOfADiscardedStepIsTakenBackAndNoOther) {
  const RunningRequest& first = Add(10, 100);
  const RunningRequest& second = Add(20, 100);
  uint64_t answered = 0;
  const auto answer_next = [&] {
    EXPECT_TRUE(Answer(++answered).status.ok());
    Pump();
  };
  Pump();
  while (answered < 50 && Sent(answered + 1).sequences_size() < 2) answer_next();
  // Tokens of both go out together now, and chunks of a third beside them.
  const RunningRequest& third = Add(300, 10);
  Pump();
  ASSERT_EQ(Of(sent_.size()), "3@128+128");
  ASSERT_EQ(Sent(answered + 1).sequences_size(), 2);
  std::map<uint64_t, int64_t> first_pos;  // by sequence
  for (const v1::StepSequence& sequence : Sent(answered + 1).sequences()) {
    first_pos[sequence.sequence_id()] = sequence.first_pos();
  }
  EXPECT_TRUE(Retry(answered + 1).retry);
  EXPECT_TRUE(first.taking_back());
  EXPECT_TRUE(second.taking_back());
  EXPECT_EQ(first.progress().next_pos, first_pos.at(1));
  EXPECT_EQ(second.progress().next_pos, first_pos.at(2));
  EXPECT_FALSE(third.taking_back());
  EXPECT_EQ(third.progress().next_pos, 256);
  EXPECT_EQ(third.rows_in_flight(), 2);
}

TEST_F(StepPipelineTest, PromptScoresOfDiscardedChunksCountOnce) {
  Add(300, 0, /*score=*/true);
  Pump();
  for (uint64_t number = 1; number <= sent_.size() && clients_[0]->ends == 0; ++number) {
    if (number % 4 != 2) {
      Answer(number);
    } else {  // with what is in flight behind it
      for (; number < sent_.size(); ++number) Retry(number);
      Retry(number);
    }
    Pump();
  }
  EXPECT_EQ(clients_[0]->ends, 1);
  EXPECT_EQ(clients_[0]->end.prompt_logprobs_size(), 299);
}

TEST_F(StepPipelineTest, ARequestThatHasEndedIsTakenBackQuietly) {
  RunningRequest& request = Add(100, 10);
  Pump();
  Answer(1);
  Retry(2);
  request.End(absl::CancelledError("gone"), v1::FINISH_REASON_UNSPECIFIED);
  EXPECT_EQ(request.rows_in_flight(), 1) << "its sequence cannot be closed yet";
  EXPECT_TRUE(Retry(3).retry);
  EXPECT_EQ(request.rows_in_flight(), 0);
  Pump();
  EXPECT_EQ(sent_.size(), 3u);
  EXPECT_EQ(clients_[0]->ends, 1);
  EXPECT_EQ(clients_[0]->tokens.size(), 1u);
}

// A new stream: what was being taken back has been lost, with all that was in flight.
TEST_F(StepPipelineTest, ARestartEndsATakingBack) {
  RunningRequest& request = Add(200, 10);
  Pump();
  Answer(1);
  ASSERT_EQ(sent_.size(), 4u);
  Retry(2);
  EXPECT_TRUE(request.taking_back());
  pipeline_.Reset();
  request.Restart();
  EXPECT_FALSE(request.taking_back());
  EXPECT_EQ(request.progress().next_pos, 128);
  Pump();
  ASSERT_EQ(sent_.size(), 7u);
  EXPECT_EQ(Of(5), "1@128+72");
  EXPECT_EQ(Sent(5).open_sequences_size(), 1);
  EXPECT_EQ(Of(6), "1@200+?");
  Answer(5);
  Answer(6);
  EXPECT_FALSE(request.taking_back()) << "though a step is in flight";
  Pump();
  EXPECT_EQ(sent_.size(), 8u);
}

// The worker is told once what draws go by, and of each token only that it is final.
TEST_F(StepPipelineTest, AHistoryGoesWithTheOpeningAndFinalTokensWithEachDraw) {
  RunningRequest& request = Add(100, 10, /*score=*/false, /*frequency_penalty=*/1);
  Pump();
  ASSERT_EQ(sent_.size(), 3u);
  const v1::DrawHistory first = Sent(1).open_sequences(0).history();
  EXPECT_EQ(first.prompt_token_ids_size(), 1) << "each once";
  EXPECT_EQ(first.drawn_token_ids_size(), 0);
  EXPECT_EQ(first.known_tokens(), 100);
  EXPECT_EQ(first.logit_bias().at(5), -1);
  for (const uint64_t number : {1, 2, 3}) EXPECT_EQ(Sent(number).sequences(0).known_tokens(), 100);
  Answer(1);
  Answer(2);
  Pump();
  ASSERT_EQ(sent_.size(), 4u);
  EXPECT_EQ(Of(4), "1@102+?");
  EXPECT_EQ(Sent(4).sequences(0).known_tokens(), 102);
  EXPECT_EQ(Sent(4).sequences(0).sampling().logit_bias_size(), 0);
  Retry(3);
  Retry(4);
  Pump();
  EXPECT_EQ(Of(5), "1@101+1");
  EXPECT_EQ(Sent(5).sequences(0).known_tokens(), 102);
  // A new stream: with the answer so far.
  Answer(5);
  pipeline_.Reset();
  request.Restart();
  const size_t before = sent_.size();
  Pump();
  ASSERT_EQ(Sent(before + 1).open_sequences_size(), 1);
  const v1::DrawHistory again = Sent(before + 1).open_sequences(0).history();
  EXPECT_EQ(std::vector<int32_t>(again.drawn_token_ids().begin(), again.drawn_token_ids().end()),
            (std::vector<int32_t>{TokenAt(100), TokenAt(101), TokenAt(102)}));
  EXPECT_EQ(again.known_tokens(), 103);
}

TEST_F(StepPipelineTest, AStepOpensOneHistory) {
  for (int i = 0; i < 3; ++i) Add(1, 10, /*score=*/false, /*frequency_penalty=*/1);
  Add(1, 10);
  Pump();
  ASSERT_EQ(sent_.size(), 2u);
  for (const uint64_t number : {1, 2}) {
    int histories = 0;
    for (const v1::OpenSequence& open : Sent(number).open_sequences()) {
      histories += open.has_history();
    }
    EXPECT_EQ(histories, 1);
  }
  Answer(1);
  Pump();
  EXPECT_EQ(Sent(3).open_sequences_size(), 1) << "the last of them";
}

TEST_F(StepPipelineTest, OnlyAnErrorIsARetryAndOnlyOfAStepInFlight) {
  Add(100, 10);
  Pump();
  // A step that has worked is no retry, whatever the flag says; this one has no results.
  const StepPipeline::Returned contradicts = Retry(1, /*code=*/0);
  EXPECT_FALSE(contradicts.retry);
  EXPECT_EQ(contradicts.status.code(), absl::StatusCode::kInternal);
  for (const uint64_t number : {uint64_t{1}, uint64_t{99}}) {
    const StepPipeline::Returned unknown = Retry(number);
    EXPECT_FALSE(unknown.retry);
    EXPECT_EQ(unknown.status.code(), absl::StatusCode::kInternal);
  }
  // An error without the flag is a failure.
  v1::StepResponse failed;
  failed.set_number(2);
  failed.set_code(14);
  const StepPipeline::Returned failure = pipeline_.Receive(failed, absl::Now());
  EXPECT_FALSE(failure.retry);
  EXPECT_EQ(failure.status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(failure.failed, std::vector<RunningRequest*>{requests_[0].get()});
}

}  // namespace
}  // namespace headroom::coordinator
