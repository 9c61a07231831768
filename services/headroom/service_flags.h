// What each service can be told, as flags: read from a command line, and written as one (by
// `serve`, for the processes that it starts).
#ifndef HEADROOM_SERVICES_HEADROOM_SERVICE_FLAGS_H_
#define HEADROOM_SERVICES_HEADROOM_SERVICE_FLAGS_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/log.h"
#include "common/security_options.h"
#include "services/coordinator/coordinator_server.h"
#include "services/headroom/flags.h"
#include "services/kvstore/kv_store_server.h"
#include "services/worker/worker_server.h"

namespace headroom::cli {

inline constexpr char kDefaultAddress[] = "127.0.0.1:7410";
inline constexpr char kDefaultWorkerAddress[] = "127.0.0.1:7411";
inline constexpr char kDefaultStoreAddress[] = "127.0.0.1:7412";

// The coordinator as a process.
struct CoordinatorProcessOptions {
  coordinator::CoordinatorOptions server;
  absl::Duration drain_timeout = absl::Seconds(30);
};

// --check-config: says whether the process would start, and does not start it.
void AddCheckFlag(Flags& flags, bool* check_config);
void AddLogFlags(Flags& flags, LogOptions* options);
// Without --listen and, for the worker, --model: `serve` has its own.
void AddWorkerFlags(Flags& flags, WorkerOptions* options);
void AddStoreFlags(Flags& flags, kvstore::KvStoreOptions* options);
void AddCoordinatorFlags(Flags& flags, CoordinatorProcessOptions* options);
void AddServerSecurityFlags(Flags& flags, ServerSecurityOptions* options);
// Of processes that find each other over a network; those of `serve` need none.
void AddPeerTlsFlags(Flags& flags, TlsFiles* files);
// Of who calls a server.
void AddClientSecurityFlags(Flags& flags, ClientSecurityOptions* options);

// The subcommand and all its flags: parsed, they give the same options again.
std::vector<std::string> WorkerArguments(const WorkerOptions& options, const LogOptions& log);
std::vector<std::string> StoreArguments(const kvstore::KvStoreOptions& options,
                                        const LogOptions& log);
std::vector<std::string> CoordinatorArguments(const CoordinatorProcessOptions& options,
                                              const LogOptions& log);

void AppendLogArguments(const LogOptions& log, std::vector<std::string>* args);

// The size of a store that was given none: that of the segment already in the folder, so that a
// restart takes it over, else a quarter of the memory that this process may use for files there.
// RESOURCE_EXHAUSTED if that cannot be found out.
absl::StatusOr<int64_t> DefaultHostMemoryBytes(const std::string& segment_dir);
// RESOURCE_EXHAUSTED if there is not so much memory for files in the folder, as far as can be told
// before it is there.
absl::Status CheckHostMemory(const std::string& segment_dir, int64_t bytes);

// INVALID_ARGUMENT if "unix:PATH" (any other address is fine) is longer than the system takes;
// NOT_FOUND, PERMISSION_DENIED and the like if no socket can be made in its folder; UNAVAILABLE if
// somebody listens there, whose socket file would be taken away.
absl::Status CheckListenAddress(const std::string& flag, const std::string& address);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_SERVICE_FLAGS_H_
