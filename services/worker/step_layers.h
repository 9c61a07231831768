// What a step enqueues, layer by layer; the executor says when. A decode step's way from tokens to a token
// is written here: products (model/decoder.cc), attention wherever keys lie, sealing, the draw.
#ifndef HEADROOM_SERVICES_WORKER_STEP_LAYERS_H_
#define HEADROOM_SERVICES_WORKER_STEP_LAYERS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "common/device/device.h"
#include "services/worker/in_place_lane.h"
#include "services/worker/model/decoder.h"
#include "services/worker/model/model_config.h"
#include "services/worker/step_context.h"

namespace headroom {

// For the executor's thread.
class StepLayers {
 public:
  // All of these outlive it.
  StepLayers(Device& device, const ModelConfig& config, Decoder& decoder, InPlaceLane& in_place,
             StreamId compute, StreamId seal)
      : device_(device),
        config_(config),
        decoder_(decoder),
        in_place_(in_place),
        compute_(compute),
        seal_(seal) {}

  // One layer of the step in `flight`, whose work `state` has. `whole`: nothing of another step is enqueued
  // between its layers, so that what leads from one attention to the next may be one operation. Errors are the
  // device's; what has been enqueued by then still runs.
  absl::Status Enqueue(StepContext& state, StepContext::Flight& flight, int32_t layer, bool whole);
  // After the last: logits, the draw, and the results on their way to the host.
  absl::Status EnqueueResults(StepContext& state, StepContext::Flight& flight);

 private:
  absl::Status PrepareAppend(StepContext& state, int32_t layer);
  absl::Status Attend(StepContext& state, StepContext::Flight& flight, int32_t layer);
  absl::Status Seal(StepContext& state, StepContext::Flight& flight, int32_t layer);
  absl::Status Move(StreamId stream, const kernels::Table<kernels::CopyKvItem>& items,
                    OpAccount* account, int32_t max_blocks = 0);

  Device& device_;
  const ModelConfig& config_;
  Decoder& decoder_;
  InPlaceLane& in_place_;
  const StreamId compute_;
  const StreamId seal_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_STEP_LAYERS_H_
