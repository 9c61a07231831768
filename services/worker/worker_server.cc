#include "services/worker/worker_server.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/device_factory.h"
#include "common/grpc_security.h"
#include "common/grpc_server.h"
#include "common/log.h"
#include "common/status.h"
#include "services/worker/worker_service.h"

namespace headroom {
namespace {

constexpr char kServiceName[] = "headroom.v1.WorkerService";
// A step stream is ended at once; what runs on the device is waited for.
constexpr std::chrono::seconds kShutdownGrace{1};

class Server : public WorkerServer {
 public:
  Server(std::unique_ptr<Worker> worker, std::unique_ptr<ServerSecurity> security)
      : worker_(std::move(worker)), service_(worker_.get()), security_(std::move(security)) {}

  absl::Status Listen(const WorkerOptions& options) {
    HEADROOM_RETURN_IF_ERROR(server_.Listen(&service_, options.listen_address,
                                            security_->credentials(), options.max_message_bytes));
    LogInfo(absl::StrCat("worker serves on ", listen_address()));
    return absl::OkStatus();
  }

  std::string listen_address() const override { return server_.listen_address(); }
  void Shutdown() override { server_.Shutdown(); }
  void Wait() override { server_.Wait(); }

 private:
  const std::unique_ptr<Worker> worker_;
  WorkerService service_;
  const std::unique_ptr<ServerSecurity> security_;
  PeerServer server_{kServiceName, kShutdownGrace};  // last: its calls use the others
};

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerServer>> StartWorker(const WorkerOptions& options) {
  if (options.listen_address.empty()) {
    return absl::InvalidArgumentError("the listen address is empty");
  }
  HEADROOM_RETURN_IF_ERROR(CheckMaxMessageBytes(options.max_message_bytes));
  // Before the weights are read, which takes its time.
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<ServerSecurity> security,
                            ServerSecurity::LoadPeer(options.peer_tls));
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, Worker::Create(options));
  auto server = std::make_unique<Server>(std::move(worker), std::move(security));
  HEADROOM_RETURN_IF_ERROR(server->Listen(options));
  return server;
}

absl::Status CheckWorkerFlags(const WorkerOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckMaxMessageBytes(options.max_message_bytes));
  HEADROOM_RETURN_IF_ERROR(ServerSecurity::LoadPeer(options.peer_tls).status());
  return Worker::CheckFlags(options);
}

absl::Status CheckWorker(const WorkerOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckWorkerFlags(options));
  HEADROOM_RETURN_IF_ERROR(CheckDevice(options.device));
  HEADROOM_ASSIGN_OR_RETURN(const ModelConfig config, ReadModelConfig(options.model_dir));
  return WeightLoading::Check(options.model_dir, config);
}

}  // namespace headroom
