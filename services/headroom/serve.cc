#include "services/headroom/serve.h"

#include <signal.h>

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/bytes_text.h"
#include "common/status.h"
#include "services/headroom/check_config.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/private_dir.h"
#include "services/headroom/process_signals.h"

namespace headroom::cli {
namespace {

std::string SocketPath(const std::string& address) {
  absl::string_view path = address;
  return absl::ConsumePrefix(&path, "unix:") ? std::string(path) : std::string();
}

absl::StatusOr<int> Serve(ServeOptions options) {
  HEADROOM_ASSIGN_OR_RETURN(ProcessSignals signals,
                            ProcessSignals::Block({SIGTERM, SIGINT, SIGHUP}));
  const coordinator::CoordinatorOptions& server = options.coordinator.server;
  HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--listen", server.listen_address));
  HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--admin", server.admin_address));
  // Of the flags that it is given a process does not know where they came from.
  HEADROOM_RETURN_IF_ERROR(CheckFlags(options));
  HEADROOM_ASSIGN_OR_RETURN(const PrivateDir sockets, PrivateDir::Make(RuntimeDir()));
  std::optional<PrivateDir> memory;
  if (options.store.segment_dir.empty()) {
    absl::StatusOr<PrivateDir> made = PrivateDir::Make(kSharedMemory);
    if (!made.ok()) return Annotate(made.status(), "--segment-dir is not set");
    memory = *std::move(made);
    options.store.segment_dir = absl::StrCat(memory->path(), "/segment");
  }
  if (options.store.host_memory_bytes == 0) {
    // Found out once: a store that is started again must ask for what is there.
    HEADROOM_ASSIGN_OR_RETURN(options.store.host_memory_bytes,
                              DefaultHostMemoryBytes(options.store.segment_dir));
    LogInfo(absl::StrCat("--host-memory is not set: ",
                         FormatBytes(options.store.host_memory_bytes)));
  }
  if (options.coordinator.server.admin_address.empty()) {
    options.coordinator.server.admin_address = absl::StrCat("unix:", sockets.path(), "/admin.sock");
  }
  LogInfo(absl::StrCat("admin address: ", options.coordinator.server.admin_address));
  const absl::Duration drain_timeout = options.coordinator.drain_timeout;
  return Supervisor(ServeProcesses(std::move(options), sockets.path()), std::move(signals),
                    drain_timeout)
      .Run();
}

}  // namespace

void CompleteOptions(ServeOptions& options, const std::string& socket_dir) {
  options.worker.listen_address = absl::StrCat("unix:", socket_dir, "/worker.sock");
  options.store.listen_address = absl::StrCat("unix:", socket_dir, "/kvstore.sock");
  options.worker.model_dir = options.coordinator.server.model_dir;
  options.coordinator.server.worker_address = options.worker.listen_address;
  options.coordinator.server.store_address = options.store.listen_address;
}

std::vector<ChildSpec> ServeProcesses(ServeOptions options, const std::string& socket_dir) {
  CompleteOptions(options, socket_dir);
  std::vector<ChildSpec> specs(3);
  specs[0] = {"kvstore", StoreArguments(options.store, options.log),
              SocketPath(options.store.listen_address), false};
  specs[1] = {"worker", WorkerArguments(options.worker, options.log),
              SocketPath(options.worker.listen_address), false};
  specs[2] = {"coordinator", CoordinatorArguments(options.coordinator, options.log),
              SocketPath(options.coordinator.server.listen_address), true};
  return specs;
}

int RunServe(ServeOptions options, const FlagSources& sources) {
  options.log.process = "serve";
  ConfigureLog(options.log);
  const absl::StatusOr<int> code = Serve(std::move(options));
  if (code.ok()) return *code;
  LogError(DescribeError(sources.Explain(code.status())));
  return ExitCodeOfStart(code.status());
}

}  // namespace headroom::cli
