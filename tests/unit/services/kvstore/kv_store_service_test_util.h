// A store that serves, as its peers see it: over a socket, and by the files that it leaves.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KV_STORE_SERVICE_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KV_STORE_SERVICE_TEST_UTIL_H_

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <chrono>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "services/kvstore/kv_store_server.h"
#include "services/kvstore/kv_store_service.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {

inline constexpr int64_t kHostBytes = 4 << 20;

inline std::string AddressIn(const TempSegmentDir& dir) { return absl::StrCat("unix:", dir.path(), "/s"); }

inline KvStoreOptions OptionsFor(const TempSegmentDir& dir, int attend_threads = 0) {
  KvStoreOptions options;
  options.attend_threads = attend_threads;
  options.listen_address = AddressIn(dir);
  options.segment_dir = dir.File("segment");
  options.host_memory_bytes = kHostBytes;
  options.max_extents = 64;
  return options;
}

// A store's RPCs as its coordinator calls them.
class KvStorePeer {
 public:
  explicit KvStorePeer(const std::string& address)
      : stub_(v1::KvStoreService::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))) {}

  // Of the calls to come that have a place among others.
  std::optional<v1::CallOrder> order;

  absl::StatusOr<v1::GetStoreInfoResponse> Info() {
    return Call<v1::GetStoreInfoResponse>(&v1::KvStoreService::Stub::GetStoreInfo,
                                          v1::GetStoreInfoRequest());
  }
  absl::StatusOr<v1::BindModelResponse> Bind(const KvGeometry& geometry,
                                             const std::string& fingerprint,
                                             bool allow_clean = false) {
    v1::BindModelRequest request;
    request.mutable_geometry()->set_num_layers(geometry.num_layers);
    request.mutable_geometry()->set_num_kv_heads(geometry.num_kv_heads);
    request.mutable_geometry()->set_head_dim(geometry.head_dim);
    request.mutable_fingerprint()->set_value(fingerprint);
    request.set_allow_clean(allow_clean);
    if (order.has_value()) *request.mutable_order() = *order;
    return Call<v1::BindModelResponse>(&v1::KvStoreService::Stub::BindModel, request);
  }
  absl::StatusOr<v1::ExtentRun> Allocate(uint64_t id, int64_t first_pos, int64_t capacity) {
    v1::AllocateRunRequest request;
    request.set_sequence_id(id);
    request.set_first_pos(first_pos);
    request.set_capacity_tokens(capacity);
    if (order.has_value()) *request.mutable_order() = *order;
    auto response =
        Call<v1::AllocateRunResponse>(&v1::KvStoreService::Stub::AllocateRun, request);
    if (!response.ok()) return response.status();
    return response->run();
  }
  absl::Status Commit(uint64_t id, int64_t sealed_tokens) {
    v1::CommitSealedRequest request;
    request.add_sequences()->set_sequence_id(id);
    request.mutable_sequences(0)->set_sealed_tokens(sealed_tokens);
    if (order.has_value()) *request.mutable_order() = *order;
    return Call<v1::CommitSealedResponse>(&v1::KvStoreService::Stub::CommitSealed, request)
        .status();
  }
  absl::StatusOr<int64_t> Truncate(const v1::TruncateSequenceRequest& request) {
    auto response =
        Call<v1::TruncateSequenceResponse>(&v1::KvStoreService::Stub::TruncateSequence, request);
    if (!response.ok()) return response.status();
    return int64_t{response->released_extents()};
  }
  absl::StatusOr<int64_t> Truncate(uint64_t id, int64_t tokens) {
    v1::TruncateSequenceRequest request;
    request.set_sequence_id(id);
    request.set_tokens(tokens);
    if (order.has_value()) *request.mutable_order() = *order;
    return Truncate(request);
  }
  absl::StatusOr<int64_t> Release(const std::vector<uint64_t>& ids) {
    v1::ReleaseSequencesRequest request;
    request.mutable_sequence_ids()->Add(ids.begin(), ids.end());
    if (order.has_value()) *request.mutable_order() = *order;
    auto response =
        Call<v1::ReleaseSequencesResponse>(&v1::KvStoreService::Stub::ReleaseSequences, request);
    if (!response.ok()) return response.status();
    return int64_t{response->released_extents()};
  }
  absl::StatusOr<v1::ListSequencesResponse> List(const v1::ListSequencesRequest& request = {}) {
    return Call<v1::ListSequencesResponse>(&v1::KvStoreService::Stub::ListSequences, request);
  }
  absl::Status Prepare(const v1::Plan& plan) {
    v1::PrepareStorePlanRequest request;
    *request.mutable_plan() = plan;
    return Call<v1::PrepareStorePlanResponse>(&v1::KvStoreService::Stub::PrepareStorePlan, request)
        .status();
  }
  absl::Status Attach(const std::string& mailbox_file) {
    v1::AttachMailboxRequest request;
    request.set_mailbox_file(mailbox_file);
    return Call<v1::AttachMailboxResponse>(&v1::KvStoreService::Stub::AttachMailbox, request)
        .status();
  }

 private:
  static void SetDeadline(grpc::ClientContext& context) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    context.set_wait_for_ready(true);
  }
  template <typename Response, typename Method, typename Request>
  absl::StatusOr<Response> Call(Method method, const Request& request) {
    grpc::ClientContext context;
    SetDeadline(context);
    Response response;
    const absl::Status status =
        FromGrpcStatus(((*stub_).*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

  const std::unique_ptr<v1::KvStoreService::Stub> stub_;
};

inline const std::string kModelA(16, '\x0a');
inline const std::string kModelB(16, '\x0b');

// A store that serves, and a peer of it.
class KvStoreServiceTest : public testing::Test {
 protected:
  KvStoreServiceTest() { Start(); }

  void Start(int attend_threads = 0) {
    server_ = Must(StartKvStore(OptionsFor(dir_, attend_threads)));
    peer_ = std::make_unique<KvStorePeer>(server_->listen_address());
  }
  // Instead of the one without threads that attend.
  void RestartWithThreads(int attend_threads) {
    server_.reset();
    Start(attend_threads);
  }
  void Restart() {
    server_.reset();
    Start();
  }
  void BindSmall() { Must(peer_->Bind(kSmallGeometry, kModelA)); }

  // The sealed word of each layer's descriptor, as the index file has it.
  std::vector<int64_t> SealedInFile(const v1::ExtentRun& run) {
    std::ifstream file(dir_.File("segment/index"), std::ios::binary);
    std::vector<int64_t> sealed;
    for (const v1::Extent& extent : run.extents()) {
      ExtentDescriptor descriptor;
      file.seekg(static_cast<std::streamoff>(IndexBytes(extent.extent_id())));
      file.read(reinterpret_cast<char*>(&descriptor), sizeof(descriptor));
      EXPECT_EQ(descriptor.commit, CommitWordOf(descriptor));
      EXPECT_EQ(descriptor.layer, static_cast<uint32_t>(extent.layer()));
      EXPECT_EQ(descriptor.data_offset, extent.data_offset());
      sealed.push_back(SealedTokens(descriptor.sealed).value_or(-1));
    }
    return sealed;
  }
  static std::string FieldOf(const absl::Status& status) {
    const std::vector<FieldViolation> violations = FieldViolationsOf(status);
    return violations.size() == 1 ? violations[0].field : std::string(status.ToString());
  }

  const TempSegmentDir dir_;
  std::unique_ptr<KvStoreServer> server_;
  std::unique_ptr<KvStorePeer> peer_;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_TESTS_UNIT_SERVICES_KVSTORE_KV_STORE_SERVICE_TEST_UTIL_H_
