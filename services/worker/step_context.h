// One of the executor's two contexts (prefill, decode): its own residual stream, tables, results and
// part of the ring, so that a chunk and the steps of other sequences can take turns at layer borders.
//
// BeginStep() derives everything that a step will enqueue, for all layers, from the step, the plan
// and where keys lie: which rows, which spans of keys per launch, which tiles, what is sealed. The
// executor then only walks through it.
#ifndef HEADROOM_SERVICES_WORKER_STEP_CONTEXT_H_
#define HEADROOM_SERVICES_WORKER_STEP_CONTEXT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "services/worker/device_budget.h"
#include "services/worker/fetch_pipeline.h"
#include "services/worker/gpu_kv.h"
#include "services/worker/in_place_lane.h"
#include "services/worker/model/model_config.h"
#include "services/worker/step.h"
#include "services/worker/step_tables.h"

namespace headroom {

// One launch of Attend.
struct AttendLaunch {
  kernels::Table<kernels::AttendItem> items;
  kernels::Table<kernels::KvSpan> spans;
};

// What one layer of a step enqueues around its linear parts.
struct LayerWork {
  kernels::Table<kernels::CopyKvItem> prelude;  // tail rows in front of the chunk's own
  kernels::Table<kernels::AppendItem> append;   // where new keys and values go
  AttendLaunch local;                           // heads with no fetched key: all their keys
  int32_t tile_begin = 0;                       // tiles [tile_begin, tile_end) and their launches
  int32_t tile_end = 0;
  AttendLaunch last;                         // heads with fetched keys: the keys after the last tile
  kernels::Table<kernels::MergeItem> merge;  // heads with keys in place: what comes back
  AttendLaunch after;                        // heads wholly in place: the keys after those
  kernels::Table<kernels::CopyKvItem> seal;    // finished blocks into extents
  kernels::Table<kernels::CopyKvItem> mirror;  // ... and into resident copies
  kernels::Table<kernels::CopyKvItem> keep;  // what is left of a chunk, into the tail

  bool in_place() const { return merge.count > 0; }
};

class StepContext {
 public:
  // What one step in flight holds until it has run.
  struct Flight {
    StepTables tables;
    OpAccount accounts[kNumLanes];
    OpAccount tile_reads;  // launches that read a tile, and resident keys in front of it
    OpAccount sealed;
    kernels::SampleResult* results = nullptr;       // arena, [kMaxResults]
    kernels::SampleResult* host_results = nullptr;  // registered host memory
    int32_t num_results = 0;
    EventId done;         // on the compute stream
    EventId sealed_done;  // on the sealing stream, if `seals`
    bool seals = false;
    OpAccount fetch_wait;
    OpAccount in_place_wait;
    std::atomic<uint32_t>* await_result = nullptr;  // registered host memory
    kernels::DrawState* draw_state = nullptr;  // likewise: of a sequence that the step opens
    const MailboxTotals* in_place_totals = nullptr;  // null: nothing is in place
    absl::Status status;
    int64_t enqueued_ns = 0;
    double kv_heads[kNumLanes] = {};
    std::unique_ptr<Step> step;
  };

  // `max_rows` rows; `slot` is the context's in every mailbox; `staging` is registered host memory of
  // StagingBytes().
  static absl::StatusOr<std::unique_ptr<StepContext>> Create(
      Device& device, const ModelConfig& config, const DeviceBudget& budget, int64_t max_rows,
      bool has_chunks, GpuKv& kv, InPlaceLane& in_place, uint32_t slot,
      std::unique_ptr<FetchPipeline> pipeline, uint8_t* staging);
  static int64_t StagingBytes(const DeviceBudget& budget);

  // Derives the step's work into flight `index`. An error leaves nothing enqueued, and names what is
  // wrong with the step (INVALID_ARGUMENT, NOT_FOUND, RESOURCE_EXHAUSTED).
  // REQUIRES: the flight's step before has run and been taken.
  absl::Status BeginStep(std::unique_ptr<Step> step, const Plan& plan, int index);
  // All of the step has been enqueued: its keys count as known and sealed from now on.
  void Commit();

  Flight& flight(int index) { return flights_[index]; }
  FetchPipeline& pipeline() { return *pipeline_; }
  const LayerWork& layer_work(int32_t layer) const { return layers_[layer]; }
  const AttendLaunch& tile_launch(int tile) const { return tile_launches_[tile]; }
  const kernels::Table<kernels::EmbedRow>& tokens() const { return tokens_; }
  const kernels::Table<int64_t>& positions() const { return positions_; }
  const kernels::Table<int32_t>& result_rows() const { return result_rows_; }
  const kernels::Table<kernels::SampleRow>& sample_rows() const { return sample_rows_; }
  int64_t rows() const { return rows_; }
  bool seals() const { return seals_; }
  uint32_t slot() const { return slot_; }
  float* x() { return x_; }
  float* cos_sin() { return cos_sin_; }

  // Events of the hand-over to the sealing stream, by layer parity (chunk buffers alternate).
  EventId appended[2];
  EventId sealed[2];
  // All sealing of the latest step that sealed anything.
  EventId all_sealed;

