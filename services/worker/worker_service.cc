#include "services/worker/worker_service.h"

#include <deque>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/log.h"
#include "common/mutex.h"
#include "services/worker/step_proto.h"

namespace headroom {
namespace {

constexpr int32_t kSchemaRevision = 2;  // 2: StepRequest.abandon_sequence_ids
constexpr int32_t kMinimumPeerRevision = 1;

absl::Status StoppingError() {
  return WithReason(absl::UnavailableError("the worker is stopping"), "STOPPING");
}

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

void MemoryToProto(const Worker& worker, v1::DeviceMemory* out) {
  const DeviceBudget& budget = worker.budget();
  const StepExecutor::Memory memory = worker.memory();
  out->set_budget_bytes(budget.budget_bytes);
  out->set_weights_bytes(budget.weights_bytes);
  out->set_ring_bytes(budget.ring_bytes);
  out->set_activation_bytes(budget.activation_bytes);
  out->set_kv_pool_bytes(memory.kv_pool_bytes);
  out->set_tail_bytes_per_sequence(budget.tail_bytes_per_sequence);
  out->set_draw_state_bytes_per_sequence(budget.draw_state_bytes);
  out->set_kv_pool_high_water_bytes(memory.kv_pool_high_water_bytes);
  // The arena is carved once; of the pool, what was never in use does not count.
  out->set_high_water_bytes(memory.arena.high_water_bytes - memory.kv_pool_bytes +
                            memory.kv_pool_high_water_bytes);
  out->set_registered_host_bytes(worker.registered_host_bytes());
}

}  // namespace

// ---------------------------------------------------------------- unary calls

grpc::ServerUnaryReactor* WorkerService::GetWorkerInfo(grpc::CallbackServerContext* context,
                                                       const v1::GetWorkerInfoRequest*,
                                                       v1::GetWorkerInfoResponse* response) {
  const ModelConfig& config = worker_->config();
  const DeviceBudget& budget = worker_->budget();
  response->set_schema_revision(kSchemaRevision);
  response->set_minimum_peer_revision(kMinimumPeerRevision);
  response->set_device(std::string(worker_->device_name()));
  v1::KvGeometry* const geometry = response->mutable_geometry();
  geometry->set_num_layers(config.num_layers);
  geometry->set_num_kv_heads(config.num_kv_heads);
  geometry->set_head_dim(config.head_dim);
  for (const int64_t window : config.windows) response->add_layer_windows(window);
  response->set_num_q_heads(config.num_q_heads);
  response->set_vocab_size(static_cast<int32_t>(config.vocab));
  response->set_max_position_tokens(config.max_position_tokens);
  const auto& fingerprint = worker_->weights().fingerprint;
  response->mutable_fingerprint()->set_value(fingerprint.data(), fingerprint.size());
  MemoryToProto(*worker_, response->mutable_memory());
  response->set_max_chunk_tokens(static_cast<int32_t>(budget.max_chunk_tokens));
  response->set_max_decode_rows(static_cast<int32_t>(kMaxDecodeRows));
  response->set_max_sequences(worker_->max_sequences());
  response->set_incarnation(worker_->incarnation());
  response->set_max_results(static_cast<int32_t>(kMaxResults));
  response->set_plans_built(worker_->plans_built());
  response->set_plans_at_start(worker_->plans_at_start());
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* WorkerService::AttachStore(grpc::CallbackServerContext* context,
                                                     const v1::AttachStoreRequest* request,
                                                     v1::AttachStoreResponse* response) {
  // Finish() is the last touch of request, response and reactor.
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const bool posted = control_.Post([this, reactor, request, response] {
    const absl::StatusOr<int64_t> registered =
        worker_->AttachStore(request->segment_dir(), request->generation());
    if (registered.ok()) {
      response->set_registered_bytes(static_cast<uint64_t>(*registered));
    } else {
      LogWarning(absl::StrCat("attaching the store: ", registered.status().message()));
    }
    reactor->Finish(ToGrpcStatus(registered.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(StoppingError()));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::OpenMailbox(grpc::CallbackServerContext* context,
                                                     const v1::OpenMailboxRequest* request,
                                                     v1::OpenMailboxResponse* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const bool posted = control_.Post([this, reactor, request, response] {
    absl::StatusOr<std::string> file = worker_->OpenMailbox(request->generation());
    if (file.ok()) response->set_mailbox_file(*std::move(file));
    reactor->Finish(ToGrpcStatus(file.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(StoppingError()));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::MeasureLanes(grpc::CallbackServerContext* context,
                                                      const v1::MeasureLanesRequest*,
                                                      v1::MeasureLanesResponse* response) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const bool posted = control_.Post([this, reactor, response] {
    const absl::StatusOr<LaneCosts> costs = worker_->MeasureLanes();
    if (costs.ok()) CostsToProto(*costs, response);
    reactor->Finish(ToGrpcStatus(costs.status()));
  });
  if (!posted) reactor->Finish(ToGrpcStatus(StoppingError()));
  return reactor;
}

grpc::ServerUnaryReactor* WorkerService::PreparePlan(grpc::CallbackServerContext* context,
                                                     const v1::PreparePlanRequest* request,
                                                     v1::PreparePlanResponse*) {
  absl::StatusOr<Plan> plan = PlanFromProto(request->plan());
  if (!plan.ok()) return Answer(context, plan.status());
  return Answer(context, worker_->PreparePlan(*std::move(plan)));
}

// ---------------------------------------------------------------- the step stream

// One call of Step. Its life: adopted on the control thread, then reads until the client ends or a newer
// stream replaces it; then, on the control thread, all sequences are closed and the call finishes.
class StepStream : public grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse> {
 public:
  explicit StepStream(WorkerService* service) : service_(service) {}

  static StepStream* Begin(WorkerService* service) {
    const auto stream = std::make_shared<StepStream>(service);
    stream->self_ = stream;
    if (!service->control_.Post([service, stream] { service->Adopt(stream); })) {
      stream->End(StoppingError());
    }
    return stream.get();
  }

  void StartReading() { StartRead(&request_); }

  // A step has run.
  void Send(const headroom::Step& step) {
    v1::StepResponse response;
    StepToProto(step, &response);
    MemoryToProto(*service_->worker_, response.mutable_memory());
    Queue(std::move(response));
  }

  // Finishes the call once what is being written is out. The first of several counts.
  void End(const absl::Status& status) {
    MutexLock lock(&mutex_);
    if (ended_) return;
    ended_ = true;
    status_ = status;
    queue_.erase(queue_.begin() + (writing_ ? 1 : 0), queue_.end());
    WriteNext();
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      service_->control_.Post([service = service_, self = self_] { service->Retire(self); });
      return;
    }
    Take();
    request_.Clear();
    StartRead(&request_);
  }

  void OnWriteDone(bool ok) override {
    // Finish() below may let OnDone() run at once, on another thread.
    const std::shared_ptr<StepStream> self = self_;
    MutexLock lock(&mutex_);
    queue_.pop_front();
    writing_ = false;
    if (!ok) {  // the read fails too, and ends the call
      broken_ = true;
      queue_.clear();
    }
    WriteNext();
  }

  void OnDone() override { const std::shared_ptr<StepStream> self = std::move(self_); }

 private:
  void Take() {
    if (request_.abandon_sequence_ids_size() > 0) {
      // The next stream may have opened them again: it forgets what was abandoned before, and this lock
      // lets nothing come after.
      MutexLock lock(&mutex_);
      if (ended_) return;
      service_->worker_->Abandon(
          {request_.abandon_sequence_ids().begin(), request_.abandon_sequence_ids().end()});
      return;
    }
    absl::StatusOr<std::unique_ptr<headroom::Step>> step = StepFromProto(request_);
    absl::Status status = step.status();
    if (status.ok()) status = service_->worker_->Submit(*std::move(step));
    if (status.ok()) return;
    v1::StepResponse response;
    response.set_number(request_.number());
    response.set_attempt(request_.attempt());
    response.set_code(static_cast<int32_t>(status.code()));
    response.set_message(std::string(status.message()));
    Queue(std::move(response));
  }

  // The protocol bounds the queue: an answer for each step in flight.
  void Queue(v1::StepResponse response) {
    MutexLock lock(&mutex_);
    if (ended_ || broken_) return;
    queue_.push_back(std::move(response));
    WriteNext();
  }

  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (!queue_.empty()) {
      writing_ = true;
      StartWrite(&queue_.front());
    } else if (ended_) {
      finished_ = true;
      Finish(ToGrpcStatus(status_));
    }
  }

  WorkerService* const service_;
  std::shared_ptr<StepStream> self_;  // until OnDone()
  v1::StepRequest request_;           // between StartRead() and OnReadDone() gRPC's
  Mutex mutex_;
  std::deque<v1::StepResponse> queue_ ABSL_GUARDED_BY(mutex_);  // front: being written
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse>* WorkerService::Step(
    grpc::CallbackServerContext*) {
  return StepStream::Begin(this);
}

void WorkerService::Adopt(const std::shared_ptr<StepStream>& stream) {
  if (current_ != nullptr) {
    current_->End(WithReason(absl::AbortedError("a newer step stream has replaced this one"),
                             "STREAM_REPLACED"));
  }
  current_ = stream;
  const absl::Status status = worker_->BeginStream(
      [stream](std::unique_ptr<headroom::Step> step) { stream->Send(*step); });
  if (status.ok()) {
    stream->StartReading();
  } else {
    stream->End(status);
  }
}

void WorkerService::Retire(const std::shared_ptr<StepStream>& stream) {
  absl::Status status;
  if (current_ == stream) {
    current_ = nullptr;
    status = worker_->EndStream();
  }
  stream->End(status);
}

}  // namespace headroom
