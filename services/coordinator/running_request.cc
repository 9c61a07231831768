#include "services/coordinator/running_request.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "services/coordinator/plan_proto.h"

namespace headroom::coordinator {
namespace {

// Adds a step's use of the lanes to a sum over steps. kv_heads, a mean per layer, becomes the mean
// over the `steps` summed so far and this one.
template <typename LaneUses>
void AddLanes(const LaneUses& lanes, int64_t steps,
              google::protobuf::RepeatedPtrField<v1::LaneUse>* sum) {
  for (const v1::LaneUse& use : lanes) {
    auto at = std::find_if(sum->begin(), sum->end(),
                           [&](const v1::LaneUse& other) { return other.lane() == use.lane(); });
    v1::LaneUse* const total = at == sum->end() ? sum->Add() : &*at;
    total->set_lane(use.lane());
    total->set_kv_heads((total->kv_heads() * static_cast<double>(steps) + use.kv_heads()) /
                        static_cast<double>(steps + 1));
    total->set_bytes(total->bytes() + use.bytes());
    total->set_busy_ns(total->busy_ns() + use.busy_ns());
    total->set_idle_ns(total->idle_ns() + use.idle_ns());
  }
}

}  // namespace

RunningRequest::RunningRequest(std::unique_ptr<Request> request, std::shared_ptr<RequestSink> sink,
                               std::unique_ptr<TokenDecoder> decoder, Sequence sequence,
                               int64_t cached_tokens)
    : request_(std::move(request)),
      sink_(std::move(sink)),
      decoder_(std::move(decoder)),
      cached_tokens_(cached_tokens),
      sequence_(std::move(sequence)),
      stop_finder_(request_->stop_strings, request_->include_stop) {
  sequence_.token_ids = request_->prompt;
  progress_.known_tokens = progress_.prompt_tokens = prompt_tokens();
  progress_.end_pos = request_->end_pos();
  progress_.capacity_tokens = sequence_.capacity_tokens();
  progress_.chunk_tokens = request_->chunk_tokens;
  progress_.draws = request_->max_tokens > 0;
  progress_.scores = request_->score_prompt;
  progress_.next_pos = progress_.tail_begin = progress_.sealed_tokens = cached_tokens;
  progress_.committed_tokens = std::min(sequence_.committed_tokens, cached_tokens);
}

// ---------------------------------------------------------------- steps

void RunningRequest::FillHistory(v1::DrawHistory* out) const {
  const auto answer = sequence_.token_ids.begin() + prompt_tokens();
  std::vector<int32_t> prompt(sequence_.token_ids.begin(), answer);
  std::sort(prompt.begin(), prompt.end());
  prompt.erase(std::unique(prompt.begin(), prompt.end()), prompt.end());
  out->mutable_prompt_token_ids()->Add(prompt.begin(), prompt.end());
  out->mutable_drawn_token_ids()->Add(answer, sequence_.token_ids.end());
  out->set_known_tokens(progress_.known_tokens);
  *out->mutable_logit_bias() = request_->logit_bias;
  out->mutable_held_back_token_ids()->Add(request_->held_back_token_ids.begin(),
                                          request_->held_back_token_ids.end());
  out->set_held_back_end(prompt_tokens() + request_->min_tokens);
}

void RunningRequest::Send(const Piece& piece, v1::StepSequence* out) {
  out->set_sequence_id(sequence_.id);
  out->set_first_pos(piece.first_pos);
  out->set_sealed_tokens(piece.sealed_tokens);
  const auto ids = sequence_.token_ids.begin() + piece.first_pos;
  if (!piece.last_drawn) out->mutable_token_ids()->Add(ids, ids + piece.count);
  if (piece.draw) {
    *out->mutable_sampling() = request_->sampling;
    if (request_->has_history()) out->set_known_tokens(progress_.known_tokens);
  }
  if (piece.num_scores > 0) {
    out->mutable_score_token_ids()->Add(ids + 1, ids + 1 + piece.num_scores);
  }
  out->set_num_top_logprobs(request_->num_top_logprobs);
  Advance(progress_, piece);
  ++rows_in_flight_;
  if (piece.count > 1) ++chunks_in_flight_;
  progress_.chunk_in_flight = chunks_in_flight_ > 0;
  if (!first_step_.has_value()) first_step_ = absl::Now();
}

void RunningRequest::TakeBack(const Piece& piece) {
  --rows_in_flight_;
  if (piece.count > 1) --chunks_in_flight_;
  progress_.chunk_in_flight = chunks_in_flight_ > 0;
  progress_.next_pos = std::min(progress_.next_pos, piece.first_pos);
  taking_back_ = rows_in_flight_ > 0;
  explanation.set_retried_steps(explanation.retried_steps() + 1);
}

void RunningRequest::Receive(const Piece& piece, const v1::StepSequenceResult& result,
                             const v1::StepResponse& step, absl::Time now) {
  --rows_in_flight_;
  if (piece.count > 1) --chunks_in_flight_;
  progress_.chunk_in_flight = chunks_in_flight_ > 0;
  failures_ = 0;
  sequence_.sealed_tokens = std::max(sequence_.sealed_tokens, result.sealed_tokens());
  progress_.sealed_tokens = sequence_.sealed_tokens;
  if (ended_) return;  // a step that was in flight when it stopped
  Account(step);
  TakeScores(piece, result);
  if (piece.end_pos() >= prompt_tokens() && generated_ == 0) prompt_done_ = now;
  if (result.has_token()) {
    TakeToken(result.token(), now);
  } else if (request_->max_tokens == 0 && piece.end_pos() >= prompt_tokens()) {
    End(absl::OkStatus(), v1::FINISH_REASON_LENGTH);
  }
}

void RunningRequest::Restart() {
  rows_in_flight_ = chunks_in_flight_ = 0;
  taking_back_ = false;
  progress_.chunk_in_flight = false;
  progress_.sealed_tokens = sequence_.sealed_tokens;
  progress_.committed_tokens = sequence_.committed_tokens;
  progress_.capacity_tokens = sequence_.capacity_tokens();
  // At least one position is computed again: its logits draw the next token.
  progress_.next_pos = FloorToBlock(std::min(sequence_.sealed_tokens, progress_.known_tokens - 1));
  progress_.tail_begin = progress_.next_pos;
  runs_on_worker = 0;
  open_on_worker = abandon_sent = false;
}

void RunningRequest::AddRun(v1::ExtentRun run) {
  sequence_.runs.push_back(std::move(run));
  progress_.capacity_tokens = sequence_.capacity_tokens();
}

void RunningRequest::Committed(int64_t tokens) {
  // The answer may be older than a truncation.
  sequence_.committed_tokens =
      std::min(std::max(sequence_.committed_tokens, tokens), sequence_.sealed_tokens);
  progress_.committed_tokens = sequence_.committed_tokens;
}

SequenceShape RunningRequest::Shape(const ExtentRules& rules, int64_t horizon_tokens) const {
  SequenceShape shape;
  shape.tokens = prompt_tokens();
  for (const v1::ExtentRun& run : sequence_.runs) shape.runs.push_back(ShapeOf(run));
  for (int64_t have = sequence_.capacity_tokens(), more;
       (more = NextLeaseTokens(rules, have, horizon_tokens, progress_.end_pos,
                               reserved_tokens)) > 0;
       have += more) {
    shape.runs.push_back({have, more});
  }
  return shape;
}

// ---------------------------------------------------------------- results

// After a restart, positions that were scored before may be scored again: the first record counts.
void RunningRequest::TakeScores(const Piece& piece, const v1::StepSequenceResult& result) {
  for (int i = 0; i < result.scored_size() && i < piece.num_scores; ++i) {
    const int64_t scored_pos = piece.first_pos + 1 + i;  // the first prompt token has no score
    if (scored_pos - 1 == static_cast<int64_t>(prompt_scores_.size())) {
      prompt_scores_.push_back(result.scored(i));
    }
  }
}

void RunningRequest::TakeToken(const v1::TokenRecord& token, absl::Time now) {
  if (!first_token_.has_value()) first_token_ = now;
  last_token_ = now;
  sequence_.token_ids.push_back(token.token_id());
  progress_.known_tokens = static_cast<int64_t>(sequence_.token_ids.size());
  v1::Delta delta;
  delta.set_index(request_->index);
  v1::TokenRecord* const record = delta.add_tokens();
  if (request_->want_logprobs) {
    *record = token;
  } else {
    record->set_token_id(token.token_id());
  }
  stop_ = StopsAt(token.token_id());
  ++generated_;
  if (!stop_.has_value() && decoder_ != nullptr) {
    StopFinder::Found found = stop_finder_.Push(decoder_->Push(token.token_id()));
    delta.set_text(std::move(found.text));
    if (found.stop.has_value()) stop_.emplace().set_stop_string(*std::move(found.stop));
  }
  sink_->OnDelta(std::move(delta));
  if (stop_.has_value()) {
    End(absl::OkStatus(), v1::FINISH_REASON_STOP);
  } else if (generated_ >= request_->max_tokens) {
    End(absl::OkStatus(), v1::FINISH_REASON_LENGTH);
  }
}

std::optional<v1::StopMatch> RunningRequest::StopsAt(int32_t token_id) const {
  const auto among = [token_id](const std::vector<int32_t>& ids) {
    return std::find(ids.begin(), ids.end(), token_id) != ids.end();
  };
  v1::StopMatch match;
  if (among(request_->eos_token_ids) && generated_ >= request_->min_tokens) {
    match.set_eos_token_id(token_id);
    return match;
  }
  if (among(request_->stop_token_ids) && generated_ >= request_->min_tokens) {
    match.set_stop_token_id(token_id);
    return match;
  }
  return std::nullopt;
}

// A step's lanes are measured for its whole batch. With one running request they are exactly its
// own; with several each of them shows the whole step.
void RunningRequest::Account(const v1::StepResponse& step) {
  const bool prefill = generated_ == 0;
  const int64_t steps = prefill ? prefill_steps_++ : decode_steps_++;
  AddLanes(step.lanes(), steps,
           prefill ? explanation.mutable_prefill_lanes() : explanation.mutable_decode_lanes());
  explanation.set_sealed_bytes(explanation.sealed_bytes() + step.sealed_bytes());
  explanation.set_fetch_wait_ns(explanation.fetch_wait_ns() + step.fetch_wait_ns());
  explanation.set_in_place_wait_ns(explanation.in_place_wait_ns() + step.in_place_wait_ns());
  explanation.set_steps(explanation.steps() + 1);
  if (step.has_memory()) {
    explanation.set_budget_bytes(step.memory().budget_bytes());
    explanation.set_peak_bytes(
        std::max(explanation.peak_bytes(), step.memory().high_water_bytes()));
  }
}

// ---------------------------------------------------------------- the client

void RunningRequest::Accept() {
  if (accepted_) return;
  accepted_ = true;
  sink_->OnAccepted();
}

void RunningRequest::End(const absl::Status& status, v1::FinishReason reason) {
  if (ended_) return;
  ended_ = true;
  progress_.may_run = false;
  // What was held back as the possible beginning of a stop string is text after all.
  if (decoder_ != nullptr && status.ok() && !(stop_.has_value() && stop_->has_stop_string())) {
    std::string text = stop_finder_.Push(decoder_->Finish()).text + stop_finder_.Finish();
    if (!text.empty()) {
      v1::Delta delta;
      delta.set_index(request_->index);
      delta.set_text(std::move(text));
      sink_->OnDelta(std::move(delta));
    }
  }
  sink_->OnFinished(status, Summary(reason));
}

v1::Finished RunningRequest::Summary(v1::FinishReason reason) const {
  v1::Finished finished;
  finished.set_index(request_->index);
  finished.set_seed(request_->sampling.seed());
  finished.set_reason(reason);
  if (stop_.has_value()) *finished.mutable_stop() = *stop_;
  finished.mutable_usage()->set_prompt_tokens(prompt_tokens());
  finished.mutable_usage()->set_cached_tokens(cached_tokens_);
  finished.mutable_usage()->set_completion_tokens(generated_);
  const auto set_timings = [&](v1::Timings& timings) {
    const absl::Time arrival = request_->arrival;
    if (!first_step_.has_value()) return;
    timings.set_queue_ns(absl::ToInt64Nanoseconds(*first_step_ - arrival));
    if (prompt_done_ > absl::UnixEpoch()) {
      timings.set_prefill_ns(absl::ToInt64Nanoseconds(prompt_done_ - *first_step_));
    }
    if (!first_token_.has_value()) return;
    timings.set_ttft_ns(absl::ToInt64Nanoseconds(*first_token_ - arrival));
    timings.set_decode_ns(absl::ToInt64Nanoseconds(last_token_ - *first_token_));
    if (generated_ > 1) timings.set_tpot_ns(timings.decode_ns() / (generated_ - 1));
  };
  set_timings(*finished.mutable_timings());
  if (request_->explain) *finished.mutable_explanation() = explanation;
  if (request_->score_prompt) {
    finished.mutable_prompt_logprobs()->Add(prompt_scores_.begin(), prompt_scores_.end());
  }
  return finished;
}

}  // namespace headroom::coordinator
