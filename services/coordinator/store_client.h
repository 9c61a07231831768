// The coordinator's end of KvStoreService.
#ifndef HEADROOM_SERVICES_COORDINATOR_STORE_CLIENT_H_
#define HEADROOM_SERVICES_COORDINATOR_STORE_CLIENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "headroom/v1/kv_store.pb.h"
#include "headroom/v1/types.pb.h"

namespace grpc {
class ChannelCredentials;
}

namespace headroom::coordinator {

// Calls block for at most their deadline (seconds). Errors carry the store's status; UNAVAILABLE
// and DEADLINE_EXCEEDED mean that it cannot be reached. One call at a time: they are numbered as they are made.
class StoreClient {
 public:
  virtual ~StoreClient() = default;

  virtual absl::StatusOr<v1::GetStoreInfoResponse> GetInfo() = 0;
  virtual absl::Status BindModel(const v1::KvGeometry& geometry,
                                 const v1::ModelFingerprint& fingerprint, bool allow_clean) = 0;
  virtual absl::StatusOr<v1::ExtentRun> AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                                    int64_t capacity_tokens) = 0;
  virtual absl::Status CommitSealed(const std::vector<v1::SealedSequence>& sequences) = 0;
  virtual absl::Status TruncateSequence(uint64_t sequence_id, int64_t tokens) = 0;
  virtual absl::Status ReleaseSequences(const std::vector<uint64_t>& sequence_ids) = 0;
  // All pages.
  virtual absl::StatusOr<std::vector<v1::StoredSequence>> ListSequences() = 0;
  virtual absl::Status PreparePlan(const v1::Plan& plan) = 0;
  virtual absl::Status AttachMailbox(const std::string& mailbox_file) = 0;
};

// `address` as gRPC names it. Connects when first called.
std::unique_ptr<StoreClient> MakeStoreClient(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials);

// Whether the store answers within `deadline`; on a channel of its own.
std::function<absl::Status()> MakeStorePing(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    absl::Duration deadline);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_STORE_CLIENT_H_
