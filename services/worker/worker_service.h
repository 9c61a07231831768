// WorkerService: protobuf in, protobuf out.
#ifndef HEADROOM_SERVICES_WORKER_WORKER_SERVICE_H_
#define HEADROOM_SERVICES_WORKER_WORKER_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <memory>

#include "common/task_thread.h"
#include "headroom/v1/worker.grpc.pb.h"
#include "services/worker/worker.h"

namespace headroom {

class StepStream;

// Thread-safe. What waits for steps in flight (attaching, streams that begin and end) runs on a thread
// of its own, never on gRPC's.
class WorkerService final : public v1::WorkerService::CallbackService {
 public:
  // Borrows `worker`.
  explicit WorkerService(Worker* worker) : worker_(worker) { control_.Start(); }
  // REQUIRES: the gRPC server has shut down.
  ~WorkerService() override { control_.Stop(); }

  grpc::ServerUnaryReactor* GetWorkerInfo(grpc::CallbackServerContext* context,
                                          const v1::GetWorkerInfoRequest* request,
                                          v1::GetWorkerInfoResponse* response) override;
  grpc::ServerUnaryReactor* AttachStore(grpc::CallbackServerContext* context,
                                        const v1::AttachStoreRequest* request,
                                        v1::AttachStoreResponse* response) override;
  grpc::ServerUnaryReactor* OpenMailbox(grpc::CallbackServerContext* context,
                                        const v1::OpenMailboxRequest* request,
                                        v1::OpenMailboxResponse* response) override;
  grpc::ServerUnaryReactor* MeasureLanes(grpc::CallbackServerContext* context,
                                         const v1::MeasureLanesRequest* request,
                                         v1::MeasureLanesResponse* response) override;
  grpc::ServerUnaryReactor* PreparePlan(grpc::CallbackServerContext* context,
                                        const v1::PreparePlanRequest* request,
                                        v1::PreparePlanResponse* response) override;
  // A newer stream replaces an older one: its coordinator may be gone without a word.
  grpc::ServerBidiReactor<v1::StepRequest, v1::StepResponse>* Step(
      grpc::CallbackServerContext* context) override;

 private:
  friend class StepStream;

  // On the control thread.
  void Adopt(const std::shared_ptr<StepStream>& stream);
  void Retire(const std::shared_ptr<StepStream>& stream);

  Worker* const worker_;
  std::shared_ptr<StepStream> current_;  // control thread only
  TaskThread control_;                   // tasks: one for each call and stream that gRPC has open
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_WORKER_SERVICE_H_
