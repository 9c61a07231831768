#include "services/headroom/health_client.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>

#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"
#include "common/protobuf_wire.h"
#include "services/headroom/channel_client.h"

namespace headroom::cli {
namespace {

constexpr char kCheck[] = "/grpc.health.v1.Health/Check";
constexpr char kWatch[] = "/grpc.health.v1.Health/Watch";

// HealthCheckRequest{service = 1}.
grpc::ByteBuffer Request(const std::string& service) {
  std::string bytes;
  wire::PutBytes(1, service, bytes);
  const grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

// HealthCheckResponse{status = 1}.
Health Response(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  if (!buffer.Dump(&slices).ok()) return Health::kUnknown;
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  Health health = Health::kUnknown;
  for (wire::Reader reader(bytes); reader.Next();) {
    if (reader.field() == 1 && reader.integer() >= 0 && reader.integer() <= 3) {
      health = static_cast<Health>(reader.integer());
    }
  }
  return health;
}

// Waits for the one operation that is under way. Calls have deadlines or are cancelled, so it ends.
bool NextOk(grpc::CompletionQueue& queue) {
  void* tag;
  bool ok = false;
  return queue.Next(&tag, &ok) && ok;
}

}  // namespace

const char* HealthName(Health health) {
  switch (health) {
    case Health::kServing:
      return "SERVING";
    case Health::kNotServing:
      return "NOT_SERVING";
    case Health::kServiceUnknown:
      return "SERVICE_UNKNOWN";
    case Health::kUnknown:
      break;
  }
  return "UNKNOWN";
}

absl::StatusOr<Health> CheckHealth(const Endpoint& endpoint, const std::string& service,
                                   absl::Duration timeout) {
  HEADROOM_ASSIGN_OR_RETURN(const auto channel, MakeChannel(endpoint));
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  SetTimeout(timeout, &context);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, kCheck, Request(service), &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  NextOk(queue);
  if (!status.ok()) return FromGrpcStatus(status);
  return Response(response);
}

absl::Status WaitUntilServing(const Endpoint& endpoint, absl::Duration timeout,
                              CallCanceller* canceller) {
  HEADROOM_ASSIGN_OR_RETURN(const auto channel, MakeChannel(endpoint));
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  SetTimeout(timeout, &context);
  context.set_wait_for_ready(true);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareCall(&context, kWatch, &queue);
  const CallCanceller::Scope scope(canceller, [&context] { context.TryCancel(); });
  call->StartCall(nullptr);
  bool ok = NextOk(queue);
  if (ok) {
    call->WriteLast(Request(""), grpc::WriteOptions(), nullptr);
    ok = NextOk(queue);
  }
  while (ok) {
    grpc::ByteBuffer response;
    call->Read(&response, nullptr);
    ok = NextOk(queue);
    if (ok && Response(response) == Health::kServing) {
      context.TryCancel();
      grpc::Status ignored;
      call->Finish(&ignored, nullptr);
      NextOk(queue);
      return absl::OkStatus();
    }
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  NextOk(queue);
  if (status.ok()) return absl::UnavailableError("the server ended the watch of its health");
  return FromGrpcStatus(status);
}

}  // namespace headroom::cli
