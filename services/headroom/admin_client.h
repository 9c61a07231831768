// Calls AdminService.
#ifndef HEADROOM_SERVICES_HEADROOM_ADMIN_CLIENT_H_
#define HEADROOM_SERVICES_HEADROOM_ADMIN_CLIENT_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "headroom/v1/admin.pb.h"
#include "services/headroom/endpoint.h"

namespace headroom::cli {

// Errors are the call's.
absl::StatusOr<v1::GetStatusResponse> GetStatus(const Endpoint& endpoint, absl::Duration timeout);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_ADMIN_CLIENT_H_
