#include "services/kvstore/kv_store_service.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/segment/mailbox.h"
#include "common/status.h"

namespace headroom::kvstore {
namespace {

constexpr int32_t kSchemaRevision = 1;
constexpr int32_t kMinimumPeerRevision = 1;
constexpr int32_t kMaxPage = 1000;
// An extent takes at most 20 bytes in a message: pages stay near 5 MB.
constexpr int64_t kMaxPageExtents = 250'000;

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(status));
  return reactor;
}

absl::Status InPlaceError() {
  return WithReason(absl::FailedPreconditionError(
                        "this store has no threads that attend in place (--attend-threads 0)"),
                    "IN_PLACE_NOT_SERVED");
}

absl::Status NoModelError() {
  return WithReason(absl::FailedPreconditionError("the segment is bound to no model yet"),
                    "NO_MODEL_BOUND");
}

absl::Status OvertakenError(absl::string_view how) {
  return WithReason(absl::AbortedError(how), "CALL_OVERTAKEN");
}

absl::StatusOr<SegmentBinding> FromProto(const v1::BindModelRequest& request) {
  SegmentBinding binding;
  binding.geometry = {request.geometry().num_layers(), request.geometry().num_kv_heads(),
                      request.geometry().head_dim()};
  const std::string& fingerprint = request.fingerprint().value();
  if (fingerprint.size() != binding.fingerprint.size()) {
    return BadRequestError({{"fingerprint.value", absl::StrCat("has ", fingerprint.size(),
                                                               " bytes, expected 16")}});
  }
  std::copy(fingerprint.begin(), fingerprint.end(), binding.fingerprint.begin());
  return binding;
}

void ToProto(const StoredRun& run, v1::ExtentRun* out) {
  out->set_first_pos(run.first_pos);
  out->set_capacity_tokens(run.capacity_tokens);
  for (size_t layer = 0; layer < run.extents.size(); ++layer) {
    v1::Extent* const extent = out->add_extents();
    extent->set_layer(static_cast<int32_t>(layer));
    extent->set_extent_id(run.extents[layer].extent_id);
    if (run.extents[layer].vacated()) {
      extent->set_vacated(true);
    } else {
      extent->set_data_offset(static_cast<uint64_t>(run.extents[layer].data_offset));
    }
  }
}

}  // namespace

template <typename Request, typename Call>
auto KvStoreService::InOrder(const Request& request, Call&& call) -> decltype(call()) {
  MutexLock lock(&order_mutex_);
  if (request.has_order() && caller_ != 0) {
    if (request.order().caller() != caller_) return OvertakenError("another caller has bound the store");
    HEADROOM_RETURN_IF_ERROR(TakeNumber(request.order()));
  }
  return call();
}

absl::Status KvStoreService::TakeNumber(const v1::CallOrder& order) {
  if (order.number() <= latest_call_) {
    return OvertakenError(absl::StrCat("call ", order.number(), " comes after ", latest_call_));
  }
  latest_call_ = order.number();
  return absl::OkStatus();
}

// By whoever comes: it is the coordinator's from then on, if it works.
absl::StatusOr<int64_t> KvStoreService::BindInOrder(const v1::BindModelRequest& request,
                                                    const SegmentBinding& binding) {
  MutexLock lock(&order_mutex_);
  const v1::CallOrder& order = request.order();
  if (request.has_order() && order.caller() == caller_) HEADROOM_RETURN_IF_ERROR(TakeNumber(order));
  HEADROOM_ASSIGN_OR_RETURN(const int64_t kept, store_->Bind(binding, request.allow_clean()));
  if (request.has_order()) {
    caller_ = order.caller();
    latest_call_ = order.number();
  }
  return kept;
}

