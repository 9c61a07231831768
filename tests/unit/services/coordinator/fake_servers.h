// The fake worker and store (fake_peers.h) behind real RPC servers on unix sockets.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_SERVERS_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_SERVERS_H_

#include <grpcpp/grpcpp.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/grpc_status.h"
#include "headroom/v1/kv_store.grpc.pb.h"
#include "headroom/v1/worker.grpc.pb.h"
#include "tests/unit/services/coordinator/fake_store.h"
#include "tests/unit/services/coordinator/fake_worker.h"

namespace headroom::coordinator {

class FakeWorkerServer : public v1::WorkerService::Service {
 public:
  FakeWorkerServer(std::shared_ptr<FakeMachine> machine, const std::string& address)
      : client_(machine), machine_(std::move(machine)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeWorkerServer() override {
    server_->Shutdown(std::chrono::system_clock::now());  // ends calls at once, as a crash would
  }

  grpc::Status GetWorkerInfo(grpc::ServerContext*, const v1::GetWorkerInfoRequest*,
                             v1::GetWorkerInfoResponse* response) override {
    absl::StatusOr<v1::GetWorkerInfoResponse> info = client_.GetInfo();
    if (info.ok()) *response = *info;
    return ToGrpcStatus(info.status());
  }
  grpc::Status AttachStore(grpc::ServerContext*, const v1::AttachStoreRequest* request,
                           v1::AttachStoreResponse*) override {
    return ToGrpcStatus(client_.AttachStore(request->segment_dir(), request->generation()));
  }
  grpc::Status PreparePlan(grpc::ServerContext*, const v1::PreparePlanRequest* request,
                           v1::PreparePlanResponse*) override {
    return ToGrpcStatus(client_.PreparePlan(request->plan()));
  }
  grpc::Status Step(grpc::ServerContext* context,
                    grpc::ServerReaderWriter<v1::StepResponse, v1::StepRequest>* stream) override {
    Mutex mutex;
    bool open = true;
    FakeStepStream steps(
        machine_,
        [&](v1::StepResponse response) {
          MutexLock lock(&mutex);
          if (open) stream->Write(response);
        },
        [&](absl::Status) { context->TryCancel(); });
    v1::StepRequest step;
    while (stream->Read(&step)) steps.Send(std::move(step));
    MutexLock lock(&mutex);
    open = false;
    return grpc::Status::OK;
  }

 private:
  FakeWorkerClient client_;
  const std::shared_ptr<FakeMachine> machine_;
  std::unique_ptr<grpc::Server> server_;
};

class FakeStoreServer : public v1::KvStoreService::Service {
 public:
  FakeStoreServer(std::shared_ptr<FakeMachine> machine, const std::string& address)
      : client_(std::move(machine)) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials());
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeStoreServer() override {
    server_->Shutdown(std::chrono::system_clock::now());  // ends calls at once, as a crash would
  }

  grpc::Status GetStoreInfo(grpc::ServerContext*, const v1::GetStoreInfoRequest*,
                            v1::GetStoreInfoResponse* response) override {
    absl::StatusOr<v1::GetStoreInfoResponse> info = client_.GetInfo();
    if (info.ok()) *response = *info;
    return ToGrpcStatus(info.status());
  }
  grpc::Status BindModel(grpc::ServerContext*, const v1::BindModelRequest* request,
                         v1::BindModelResponse*) override {
    return ToGrpcStatus(
        client_.BindModel(request->geometry(), request->fingerprint(), request->allow_clean()));
  }
  grpc::Status AllocateRun(grpc::ServerContext*, const v1::AllocateRunRequest* request,
                           v1::AllocateRunResponse* response) override {
    absl::StatusOr<v1::ExtentRun> run = client_.AllocateRun(
        request->sequence_id(), request->first_pos(), request->capacity_tokens());
    if (run.ok()) *response->mutable_run() = *run;
    return ToGrpcStatus(run.status());
  }
  grpc::Status CommitSealed(grpc::ServerContext*, const v1::CommitSealedRequest* request,
                            v1::CommitSealedResponse*) override {
    return ToGrpcStatus(
        client_.CommitSealed({request->sequences().begin(), request->sequences().end()}));
  }
  grpc::Status TruncateSequence(grpc::ServerContext*, const v1::TruncateSequenceRequest* request,
                                v1::TruncateSequenceResponse*) override {
    return ToGrpcStatus(client_.TruncateSequence(request->sequence_id(), request->tokens()));
  }
  grpc::Status ReleaseSequences(grpc::ServerContext*, const v1::ReleaseSequencesRequest* request,
                                v1::ReleaseSequencesResponse*) override {
    return ToGrpcStatus(
        client_.ReleaseSequences({request->sequence_ids().begin(), request->sequence_ids().end()}));
  }
  // Two a page, so that there are pages.
  grpc::Status ListSequences(grpc::ServerContext*, const v1::ListSequencesRequest* request,
                             v1::ListSequencesResponse* response) override {
    absl::StatusOr<std::vector<v1::StoredSequence>> all = client_.ListSequences();
    if (!all.ok()) return ToGrpcStatus(all.status());
    for (const v1::StoredSequence& sequence : *all) {
      if (sequence.sequence_id() <= request->after_sequence_id()) continue;
      response->set_more(response->sequences_size() == 2);
      if (response->more()) break;
      *response->add_sequences() = sequence;
    }
    return grpc::Status::OK;
  }
  grpc::Status PrepareStorePlan(grpc::ServerContext*, const v1::PrepareStorePlanRequest* request,
                                v1::PrepareStorePlanResponse*) override {
    return ToGrpcStatus(client_.PreparePlan(request->plan()));
  }

 private:
  FakeStoreClient client_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_SERVERS_H_
