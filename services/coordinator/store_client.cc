#include "services/coordinator/store_client.h"

#include <cstdint>
#include <random>
#include <utility>

#include "common/status.h"
#include "headroom/v1/kv_store.grpc.pb.h"
#include "services/coordinator/channel_client.h"

namespace headroom::coordinator {
namespace {

// Everything but binding is bookkeeping of microseconds; binding may clean a segment.
constexpr std::chrono::milliseconds kBindDeadline{60'000};
constexpr int32_t kListPage = 1000;

// Not 0.
uint64_t DrawCaller() {
  std::random_device device;
  return (uint64_t{device()} << 32 | device()) | 1;
}

class GrpcStoreClient : public StoreClient {
 public:
  GrpcStoreClient(const std::string& address,
                const std::shared_ptr<grpc::ChannelCredentials>& credentials)
      : stub_(v1::KvStoreService::NewStub(MakePeerChannel(address, credentials))) {}

  absl::StatusOr<v1::GetStoreInfoResponse> GetInfo() override {
    return Call<v1::GetStoreInfoResponse>(&Stub::GetStoreInfo, v1::GetStoreInfoRequest());
  }

  absl::Status BindModel(const v1::KvGeometry& geometry, const v1::ModelFingerprint& fingerprint,
                         bool allow_clean) override {
    v1::BindModelRequest request;
    *request.mutable_geometry() = geometry;
    *request.mutable_fingerprint() = fingerprint;
    request.set_allow_clean(allow_clean);
    return CallInOrder<v1::BindModelResponse>(&Stub::BindModel, request, kBindDeadline).status();
  }

  absl::StatusOr<v1::ExtentRun> AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                            int64_t capacity_tokens) override {
    v1::AllocateRunRequest request;
    request.set_sequence_id(sequence_id);
    request.set_first_pos(first_pos);
    request.set_capacity_tokens(capacity_tokens);
    HEADROOM_ASSIGN_OR_RETURN(v1::AllocateRunResponse response,
                              CallInOrder<v1::AllocateRunResponse>(&Stub::AllocateRun, request));
    return std::move(*response.mutable_run());
  }

  absl::Status CommitSealed(const std::vector<v1::SealedSequence>& sequences) override {
    v1::CommitSealedRequest request;
    request.mutable_sequences()->Add(sequences.begin(), sequences.end());
    return CallInOrder<v1::CommitSealedResponse>(&Stub::CommitSealed, request).status();
  }

  absl::Status TruncateSequence(uint64_t sequence_id, int64_t tokens) override {
    v1::TruncateSequenceRequest request;
    request.set_sequence_id(sequence_id);
    request.set_tokens(tokens);
    return CallInOrder<v1::TruncateSequenceResponse>(&Stub::TruncateSequence, request).status();
  }

  absl::Status ReleaseSequences(const std::vector<uint64_t>& sequence_ids) override {
    v1::ReleaseSequencesRequest request;
    request.mutable_sequence_ids()->Add(sequence_ids.begin(), sequence_ids.end());
    return CallInOrder<v1::ReleaseSequencesResponse>(&Stub::ReleaseSequences, request).status();
  }

  absl::StatusOr<std::vector<v1::StoredSequence>> ListSequences() override {
    std::vector<v1::StoredSequence> sequences;
    v1::ListSequencesRequest request;
    request.set_page_size(kListPage);
    for (bool more = true; more;) {
      HEADROOM_ASSIGN_OR_RETURN(v1::ListSequencesResponse page,
                                CallInOrder<v1::ListSequencesResponse>(&Stub::ListSequences, request));
      sequences.insert(sequences.end(), page.sequences().begin(), page.sequences().end());
      more = page.more() && page.sequences_size() > 0;
      if (more) request.set_after_sequence_id(sequences.back().sequence_id());
    }
    return sequences;
  }

  absl::Status PreparePlan(const v1::Plan& plan) override {
    v1::PrepareStorePlanRequest request;
    *request.mutable_plan() = plan;
    return Call<v1::PrepareStorePlanResponse>(&Stub::PrepareStorePlan, request).status();
  }

  absl::Status AttachMailbox(const std::string& mailbox_file) override {
    v1::AttachMailboxRequest request;
    request.set_mailbox_file(mailbox_file);
    return Call<v1::AttachMailboxResponse>(&Stub::AttachMailbox, request).status();
  }

 private:
  using Stub = v1::KvStoreService::Stub;

  template <typename Response, typename Method, typename Request>
  absl::StatusOr<Response> Call(Method method, const Request& request,
                                std::chrono::milliseconds deadline = kCallDeadline) {
    Response response;
    HEADROOM_RETURN_IF_ERROR(CallWithDeadline(deadline, [&](grpc::ClientContext* context) {
      return (stub_.get()->*method)(context, request, &response);
    }));
    return response;
  }

  template <typename Response, typename Method, typename Request>
  absl::StatusOr<Response> CallInOrder(Method method, Request& request,
                                       std::chrono::milliseconds deadline = kCallDeadline) {
    request.mutable_order()->set_caller(caller_);
    request.mutable_order()->set_number(++calls_);
    return Call<Response>(method, request, deadline);
  }

  const std::unique_ptr<Stub> stub_;
  const uint64_t caller_ = DrawCaller();
  uint64_t calls_ = 0;
};

}  // namespace

std::unique_ptr<StoreClient> MakeStoreClient(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
  return std::make_unique<GrpcStoreClient>(address, credentials);
}

std::function<absl::Status()> MakeStorePing(
    const std::string& address, const std::shared_ptr<grpc::ChannelCredentials>& credentials,
    absl::Duration deadline) {
  using Stub = v1::KvStoreService::Stub;
  return MakePing(std::make_shared<Stub>(MakePeerChannel(address, credentials)), &Stub::GetStoreInfo,
                  absl::ToChronoMilliseconds(deadline));
}

}  // namespace headroom::coordinator
