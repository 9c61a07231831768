#include "services/headroom/generate_client.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "headroom/v1/inference.grpc.pb.h"
#include "services/headroom/channel_client.h"

namespace headroom::cli {
namespace {

// gRPC itself refuses a message that is too long; its words do not say what to do.
absl::Status NameSizeFlag(absl::Status status) {
  if (!absl::IsResourceExhausted(status) ||
      !absl::StrContains(status.message(), "message larger than max")) {
    return status;
  }
  absl::Status named(status.code(),
                     absl::StrCat(status.message(),
                                  ": raise --max-message-bytes of the coordinator or of serve"));
  return named;
}

// To the one answer, or to one of several.
template <typename Text>
void Append(v1::Delta& delta, Text& out) {
  out.mutable_text()->append(delta.text());
  for (v1::TokenRecord& token : *delta.mutable_tokens()) *out.add_tokens() = std::move(token);
}

}  // namespace

absl::StatusOr<v1::GenerateOnceResponse> GenerateClient::Generate(
    const v1::GenerateRequest& request, absl::Duration timeout, CallCanceller* canceller,
    const std::function<void(const v1::Delta&)>& on_delta) {
  HEADROOM_ASSIGN_OR_RETURN(const auto channel, MakeChannel(endpoint_));
  const auto stub = v1::InferenceService::NewStub(channel);
  grpc::ClientContext context;
  SetTimeout(timeout, &context);
  const CallCanceller::Scope scope(canceller, [&context] { context.TryCancel(); });
  const auto stream = stub->Generate(&context, request);
  v1::GenerateOnceResponse whole;
  const int32_t n = request.n();
  int32_t left = std::max(1, n);
  // Of several; null if the server speaks of one that was not asked for.
  const auto answer = [&](int32_t index) -> v1::Answer* {
    if (index < 0 || index >= n) return nullptr;
    while (whole.answers_size() <= index) whole.add_answers();
    return whole.mutable_answers(index);
  };
  for (v1::GenerateResponse event; stream->Read(&event);) {
    switch (event.event_case()) {
      case v1::GenerateResponse::kAccepted:
        whole.set_request_id(event.accepted().request_id());
        *whole.mutable_prompt_token_ids() = event.accepted().prompt_token_ids();
        break;
      case v1::GenerateResponse::kDelta:
        on_delta(event.delta());
        if (n <= 1) {
          Append(*event.mutable_delta(), whole);
        } else if (v1::Answer* const one = answer(event.delta().index())) {
          Append(*event.mutable_delta(), *one);
        }
        break;
      case v1::GenerateResponse::kFinished:
        if (n <= 1) {
          *whole.mutable_finished() = std::move(*event.mutable_finished());
        } else if (v1::Answer* const one = answer(event.finished().index())) {
          *one->mutable_finished() = std::move(*event.mutable_finished());
        }
        --left;
        break;
      case v1::GenerateResponse::EVENT_NOT_SET:
        break;  // an event of a newer server
    }
  }
  if (const grpc::Status status = stream->Finish(); !status.ok()) {
    return NameSizeFlag(FromGrpcStatus(status));
  }
  if (left > 0) return absl::InternalError("the stream ended without its terminal event");
  return whole;
}

}  // namespace headroom::cli
