// The subcommands that serve.
#include <google/protobuf/stubs/logging.h>
#include <malloc.h>

#include <cstdlib>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/bytes_text.h"
#include "common/status.h"
#include "services/coordinator/coordinator_server.h"
#include "services/headroom/check_config.h"
#include "services/headroom/commands.h"
#include "services/headroom/serve.h"
#include "services/headroom/server_process.h"
#include "services/headroom/service_flags.h"
#include "services/kvstore/kv_store_server.h"
#include "services/worker/worker_server.h"

namespace headroom::cli {
namespace {

constexpr char kModelText[] =
    "Folder of the model, as published: config.json, tokenizer.json, *.safetensors.";
// What a request of many MB took goes back when it is over. Left alone, glibc raises its thresholds to
// 32 MiB with the first of them: then 68 MiB stayed after some wrong requests, 8 with these.
void KeepNoFreedMemory() {
  mallopt(M_MMAP_THRESHOLD, 256 << 10);
  mallopt(M_TRIM_THRESHOLD, 1 << 20);
}

constexpr char kAdminText[] = "Where operators connect (headroom status): HOST:PORT or unix:PATH.";

}  // namespace

int ServeCommand(const std::vector<std::string>& args) {
  bool check_config = false;
  ServeOptions options;
  options.coordinator.server.listen_address = kDefaultAddress;
  Flags flags("headroom serve",
              "Starts coordinator, worker and kvstore as processes of this host and keeps them "
              "running.",
              "SIGTERM or SIGINT: new requests are refused, running ones have --drain-timeout to\n"
              "finish, then all stops. A second signal ends it at once.");
  flags.Group("Model");
  flags.Text("model", "DIR", &options.coordinator.server.model_dir, kModelText);
  AddCoordinatorFlags(flags, &options.coordinator);
  flags.Address("admin", &options.coordinator.server.admin_address,
             absl::StrCat(kAdminText, " Default: a socket in a private folder, named in the log."));
  AddServerSecurityFlags(flags, &options.coordinator.server.security);
  AddWorkerFlags(flags, &options.worker);
  AddStoreFlags(flags, &options.store);
  AddLogFlags(flags, &options.log);
  AddCheckFlag(flags, &check_config);
  if (const auto code = ParseOrExit("serve", args, flags)) return *code;
  if (options.coordinator.server.model_dir.empty()) return MissingFlag("serve", "model");
  if (check_config) return ReportCheck("serve", flags.sources().Explain(CheckConfig(options)));
  return RunServe(std::move(options), flags.sources());
}

int CoordinatorCommand(const std::vector<std::string>& args) {
  bool check_config = false;
  CoordinatorProcessOptions options;
  options.server.listen_address = kDefaultAddress;
  options.server.worker_address = kDefaultWorkerAddress;
  options.server.store_address = kDefaultStoreAddress;
  LogOptions log{.process = "coordinator"};
  Flags flags("headroom coordinator",
              "The public API: sessions, batching, placement. Needs a worker and a kvstore, which "
              "may come later and go.");
  flags.Group("Model and peers");
  flags.Text("model", "DIR", &options.server.model_dir,
             "Folder of the model: tokenizer, chat template, config.json. The weights are the "
             "worker's.");
  flags.Address("worker", &options.server.worker_address, "The worker's --listen.");
  flags.Address("kvstore", &options.server.store_address, "The kvstore's --listen.");
  AddCoordinatorFlags(flags, &options);
  flags.Address("admin", &options.server.admin_address,
             absl::StrCat(kAdminText, " Default: nowhere."));
  AddServerSecurityFlags(flags, &options.server.security);
  AddPeerTlsFlags(flags, &options.server.peer_tls);
  AddLogFlags(flags, &log);
  AddCheckFlag(flags, &check_config);
  if (const auto code = ParseOrExit("coordinator", args, flags)) return *code;
  if (options.server.model_dir.empty()) return MissingFlag("coordinator", "model");
  if (check_config) {
    return ReportCheck("coordinator", flags.sources().Explain(CheckConfig(options, log)));
  }
  KeepNoFreedMemory();
  // Of each text that is not UTF-8 protobuf says so on stderr; who sent it is told in the answer.
  google::protobuf::SetLogHandler(nullptr);
  return RunServer<coordinator::CoordinatorServer>(
      log, flags.sources(),
      [&]() -> absl::StatusOr<std::unique_ptr<coordinator::CoordinatorServer>> {
        HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--listen", options.server.listen_address));
        HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--admin", options.server.admin_address));
        return coordinator::StartCoordinator(options.server);
      },
      [&](coordinator::CoordinatorServer& server) {
        if (!server.Drain(options.drain_timeout)) {
          LogWarning("--drain-timeout has passed: the requests that still run are ended");
        }
        server.Shutdown();
        server.Wait();
      });
}

int WorkerCommand(const std::vector<std::string>& args) {
  bool check_config = false;
  WorkerOptions options;
  options.listen_address = kDefaultWorkerAddress;
  LogOptions log{.process = "worker"};
  Flags flags("headroom worker", "Holds the weights and the device's memory, and runs the steps.");
  flags.Group("Model and address");
  flags.Text("model", "DIR", &options.model_dir, kModelText);
  flags.Address("listen", &options.listen_address,
             "Where the coordinator connects: HOST:PORT or unix:PATH. A port of 0 picks one.");
  AddWorkerFlags(flags, &options);
  AddPeerTlsFlags(flags, &options.peer_tls);
  AddLogFlags(flags, &log);
  AddCheckFlag(flags, &check_config);
  if (const auto code = ParseOrExit("worker", args, flags)) return *code;
  if (options.model_dir.empty()) return MissingFlag("worker", "model");
  if (check_config) {
    return ReportCheck("worker", flags.sources().Explain(CheckConfig(options, log)));
  }
  return RunServer<WorkerServer>(
      log, flags.sources(),
      [&]() -> absl::StatusOr<std::unique_ptr<WorkerServer>> {
        HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--listen", options.listen_address));
        // Nothing is lost with the process: keys lie in the store, tokens with the coordinator.
        options.on_device_lost = [](const absl::Status& status) {
          LogError(absl::StrCat("the device is lost: ", status.message()));
          std::_Exit(kExitDeviceLost);
        };
        return StartWorker(options);
      },
      [](WorkerServer& server) {
        server.Shutdown();
        server.Wait();
      });
}

int KvStoreCommand(const std::vector<std::string>& args) {
  bool check_config = false;
  kvstore::KvStoreOptions options;
  options.listen_address = kDefaultStoreAddress;
  options.segment_dir = "/dev/shm/headroom";
  LogOptions log{.process = "kvstore"};
  Flags flags("headroom kvstore", "Keeps keys and values in shared memory of this host.");
  flags.Group("Address");
  flags.Address("listen", &options.listen_address,
             "Where the coordinator connects: HOST:PORT or unix:PATH. A port of 0 picks one.");
  AddStoreFlags(flags, &options);
  AddPeerTlsFlags(flags, &options.peer_tls);
  AddLogFlags(flags, &log);
  AddCheckFlag(flags, &check_config);
  if (const auto code = ParseOrExit("kvstore", args, flags)) return *code;
  if (check_config) {
    return ReportCheck("kvstore", flags.sources().Explain(CheckConfig(options, log)));
  }
  return RunServer<kvstore::KvStoreServer>(
      log, flags.sources(),
      [&]() -> absl::StatusOr<std::unique_ptr<kvstore::KvStoreServer>> {
        HEADROOM_RETURN_IF_ERROR(CheckListenAddress("--listen", options.listen_address));
        if (options.host_memory_bytes == 0) {
          HEADROOM_ASSIGN_OR_RETURN(options.host_memory_bytes,
                                    DefaultHostMemoryBytes(options.segment_dir));
          LogInfo(absl::StrCat("--host-memory is not set: ",
                               FormatBytes(options.host_memory_bytes)));
        }
        return kvstore::StartKvStore(options);
      },
      [](kvstore::KvStoreServer& server) {
        server.Shutdown();
        server.Wait();
      });
}

}  // namespace headroom::cli
