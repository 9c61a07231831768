// What the clients of this program share.
#ifndef HEADROOM_SERVICES_HEADROOM_CHANNEL_CLIENT_H_
#define HEADROOM_SERVICES_HEADROOM_CHANNEL_CLIENT_H_

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/grpc_security.h"
#include "common/status.h"
#include "services/headroom/endpoint.h"

namespace headroom::cli {

// Connects when it is used. Answers of up to 256 MiB: a prompt of millions of tokens, scored.
// INVALID_ARGUMENT: a file of TLS or tokens is wrong.
inline absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const Endpoint& endpoint) {
  HEADROOM_ASSIGN_OR_RETURN(const auto credentials, MakeChannelCredentials(endpoint.security));
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(256 << 20);
  // A server whose host is gone is noticed within some 40 s.
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  // Where a server is waited for, it is one that starts on this machine.
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 50);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 5'000);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 200);
  if (!endpoint.security.server_name.empty()) {
    args.SetSslTargetNameOverride(endpoint.security.server_name);
  }
  return grpc::CreateCustomChannel(endpoint.address, credentials, args);
}

// InfiniteDuration(): none.
inline void SetTimeout(absl::Duration timeout, grpc::ClientContext* context) {
  if (timeout == absl::InfiniteDuration()) return;
  context->set_deadline(absl::ToChronoTime(absl::Now() + timeout));
}

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_CHANNEL_CLIENT_H_
