#include "services/coordinator/generate_service.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"

namespace headroom::coordinator {
namespace {

// To a delta, a message for one answer, or one answer of several.
template <typename Text>
void Append(v1::Delta delta, Text& out) {
  out.mutable_text()->append(delta.text());
  for (v1::TokenRecord& token : *delta.mutable_tokens()) *out.add_tokens() = std::move(token);
}

}  // namespace

void AddErrorMetadata(grpc::CallbackServerContext* context, const std::string& request_id,
                      const absl::Status& status) {
  if (!request_id.empty()) context->AddTrailingMetadata("x-request-id", request_id);
  const std::optional<absl::Duration> delay = RetryAfterOf(status);
  if (delay.has_value()) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms",
                                 absl::StrCat(absl::ToInt64Milliseconds(*delay)));
  }
}

// ---------------------------------------------------------------- Generate

GenerateStream::GenerateStream(grpc::CallbackServerContext* context, Scheduler* scheduler,
                               const Request& request)
    : context_(context),
      scheduler_(scheduler),
      request_id_(request.id),
      answers_left_(request.n) {}

std::shared_ptr<GenerateStream> GenerateStream::Make(grpc::CallbackServerContext* context,
                                                     Scheduler* scheduler, const Request& request) {
  std::shared_ptr<GenerateStream> stream(new GenerateStream(context, scheduler, request));
  stream->self_ = stream;
  return stream;
}

void GenerateStream::Submit(const ServedModel& model, const Request& request) {
  const std::shared_ptr<GenerateStream> self = self_;
  {
    MutexLock lock(&mutex_);
    accepted_.emplace();
    accepted_->set_request_id(request.id);
    accepted_->mutable_prompt_token_ids()->Add(request.prompt.begin(), request.prompt.end());
    accepted_->set_seed(request.sampling.seed());
  }
  const absl::Status status =
      scheduler_->Submit(request, self, [&] { return model.MakeDecoder(request.prompt); });
  if (!status.ok()) Refuse(status);
}

void GenerateStream::Refuse(const absl::Status& status) {
  const std::shared_ptr<GenerateStream> self = self_;
  MutexLock lock(&mutex_);
  scheduler_->GiveUp(request_id_);
  Fail(status);
}

void GenerateStream::OnAccepted() {
  MutexLock lock(&mutex_);
  if (ended_ || !accepted_.has_value()) return;
  // Not before: headers commit a call, and a client would not try again elsewhere.
  context_->AddInitialMetadata("x-request-id", request_id_);
  *queue_.emplace_back().mutable_accepted() = *std::move(accepted_);
  accepted_.reset();
  WriteNext();
}

void GenerateStream::OnDelta(v1::Delta delta) {
  MutexLock lock(&mutex_);
  if (broken_ || ended_) return;
  pending_tokens_ += delta.tokens_size();
  const auto waiting = std::find_if(queue_.begin() + (writing_ ? 1 : 0), queue_.end(),
                                    [&](const v1::GenerateResponse& response) {
                                      return response.has_delta() &&
                                             response.delta().index() == delta.index();
                                    });
  if (waiting != queue_.end()) {
    Append(std::move(delta), *waiting->mutable_delta());
  } else {
    *queue_.emplace_back().mutable_delta() = std::move(delta);
  }
  WriteNext();
}

void GenerateStream::OnFinished(const absl::Status& status, v1::Finished finished) {
  MutexLock lock(&mutex_);
  if (ended_) return;
  --answers_left_;
  if (status.ok()) {
    *queue_.emplace_back().mutable_finished() = std::move(finished);
    ended_ = answers_left_ == 0;
    WriteNext();
  } else {
    if (answers_left_ > 0) scheduler_->Cancel(request_id_);
    Fail(status);
  }
}

void GenerateStream::Fail(const absl::Status& status) {
  ended_ = true;
  status_ = status;
  AddErrorMetadata(context_, request_id_, status);
  WriteNext();
}

