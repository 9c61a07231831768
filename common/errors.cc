#include "common/errors.h"

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "common/protobuf_wire.h"

namespace headroom {
namespace {

// What does not come through whole is better counted than sent (grpc_status.cc has the limits).
constexpr size_t kMaxDescriptionBytes = 300;
constexpr size_t kMaxViolationsBytes = 1500;

// A payload's bytes, or none.
std::string PayloadOf(const absl::Status& status, absl::string_view url) {
  const absl::optional<absl::Cord> payload = status.GetPayload(url);
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace

absl::Status WithReason(absl::Status status, absl::string_view reason) {
  std::string info;
  wire::PutBytes(1, reason, info);
  wire::PutBytes(2, kErrorDomain, info);
  status.SetPayload(kErrorInfoUrl, absl::Cord(info));
  return status;
}

absl::Status WithRetryAfter(absl::Status status, absl::Duration delay) {
  absl::Duration rest;
  const int64_t seconds = absl::IDivDuration(delay, absl::Seconds(1), &rest);
  std::string duration;
  if (seconds != 0) wire::PutInt(1, seconds, duration);
  if (rest != absl::ZeroDuration()) wire::PutInt(2, absl::ToInt64Nanoseconds(rest), duration);
  std::string info;
  wire::PutBytes(1, duration, info);
  status.SetPayload(kRetryInfoUrl, absl::Cord(info));
  return status;
}

std::string Cut(absl::string_view text, size_t most_bytes) {
  if (text.size() <= most_bytes) return std::string(text);
  size_t size = most_bytes;
  while (size > 0 && (static_cast<uint8_t>(text[size]) & 0xc0) == 0x80) --size;
  return absl::StrCat(text.substr(0, size), "...");
}

absl::Status BadRequestError(const std::vector<FieldViolation>& violations) {
  if (violations.empty()) return absl::OkStatus();
  std::string message;
  std::string details;
  size_t named = 0;
  for (const FieldViolation& violation : violations) {
    const std::string description = Cut(violation.description, kMaxDescriptionBytes);
    std::string encoded;
    wire::PutBytes(1, violation.field, encoded);
    wire::PutBytes(2, description, encoded);
    if (details.size() + encoded.size() > kMaxViolationsBytes) break;
    wire::PutBytes(1, encoded, details);
    absl::StrAppend(&message, message.empty() ? "" : "; ", violation.field, ": ", description);
    ++named;
  }
  if (named < violations.size()) {
    absl::StrAppend(&message, "; and ", violations.size() - named, " more");
  }
  absl::Status status = WithReason(absl::InvalidArgumentError(message), "INVALID_REQUEST");
  status.SetPayload(kBadRequestUrl, absl::Cord(details));
  return status;
}

std::string ReasonOf(const absl::Status& status) {
  const std::string info = PayloadOf(status, kErrorInfoUrl);
  for (wire::Reader reader(info); reader.Next();) {
    if (reader.field() == 1) return std::string(reader.bytes());
  }
  return "";
}

std::vector<FieldViolation> FieldViolationsOf(const absl::Status& status) {
  std::vector<FieldViolation> violations;
  const std::string details = PayloadOf(status, kBadRequestUrl);
  for (wire::Reader reader(details); reader.Next();) {
    if (reader.field() != 1) continue;
    FieldViolation& violation = violations.emplace_back();
    for (wire::Reader field(reader.bytes()); field.Next();) {
      if (field.field() == 1) violation.field = std::string(field.bytes());
      if (field.field() == 2) violation.description = std::string(field.bytes());
    }
  }
  return violations;
}

std::optional<absl::Duration> RetryAfterOf(const absl::Status& status) {
  const std::string info = PayloadOf(status, kRetryInfoUrl);
  for (wire::Reader reader(info); reader.Next();) {
    if (reader.field() != 1) continue;
    absl::Duration delay;
    for (wire::Reader duration(reader.bytes()); duration.Next();) {
      if (duration.field() == 1) delay += absl::Seconds(duration.integer());
      if (duration.field() == 2) delay += absl::Nanoseconds(duration.integer());
    }
    return delay;
  }
  return std::nullopt;
}

}  // namespace headroom
