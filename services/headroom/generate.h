// `headroom generate`: one answer, from a running server or from a private one.
#ifndef HEADROOM_SERVICES_HEADROOM_GENERATE_H_
#define HEADROOM_SERVICES_HEADROOM_GENERATE_H_

#include <cstdint>
#include <string>

#include "absl/time/time.h"
#include "common/log.h"
#include "services/headroom/endpoint.h"
#include "services/headroom/flag_sources.h"
#include "services/headroom/generate_request.h"

namespace headroom::cli {

struct GenerateCommandOptions {
  GenerateOptions generate;
  // Where a server is; or else a model for a private `serve` with what follows.
  Endpoint server;
  std::string model_dir;
  std::string device = "auto";
  int64_t gpu_memory_bytes = 0;
  int64_t host_memory_bytes = 0;
  int32_t threads = 0;
  absl::Duration timeout = absl::InfiniteDuration();
  LogOptions log = {.level = LogLevel::kError};  // of the private serve
};

// For the main thread. Prints the answer to standard output, errors to standard error; SIGINT and
// SIGTERM cancel the call. Returns the exit code.
int RunGenerate(const GenerateCommandOptions& options, const FlagSources& sources);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_GENERATE_H_