bool GenerateStream::CanTake() const {
  MutexLock lock(&mutex_);
  return pending_tokens_ < kMaxPendingTokens;
}

void GenerateStream::WriteNext() {
  if (writing_ || finished_) return;
  if (!queue_.empty() && !broken_) {
    writing_ = true;
    StartWrite(&queue_.front());
  } else if (ended_) {
    finished_ = true;
    Finish(ToGrpcStatus(status_));
  }
}

void GenerateStream::OnWriteDone(bool ok) {
  // Finish() below may let OnDone() run at once, on another thread.
  const std::shared_ptr<GenerateStream> self = self_;
  bool gone = false;
  {
    MutexLock lock(&mutex_);
    pending_tokens_ -= queue_.front().delta().tokens_size();
    queue_.pop_front();
    writing_ = false;
    if (!ok) {
      gone = !ended_;
      broken_ = true;
      queue_.clear();
      pending_tokens_ = 0;
    }
    WriteNext();
  }
  if (gone) {
    scheduler_->Cancel(request_id_);
  } else {
    scheduler_->Wake();
  }
}

void GenerateStream::OnCancel() {
  MutexLock lock(&mutex_);
  if (!ended_) scheduler_->Cancel(request_id_);  // else the id may be another call's
}

void GenerateStream::OnDone() { const std::shared_ptr<GenerateStream> self = std::move(self_); }

// ---------------------------------------------------------------- GenerateOnce

GenerateOnceCall::GenerateOnceCall(grpc::CallbackServerContext* context, Scheduler* scheduler,
                                   const Request& request, v1::GenerateOnceResponse* response)
    : context_(context),
      scheduler_(scheduler),
      request_id_(request.id),
      response_(response),
      answers_left_(request.n) {
  response_->set_request_id(request.id);
  for (int32_t index = 0; request.n > 1 && index < request.n; ++index) response_->add_answers();
}

std::shared_ptr<GenerateOnceCall> GenerateOnceCall::Make(grpc::CallbackServerContext* context,
                                                         Scheduler* scheduler, const Request& request,
                                                         v1::GenerateOnceResponse* response) {
  std::shared_ptr<GenerateOnceCall> call(new GenerateOnceCall(context, scheduler, request, response));
  call->self_ = call;
  return call;
}

void GenerateOnceCall::Submit(const ServedModel& model, const Request& request) {
  response_->mutable_prompt_token_ids()->Add(request.prompt.begin(), request.prompt.end());
  const absl::Status status =
      scheduler_->Submit(request, self_, [&] { return model.MakeDecoder(request.prompt); });
  if (!status.ok()) Refuse(status);
}

void GenerateOnceCall::Refuse(const absl::Status& status) {
  ended_.store(true);
  scheduler_->GiveUp(request_id_);
  Fail(status);
}

void GenerateOnceCall::OnDelta(v1::Delta delta) {
  if (answers_left_ == 0) return;
  if (response_->answers_size() == 0) {
    Append(std::move(delta), *response_);
  } else {
    Append(std::move(delta), *response_->mutable_answers(delta.index()));
  }
}

void GenerateOnceCall::OnFinished(const absl::Status& status, v1::Finished finished) {
  if (answers_left_ == 0) return;
  --answers_left_;
  if (!status.ok()) {
    if (answers_left_ > 0) scheduler_->Cancel(request_id_);
    Fail(status);
    return;
  }
  v1::Finished* const out = response_->answers_size() == 0
                                ? response_->mutable_finished()
                                : response_->mutable_answers(finished.index())->mutable_finished();
  *out = std::move(finished);
  if (answers_left_ > 0) return;
  ended_.store(true);
  context_->AddInitialMetadata("x-request-id", request_id_);
  Finish(grpc::Status::OK);
}

void GenerateOnceCall::Fail(const absl::Status& status) {
  ended_.store(true);
  answers_left_ = 0;
  AddErrorMetadata(context_, request_id_, status);
  Finish(ToGrpcStatus(status));
}

}  // namespace headroom::coordinator
