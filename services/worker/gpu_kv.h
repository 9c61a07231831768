// Keys and values of the open sequences: their tails and resident copies in device memory, and where
// their extents lie in the mapped segment.
//
// The host copy is the truth and a resident copy a cache of it: dropping one loses nothing. Which
// copies there should be is the plan's word; which there are is decided here, within the pool.
//
// Used by the executor's thread only. Everything here is bookkeeping; moving bytes is the executor's
// and the fetch pipeline's.
#ifndef HEADROOM_SERVICES_WORKER_GPU_KV_H_
#define HEADROOM_SERVICES_WORKER_GPU_KV_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/kv_layout.h"
#include "kernels/sample.h"
#include "kernels/types.h"
#include "services/worker/kv_pool.h"
#include "services/worker/step.h"

namespace headroom {

// The data file of the store's segment as this process has it mapped.
struct SegmentView {
  uint8_t* data = nullptr;
  int64_t bytes = 0;
};

class GpuKv {
 public:
  struct Sequence {
    uint64_t id = 0;
    int32_t slot = 0;
    std::vector<Run> runs;
    // As of the steps enqueued so far, once they have run: positions [0, sealed_tokens) are in extents,
    // keys of [0, known_end) have been computed, and the tail holds those from tail_begin on.
    int64_t sealed_tokens = 0;
    int64_t known_end = 0;
    int64_t tail_begin = 0;
    bool has_vacated = false;  // of the runs' extents some are vacated
    bool has_drawn = false;  // a token, which a step may refer to as the last drawn
    // Of a sequence that was opened with a history: what its draws go by, once it has been filled,
    // and the tokens that are counted in it as of the steps enqueued so far.
    kernels::DrawState* draw_state = nullptr;
    bool draw_state_filled = false;
    int64_t counted_tokens = 0;
    // The known_end at which the next run lies behind a window.
    int64_t next_drop_pos = std::numeric_limits<int64_t>::max();
    std::vector<uint8_t*> tails;      // per layer: [kv_head][K | V][kTailTokens]
    std::vector<uint8_t*> residents;  // [run][layer][kv_head]: copy of that head of the run, or null

    int64_t capacity_tokens() const {
      return runs.empty() ? 0 : runs.back().first_pos + runs.back().capacity_tokens;
    }
  };

  // `draw_state_bytes` is what the history of one sequence's draws takes of the pool.
  // `windows` are the layers' (ModelConfig::windows): of runs that lie behind one there are no copies.
  GpuKv(const KvGeometry& geometry, uint8_t* pool, int64_t pool_bytes, int32_t max_sequences,
        int64_t draw_state_bytes, std::vector<int64_t> windows = {});

  // The segment that offsets refer to; open sequences must fit the new one too.
  void SetSegment(const SegmentView& segment) { segment_ = segment; }

  // INVALID_ARGUMENT for runs that do not follow each other, are misshapen or leave the segment;
  // ALREADY_EXISTS; RESOURCE_EXHAUSTED when no slot, no tail or no room for a history is left, even
  // with every resident copy dropped.
  absl::Status Open(const OpenSequence& open);
  // NOT_FOUND if it is not open; INVALID_ARGUMENT as above.
  absl::Status Grant(const RunGrant& grant);
  // Unknown sequences are ignored.
  void Close(uint64_t sequence_id);
  void CloseAll();
  Sequence* Find(uint64_t sequence_id);
  // Whether that has been done already: a repeated step brings its openings and grants again.
  bool Holds(const OpenSequence& open);
  bool Holds(const RunGrant& grant);

  // Makes the resident copies what `plan` says, as far as the pool allows; calls promote(sequence,
  // run, layer, kv_head) for each new copy, which must then be filled with what is sealed. Copies behind
  // windows go with `drop_behind` only: a step that is being enqueued, and is a repeated one, may name them.
  void ApplyPlan(const Plan& plan,
                 const std::function<void(const Sequence&, int, int32_t, int32_t)>& promote,
                 bool drop_behind = true);
  // Whether a run has come to lie behind a window since ApplyPlan() dropped such copies.
  bool WindowsMoved() const;

  // ---- Spans of one sequence.
  kernels::KvSpan Tail(const Sequence& sequence, int32_t layer) const;
  // All KV heads of a run's extent in the segment; base == nullptr if it is vacated.
  kernels::KvSpan Extent(const Sequence& sequence, int run, int32_t layer) const;
  // base == nullptr where there is no copy.
  kernels::KvSpan Resident(const Sequence& sequence, int run, int32_t layer, int32_t kv_head) const;

  const KvGeometry& geometry() const { return geometry_; }
  const KvPool& pool() const { return pool_; }
  int32_t num_open() const { return static_cast<int32_t>(sequences_.size()); }
  // Whether memory has been freed since the last call: work enqueued from now on must then wait for
  // all earlier work before it may reuse it.
  bool TakeFreed() { return std::exchange(freed_, false); }

 private:
  absl::Status CheckRun(const Sequence& sequence, const Run& run) const;
  void AddRun(Sequence& sequence, const Run& run);
  int64_t NextDropPos(const Sequence& sequence) const;
  bool BehindWindow(const Sequence& sequence, int run, int32_t layer) const;
  uint8_t*& ResidentSlot(Sequence& sequence, int run, int32_t layer, int32_t kv_head) const;
  void DropResident(Sequence& sequence, int run, int32_t layer, int32_t kv_head);
  // Of the pool, with resident copies dropped as need be; nullptr if there is no room even so.
  uint8_t* Take(int64_t bytes);
  // Drops one resident copy, oldest positions first. False if there is none.
  bool EvictOne();

  const KvGeometry geometry_;
  const int64_t tail_layer_bytes_;
  const int64_t draw_state_bytes_;
  const std::vector<int64_t> windows_;
  KvPool pool_;
  SegmentView segment_;
  std::vector<std::unique_ptr<Sequence>> sequences_;
  std::vector<int32_t> free_slots_;
  bool freed_ = false;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_GPU_KV_H_
