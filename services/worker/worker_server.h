// The worker as a process has it: one device, one model, behind an address.
#ifndef HEADROOM_SERVICES_WORKER_WORKER_SERVER_H_
#define HEADROOM_SERVICES_WORKER_WORKER_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/security_options.h"

namespace headroom {

struct WorkerOptions {
  // As gRPC names addresses: "unix:/path", "host:port". A port of 0 picks one.
  std::string listen_address;
  TlsFiles peer_tls = PeerTlsFiles();  // what the coordinator must show, and is shown
  std::string model_dir;
  // "cpu", "cuda", or "auto": cuda where /dev/nvidiactl is, else cpu.
  std::string device = "auto";
  // Device memory for everything: weights, resident keys, tails, staging ring, activations. 0: on cuda
  // what is free less 1 GiB; on cpu the weights and 2 GiB.
  int64_t gpu_memory_bytes = 0;
  // Threads of the CPU device's compute stream; 0: as many as this process may run on.
  int32_t compute_threads = 0;
  // Most new tokens of one sequence in one step, beside what the memory allows.
  int64_t max_chunk_tokens = 8192;
  // Longest context that tables are laid out for; 0: as long as the model was trained for.
  int64_t max_context_tokens = 0;
  int32_t max_sequences = 16;
  int64_t max_message_bytes = int64_t{16} << 20;
  // What the kvstore has for one layer's keys in place; then the step is run again, without it.
  absl::Duration in_place_deadline = absl::Seconds(1);
  // For tests: delays each device operation by 0 to 5 ms, drawn from this seed.
  std::optional<uint64_t> delay_seed;
  // For tests: the CPU device is lost once there is a file of this name.
  std::string fail_file;
  // Called when the device has failed for good (an Xid, an illegal access: no later operation runs), before
  // any step says so; on a thread of the executor. Only another process gets the device back. Without it
  // all steps fail.
  std::function<void(const absl::Status&)> on_device_lost;
};

class WorkerServer {
 public:
  virtual ~WorkerServer() = default;

  // What the listen address came to, where a port was picked.
  virtual std::string listen_address() const = 0;
  // Ends calls and Wait().
  virtual void Shutdown() = 0;
  // Returns after Shutdown().
  virtual void Wait() = 0;
};

// Loads the weights, then serves; health ("" and "headroom.v1.WorkerService") says so. Errors name flag
// or file: INVALID_ARGUMENT and UNIMPLEMENTED for an option or a model that is wrong,
// RESOURCE_EXHAUSTED with the least --gpu-memory that would do, UNAVAILABLE for an address that cannot
// be listened on or a device that is not there.
absl::StatusOr<std::unique_ptr<WorkerServer>> StartWorker(const WorkerOptions& options);

// What can be found wrong without a driver and without the weights' files: options, TLS files,
// config.json, and whether --gpu-memory is enough where it is known. Errors as above.
absl::Status CheckWorkerFlags(const WorkerOptions& options);
// And whether there is a driver for --device, and the headers of the weights.
absl::Status CheckWorker(const WorkerOptions& options);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_WORKER_SERVER_H_
