// The KV store without its RPCs: one segment, the index of its extents, and the thread that backs the
// segment with memory while it already serves.
//
// Thread-safe. Calls take microseconds, but for Bind() with cleaning.
#ifndef HEADROOM_SERVICES_KVSTORE_KV_STORE_H_
#define HEADROOM_SERVICES_KVSTORE_KV_STORE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/mutex.h"
#include "common/segment_format.h"
#include "services/kvstore/extent_index.h"
#include "services/kvstore/segment.h"

namespace headroom::kvstore {

struct StoreFacts {
  uint64_t generation = 0;
  std::string segment_dir;
  int64_t capacity_bytes = 0;  // what extents can take in the end
  int64_t used_bytes = 0;
  int64_t max_extents = 0;
  int64_t used_extents = 0;
  int64_t ready_bytes = 0;      // of the data file, backed by memory so far
  int64_t huge_page_bytes = 0;  // as of when memory was last added
  std::optional<SegmentBinding> binding;
};

class KvStore {
 public:
  // Opens the segment and takes over what an earlier store has left. The first GiB is there on return;
  // more follows on a thread of its own. Errors as Segment::Open().
  static absl::StatusOr<std::unique_ptr<KvStore>> Open(const SegmentOptions& options);
  ~KvStore();

  StoreFacts Facts() const;
  // The extents' bytes; what is ready of them may be read, from any thread.
  const uint8_t* data() const { return segment_->data(); }
  int64_t ready_bytes() const { return segment_->ready_bytes(); }

  // Returns how many sequences were kept. INVALID_ARGUMENT: no usable geometry. FAILED_PRECONDITION:
  // there are sequences of another model, and `allow_clean` is false.
  absl::StatusOr<int64_t> Bind(const SegmentBinding& binding, bool allow_clean);

  // These are ExtentIndex's, with FAILED_PRECONDITION while no model is bound. AllocateRun() is
  // UNAVAILABLE if only memory that is still to come has room.
  absl::StatusOr<StoredRun> AllocateRun(uint64_t sequence_id, int64_t first_pos,
                                        int64_t capacity_tokens);
  absl::Status CommitSealed(std::span<const SealedCount> counts);
  absl::StatusOr<int64_t> Truncate(uint64_t sequence_id, int64_t tokens);
  absl::StatusOr<int64_t> Release(std::span<const uint64_t> sequence_ids);

  // Sequences with ids larger than `after`, in order, until there are `max_sequences`, or more than
  // `max_extents` extents in them.
  struct Page {
    std::vector<std::pair<uint64_t, StoredSequence>> sequences;
    bool more = false;
  };
  absl::StatusOr<Page> List(uint64_t after, int64_t max_sequences, int64_t max_extents) const;

  // Waits until all memory is there, or cannot be had, and returns the error in that case.
  absl::Status WaitUntilReady();

 private:
  explicit KvStore(std::unique_ptr<Segment> segment);

  absl::Status Start();
  void PrefaultLoop();
  // What a piece of the data file has come to: extents may lie in it.
  void OnReady(int64_t begin, int64_t end);
  // A new index over the memory that is ready, of the geometry that is bound.
  void MakeIndex() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status CheckBound() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const std::unique_ptr<Segment> segment_;
  std::atomic<bool> stop_{false};

  mutable Mutex mutex_;
  CondVar ready_changed_;
  std::optional<SegmentBinding> binding_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<ExtentIndex> index_ ABSL_GUARDED_BY(mutex_);  // null while no model is bound
  // Where each piece of kRegistrationBytes that has memory begins and ends, in order.
  std::vector<std::pair<int64_t, int64_t>> ready_ ABSL_GUARDED_BY(mutex_);
  bool prefaulting_ ABSL_GUARDED_BY(mutex_) = true;
  absl::Status prefault_status_ ABSL_GUARDED_BY(mutex_);
  int64_t huge_page_bytes_ ABSL_GUARDED_BY(mutex_) = 0;

  std::thread prefault_thread_;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_KV_STORE_H_
