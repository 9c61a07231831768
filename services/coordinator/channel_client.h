// What the coordinator's two clients share: channels and deadlines.
#ifndef HEADROOM_SERVICES_COORDINATOR_CHANNEL_CLIENT_H_
#define HEADROOM_SERVICES_COORDINATOR_CHANNEL_CLIENT_H_

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "common/grpc_status.h"

namespace headroom::coordinator {

// A lost peer is noticed within some 20 s even if its host is gone, and tried again four times a second:
// where all three start together the coordinator waits for the worker's weights.
inline std::shared_ptr<grpc::Channel> MakePeerChannel(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(16 << 20);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  // How long one attempt may take; a peer that is busy starting answers late.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 250);
  return grpc::CreateCustomChannel(address, credentials, args);
}

inline constexpr std::chrono::milliseconds kCallDeadline{5'000};

// One unary call with a deadline: `call` is (context) -> grpc::Status.
template <typename Call>
absl::Status CallWithDeadline(std::chrono::milliseconds deadline, Call&& call) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + deadline);
  return FromGrpcStatus(call(&context));
}

// Asks the peer of `stub` by `call`, a method of an empty request, each time that it is called.
// `on_answer`, if given, gets what it says.
template <typename Stub, typename Request, typename Response>
std::function<absl::Status()> MakePing(
    std::shared_ptr<Stub> stub,
    grpc::Status (Stub::*call)(grpc::ClientContext*, const Request&, Response*),
    std::chrono::milliseconds deadline,
    std::function<void(const Response&)> on_answer = nullptr) {
  return [stub = std::move(stub), call, deadline, on_answer = std::move(on_answer)] {
    Response response;
    const absl::Status status = CallWithDeadline(deadline, [&](grpc::ClientContext* context) {
      return ((*stub).*call)(context, Request(), &response);
    });
    if (status.ok() && on_answer != nullptr) on_answer(response);
    return status;
  };
}

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_CHANNEL_CLIENT_H_
