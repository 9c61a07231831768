#include "services/worker/worker_server.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <atomic>
#include <chrono>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
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
  explicit Server(std::unique_ptr<Worker> worker)
      : worker_(std::move(worker)), service_(worker_.get()) {}
  ~Server() override { Shutdown(); }

  absl::Status Listen(const WorkerOptions& options);

  std::string listen_address() const override { return listen_address_; }
  void Shutdown() override {
    if (shut_down_.exchange(true) || server_ == nullptr) return;
    server_->GetHealthCheckService()->Shutdown();
    server_->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
  }
  void Wait() override { server_->Wait(); }

 private:
  const std::unique_ptr<Worker> worker_;
  WorkerService service_;
  std::unique_ptr<grpc::Server> server_;
  std::string listen_address_;
  std::atomic<bool> shut_down_{false};
};

absl::Status Server::Listen(const WorkerOptions& options) {
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(options.listen_address, grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service_);
  builder.SetMaxReceiveMessageSize(static_cast<int>(options.max_message_bytes));
  // The coordinator pings every 10 s, also while it sends no step: welcome, or it would get GOAWAY.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  // Two servers on one port would take turns; the second is a mistake.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  server_ = builder.BuildAndStart();
  if (server_ == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", options.listen_address));
  }
  listen_address_ = options.listen_address;
  const size_t colon = listen_address_.rfind(':');
  if (port > 0 && !absl::StartsWith(listen_address_, "unix:") && colon != std::string::npos) {
    listen_address_ = absl::StrCat(listen_address_.substr(0, colon), ":", port);
  }
  server_->GetHealthCheckService()->SetServingStatus("", true);
  server_->GetHealthCheckService()->SetServingStatus(kServiceName, true);
  LogInfo(absl::StrCat("worker serves on ", listen_address_));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<WorkerServer>> StartWorker(const WorkerOptions& options) {
  if (options.listen_address.empty()) {
    return absl::InvalidArgumentError("the listen address is empty");
  }
  if (options.max_message_bytes < 1024 || options.max_message_bytes > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("--max-message-bytes ",
                                                   options.max_message_bytes, ", expected 1024 to ",
                                                   INT32_MAX));
  }
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, Worker::Create(options));
  auto server = std::make_unique<Server>(std::move(worker));
  HEADROOM_RETURN_IF_ERROR(server->Listen(options));
  return server;
}

}  // namespace headroom
