#include "services/worker/step_layers.h"

#include "common/status.h"

namespace headroom {

absl::Status StepLayers::Enqueue(StepContext& state, StepContext::Flight& flight, int32_t layer,
                                 bool whole) {
  const LayerWork& work = state.layer_work(layer);
  if (layer == 0 || !whole) {
    HEADROOM_RETURN_IF_ERROR(PrepareAppend(state, layer));
    HEADROOM_RETURN_IF_ERROR(
        decoder_.AttentionInput(layer, state.x(), state.rows(), {state.cos_sin(), work.append}));
  }
  if (work.in_place()) {  // first, so that the store works beside all that follows
    HEADROOM_RETURN_IF_ERROR(in_place_.Post(compute_, state.slot(), *flight.step, layer,
                                            decoder_.Attention(layer, state.rows())));
  }
  HEADROOM_RETURN_IF_ERROR(Seal(state, flight, layer));
  HEADROOM_RETURN_IF_ERROR(Attend(state, flight, layer));
  HEADROOM_RETURN_IF_ERROR(Move(compute_, work.keep, nullptr));
  if (!whole || layer + 1 == config_.num_layers) {
    return decoder_.LayerOutput(layer, state.x(), state.rows(), nullptr);
  }
  HEADROOM_RETURN_IF_ERROR(PrepareAppend(state, layer + 1));
  const Decoder::NewKeys next = {state.cos_sin(), state.layer_work(layer + 1).append};
  return decoder_.LayerOutput(layer, state.x(), state.rows(), &next);
}

// What must be done before a layer's keys are appended.
absl::Status StepLayers::PrepareAppend(StepContext& state, int32_t layer) {
  if (layer >= 2 && state.seals()) {
    HEADROOM_RETURN_IF_ERROR(device_.Wait(compute_, state.sealed[layer % 2]));  // chunk buffer's reuse
  }
  return Move(compute_, state.layer_work(layer).prelude, nullptr);
}

absl::Status StepLayers::Move(StreamId stream, const kernels::Table<kernels::CopyKvItem>& items,
                              OpAccount* account, int32_t max_blocks) {
  if (items.count == 0) return absl::OkStatus();
  kernels::CopyKvRowsArgs args;
  args.items = items;
  args.head_dim = config_.head_dim;
  args.max_blocks = max_blocks;
  return device_.CopyKvRows(stream, args, account);
}

// Finished blocks go to their extents, and to resident copies, on a stream of their own.
absl::Status StepLayers::Seal(StepContext& state, StepContext::Flight& flight, int32_t layer) {
  const LayerWork& work = state.layer_work(layer);
  if (work.seal.count == 0) return absl::OkStatus();
  const int parity = layer % 2;
  HEADROOM_RETURN_IF_ERROR(device_.Record(compute_, state.appended[parity]));
  HEADROOM_RETURN_IF_ERROR(device_.Wait(seal_, state.appended[parity]));
  HEADROOM_RETURN_IF_ERROR(Move(seal_, work.seal, &flight.sealed, kernels::kHostCopyBlocks));
  HEADROOM_RETURN_IF_ERROR(Move(seal_, work.mirror, nullptr));
  return device_.Record(seal_, state.sealed[parity]);
}

// Resident keys and the tail first, then tile by tile as copies arrive, then what follows the tiles:
// for every head in ascending order of position. What the store has attended to in the meantime comes
// last, and after it the tail of the heads that lie there as a whole.
absl::Status StepLayers::Attend(StepContext& state, StepContext::Flight& flight, int32_t layer) {
  const LayerWork& work = state.layer_work(layer);
  OpAccount& resident = flight.accounts[static_cast<int>(Lane::kResident)];
  const auto attend = [&](const AttendLaunch& launch, OpAccount* account) -> absl::Status {
    if (launch.items.count == 0) return absl::OkStatus();
    kernels::AttendArgs args = decoder_.Attention(layer, state.rows());
    args.items = launch.items;
    args.spans = launch.spans;
    return device_.Attend(compute_, args, account);
  };
  HEADROOM_RETURN_IF_ERROR(attend(work.local, &resident));
  for (int tile = work.tile_begin; tile < work.tile_end; ++tile) {
    HEADROOM_RETURN_IF_ERROR(state.pipeline().BeginConsume(tile));
    HEADROOM_RETURN_IF_ERROR(attend(state.tile_launch(tile), &flight.tile_reads));
    HEADROOM_RETURN_IF_ERROR(state.pipeline().EndConsume(tile));
  }
  HEADROOM_RETURN_IF_ERROR(attend(work.last, &resident));
  if (!work.in_place()) return absl::OkStatus();
  HEADROOM_RETURN_IF_ERROR(in_place_.Await(compute_, state.slot(), *flight.step, layer,
                                           flight.await_result, &flight.in_place_wait));
  const kernels::AttendArgs as = decoder_.Attention(layer, state.rows());
  kernels::MergePartialsArgs merge;
  merge.partials = in_place_.partials(state.slot());
  merge.state = as.state;
  merge.out = as.out;
  merge.rows = as.rows;
  merge.items = work.merge;
  merge.num_q_heads = as.num_q_heads;
  merge.num_kv_heads = as.num_kv_heads;
  merge.head_dim = as.head_dim;
  HEADROOM_RETURN_IF_ERROR(device_.MergePartials(compute_, merge));
  return attend(work.after, &resident);
}

absl::Status StepLayers::EnqueueResults(StepContext& state, StepContext::Flight& flight) {
  HEADROOM_RETURN_IF_ERROR(decoder_.Sample(state.x(), state.rows(), state.result_rows(),
                                           state.sample_rows(), flight.results));
  if (flight.num_results == 0) return absl::OkStatus();
  CopyArgs copy;
  copy.dst = flight.host_results;
  copy.src = flight.results;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes =
      flight.num_results * static_cast<int64_t>(sizeof(kernels::SampleResult));
  return device_.Copy(compute_, copy);
}

}  // namespace headroom
