// Operators' calls.
#ifndef HEADROOM_SERVICES_COORDINATOR_ADMIN_SERVICE_H_
#define HEADROOM_SERVICES_COORDINATOR_ADMIN_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <functional>
#include <string>

#include "headroom/v1/admin.grpc.pb.h"
#include "services/coordinator/scheduler.h"
#include "services/coordinator/served_model.h"

namespace headroom::coordinator {

// Where the three processes listen, as `headroom status` shows them.
struct ProcessAddresses {
  std::string coordinator;
  std::string worker;
  std::string kvstore;
};

// Thread-safe.
class AdminService final : public v1::AdminService::CallbackService {
 public:
  // `scheduler` and `model` outlive the server. `on_drain`: called when a drain begins, before new
  // requests are refused: health says NOT_SERVING first.
  AdminService(Scheduler* scheduler, const ServedModel* model, ProcessAddresses addresses,
               std::function<void()> on_drain)
      : scheduler_(scheduler),
        model_(model),
        addresses_(std::move(addresses)),
        on_drain_(std::move(on_drain)) {}

  grpc::ServerUnaryReactor* GetStatus(grpc::CallbackServerContext* context,
                                      const v1::GetStatusRequest* request,
                                      v1::GetStatusResponse* response) override;
  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context,
                                  const v1::DrainRequest* request,
                                  v1::DrainResponse* response) override;
  grpc::ServerUnaryReactor* Flush(grpc::CallbackServerContext* context,
                                  const v1::FlushRequest* request,
                                  v1::FlushResponse* response) override;
  grpc::ServerUnaryReactor* Profile(grpc::CallbackServerContext* context,
                                    const v1::ProfileRequest* request,
                                    v1::ProfileResponse* response) override;

 private:
  Scheduler* const scheduler_;
  const ServedModel* const model_;
  const ProcessAddresses addresses_;
  const std::function<void()> on_drain_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_ADMIN_SERVICE_H_
