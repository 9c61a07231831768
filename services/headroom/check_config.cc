#include "services/headroom/check_config.h"

#include <cstdio>
#include <string>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "services/headroom/exit_code.h"

namespace headroom::cli {
namespace {

// That somebody listens there is no error: it may be the process whose next start is being checked.
absl::Status CheckAddress(const std::string& flag, const std::string& address) {
  const absl::Status status = CheckListenAddress(flag, address);
  return absl::IsUnavailable(status) ? absl::OkStatus() : status;
}

}  // namespace

absl::Status CheckConfig(const ServeOptions& options) {
  ServeOptions whole = options;
  CompleteOptions(whole, /*socket_dir=*/"");
  if (whole.store.segment_dir.empty()) whole.store.segment_dir = kSharedMemory;
  HEADROOM_RETURN_IF_ERROR(CheckConfig(whole.coordinator));
  HEADROOM_RETURN_IF_ERROR(CheckConfig(whole.worker));
  return CheckConfig(whole.store);
}

absl::Status CheckConfig(const CoordinatorProcessOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.server.listen_address));
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--admin", options.server.admin_address));
  return coordinator::CheckCoordinator(options.server);
}

absl::Status CheckConfig(const WorkerOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.listen_address));
  return CheckWorker(options);
}

absl::Status CheckConfig(const kvstore::KvStoreOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckAddress("--listen", options.listen_address));
  HEADROOM_RETURN_IF_ERROR(kvstore::CheckKvStore(options));
  if (options.host_memory_bytes == 0) return DefaultHostMemoryBytes(options.segment_dir).status();
  return CheckHostMemory(options.segment_dir, options.host_memory_bytes);
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
