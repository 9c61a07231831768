// A store for tests of the scheduler (fake_machine.h): its runs' extents, their keys and what is sealed of them.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_STORE_H_
#define HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_STORE_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/kv_layout.h"
#include "common/mutex.h"
#include "services/coordinator/store_client.h"
#include "tests/unit/services/coordinator/fake_machine.h"

namespace headroom::coordinator {

class FakeStoreClient : public StoreClient {
 public:
  explicit FakeStoreClient(std::shared_ptr<FakeMachine> machine) : machine_(std::move(machine)) {}

  absl::StatusOr<v1::GetStoreInfoResponse> GetInfo() override {
    MutexLock lock(&machine_->mutex);
    if (machine_->store_away) return absl::UnavailableError("store away");
    v1::GetStoreInfoResponse info;
    info.set_schema_revision(1);
    info.set_minimum_peer_revision(1);
    info.set_generation(machine_->generation);
    info.set_segment_dir("/fake");
    const int64_t token_bytes = machine_->geometry.BytesPerToken();
    info.set_capacity_bytes(machine_->host_tokens * token_bytes);
    info.set_used_bytes(machine_->used_bytes());
    info.set_max_extents(100000);
    info.set_attend_threads(machine_->attend_threads);
    return info;
  }
  absl::Status BindModel(const v1::KvGeometry&, const v1::ModelFingerprint&, bool) override {
    MutexLock lock(&machine_->mutex);
    if (machine_->store_away) return absl::UnavailableError("store away");
    bound_ = machine_->generation;
    machine_->bound_by_another = false;
    return absl::OkStatus();
  }
  absl::StatusOr<v1::ExtentRun> AllocateRun(uint64_t id, int64_t first_pos,
                                            int64_t capacity) override {
    MutexLock lock(&machine_->mutex);
    if (absl::Status status = Ready(); !status.ok()) return status;
    FakeMachine::Stored& sequence = machine_->stored[id];
    int64_t end = 0;
    for (const v1::ExtentRun& run : sequence.runs) {
      if (run.first_pos() == first_pos && run.capacity_tokens() == capacity && Whole(run)) return run;
      end = run.first_pos() + run.capacity_tokens();
    }
    if (first_pos != end) return absl::InvalidArgumentError("the run follows no other");
    const int64_t token_bytes = machine_->geometry.BytesPerToken();
    if (machine_->used_bytes() + capacity * token_bytes > machine_->host_tokens * token_bytes) {
      return absl::ResourceExhaustedError("the segment is full");
    }
    v1::ExtentRun run;
    run.set_first_pos(first_pos);
    run.set_capacity_tokens(capacity);
    for (int32_t layer = 0; layer < machine_->geometry.num_layers; ++layer) {
      v1::Extent* const extent = run.add_extents();
      extent->set_layer(layer);
      extent->set_extent_id(machine_->next_extent);
      extent->set_data_offset(uint64_t{machine_->next_extent} << 20);
      machine_->extents[machine_->next_extent].assign(capacity, -1);
      ++machine_->next_extent;
    }
    machine_->most_used_bytes = std::max(machine_->most_used_bytes, machine_->used_bytes());
    sequence.runs.push_back(run);
    return run;
  }
  absl::Status CommitSealed(const std::vector<v1::SealedSequence>& sequences) override {
    MutexLock lock(&machine_->mutex);
    if (absl::Status status = Ready(); !status.ok()) return status;
    for (const v1::SealedSequence& what : sequences) {
      const auto at = machine_->stored.find(what.sequence_id());
      if (at == machine_->stored.end()) return absl::NotFoundError("no such sequence");
      at->second.sealed_tokens = std::max(at->second.sealed_tokens, what.sealed_tokens());
      for (v1::ExtentRun& run : at->second.runs) Vacate(what, run);
    }
    return absl::OkStatus();
  }
  absl::Status TruncateSequence(uint64_t id, int64_t tokens) override {
    MutexLock lock(&machine_->mutex);
    if (absl::Status status = Ready(); !status.ok()) return status;
    if (machine_->lost_truncations > 0) {
      --machine_->lost_truncations;
      return absl::DeadlineExceededError("the store does not answer");
    }
    if (machine_->refuses_truncations) return absl::FailedPreconditionError("not to be truncated");
    const auto at = machine_->stored.find(id);
    if (at == machine_->stored.end()) return absl::NotFoundError("no such sequence");
    auto& runs = at->second.runs;
    for (const v1::ExtentRun& run : runs) {
      if (run.first_pos() < tokens && run.first_pos() + run.capacity_tokens() > tokens && !Whole(run)) {
        return absl::FailedPreconditionError("an extent with the position is vacated");
      }
    }
    while (!runs.empty() && runs.back().first_pos() >= tokens) {
      Erase(runs.back());
      runs.pop_back();
    }
    at->second.sealed_tokens = std::min(at->second.sealed_tokens, tokens);
    return absl::OkStatus();
  }
  absl::Status ReleaseSequences(const std::vector<uint64_t>& ids) override {
    MutexLock lock(&machine_->mutex);
    if (absl::Status status = Ready(); !status.ok()) return status;
    for (const uint64_t id : ids) {
      for (const v1::ExtentRun& run : machine_->stored[id].runs) Erase(run);
      machine_->stored.erase(id);
    }
    return absl::OkStatus();
  }
  absl::StatusOr<std::vector<v1::StoredSequence>> ListSequences() override {
    MutexLock lock(&machine_->mutex);
    if (absl::Status status = Ready(); !status.ok()) return status;
    std::vector<v1::StoredSequence> listed;
    for (const auto& [id, sequence] : machine_->stored) {
      v1::StoredSequence& out = listed.emplace_back();
      out.set_sequence_id(id);
      out.set_sealed_tokens(sequence.sealed_tokens);
      out.mutable_runs()->Add(sequence.runs.begin(), sequence.runs.end());
    }
    return listed;
  }
  absl::Status PreparePlan(const v1::Plan&) override {
    MutexLock lock(&machine_->mutex);
    return Ready();
  }
  absl::Status AttachMailbox(const std::string& file) override {
    MutexLock lock(&machine_->mutex);
    if (file != absl::StrCat("mailbox-", machine_->generation, "-", machine_->mailboxes)) {
      return absl::NotFoundError(file);
    }
    if (absl::Status status = Ready(); !status.ok()) return status;
    ++machine_->mailboxes_attached;
    return absl::OkStatus();
  }

