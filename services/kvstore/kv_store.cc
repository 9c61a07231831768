#include "services/kvstore/kv_store.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/log.h"
#include "common/segment/mapped_segment.h"
#include "common/status.h"

namespace headroom::kvstore {
namespace {

// Memory comes at 1 to 3 GB/s.
constexpr absl::Duration kRetryPrefault = absl::Seconds(1);

// What extents can take of `bytes` of data: whole units of each piece.
int64_t UsableBytes(int64_t bytes, const KvGeometry& geometry) {
  const int64_t unit = kBlockTokens * geometry.BytesPerTokenPerLayer();
  const auto usable = [unit](int64_t range) { return range / unit * unit; };
  return bytes / kRegistrationBytes * usable(kRegistrationBytes) +
         usable(bytes % kRegistrationBytes);
}

std::string Text(const SegmentBinding& binding) {
  return absl::StrCat("model ", FingerprintText(binding.fingerprint), " (",
                      binding.geometry.num_layers, " layers x ", binding.geometry.num_kv_heads,
                      " KV heads x ", binding.geometry.head_dim, ")");
}

}  // namespace

// ---------------------------------------------------------------- start and end

KvStore::KvStore(std::unique_ptr<Segment> segment) : segment_(std::move(segment)) {}

absl::StatusOr<std::unique_ptr<KvStore>> KvStore::Open(const SegmentOptions& options) {
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<Segment> segment, Segment::Open(options));
  std::unique_ptr<KvStore> store(new KvStore(std::move(segment)));
  HEADROOM_RETURN_IF_ERROR(store->Start());
  return store;
}

KvStore::~KvStore() {
  stop_.store(true);
  if (prefault_thread_.joinable()) prefault_thread_.join();
}

absl::Status KvStore::Start() {
  // The first piece, and the pieces that an earlier store had made ready: its extents lie there.
  const int64_t pieces =
      std::max<int64_t>(1, (segment_->ready_bytes() + kRegistrationBytes - 1) / kRegistrationBytes);
  const int64_t first = std::min(segment_->data_bytes(), pieces * kRegistrationBytes);
  HEADROOM_RETURN_IF_ERROR(segment_->Prefault(first, stop_));
  for (int64_t begin = 0; begin < first; begin += kRegistrationBytes) {
    OnReady(begin, std::min(begin + kRegistrationBytes, first));
  }
  MutexLock lock(&mutex_);
  binding_ = segment_->binding();
  RecoveryReport report;
  if (binding_.has_value()) {
    MakeIndex();
    report = index_->Recover();
  }
  if (segment_->why_new().empty()) {
    LogInfo(absl::StrCat("took over the segment in ", segment_->dir(), ": ", report.kept_sequences,
                         " sequences in ", report.kept_extents, " extents; freed ",
                         report.incomplete_extents, " that were half-made and ",
                         report.damaged_extents, " that were damaged"));
  } else {
    LogInfo(absl::StrCat("made a new segment in ", segment_->dir(), ": ", segment_->why_new()));
  }
  prefault_thread_ = std::thread([this] { PrefaultLoop(); });
  return absl::OkStatus();
}

void KvStore::PrefaultLoop() {
  absl::Status status;
  const int64_t all = segment_->data_bytes();
  for (int64_t begin = segment_->ready_bytes(); begin < all && status.ok() && !stop_.load();) {
    const int64_t end =
        std::min(all, (begin / kRegistrationBytes + 1) * kRegistrationBytes);
    status = segment_->Prefault(end, stop_);
    const int64_t ready = segment_->ready_bytes();
    if (ready > begin) OnReady(begin, ready);
    begin = ready;
  }
  if (!status.ok()) LogError(status.message());
  const int64_t huge = segment_->CountHugePageBytes();
  LogInfo(absl::StrCat("segment: ", segment_->ready_bytes(), " of ", all,
                       " bytes backed by memory, ", huge, " of them by huge pages"));
  MutexLock lock(&mutex_);
  huge_page_bytes_ = huge;
  prefault_status_ = status;
  prefaulting_ = false;
  ready_changed_.SignalAll();
}

void KvStore::OnReady(int64_t begin, int64_t end) {
  MutexLock lock(&mutex_);
  ready_.emplace_back(begin, end);
  if (index_ != nullptr) index_->AddRange(begin, end - begin);
  ready_changed_.SignalAll();
}

absl::Status KvStore::WaitUntilReady() {
  MutexLock lock(&mutex_);
  while (prefaulting_) ready_changed_.WaitFor(&mutex_, absl::Seconds(1));
  return prefault_status_;
}

// ---------------------------------------------------------------- the model

void KvStore::MakeIndex() {
  index_ = std::make_unique<ExtentIndex>(segment_->descriptors(), binding_->geometry);
  for (const auto& [begin, end] : ready_) index_->AddRange(begin, end - begin);
}

absl::Status KvStore::CheckBound() const {
  if (index_ != nullptr) return absl::OkStatus();
  return WithReason(absl::FailedPreconditionError("the segment is bound to no model yet"),
                    "NO_MODEL_BOUND");
}

