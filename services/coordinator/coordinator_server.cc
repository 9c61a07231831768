#include "services/coordinator/coordinator_server.h"

#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>

#include <atomic>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/grpc_security.h"
#include "common/grpc_server.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/status.h"
#include "services/coordinator/admin_service.h"
#include "services/coordinator/heartbeat.h"
#include "services/coordinator/inference_service.h"
#include "services/coordinator/scheduler.h"
#include "services/coordinator/served_model.h"

namespace headroom::coordinator {
namespace {

constexpr char kServiceName[] = "headroom.v1.InferenceService";
// Calls that have been told to end have so long to do so.
constexpr std::chrono::seconds kShutdownGrace{5};

absl::Status CheckOptions(const CoordinatorOptions& options) {
  const auto wrong = [](absl::string_view what) { return absl::InvalidArgumentError(what); };
  if (options.listen_address.empty()) return wrong("the listen address is empty");
  if (options.worker_address.empty()) return wrong("the worker's address is empty");
  if (options.store_address.empty()) return wrong("the kvstore's address is empty");
  if (options.max_queue < 1 || options.max_queue > 1'000'000) {
    return wrong(absl::StrCat("--max-queue ", options.max_queue, ", expected 1 to 1000000"));
  }
  if (options.max_sessions < 1 || options.max_sessions > 1'000'000) {
    return wrong(absl::StrCat("--max-sessions ", options.max_sessions, ", expected 1 to 1000000"));
  }
  if (options.context_limit_tokens < 0) {
    return wrong(
        absl::StrCat("--context-limit ", options.context_limit_tokens, ", expected 0 or more"));
  }
  return CheckMaxMessageBytes(options.max_message_bytes);
}

class Server : public CoordinatorServer {
 public:
  Server(const CoordinatorOptions& options, std::unique_ptr<ServedModel> model)
      : options_(options), model_(std::move(model)) {}

  ~Server() override { Shutdown(); }

  absl::Status Start();
  std::string listen_address() const override { return listen_address_; }
  std::string admin_address() const override { return admin_address_; }
  bool serving() const override { return serving_.load(); }
  bool Drain(absl::Duration timeout) override;
  void Shutdown() override;
  void Wait() override { server_->Wait(); }

 private:
  absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> PeerCredentials();
  // Sets one of what health hangs on, and tells what follows.
  void SetHealth(bool Server::*part, bool value);
  void BeginDrain();

