// Asks a server's health (grpc.health.v1.Health, whose messages the distribution does not ship:
// they are put together here).
#ifndef HEADROOM_SERVICES_HEADROOM_HEALTH_CLIENT_H_
#define HEADROOM_SERVICES_HEADROOM_HEALTH_CLIENT_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "services/headroom/call_canceller.h"
#include "services/headroom/endpoint.h"

namespace headroom::cli {

// The numbers of the protocol.
enum class Health { kUnknown = 0, kServing = 1, kNotServing = 2, kServiceUnknown = 3 };
const char* HealthName(Health health);

// One look. Errors are the call's: UNAVAILABLE if nobody listens, NOT_FOUND for a service that the
// server does not have.
absl::StatusOr<Health> CheckHealth(const Endpoint& endpoint, const std::string& service,
                                   absl::Duration timeout);

// Waits until the server is there and says SERVING. DEADLINE_EXCEEDED; CANCELLED.
absl::Status WaitUntilServing(const Endpoint& endpoint, absl::Duration timeout,
                              CallCanceller* canceller);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_HEALTH_CLIENT_H_
