#include "services/coordinator/generate_service.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"

namespace headroom::coordinator {

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
    : context_(context), scheduler_(scheduler), request_id_(request.id) {
  accepted_.set_request_id(request.id);
  accepted_.mutable_prompt_token_ids()->Add(request.prompt.begin(), request.prompt.end());
  accepted_.set_seed(request.sampling.seed());
}

GenerateStream* GenerateStream::Begin(grpc::CallbackServerContext* context, Scheduler* scheduler,
                                      std::unique_ptr<Request> request,
                                      std::unique_ptr<TokenDecoder> decoder) {
  const std::shared_ptr<GenerateStream> stream(new GenerateStream(context, scheduler, *request));
  stream->self_ = stream;
  const absl::Status status = scheduler->Submit(std::move(request), stream, std::move(decoder));
  if (!status.ok()) stream->OnFinished(status, v1::Finished());
  return stream.get();
}

void GenerateStream::OnAccepted() {
  MutexLock lock(&mutex_);
  // Not before: headers commit a call, and a client would not try again elsewhere.
  context_->AddInitialMetadata("x-request-id", request_id_);
  v1::GenerateResponse response;
  *response.mutable_accepted() = std::move(accepted_);
  queue_.push_back(std::move(response));
  WriteNext();
}

void GenerateStream::OnDelta(v1::Delta delta) {
  MutexLock lock(&mutex_);
  if (broken_) return;
  pending_tokens_ += delta.tokens_size();
  const size_t first_waiting = writing_ ? 1 : 0;
  if (queue_.size() > first_waiting && queue_.back().has_delta()) {
    v1::Delta* const waiting = queue_.back().mutable_delta();
    waiting->mutable_text()->append(delta.text());
    for (v1::TokenRecord& token : *delta.mutable_tokens()) {
      *waiting->add_tokens() = std::move(token);
    }
  } else {
    *queue_.emplace_back().mutable_delta() = std::move(delta);
  }
  WriteNext();
}

void GenerateStream::OnFinished(const absl::Status& status, v1::Finished finished) {
  MutexLock lock(&mutex_);
  ended_ = true;
  status_ = status;
  if (status.ok()) {
    *queue_.emplace_back().mutable_finished() = std::move(finished);
  } else {
    AddErrorMetadata(context_, request_id_, status);
  }
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

void GenerateStream::OnCancel() { scheduler_->Cancel(request_id_); }

void GenerateStream::OnDone() { const std::shared_ptr<GenerateStream> self = std::move(self_); }

// ---------------------------------------------------------------- GenerateOnce

GenerateOnceCall::GenerateOnceCall(grpc::CallbackServerContext* context, Scheduler* scheduler,
                                   const Request& request, v1::GenerateOnceResponse* response)
    : context_(context), scheduler_(scheduler), request_id_(request.id), response_(response) {
  response_->set_request_id(request.id);
  response_->mutable_prompt_token_ids()->Add(request.prompt.begin(), request.prompt.end());
}

GenerateOnceCall* GenerateOnceCall::Begin(grpc::CallbackServerContext* context,
                                          Scheduler* scheduler, std::unique_ptr<Request> request,
                                          std::unique_ptr<TokenDecoder> decoder,
                                          v1::GenerateOnceResponse* response) {
  const std::shared_ptr<GenerateOnceCall> call(
      new GenerateOnceCall(context, scheduler, *request, response));
  call->self_ = call;
  const absl::Status status = scheduler->Submit(std::move(request), call, std::move(decoder));
  if (!status.ok()) call->OnFinished(status, v1::Finished());
  return call.get();
}

void GenerateOnceCall::OnDelta(v1::Delta delta) {
  response_->mutable_text()->append(delta.text());
  for (v1::TokenRecord& token : *delta.mutable_tokens()) {
    *response_->add_tokens() = std::move(token);
  }
}

void GenerateOnceCall::OnFinished(const absl::Status& status, v1::Finished finished) {
  if (status.ok()) {
    context_->AddInitialMetadata("x-request-id", request_id_);
    *response_->mutable_finished() = std::move(finished);
  } else {
    AddErrorMetadata(context_, request_id_, status);
  }
  Finish(ToGrpcStatus(status));
}

}  // namespace headroom::coordinator