absl::StatusOr<int64_t> KvStore::Bind(const SegmentBinding& binding, bool allow_clean) {
  if (!IsUsable(binding.geometry)) {
    return BadRequestError(
        {{"geometry", absl::StrCat("is ", binding.geometry.num_layers, " layers x ",
                                   binding.geometry.num_kv_heads, " KV heads x ",
                                   binding.geometry.head_dim, ", which cannot be laid out")}});
  }
  MutexLock lock(&mutex_);
  if (binding_.has_value() && *binding_ == binding) {
    return static_cast<int64_t>(index_->sequences().size());
  }
  if (binding_.has_value()) {
    const size_t held = index_->sequences().size();
    if (held > 0 && !allow_clean) {
      return WithReason(absl::FailedPreconditionError(absl::StrCat(
                            "the segment holds ", held, " sequences of ", Text(*binding_),
                            "; asked for was ", Text(binding),
                            ". Allow cleaning, or use another --segment-dir")),
                        "OTHER_MODEL");
    }
    if (held > 0) LogWarning(absl::StrCat("cleaning ", held, " sequences of ", Text(*binding_)));
  }
  for (ExtentDescriptor& descriptor : segment_->descriptors()) StoreRelease(descriptor.commit, 0);
  segment_->Bind(binding);
  binding_ = binding;
  MakeIndex();
  LogInfo(absl::StrCat("bound to ", Text(binding)));
  return 0;
}

// ---------------------------------------------------------------- sequences

absl::StatusOr<StoredRun> KvStore::AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                               int64_t capacity_tokens) {
  MutexLock lock(&mutex_);
  HEADROOM_RETURN_IF_ERROR(CheckBound());
  absl::StatusOr<const StoredRun*> run =
      index_->AllocateRun(sequence_id, first_pos, capacity_tokens);
  if (run.ok()) return **run;
  const bool descriptors_left = segment_->descriptors().size() - index_->used_extents() >=
                                static_cast<size_t>(binding_->geometry.num_layers);
  // The prefault thread goes on to count huge pages once all memory is there.
  const bool memory_to_come = prefaulting_ && ready_.back().second < segment_->data_bytes();
  if (absl::IsResourceExhausted(run.status()) && memory_to_come && descriptors_left) {
    return WithRetryAfter(WithReason(absl::UnavailableError(absl::StrCat(
                                         "memory is being prepared, ", segment_->ready_bytes(),
                                         " of ", segment_->data_bytes(), " bytes are ready")),
                                     "SEGMENT_NOT_READY"),
                          kRetryPrefault);
  }
  return run.status();
}

absl::Status KvStore::CommitSealed(std::span<const SealedCount> counts) {
  MutexLock lock(&mutex_);
  HEADROOM_RETURN_IF_ERROR(CheckBound());
  return index_->CommitSealed(counts);
}

absl::StatusOr<int64_t> KvStore::Truncate(uint64_t sequence_id, int64_t tokens) {
  MutexLock lock(&mutex_);
  HEADROOM_RETURN_IF_ERROR(CheckBound());
  return index_->Truncate(sequence_id, tokens);
}

absl::StatusOr<int64_t> KvStore::Release(std::span<const uint64_t> sequence_ids) {
  MutexLock lock(&mutex_);
  HEADROOM_RETURN_IF_ERROR(CheckBound());
  int64_t extents = 0;
  for (const uint64_t id : sequence_ids) extents += index_->Release(id);
  return extents;
}

absl::StatusOr<KvStore::Page> KvStore::List(uint64_t after, int64_t max_sequences,
                                            int64_t max_extents) const {
  MutexLock lock(&mutex_);
  HEADROOM_RETURN_IF_ERROR(CheckBound());
  Page page;
  int64_t extents = 0;
  for (auto at = index_->sequences().upper_bound(after); at != index_->sequences().end(); ++at) {
    page.more = static_cast<int64_t>(page.sequences.size()) >= max_sequences ||
                extents > max_extents;
    if (page.more) break;
    page.sequences.emplace_back(*at);
    extents += static_cast<int64_t>(at->second.runs.size()) * binding_->geometry.num_layers;
  }
  return page;
}

StoreFacts KvStore::Facts() const {
  StoreFacts facts;
  facts.generation = segment_->generation();
  facts.segment_dir = segment_->dir();
  facts.max_extents = static_cast<int64_t>(segment_->descriptors().size());
  facts.ready_bytes = segment_->ready_bytes();
  MutexLock lock(&mutex_);
  facts.huge_page_bytes = huge_page_bytes_;
  facts.binding = binding_;
  // Memory that is still to come counts as had, unless it could not be had.
  facts.capacity_bytes = prefaulting_ ? segment_->data_bytes() : facts.ready_bytes;
  if (index_ == nullptr) return facts;
  facts.capacity_bytes = UsableBytes(facts.capacity_bytes, binding_->geometry);
  facts.used_bytes = index_->used_bytes();
  facts.used_extents = index_->used_extents();
  return facts;
}

}  // namespace headroom::kvstore
