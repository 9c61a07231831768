// --check-config: whether a service would start with what it is given, without starting it.
#ifndef HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_
#define HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_

#include "absl/status/status.h"
#include "services/headroom/serve.h"
#include "services/headroom/service_flags.h"

namespace headroom::cli {

// The first thing that is wrong with options or with files that they name. Nothing is made, nothing
// listened on; a device that is not there and an address that is in use are not found.
absl::Status CheckConfig(const ServeOptions& options);
absl::Status CheckConfig(const CoordinatorProcessOptions& options);
absl::Status CheckConfig(const WorkerOptions& options);
absl::Status CheckConfig(const kvstore::KvStoreOptions& options);

// Prints what CheckConfig() said: one line. Returns the exit code.
int ReportCheck(const char* command, const absl::Status& status);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_
