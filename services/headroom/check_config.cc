#include "services/headroom/check_config.h"

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "common/trace.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/private_dir.h"

namespace headroom::cli {
namespace {

// That somebody listens there is no error: it may be the process whose next start is being checked.
absl::Status CheckAddress(const std::string& flag, const std::string& address) {
  const absl::Status status = CheckListenAddress(flag, address);
  return absl::IsUnavailable(status) ? absl::OkStatus() : status;
}

ServeOptions WholeOptions(ServeOptions options) {
  CompleteOptions(options, RuntimeDir());
  if (options.store.segment_dir.empty()) options.store.segment_dir = kSharedMemory;
  return options;
}

absl::Status CheckLog(const LogOptions& log) {
  return log.trace_path.empty() ? absl::OkStatus() : CheckTrace(log.trace_path);
}

}  // namespace

absl::Status CheckFlags(const ServeOptions& options) {
  const ServeOptions whole = WholeOptions(options);
  HEADROOM_RETURN_IF_ERROR(coordinator::CheckCoordinatorFlags(whole.coordinator.server));
  HEADROOM_RETURN_IF_ERROR(CheckWorkerFlags(whole.worker));
  return CheckConfig(whole.store, whole.log);
}

absl::Status CheckConfig(const ServeOptions& options) {
  const ServeOptions whole = WholeOptions(options);
  HEADROOM_RETURN_IF_ERROR(CheckConfig(whole.coordinator, whole.log));
  HEADROOM_RETURN_IF_ERROR(CheckConfig(whole.worker, whole.log));
  return CheckConfig(whole.store, whole.log);
}

absl::Status CheckConfig(const CoordinatorProcessOptions& options, const LogOptions& log) {
  HEADROOM_RETURN_IF_ERROR(CheckLog(log));
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.server.listen_address));
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--admin", options.server.admin_address));
  return coordinator::CheckCoordinator(options.server);
}

absl::Status CheckConfig(const WorkerOptions& options, const LogOptions& log) {
  HEADROOM_RETURN_IF_ERROR(CheckLog(log));
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.listen_address));
  return CheckWorker(options);
}

absl::Status CheckConfig(const kvstore::KvStoreOptions& options, const LogOptions& log) {
  HEADROOM_RETURN_IF_ERROR(CheckLog(log));
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.listen_address));
  kvstore::KvStoreOptions whole = options;
  if (whole.host_memory_bytes == 0) {
    HEADROOM_ASSIGN_OR_RETURN(whole.host_memory_bytes, DefaultHostMemoryBytes(whole.segment_dir));
  }
  HEADROOM_RETURN_IF_ERROR(kvstore::CheckKvStore(whole));
  return CheckHostMemory(whole.segment_dir, whole.host_memory_bytes);
}

int ReportCheck(const char* command, const absl::Status& status) {
  if (!status.ok()) {
    PrintError(command, status);
    return kExitUsage;
  }
  const std::string line = absl::StrCat("headroom ", command, ": the configuration is right\n");
  std::fwrite(line.data(), 1, line.size(), stdout);
  return kExitOk;
}

}  // namespace headroom::cli
