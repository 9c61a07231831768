#include "services/coordinator/errors.h"

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/status.h"

namespace headroom::coordinator {
namespace {

// A full queue moves by one request; a peer is tried again every second.
constexpr absl::Duration kRetrySoon = absl::Seconds(1);

}  // namespace

absl::Status IdInUseError(absl::string_view request_id) {
  return WithReason(
      absl::AlreadyExistsError(absl::StrCat("a request with x-request-id '", request_id, "' runs")),
      "REQUEST_ID_IN_USE");
}

absl::Status QueueFullError(int64_t max_queue) {
  return WithRetryAfter(
      WithReason(absl::ResourceExhaustedError(absl::StrCat(
                     max_queue, " requests wait already, as many as --max-queue allows")),
                 "QUEUE_FULL"),
      kRetrySoon);
}

absl::Status TokenizerBusyError(int64_t calls, int64_t text_bytes) {
  return WithRetryAfter(
      WithReason(absl::ResourceExhaustedError(absl::StrCat("texts of ", calls, " calls, ", text_bytes,
                                                           " bytes, are being tokenized already")),
                 "TOKENIZER_BUSY"),
      kRetrySoon);
}

absl::Status DrainingError() {
  return WithReason(absl::UnavailableError("the server is draining: it takes no new requests"),
                    "DRAINING");
}

absl::Status NotReadyError(absl::string_view why) {
  return WithRetryAfter(
      WithReason(absl::UnavailableError(absl::StrCat("the server is not ready: ", why)),
                 "NOT_READY"),
      kRetrySoon);
}

absl::Status PeerLostError(absl::Duration away, absl::string_view why) {
  return WithRetryAfter(
      WithReason(absl::UnavailableError(absl::StrCat("worker or kvstore have been away for ",
                                                     absl::FormatDuration(away), ": ", why)),
                 "PEER_LOST"),
      kRetrySoon);
}

absl::Status NeverFitsError(absl::string_view why) {
  return WithReason(absl::ResourceExhaustedError(why), "DOES_NOT_FIT");
}

absl::Status LeaseFailedError(const absl::Status& from_store) {
  if (!absl::IsResourceExhausted(from_store)) return StoreRefusedError(from_store);
  return WithReason(absl::ResourceExhaustedError(
                        absl::StrCat("no host memory for more keys: ", from_store.message())),
                    "HOST_MEMORY");
}

absl::Status StoreRefusedError(const absl::Status& from_store) {
  return WithReason(
      absl::InternalError(absl::StrCat("the kvstore refused a call: ", from_store.message())),
      "STORE_REFUSED");
}

absl::Status InPlaceNotServedError(int32_t attend_threads) {
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat(
          "in place is not served by this store (attend threads ", attend_threads, ")")),
      "IN_PLACE_NOT_SERVED");
}

absl::Status SessionBusyError(absl::string_view session_id) {
  return WithReason(absl::FailedPreconditionError(
                        absl::StrCat("session '", session_id, "' is in use by another request")),
                    "SESSION_BUSY");
}

absl::Status SessionUnknownError(absl::string_view session_id) {
  return WithReason(absl::NotFoundError(absl::StrCat("there is no session '", session_id, "'")),
                    "SESSION_UNKNOWN");
}

absl::Status SlowClientError(absl::Duration waited) {
  return WithReason(
      absl::ResourceExhaustedError(absl::StrCat("the client has taken nothing of the stream for ",
                                                absl::FormatDuration(waited))),
      "SLOW_CLIENT");
}

absl::Status DeadlinePassedError() {
  return WithReason(absl::DeadlineExceededError("the request's deadline has passed"),
                    "DEADLINE_PASSED");
}

absl::Status ClientGoneError() {
  return WithReason(absl::CancelledError("the client has cancelled the request"), "CLIENT_GONE");
}

absl::Status StoppingError() {
  return WithReason(absl::UnavailableError("the server is stopping"), "STOPPING");
}

bool IsOvertaken(const absl::Status& from_store) { return ReasonOf(from_store) == "CALL_OVERTAKEN"; }

bool MayPassAway(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status);
}

absl::Status StepFailedError(const absl::Status& step) {
  switch (step.code()) {
    // The machine's trouble, said by the worker in words that help.
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
      return WithReason(step, "STEP_FAILED");
    default:  // a step that the worker refuses is this program's mistake, not the client's
      return WithReason(
          absl::InternalError(absl::StrCat("the worker refused a step: ", step.message())),
          "STEP_REFUSED");
  }
}

}  // namespace headroom::coordinator
