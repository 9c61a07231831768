// `headroom serve`: coordinator, worker and kvstore as supervised processes of this host.
#ifndef HEADROOM_SERVICES_HEADROOM_SERVE_H_
#define HEADROOM_SERVICES_HEADROOM_SERVE_H_

#include <string>
#include <vector>

#include "common/log.h"
#include "services/headroom/service_flags.h"
#include "services/headroom/supervisor.h"

namespace headroom::cli {

struct ServeOptions {
  CoordinatorProcessOptions coordinator;  // admin_address empty: a socket in the private folder
  WorkerOptions worker;
  kvstore::KvStoreOptions store;  // segment_dir empty: a private folder in shared memory
  LogOptions log;
};

// Where the private folder of a segment is made.
inline constexpr char kSharedMemory[] = "/dev/shm";

// Fills in what the three processes are told of each other: the model, and the addresses that they
// reach each other at, sockets in `socket_dir`.
void CompleteOptions(ServeOptions& options, const std::string& socket_dir);

// The three processes, with completed options.
std::vector<ChildSpec> ServeProcesses(ServeOptions options, const std::string& socket_dir);

// Blocks until SIGTERM, SIGINT or SIGHUP. Sockets lie in a private folder (mode 0700) that is
// removed at the end, and so is the segment unless its folder was given. Returns the exit code,
// see Supervisor. `sources` are for errors that come before the three processes.
int RunServe(ServeOptions options, const FlagSources& sources);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_SERVE_H_
