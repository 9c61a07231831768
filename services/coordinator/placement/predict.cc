#include "services/coordinator/placement/predict.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/bytes_text.h"
#include "services/coordinator/placement/step_model.h"

namespace headroom::coordinator {

SequenceShape ForeseenShape(const ExtentRules& rules, int64_t prompt_tokens, int64_t tokens) {
  SequenceShape shape;
  shape.tokens = prompt_tokens;
  const int64_t reserved = ReservedTokens(rules, 0, tokens);
  int64_t have = 0;
  for (int64_t pos = std::min(prompt_tokens, tokens);;) {
    const int64_t more = NextLeaseTokens(rules, have, pos, tokens, reserved);
    if (more > 0) {
      shape.runs.push_back({have, more});
      have += more;
    } else if (pos < tokens) {
      pos = std::min(tokens, std::max(pos, have - kLeaseAheadTokens) + 1);
    } else {
      return shape;
    }
  }
}

Prediction Predict(const PredictInput& input) {
  const KvGeometry& geometry = input.extents.geometry;
  const LayerWindows& windows = input.extents.windows;
  Prediction prediction;
  const int64_t tokens = input.prompt_tokens + input.max_tokens;
  const SequenceShape shape = ForeseenShape(input.extents, input.prompt_tokens, tokens);
  const std::vector<SequenceShape> shapes(input.num_sequences, shape);
  prediction.pool_bytes = input.pool_bytes;
  prediction.tail_bytes = input.num_sequences * input.tail_bytes_per_sequence;
  const int64_t for_residents = std::max<int64_t>(0, input.pool_bytes - prediction.tail_bytes);
  prediction.placement =
      input.spec.automatic ? PlaceByBudget(geometry, for_residents, input.costs, shapes, windows)
                           : PlaceByShares(geometry, input.spec, shapes);
  prediction.resident_bytes = ResidentBytes(geometry, prediction.placement, shapes, windows);

  const int64_t capacity = shape.runs.empty() ? 0 : shape.runs.back().first_pos +
                                                         shape.runs.back().capacity_tokens;
  prediction.host_bytes = input.num_sequences * MostHostBytes(input.extents, capacity);
  const int64_t sealed = FloorToBlock(input.prompt_tokens);
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    const int64_t first_key = FirstKey(windows, layer, input.prompt_tokens);
    for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
      for (const RunShape& run : shape.runs) {
        const int64_t end = std::min(sealed, run.first_pos + run.capacity_tokens);
        const int64_t keys = std::max<int64_t>(0, end - std::max(run.first_pos, first_key));
        LanePrediction& lane =
            prediction
                .lanes[static_cast<int>(prediction.placement.LaneOf(layer, head, run.first_pos))];
        lane.bytes += input.num_sequences * keys * geometry.BytesPerTokenPerHead();
        if (sealed > first_key) {
          lane.kv_heads += static_cast<double>(keys) / static_cast<double>(sealed - first_key) /
                           static_cast<double>(geometry.num_layers);
        }
      }
    }
  }
  if (input.costs.known()) {
    LaneBytes bytes;
    for (int lane = 0; lane < kNumLanes; ++lane) {
      bytes[lane] = static_cast<double>(prediction.lanes[lane].bytes);
    }
    prediction.step_seconds = StepSeconds(input.costs, bytes);
  }
  if (prediction.tail_bytes > input.pool_bytes) {
    prediction.does_not_fit.push_back(
        absl::StrCat("tails of ", input.num_sequences, " sequences take ",
                     FormatBytes(prediction.tail_bytes), " of device memory, the KV pool has ",
                     FormatBytes(input.pool_bytes), ": raise --gpu-memory, or lower --sequences"));
  } else if (prediction.resident_bytes > for_residents) {
    prediction.does_not_fit.push_back(
        absl::StrCat("resident keys take ", FormatBytes(prediction.resident_bytes),
                     " of device memory, the KV pool has ", FormatBytes(for_residents),
                     " beside tails: raise --gpu-memory, or have less resident by --placement"));
  }
  if (prediction.host_bytes > input.host_capacity_bytes) {
    constexpr int64_t kMiB = int64_t{1} << 20;
    prediction.does_not_fit.push_back(
        absl::StrCat("extents take ", FormatBytes(prediction.host_bytes), ", --host-memory is ",
                     FormatBytes(input.host_capacity_bytes), ": raise it to ",
                     (prediction.host_bytes + kMiB - 1) / kMiB, "MiB"));
  }
  return prediction;
}

}  // namespace headroom::coordinator
