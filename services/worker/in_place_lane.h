// The worker's end of a mailbox: what each layer of a step attends to inside the KV store, asked for
// by the device and awaited by it. The store's end is services/kvstore/attend_pool.h.
//
// Every context of the executor has a slot, every step in flight a table in it. A mailbox is of use
// until a wait on it has given up; then keys in place are fetched, until the next one is set.
//
// Used by the executor's thread only.
#ifndef HEADROOM_SERVICES_WORKER_IN_PLACE_LANE_H_
#define HEADROOM_SERVICES_WORKER_IN_PLACE_LANE_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/device/device.h"
#include "common/segment/mailbox.h"
#include "services/worker/device_budget.h"
#include "services/worker/model/model_config.h"
#include "services/worker/step.h"

namespace headroom {

// New tokens of a step whose keys may be attended in place: what a mailbox has room for.
inline constexpr int64_t kMaxInPlaceRows = kMaxDecodeRows;
// Queries of a KV head (a sequence's new tokens times query heads of a KV head) up to which its keys are
// attended in place at the rate of a decode step's; from there on the rate falls as queries grow. With AMX,
// 16 cores, GB/s of 4, 16, 32 and 128 queries: 105, 102, 85, 36; in float32 32 took twice as long as 4.
inline constexpr int64_t kFastQueriesInTiles = 40;
inline constexpr int64_t kFastQueries = 16;

// Of `heads` KV heads that the plan has in place in a layer, those that a sequence with so many queries
// leaves there; the others are fetched, so that both links end together. A plan balances them for decode
// steps: where keys in place take q / fast_queries times as long, the share s that stays takes s q /
// fast_queries of a decode step, and what is fetched 1 + (1 - s) r, r being how many keys are attended to in
// place while one comes over PCIe: 2 at least. Rounded such that over the layers the share is met.
int32_t HeadsInPlace(int64_t queries, int64_t fast_queries, int32_t heads, int32_t layer);

// What a worker with this budget makes its mailboxes like.
MailboxShape MailboxShapeOf(const ModelConfig& config, const DeviceBudget& budget,
                            bool poster_wakes);

class InPlaceLane {
 public:
  // `device` outlives the lane; `deadline` bounds each wait.
  InPlaceLane(Device& device, const ModelConfig& config, absl::Duration deadline);
  ~InPlaceLane();

  // Null: none. REQUIRES: no step is in flight.
  absl::Status SetMailbox(std::shared_ptr<Mailbox> mailbox);
  // Whether a step that begins now may use it: its store looks at it, and no wait has given up.
  bool ready() const;

  // ---- The table of a step that begins, in order of layers.
  void BeginTable(uint32_t slot, uint32_t table);
  void BeginLayer();
  void AddItem(const MailboxItem& item, const std::vector<MailboxSpan>& spans);
  // Whether the layer that was begun last has items.
  bool layer_has_items() const { return layers_.back().item_count > 0; }
  // Writes the table where the store reads it, and wakes it. RESOURCE_EXHAUSTED if it does not fit.
  absl::Status EndTable();
  // Where the store counts what a step comes to; to be read when the step's last wait has been passed.
  const MailboxTotals* totals(uint32_t slot, uint32_t table) const;

  // ---- A layer of the step whose table was ended last in the slot. `args` are of its attention.
  absl::Status Post(StreamId stream, uint32_t slot, const Step& step, int32_t layer,
                    const kernels::AttendArgs& args);
  // ... and its answer. `status`, registered, becomes an AwaitResult if none is taken.
  absl::Status Await(StreamId stream, uint32_t slot, const Step& step, int32_t layer,
                     std::atomic<uint32_t>* status, OpAccount* waited);
  const float* partials(uint32_t slot) const { return mailbox_->partials(slot); }

 private:
  Device& device_;
  const ModelConfig& config_;
  const absl::Duration deadline_;
  std::shared_ptr<Mailbox> mailbox_;
  std::vector<uint64_t> posts_;            // by slot
  std::vector<uint32_t> tables_in_use_;    // by slot: of the step that is being enqueued

  uint32_t slot_ = 0;  // of the table that is being built
  std::vector<MailboxLayer> layers_;
  std::vector<MailboxItem> items_;
  std::vector<MailboxSpan> spans_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_IN_PLACE_LANE_H_
