// KvStoreService: protobuf in, protobuf out. Messages are checked here, numbers in the index.
#ifndef HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVICE_H_
#define HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/mutex.h"
#include "headroom/v1/kv_store.grpc.pb.h"
#include "services/kvstore/attend_pool.h"
#include "services/kvstore/kv_store.h"

namespace headroom::kvstore {

// Thread-safe. Handlers run on gRPC's threads and do not block.
class KvStoreService : public v1::KvStoreService::CallbackService {
 public:
  // Borrows both. `pool` may be null: nothing is attended in place.
  KvStoreService(KvStore* store, AttendPool* pool) : store_(store), pool_(pool) {}

  grpc::ServerUnaryReactor* GetStoreInfo(grpc::CallbackServerContext* context,
                                         const v1::GetStoreInfoRequest* request,
                                         v1::GetStoreInfoResponse* response) override;
  grpc::ServerUnaryReactor* BindModel(grpc::CallbackServerContext* context,
                                      const v1::BindModelRequest* request,
                                      v1::BindModelResponse* response) override;
  grpc::ServerUnaryReactor* AllocateRun(grpc::CallbackServerContext* context,
                                        const v1::AllocateRunRequest* request,
                                        v1::AllocateRunResponse* response) override;
  grpc::ServerUnaryReactor* CommitSealed(grpc::CallbackServerContext* context,
                                         const v1::CommitSealedRequest* request,
                                         v1::CommitSealedResponse* response) override;
  grpc::ServerUnaryReactor* TruncateSequence(grpc::CallbackServerContext* context,
                                             const v1::TruncateSequenceRequest* request,
                                             v1::TruncateSequenceResponse* response) override;
  grpc::ServerUnaryReactor* ReleaseSequences(grpc::CallbackServerContext* context,
                                             const v1::ReleaseSequencesRequest* request,
                                             v1::ReleaseSequencesResponse* response) override;
  grpc::ServerUnaryReactor* ListSequences(grpc::CallbackServerContext* context,
                                          const v1::ListSequencesRequest* request,
                                          v1::ListSequencesResponse* response) override;
  grpc::ServerUnaryReactor* PrepareStorePlan(grpc::CallbackServerContext* context,
                                             const v1::PrepareStorePlanRequest* request,
                                             v1::PrepareStorePlanResponse* response) override;
  grpc::ServerUnaryReactor* AttachMailbox(grpc::CallbackServerContext* context,
                                          const v1::AttachMailboxRequest* request,
                                          v1::AttachMailboxResponse* response) override;

 private:
  // Carries a call out, unless it is behind one that has been.
  template <typename Request, typename Call>
  auto InOrder(const Request& request, Call&& call) -> decltype(call());
  // Of a call of caller_. ABORTED if one that came after it has been carried out.
  absl::Status TakeNumber(const v1::CallOrder& order) ABSL_EXCLUSIVE_LOCKS_REQUIRED(order_mutex_);
  absl::StatusOr<int64_t> BindInOrder(const v1::BindModelRequest& request, const SegmentBinding& binding);
  absl::Status CheckPlan(const v1::Plan& plan) const;
  absl::Status Attach(const std::string& mailbox_file);

  KvStore* const store_;
  AttendPool* const pool_;
  Mutex order_mutex_;
  uint64_t caller_ ABSL_GUARDED_BY(order_mutex_) = 0;  // who has bound the store; 0: nobody has
  uint64_t latest_call_ ABSL_GUARDED_BY(order_mutex_) = 0;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVICE_H_