grpc::ServerUnaryReactor* KvStoreService::GetStoreInfo(grpc::CallbackServerContext* context,
                                                       const v1::GetStoreInfoRequest*,
                                                       v1::GetStoreInfoResponse* response) {
  const StoreFacts facts = store_->Facts();
  response->set_schema_revision(kSchemaRevision);
  response->set_minimum_peer_revision(kMinimumPeerRevision);
  response->set_generation(facts.generation);
  response->set_segment_dir(facts.segment_dir);
  response->set_format_version(kSegmentFormatVersion);
  response->set_capacity_bytes(static_cast<uint64_t>(facts.capacity_bytes));
  response->set_used_bytes(static_cast<uint64_t>(facts.used_bytes));
  response->set_max_extents(static_cast<uint32_t>(facts.max_extents));
  response->set_used_extents(static_cast<uint32_t>(facts.used_extents));
  response->set_huge_page_bytes(static_cast<uint64_t>(facts.huge_page_bytes));
  response->set_attend_threads(pool_ == nullptr ? 0 : pool_->threads());
  if (pool_ != nullptr) {
    const AttendPool::Counters counters = pool_->counters();
    v1::InPlaceCounters* const in_place = response->mutable_in_place();
    in_place->set_posts(counters.posts);
    in_place->set_refused(counters.refused);
    in_place->set_late_partials(counters.late_partials);
    in_place->set_bytes(counters.bytes);
    in_place->set_busy_ns(counters.busy_ns);
  }
  if (facts.binding.has_value()) {
    const SegmentBinding& binding = *facts.binding;
    response->mutable_geometry()->set_num_layers(binding.geometry.num_layers);
    response->mutable_geometry()->set_num_kv_heads(binding.geometry.num_kv_heads);
    response->mutable_geometry()->set_head_dim(binding.geometry.head_dim);
    response->mutable_fingerprint()->set_value(binding.fingerprint.data(),
                                               binding.fingerprint.size());
  }
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* KvStoreService::BindModel(grpc::CallbackServerContext* context,
                                                    const v1::BindModelRequest* request,
                                                    v1::BindModelResponse* response) {
  const absl::StatusOr<SegmentBinding> binding = FromProto(*request);
  if (!binding.ok()) return Answer(context, binding.status());
  const absl::StatusOr<int64_t> kept = BindInOrder(*request, *binding);
  if (kept.ok()) response->set_kept_sequences(static_cast<uint64_t>(*kept));
  return Answer(context, kept.status());
}

grpc::ServerUnaryReactor* KvStoreService::AllocateRun(grpc::CallbackServerContext* context,
                                                      const v1::AllocateRunRequest* request,
                                                      v1::AllocateRunResponse* response) {
  const absl::StatusOr<StoredRun> run = InOrder(*request, [&] {
    return store_->AllocateRun(request->sequence_id(), request->first_pos(), request->capacity_tokens());
  });
  if (run.ok()) ToProto(*run, response->mutable_run());
  return Answer(context, run.status());
}

grpc::ServerUnaryReactor* KvStoreService::CommitSealed(grpc::CallbackServerContext* context,
                                                       const v1::CommitSealedRequest* request,
                                                       v1::CommitSealedResponse*) {
  std::vector<SealedCount> counts;
  for (const v1::SealedSequence& sequence : request->sequences()) {
    counts.push_back({sequence.sequence_id(),
                      sequence.sealed_tokens(),
                      {sequence.kept_from().begin(), sequence.kept_from().end()}});
  }
  return Answer(context, InOrder(*request, [&] { return store_->CommitSealed(counts); }));
}

grpc::ServerUnaryReactor* KvStoreService::TruncateSequence(
    grpc::CallbackServerContext* context, const v1::TruncateSequenceRequest* request,
    v1::TruncateSequenceResponse* response) {
  // An unset count must not read as 'all of it'.
  if (!request->has_tokens()) return Answer(context, BadRequestError({{"tokens", "is not set"}}));
  const absl::StatusOr<int64_t> released =
      InOrder(*request, [&] { return store_->Truncate(request->sequence_id(), request->tokens()); });
  if (released.ok()) response->set_released_extents(static_cast<uint32_t>(*released));
  return Answer(context, released.status());
}

grpc::ServerUnaryReactor* KvStoreService::ReleaseSequences(
    grpc::CallbackServerContext* context, const v1::ReleaseSequencesRequest* request,
    v1::ReleaseSequencesResponse* response) {
  const absl::StatusOr<int64_t> released = InOrder(*request, [&] {
    return store_->Release({request->sequence_ids().data(),
                            static_cast<size_t>(request->sequence_ids_size())});
  });
  if (released.ok()) response->set_released_extents(static_cast<uint32_t>(*released));
  return Answer(context, released.status());
}

grpc::ServerUnaryReactor* KvStoreService::ListSequences(grpc::CallbackServerContext* context,
                                                        const v1::ListSequencesRequest* request,
                                                        v1::ListSequencesResponse* response) {
  const int32_t page_size = request->has_page_size() ? request->page_size() : kMaxPage;
  if (page_size < 1 || page_size > kMaxPage) {
    return Answer(context, BadRequestError({{"page_size", absl::StrCat("is ", page_size,
                                                                       ", expected 1 to ",
                                                                       kMaxPage)}}));
  }
  const absl::StatusOr<KvStore::Page> page = InOrder(
      *request, [&] { return store_->List(request->after_sequence_id(), page_size, kMaxPageExtents); });
  if (!page.ok()) return Answer(context, page.status());
  for (const auto& [id, sequence] : page->sequences) {
    v1::StoredSequence* const out = response->add_sequences();
    out->set_sequence_id(id);
    out->set_sealed_tokens(sequence.sealed_tokens);
    for (const StoredRun& run : sequence.runs) ToProto(run, out->add_runs());
  }
  response->set_more(page->more);
  return Answer(context, absl::OkStatus());
}

absl::Status KvStoreService::CheckPlan(const v1::Plan& plan) const {
  const std::optional<SegmentBinding> binding = store_->Facts().binding;
  if (!binding.has_value()) return NoModelError();
  if (plan.layers_size() != binding->geometry.num_layers) {
    return BadRequestError({{"plan.layers", absl::StrCat("has ", plan.layers_size(),
                                                         " elements, expected ",
                                                         binding->geometry.num_layers)}});
  }
  for (int layer = 0; layer < plan.layers_size(); ++layer) {
    for (const v1::LaneRange& range : plan.layers(layer).ranges()) {
      if (range.lane() == v1::LANE_IN_PLACE && pool_ == nullptr) return InPlaceError();
      if (range.lane() != v1::LANE_RESIDENT && range.lane() != v1::LANE_FETCHED &&
          range.lane() != v1::LANE_IN_PLACE) {
        return BadRequestError({{absl::StrCat("plan.layers[", layer, "].ranges"),
                                 absl::StrCat("names lane ", static_cast<int>(range.lane()))}});
      }
    }
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KvStoreService::PrepareStorePlan(
    grpc::CallbackServerContext* context, const v1::PrepareStorePlanRequest* request,
    v1::PrepareStorePlanResponse*) {
  return Answer(context, CheckPlan(request->plan()));
}

absl::Status KvStoreService::Attach(const std::string& mailbox_file) {
  if (pool_ == nullptr) return InPlaceError();
  const StoreFacts facts = store_->Facts();
  if (!facts.binding.has_value()) return NoModelError();
  HEADROOM_ASSIGN_OR_RETURN(
      std::unique_ptr<Mailbox> mailbox,
      Mailbox::Open(facts.segment_dir, mailbox_file, facts.binding->geometry, facts.generation));
  pool_->Attach(std::move(mailbox));
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* KvStoreService::AttachMailbox(grpc::CallbackServerContext* context,
                                                        const v1::AttachMailboxRequest* request,
                                                        v1::AttachMailboxResponse*) {
  return Answer(context, Attach(request->mailbox_file()));
}

}  // namespace headroom::kvstore
