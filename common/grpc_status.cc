#include "common/grpc_status.h"

#include <string>

#include "absl/strings/cord.h"
#include "common/errors.h"
#include "common/protobuf_wire.h"

namespace headroom {
namespace {

// Clients take 8 KiB of metadata or lose the call's status: the message may come to three times its size
// percent-encoded, and the details, which have a copy of it, to a third more in base64.
constexpr size_t kMaxMessageBytes = 1000;
constexpr size_t kMaxDetailBytes = 2000;

}  // namespace

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  const absl::Status with_reason =
      status.GetPayload(kErrorInfoUrl).has_value()
          ? status
          : WithReason(status, absl::StatusCodeToString(status.code()));
  const std::string message = Cut(status.message(), kMaxMessageBytes);
  std::string details;  // google.rpc.Status
  wire::PutInt(1, static_cast<int>(status.code()), details);
  wire::PutBytes(2, message, details);
  with_reason.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    if (details.size() + payload.size() > kMaxDetailBytes + kMaxMessageBytes) return;
    std::string any;
    wire::PutBytes(1, url, any);
    wire::PutBytes(2, std::string(payload), any);
    wire::PutBytes(3, any, details);
  });
  // The codes are the same numbers in both.
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), message, details);
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status out(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  const std::string details = status.error_details();
  for (wire::Reader reader(details); reader.Next();) {
    if (reader.field() != 3) continue;
    absl::string_view url, value;
    for (wire::Reader any(reader.bytes()); any.Next();) {
      if (any.field() == 1) url = any.bytes();
      if (any.field() == 2) value = any.bytes();
    }
    if (!url.empty()) out.SetPayload(url, absl::Cord(value));
  }
  return out;
}

}  // namespace headroom