 private:
  static bool Whole(const v1::ExtentRun& run) {
    return std::none_of(run.extents().begin(), run.extents().end(),
                        [](const v1::Extent& extent) { return extent.vacated(); });
  }
  void Erase(const v1::ExtentRun& run) {
    for (const v1::Extent& extent : run.extents()) machine_->extents.erase(extent.extent_id());
  }
  void Vacate(const v1::SealedSequence& what, v1::ExtentRun& run) {
    for (v1::Extent& extent : *run.mutable_extents()) {
      if (what.kept_from().empty() ||
          run.first_pos() + run.capacity_tokens() > what.kept_from(extent.layer())) {
        continue;
      }
      machine_->extents.erase(extent.extent_id());
      extent.clear_data_offset();
      extent.set_vacated(true);
    }
  }
  absl::Status Ready() {
    if (machine_->store_away) return absl::UnavailableError("store away");
    if (bound_ != machine_->generation) {
      return WithReason(absl::FailedPreconditionError("no model is bound"), "NO_MODEL_BOUND");
    }
    if (machine_->bound_by_another) {
      return WithReason(absl::AbortedError("another caller has bound the store"), "CALL_OVERTAKEN");
    }
    return absl::OkStatus();
  }

  const std::shared_ptr<FakeMachine> machine_;
  uint64_t bound_ = 0;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_TESTS_UNIT_SERVICES_COORDINATOR_FAKE_STORE_H_
