// The coordinator's end of WorkerService.
#ifndef HEADROOM_SERVICES_COORDINATOR_WORKER_CLIENT_H_
#define HEADROOM_SERVICES_COORDINATOR_WORKER_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "headroom/v1/types.pb.h"
#include "headroom/v1/worker.pb.h"

namespace grpc {
class ChannelCredentials;
}

namespace headroom::coordinator {

// One step stream. Thread-safe.
class StepStream {
 public:
  // Ends the stream (the worker closes all sequences) and waits, at most some seconds, until no
  // callback runs any more.
  virtual ~StepStream() = default;
  // Queues the step; never blocks. Dropped if the stream is broken: on_closed tells.
  virtual void Send(v1::StepRequest step) = 0;
};

// Calls block for at most their deadline (seconds). Errors carry the worker's status; UNAVAILABLE
// and DEADLINE_EXCEEDED mean that it cannot be reached. Thread-safe.
class WorkerClient {
 public:
  virtual ~WorkerClient() = default;

  virtual absl::StatusOr<v1::GetWorkerInfoResponse> GetInfo() = 0;
  virtual absl::Status AttachStore(const std::string& segment_dir, uint64_t generation) = 0;
  virtual absl::StatusOr<std::string> OpenMailbox(uint64_t generation) = 0;
  virtual absl::StatusOr<v1::MeasureLanesResponse> MeasureLanes() = 0;
  virtual absl::Status PreparePlan(const v1::Plan& plan) = 0;
  // The callbacks run on threads of the RPC library and must not block; on_closed is the last one
  // and comes once.
  virtual absl::StatusOr<std::unique_ptr<StepStream>> StartSteps(
      std::function<void(v1::StepResponse)> on_response,
      std::function<void(absl::Status)> on_closed) = 0;
};

// `address` as gRPC names it: "unix:/path", "host:port". Connects when first called.
std::unique_ptr<WorkerClient> MakeWorkerClient(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials);

// Whether the worker answers within `deadline`; on a channel of its own. `on_info` gets what it says of
// itself, on the thread that pings.
std::function<absl::Status()> MakeWorkerPing(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    absl::Duration deadline, std::function<void(const v1::GetWorkerInfoResponse&)> on_info);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_WORKER_CLIENT_H_
