// Brings fetched keys from the mapped extents into a staging ring, ahead of the attention that reads
// them: one total order of tiles, equal to the order of consumption, across heads and layers (keys do
// not depend on this step's queries). A FIFO ring filled in any other order would deadlock.
//
// Per tile there are two events: `filled` (copy stream to compute stream) and `released` (back). The
// host keeps filling until the next tile would overwrite one whose consumer it has not enqueued yet.
//
// Used by the executor's thread only; one pipeline, with its own part of the ring, per context.
#ifndef HEADROOM_SERVICES_WORKER_FETCH_PIPELINE_H_
#define HEADROOM_SERVICES_WORKER_FETCH_PIPELINE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "kernels/types.h"
#include "services/worker/gpu_kv.h"
#include "services/worker/tiling.h"

namespace headroom {

class FetchPipeline {
 public:
  // `ring`: `bytes` of the arena, a multiple of 256.
  static absl::StatusOr<std::unique_ptr<FetchPipeline>> Create(Device& device, StreamId copy,
                                                               StreamId compute, GpuKv& kv,
                                                               uint8_t* ring, int64_t bytes);

  // Largest tile that may be added: with two of them in the ring, one fills while one is read.
  int64_t max_tile_bytes() const { return bytes_ / 2; }

  // ---- A step's tiles, in the order of consumption.
  // `copied` receives bytes and time of the copies, `waited` the compute stream's waits for them.
  // REQUIRES: every tile of the step before has been consumed or abandoned.
  void BeginStep(OpAccount* copied, OpAccount* waited);
  // Returns the tile's index. Its place in the ring is settled now: SpanOf() is valid at once.
  int AddTile(const GpuKv::Sequence& sequence, int32_t layer, const Rectangle& tile);
  kernels::KvSpan SpanOf(int tile) const;

  // Enqueues fills as far ahead as the ring allows.
  absl::Status Advance();
  // Before the kernels that read `tile` are enqueued on the compute stream: waits for its fill.
  // REQUIRES: tiles are consumed in order of their index.
  absl::Status BeginConsume(int tile);
  // After them: releases the tile, then fills on.
  absl::Status EndConsume(int tile);
  // Gives up what is left of the step: nothing more is consumed. Later work of the compute stream
  // runs after the copies in flight.
  absl::Status Abandon();

 private:
  // One tile of the step. Runs and offsets are looked up when it is added, because the sequence may
  // get more runs before the copy is enqueued.
  struct Tile {
    int64_t ring_offset = 0;
    int64_t bytes = 0;
    int32_t kv_head_begin = 0;
    int32_t kv_head_end = 0;
    int64_t first_pos = 0;
    int32_t count = 0;
    int32_t copy_begin = 0;  // copies_[copy_begin, copy_end)
    int32_t copy_end = 0;
  };
  // What lies in the ring, oldest first.
  struct Live {
    int64_t ring_offset = 0;
    int64_t bytes = 0;
    int64_t serial = 0;
  };

  static constexpr int64_t kMaxLive = 64;

  FetchPipeline(Device& device, StreamId copy, StreamId compute, GpuKv& kv, uint8_t* ring,
                int64_t bytes);
  // Frees the place of the next tile; false if a consumer there has not been enqueued yet.
  absl::StatusOr<bool> MakeRoom(const Tile& tile);
  // Enqueues the copies of the next tile.
  absl::Status Fill(const Tile& tile);

  Device& device_;
  const StreamId copy_;
  const StreamId compute_;
  GpuKv& kv_;
  uint8_t* const ring_;
  const int64_t bytes_;
  std::vector<EventId> filled_;    // by serial % kMaxLive
  std::vector<EventId> released_;  // by serial % kMaxLive

  OpAccount* copied_ = nullptr;
  OpAccount* waited_ = nullptr;
  std::vector<Tile> tiles_;
  std::vector<CopyArgs> copies_;
  int next_fill_ = 0;
  int next_consume_ = 0;
  int64_t step_serial_ = 0;  // serial of tiles_[0]
  int64_t cursor_ = 0;       // where the next added tile begins, if it fits
  std::vector<Live> live_;   // ring buffer of kMaxLive
  int64_t live_head_ = 0;
  int64_t live_tail_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_FETCH_PIPELINE_H_
