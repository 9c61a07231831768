// --check-config: whether a service would start with what it is given, without starting it.
#ifndef HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_
#define HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_

#include "absl/status/status.h"
#include "services/headroom/serve.h"
#include "services/headroom/service_flags.h"

namespace headroom::cli {

// What a flag's value is to blame for, as far as that is known without the model's tokenizer and weights
// and without a driver, which take their time.
absl::Status CheckFlags(const ServeOptions& options);

// The first thing that is wrong with options or with files that they name, in the words in which
// starting refuses it. Nothing is made, nothing listened on; an address that is in use, a GPU that is
// too old and one whose memory is taken are not found.
absl::Status CheckConfig(const ServeOptions& options);
absl::Status CheckConfig(const CoordinatorProcessOptions& options, const LogOptions& log);
absl::Status CheckConfig(const WorkerOptions& options, const LogOptions& log);
absl::Status CheckConfig(const kvstore::KvStoreOptions& options, const LogOptions& log);

// Prints what CheckConfig() said: one line. Returns the exit code.
int ReportCheck(const char* command, const absl::Status& status);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_CHECK_CONFIG_H_
