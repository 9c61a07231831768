#include "services/coordinator/step_pipeline.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace headroom::coordinator {

void StepPipeline::Reset() {
  in_flight_.clear();
  to_close_.clear();
}

int StepPipeline::CountInFlight(Kind kind) const {
  return static_cast<int>(std::count_if(in_flight_.begin(), in_flight_.end(),
                                        [kind](const InFlight& f) { return f.kind == kind; }));
}

// A step opens one sequence with a history: the worker has room to fill one. The others follow.
void StepPipeline::OpenOneHistory(const Requests& requests, std::vector<BatchEntry>& batch) {
  bool opens = false;
  std::erase_if(batch, [&](const BatchEntry& entry) {
    const RunningRequest& request = *requests[entry.index];
    const bool opens_too = !request.open_on_worker && request.request().has_history();
    return opens_too && std::exchange(opens, true);
  });
}

void StepPipeline::Abandon(uint64_t sequence_id) {
  v1::StepRequest abandon;
  abandon.add_abandon_sequence_ids(sequence_id);
  send_(std::move(abandon));
}

void StepPipeline::Pump(Requests& requests, uint64_t plan_version) {
  // A chunk that ends a prompt makes room for the token after it at once, so: until nothing goes.
  for (bool sent = true; sent;) {
    sent = false;
    for (const Kind kind : {kTokens, kChunk}) {
      if (CountInFlight(kind) < kDepth && SendOne(kind, requests, plan_version)) sent = true;
    }
  }
}

bool StepPipeline::SendOne(Kind kind, Requests& requests, uint64_t plan_version) {
  std::vector<SequenceProgress> progress;
  for (const auto& request : requests) progress.push_back(request->progress());
  std::vector<BatchEntry> batch;
  if (!progress.empty()) {
    batch = kind == kChunk ? ComposeChunkStep(progress, limits_)
                           : ComposeTokenStep(progress, limits_,
                                              next_turn_ % static_cast<int>(progress.size()));
  }
  // A step that opens or closes a sequence waits at the worker until a chunk's layers are enqueued,
  // and later steps of tokens behind it: an opening chunk goes out only when no chunk is in flight.
  if (kind == kChunk && !batch.empty() && !requests[batch[0].index]->open_on_worker &&
      CountInFlight(kChunk) > 0) {
    return false;
  }
  OpenOneHistory(requests, batch);
  if (batch.empty() && (kind == kChunk || to_close_.empty())) return false;

  v1::StepRequest step;
  InFlight flight;
  flight.number = next_number_++;
  flight.kind = kind;
  flight.closes.swap(to_close_);
  step.set_number(flight.number);
  step.set_attempt(0);
  step.set_plan_version(plan_version);
  step.mutable_close_sequence_ids()->Add(flight.closes.begin(), flight.closes.end());
  for (const BatchEntry& entry : batch) Add(*requests[entry.index], entry.piece, step, flight);
  if (kind == kTokens && !batch.empty()) next_turn_ = batch.back().index + 1;
  in_flight_.push_back(std::move(flight));
  send_(std::move(step));
  return true;
}

void StepPipeline::Add(RunningRequest& request, const Piece& piece, v1::StepRequest& step,
                       InFlight& flight) {
  const std::vector<v1::ExtentRun>& runs = request.sequence().runs;
  if (!request.open_on_worker) {
    v1::OpenSequence* const open = step.add_open_sequences();
    open->set_sequence_id(request.sequence().id);
    open->set_sealed_tokens(request.progress().tail_begin);
    open->mutable_runs()->Add(runs.begin(), runs.end());
    if (request.request().has_history()) request.FillHistory(open->mutable_history());
    request.open_on_worker = true;
  } else {
    for (size_t run = request.runs_on_worker; run < runs.size(); ++run) {
      v1::ExtentGrant* const grant = step.add_grants();
      grant->set_sequence_id(request.sequence().id);
      *grant->mutable_run() = runs[run];
    }
  }
  request.runs_on_worker = runs.size();
  request.Send(piece, step.add_sequences());
  flight.entries.push_back({&request, piece});
}

StepPipeline::Returned StepPipeline::Receive(const v1::StepResponse& response, absl::Time now) {
  Returned returned;
  const auto at = std::find_if(in_flight_.begin(), in_flight_.end(), [&](const InFlight& flight) {
    return flight.number == response.number();
  });
  if (at == in_flight_.end()) {
    returned.status = absl::InternalError(
        absl::StrCat("the worker answered step ", response.number(), ", which is not in flight"));
    return returned;
  }
  const InFlight flight = std::move(*at);
  in_flight_.erase(at);
  ++steps_returned_;
  if (response.code() != 0 && response.retry()) {
    for (const Entry& entry : flight.entries) entry.request->TakeBack(entry.piece);
    returned.retry = true;
    returned.abandoned = response.code() == static_cast<int>(absl::StatusCode::kCancelled);
    returned.closed = flight.closes;
    return returned;
  }
  if (response.code() != 0) {
    returned.status = absl::Status(static_cast<absl::StatusCode>(response.code()),
                                   absl::StrCat("step ", flight.number, ": ", response.message()));
  } else if (response.results_size() != static_cast<int>(flight.entries.size())) {
    returned.status = absl::InternalError(
        absl::StrCat("step ", flight.number, " had ", flight.entries.size(),
                     " sequences, the worker answered for ", response.results_size()));
  }
  for (size_t i = 0; i < flight.entries.size() && returned.status.ok(); ++i) {
    const Entry& entry = flight.entries[i];
    const v1::StepSequenceResult& result = response.results(static_cast<int>(i));
    if (result.sequence_id() != entry.request->sequence().id ||
        result.has_token() != entry.piece.draw) {
      returned.status = absl::InternalError(
          absl::StrCat("step ", flight.number, ": the worker's answer for sequence ",
                       entry.request->sequence().id, " is not what was asked for"));
      break;
    }
    entry.request->Receive(entry.piece, result, response, now);
  }
  if (!returned.status.ok()) {
    for (const Entry& entry : flight.entries) returned.failed.push_back(entry.request);
    return returned;
  }
  returned.closed = flight.closes;
  return returned;
}

}  // namespace headroom::coordinator
