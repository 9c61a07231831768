// Details of errors: what a program, not a person, reads. They travel as google.rpc messages in the
// payloads of an absl::Status, and by common/grpc_status.h to clients.
//
// Which errors there are is each service's own business (its errors.h); this is what they are made
// of.
#ifndef HEADROOM_COMMON_ERRORS_H_
#define HEADROOM_COMMON_ERRORS_H_

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace headroom {

inline constexpr char kErrorDomain[] = "headroom";
inline constexpr char kErrorInfoUrl[] = "type.googleapis.com/google.rpc.ErrorInfo";
inline constexpr char kBadRequestUrl[] = "type.googleapis.com/google.rpc.BadRequest";
inline constexpr char kRetryInfoUrl[] = "type.googleapis.com/google.rpc.RetryInfo";

// Adds ErrorInfo{reason, domain "headroom"}. `reason` is UPPER_SNAKE_CASE, at most 63 characters,
// and stays the same over releases: programs compare it. An OK status stays as it is.
absl::Status WithReason(absl::Status status, absl::string_view reason);
// Adds RetryInfo: trying again can help, not before this delay.
absl::Status WithRetryAfter(absl::Status status, absl::Duration delay);

struct FieldViolation {
  std::string field;  // as the proto names it: "sampling.top_p", "placement.shares[1].share"
  std::string description;
};

// INVALID_ARGUMENT with ErrorInfo{INVALID_REQUEST} and BadRequest. Descriptions are cut to 300 bytes and
// the violations that come first are named, 1,500 bytes of them; the message says how many more there are.
// OK if there is no violation.
absl::Status BadRequestError(const std::vector<FieldViolation>& violations);

// The text, or as many whole UTF-8 characters of it as `most_bytes` hold and "...".
std::string Cut(absl::string_view text, size_t most_bytes);

// What a status carries; empty or nothing where it does not, or where a payload is damaged.
std::string ReasonOf(const absl::Status& status);
std::vector<FieldViolation> FieldViolationsOf(const absl::Status& status);
std::optional<absl::Duration> RetryAfterOf(const absl::Status& status);

}  // namespace headroom

#endif  // HEADROOM_COMMON_ERRORS_H_