  const CoordinatorOptions options_;
  const std::unique_ptr<ServedModel> model_;
  std::unique_ptr<TlsIdentity> peer_identity_;
  std::unique_ptr<ServerSecurity> security_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<InferenceService> inference_;
  std::unique_ptr<AdminService> admin_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<grpc::Server> admin_server_;
  std::string listen_address_;
  std::string admin_address_;
  std::unique_ptr<Heartbeat> heartbeat_;
  std::atomic<bool> serving_{false};
  Mutex health_mutex_;
  bool connected_ ABSL_GUARDED_BY(health_mutex_) = false;
  bool alive_ ABSL_GUARDED_BY(health_mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(health_mutex_) = false;
  Mutex mutex_;
  bool shut_down_ ABSL_GUARDED_BY(mutex_) = false;
};

absl::Status Server::Start() {
  SchedulerOptions scheduler;
  scheduler.max_queue = options_.max_queue;
  scheduler.max_sessions = options_.max_sessions;
  scheduler.allow_clean = options_.allow_clean_segment;
  scheduler.lost_peer_timeout = options_.lost_peer_timeout;
  HEADROOM_ASSIGN_OR_RETURN(security_, ServerSecurity::Load(options_.security));
  HEADROOM_ASSIGN_OR_RETURN(const auto peer_credentials, PeerCredentials());
  scheduler_ = std::make_unique<Scheduler>(
      scheduler, MakeWorkerClient(options_.worker_address, peer_credentials),
      MakeStoreClient(options_.store_address, peer_credentials),
      [this](bool connected) { SetHealth(&Server::connected_, connected); });
  inference_ = std::make_unique<InferenceService>(scheduler_.get(), model_.get(),
                                                  options_.context_limit_tokens);
  grpc::EnableDefaultHealthCheckService(true);
  const Reflection reflection = options_.reflection ? Reflection::kYes : Reflection::kNo;
  HEADROOM_ASSIGN_OR_RETURN(server_,
                            ListenGrpc(inference_.get(), options_.listen_address,
                                       security_->credentials(), options_.max_message_bytes,
                                       reflection, &listen_address_));
  SetHealth(&Server::draining_, false);
  if (!options_.admin_address.empty()) {
    admin_ = std::make_unique<AdminService>(
        scheduler_.get(), model_.get(),
        ProcessAddresses{listen_address_, options_.worker_address, options_.store_address},
        [this] { BeginDrain(); });
    HEADROOM_ASSIGN_OR_RETURN(admin_server_,
                              ListenGrpc(admin_.get(), options_.admin_address,
                                         security_->credentials(), options_.max_message_bytes,
                                         reflection, &admin_address_));
  }
  scheduler_->Start();
  heartbeat_ = std::make_unique<Heartbeat>(
      MakeWorkerPing(
          options_.worker_address, peer_credentials, kPingDeadline,
          [this](const v1::GetWorkerInfoResponse& worker) { scheduler_->NoteWorker(worker); }),
      MakeStorePing(options_.store_address, peer_credentials, kPingDeadline),
      [this](bool alive) { SetHealth(&Server::alive_, alive); });
  LogInfo(absl::StrCat("coordinator serves ", model_->name(), " on ", listen_address_));
  return absl::OkStatus();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> Server::PeerCredentials() {
  HEADROOM_ASSIGN_OR_RETURN(peer_identity_, TlsIdentity::LoadPeer(options_.peer_tls));
  return peer_identity_ == nullptr ? grpc::InsecureChannelCredentials()
                                   : peer_identity_->ChannelCredentials();
}

void Server::SetHealth(bool Server::*part, bool value) {
  MutexLock lock(&health_mutex_);  // to the end: what is told last is what holds
  this->*part = value;
  const bool serving = connected_ && alive_ && !draining_;
  serving_.store(serving);
  grpc::HealthCheckServiceInterface* const health = server_->GetHealthCheckService();
  if (health == nullptr) return;
  health->SetServingStatus("", serving);
  health->SetServingStatus(kServiceName, serving);
}

void Server::BeginDrain() {
  SetHealth(&Server::draining_, true);
}

bool Server::Drain(absl::Duration timeout) {
  BeginDrain();
  struct Drained {
    Mutex mutex;
    CondVar condition;
    bool done = false;
  };
  const auto drained = std::make_shared<Drained>();
  scheduler_->Drain([drained] {
    MutexLock lock(&drained->mutex);
    drained->done = true;
    drained->condition.SignalAll();
  });
  const absl::Time deadline = absl::Now() + timeout;
  MutexLock lock(&drained->mutex);
  while (!drained->done && absl::Now() < deadline) {
    drained->condition.WaitFor(&drained->mutex, deadline - absl::Now());
  }
  return drained->done;
}

void Server::Shutdown() {
  {
    MutexLock lock(&mutex_);
    if (std::exchange(shut_down_, true)) return;
  }
  if (server_ != nullptr) BeginDrain();
  heartbeat_.reset();
  if (scheduler_ != nullptr) scheduler_->Stop();
  const auto deadline = std::chrono::system_clock::now() + kShutdownGrace;
  if (admin_server_ != nullptr) admin_server_->Shutdown(deadline);
  if (server_ != nullptr) server_->Shutdown(deadline);
}

}  // namespace

absl::StatusOr<std::unique_ptr<CoordinatorServer>> StartCoordinator(
    const CoordinatorOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<ServedModel> model,
                            ServedModel::Load(options.model_dir));
  auto server = std::make_unique<Server>(options, std::move(model));
  HEADROOM_RETURN_IF_ERROR(server->Start());
  return server;
}

absl::Status CheckCoordinatorFlags(const CoordinatorOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  HEADROOM_RETURN_IF_ERROR(ServerSecurity::Load(options.security).status());
  return TlsIdentity::LoadPeer(options.peer_tls).status();
}

absl::Status CheckCoordinator(const CoordinatorOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckCoordinatorFlags(options));
  return ServedModel::Load(options.model_dir).status();
}

}  // namespace headroom::coordinator