 private:
  // A sequence of the step, with where its new keys go.
  struct Part {
    const StepSequence* what = nullptr;
    GpuKv::Sequence* kv = nullptr;
    int32_t row_begin = 0;
    bool in_tail = true;              // else in the chunk buffer, from chunk_offset on
    int64_t chunk_offset_bytes = 0;
    int64_t first_own_pos = 0;        // own keys are [first_own_pos, end): unsealed and new ones
    bool prelude_sealed = false;      // own keys in front of the new ones come from extents
  };

  StepContext(const ModelConfig& config, int64_t fast_queries, const kernels::WideShape& wide,
              int64_t max_rows, GpuKv& kv, InPlaceLane& in_place, uint32_t slot,
              std::unique_ptr<FetchPipeline> pipeline);

  absl::Status AddPart(const StepSequence& sequence);
  // INVALID_ARGUMENT if the part would read or write an extent that the store has given to another.
  absl::Status CheckExtents(const Part& part) const;
  absl::Status CheckPart(const StepSequence& sequence, const GpuKv::Sequence& kv) const;
  absl::Status CheckDraw(const StepSequence& sequence, const GpuKv::Sequence& kv) const;
  void BuildRows(StepTables& tables);
  absl::Status BuildResults(const Step& step, StepTables& tables);
  void BuildLayer(int32_t layer, StepTables& tables, Flight& flight);
  void BuildMoves(int32_t layer, StepTables& tables);
  void BuildAttention(int32_t layer, StepTables& tables);
  void AttendHeads(const Part& part, int32_t layer, int32_t head_begin, int32_t head_end,
                   StepTables& tables);
  kernels::KvSpan OwnKeys(const Part& part, int32_t layer) const;
  void AskStore(const Part& part, int32_t layer, int32_t head_begin, int32_t head_end);
  // Of the sealed runs of a head, how many the store is asked for: the oldest, up to the first that the
  // plan has elsewhere or that has a copy. (Attention goes on from what lies in front of it; a gap in
  // what the device attends to is not foreseen.)
  int RunsInPlace(const Part& part, int32_t layer, int32_t head) const;
  // Where this step attends to the keys of a head of a run of the layer that is being built.
  Lane LaneOf(const Part& part, int run, int32_t layer, int32_t head) const;
  // Of a run's positions, how many from `from` on are sealed for this step.
  int64_t SealedTokens(const Part& part, int run, int64_t from) const;
  // The runs that the layer's rows attend to: [FirstRun(), SealedRuns()). What lies behind the window of
  // the first row, and so of all, is left out block by block: FirstKey() and on is read.
  int SealedRuns(const Part& part) const;
  int FirstRun(const Part& part, int32_t layer) const;
  int64_t FirstKey(const Part& part, int32_t layer) const;
  int64_t ResidentTo(const Part& part, int32_t layer, int32_t head, int64_t pos, int64_t most) const;
  int64_t PieceEnd(int64_t end) const;

  const ModelConfig& config_;
  const KvGeometry geometry_;
  const int64_t group_;  // query heads of a KV head
  const int64_t fast_queries_;  // HeadsInPlace()'s
  const kernels::WideShape wide_;  // of chunks' attention; no rows on a device of float32
  const int64_t max_rows_;
  GpuKv& kv_;
  InPlaceLane& in_place_;
  const uint32_t slot_;
  const std::unique_ptr<FetchPipeline> pipeline_;
  Flight flights_[kStepsInFlight];
  float* x_ = nullptr;        // [max_rows, hidden]
  float* cos_sin_ = nullptr;  // [max_rows, head_dim]
  uint8_t* chunk_buffers_[2] = {};
  int64_t chunk_buffer_bytes_ = 0;

  // The step whose work this is.
  const Plan* plan_ = nullptr;
  bool may_ask_store_ = false;
  std::vector<int> runs_in_place_;  // [part][kv_head], of the layer that is being built
  std::vector<Part> parts_;
  std::vector<LayerWork> layers_;
  std::vector<AttendLaunch> tile_launches_;
  kernels::Table<kernels::EmbedRow> tokens_;
  kernels::Table<int64_t> positions_;
  kernels::Table<int32_t> result_rows_;
  kernels::Table<kernels::SampleRow> sample_rows_;
  int64_t rows_ = 0;
  int64_t chunk_bytes_ = 0;
  bool seals_ = false;
  Tiling tiling_ = Tiling::kDecode;

  // Scratch of BeginStep, kept for its capacity.
  std::vector<kernels::EmbedRow> embed_scratch_;
  std::vector<int64_t> position_scratch_;
  std::vector<int32_t> row_scratch_;
  std::vector<kernels::SampleRow> sample_scratch_;
  std::vector<kernels::AppendItem> append_scratch_;
  std::vector<kernels::CopyKvItem> copy_scratch_[4];  // prelude, seal, mirror, keep
  std::vector<kernels::AttendItem> item_scratch_[4];  // local, tile, last, after
  std::vector<kernels::KvSpan> span_scratch_[4];
  std::vector<kernels::MergeItem> merge_scratch_;
  std::vector<MailboxSpan> mailbox_scratch_;
  std::vector<Rectangle> tile_scratch_;
  std::vector<int64_t> progress_;  // per head: keys below are in launches already
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_CONTEXT_H_
