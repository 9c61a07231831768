#include "services/coordinator/worker_client.h"

#include <deque>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/mutex.h"
#include "common/status.h"
#include "headroom/v1/worker.grpc.pb.h"
#include "services/coordinator/channel_client.h"

namespace headroom::coordinator {
namespace {

// Mapping and registering the first gigabyte of a segment.
constexpr std::chrono::milliseconds kAttachDeadline{60'000};
constexpr absl::Duration kCloseDeadline = absl::Seconds(5);

// The call itself. Lives until the RPC library is done with it, whoever has let go before.
class StepCall : public grpc::ClientBidiReactor<v1::StepRequest, v1::StepResponse> {
 public:
  StepCall(std::function<void(v1::StepResponse)> on_response,
           std::function<void(absl::Status)> on_closed)
      : on_response_(std::move(on_response)), on_closed_(std::move(on_closed)) {}

  void Begin(v1::WorkerService::Stub& stub, std::shared_ptr<StepCall> self) {
    self_ = std::move(self);
    stub.async()->Step(&context_, this);
    AddHold();  // for Send(), which comes from outside the reactions
    StartRead(&response_);
    StartCall();
  }

  void Send(v1::StepRequest step) {
    MutexLock lock(&mutex_);
    if (ended_) return;
    // Bounded by the protocol: two steps of each kind in flight.
    queue_.push_back(std::move(step));
    if (queue_.size() == 1) StartWrite(&queue_.front());
  }

  void CancelAndWait() {
    context_.TryCancel();
    const absl::Time deadline = absl::Now() + kCloseDeadline;
    MutexLock lock(&mutex_);
    while (!done_ && absl::Now() < deadline) done_condition_.WaitFor(&mutex_, absl::Seconds(1));
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      End();
      return;
    }
    on_response_(std::move(response_));
    response_.Clear();
    StartRead(&response_);
  }

  void OnWriteDone(bool ok) override {
    MutexLock lock(&mutex_);
    queue_.pop_front();
    if (!ok || ended_) {
      queue_.clear();
    } else if (!queue_.empty()) {
      StartWrite(&queue_.front());
    }
  }

  void OnDone(const grpc::Status& status) override {
    const std::shared_ptr<StepCall> self = std::move(self_);
    on_closed_(status.ok() ? absl::UnavailableError("the worker ended the step stream")
                           : FromGrpcStatus(status));
    MutexLock lock(&mutex_);
    done_ = true;
    done_condition_.SignalAll();
  }

 private:
  // Nothing more will be read: no more writes either.
  void End() {
    {
      MutexLock lock(&mutex_);
      ended_ = true;
    }
    RemoveHold();
  }

  const std::function<void(v1::StepResponse)> on_response_;
  const std::function<void(absl::Status)> on_closed_;
  grpc::ClientContext context_;
  v1::StepResponse response_;
  std::shared_ptr<StepCall> self_;
  Mutex mutex_;
  CondVar done_condition_;
  std::deque<v1::StepRequest> queue_ ABSL_GUARDED_BY(mutex_);  // front: being written
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool done_ ABSL_GUARDED_BY(mutex_) = false;
};

class GrpcStepStream : public StepStream {
 public:
  explicit GrpcStepStream(std::shared_ptr<StepCall> call) : call_(std::move(call)) {}
  ~GrpcStepStream() override { call_->CancelAndWait(); }
  void Send(v1::StepRequest step) override { call_->Send(std::move(step)); }

 private:
  const std::shared_ptr<StepCall> call_;
};

class GrpcWorkerClient : public WorkerClient {
 public:
  GrpcWorkerClient(const std::string& address,
                const std::shared_ptr<grpc::ChannelCredentials>& credentials)
      : stub_(v1::WorkerService::NewStub(MakePeerChannel(address, credentials))) {}

  absl::StatusOr<v1::GetWorkerInfoResponse> GetInfo() override {
    v1::GetWorkerInfoResponse response;
    HEADROOM_RETURN_IF_ERROR(CallWithDeadline(kCallDeadline, [&](grpc::ClientContext* context) {
      return stub_->GetWorkerInfo(context, v1::GetWorkerInfoRequest(), &response);
    }));
    return response;
  }

  absl::Status AttachStore(const std::string& segment_dir, uint64_t generation) override {
    v1::AttachStoreRequest request;
    request.set_segment_dir(segment_dir);
    request.set_generation(generation);
    v1::AttachStoreResponse response;
    return CallWithDeadline(kAttachDeadline, [&](grpc::ClientContext* context) {
      return stub_->AttachStore(context, request, &response);
    });
  }

  absl::StatusOr<std::string> OpenMailbox(uint64_t generation) override {
    v1::OpenMailboxRequest request;
    request.set_generation(generation);
    v1::OpenMailboxResponse response;
    HEADROOM_RETURN_IF_ERROR(CallWithDeadline(kCallDeadline, [&](grpc::ClientContext* context) {
      return stub_->OpenMailbox(context, request, &response);
    }));
    return response.mailbox_file();
  }

  absl::StatusOr<v1::MeasureLanesResponse> MeasureLanes() override {
    v1::MeasureLanesResponse response;
    HEADROOM_RETURN_IF_ERROR(CallWithDeadline(kAttachDeadline, [&](grpc::ClientContext* context) {
      return stub_->MeasureLanes(context, v1::MeasureLanesRequest(), &response);
    }));
    return response;
  }

  absl::Status PreparePlan(const v1::Plan& plan) override {
    v1::PreparePlanRequest request;
    *request.mutable_plan() = plan;
    v1::PreparePlanResponse response;
    return CallWithDeadline(kCallDeadline, [&](grpc::ClientContext* context) {
      return stub_->PreparePlan(context, request, &response);
    });
  }

  absl::StatusOr<std::unique_ptr<StepStream>> StartSteps(
      std::function<void(v1::StepResponse)> on_response,
      std::function<void(absl::Status)> on_closed) override {
    auto call = std::make_shared<StepCall>(std::move(on_response), std::move(on_closed));
    call->Begin(*stub_, call);
    return std::make_unique<GrpcStepStream>(std::move(call));
  }

 private:
  const std::unique_ptr<v1::WorkerService::Stub> stub_;
};

}  // namespace

std::unique_ptr<WorkerClient> MakeWorkerClient(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  return std::make_unique<GrpcWorkerClient>(address, credentials);
}

std::function<absl::Status()> MakeWorkerPing(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    absl::Duration deadline, std::function<void(const v1::GetWorkerInfoResponse&)> on_info) {
  using Stub = v1::WorkerService::Stub;
  return MakePing(std::make_shared<Stub>(MakePeerChannel(address, credentials)), &Stub::GetWorkerInfo,
                  absl::ToChronoMilliseconds(deadline), std::move(on_info));
}

}  // namespace headroom::coordinator
