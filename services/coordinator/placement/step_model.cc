#include "services/coordinator/placement/step_model.h"

#include <algorithm>

namespace headroom::coordinator {
namespace {

constexpr int kResident = static_cast<int>(Lane::kResident);
constexpr int kFetched = static_cast<int>(Lane::kFetched);
constexpr int kInPlace = static_cast<int>(Lane::kInPlace);

}  // namespace

double BestFetchedShare(const LaneCosts& costs, double bytes) {
  const double fetch = bytes * costs.seconds_per_byte[kFetched];
  const double in_place = bytes * costs.seconds_per_byte[kInPlace];
  if (!costs.known() || fetch <= 0 || in_place <= 0) return 1;
  const double hidden = costs.hidden_base * costs.base_seconds + costs.in_place_seconds;
  // Both end together: (fetch f - hidden) slowdown = in_place (1 - f) slowdown.
  const double slow_fetch = fetch * costs.fetched_slowdown;
  const double slow_in_place = in_place * costs.in_place_slowdown;
  const double balance =
      (slow_in_place + hidden * costs.fetched_slowdown) / (slow_fetch + slow_in_place);
  const auto seconds = [&](double share) {
    return StepSeconds(costs, {0, share * bytes, (1 - share) * bytes});
  };
  // Convex and linear in pieces: its least is where pieces meet.
  constexpr double kInPlaceMustWinBy = 0.98;
  double best = 1;
  double least = kInPlaceMustWinBy * seconds(1);
  for (const double share : {hidden / fetch, balance, 0.0}) {
    if (share < 0 || share > 1 || seconds(share) >= least) continue;
    best = share;
    least = seconds(share);
  }
  return best;
}

LaneBytes BytesOfStep(const KvGeometry& geometry, const Placement& placement,
                      const std::vector<SequenceShape>& sequences, const LayerWindows& windows) {
  LaneBytes bytes = {};
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    for (const LaneRange& range : placement.layers[layer]) {
      int64_t tokens = 0;
      for (const SequenceShape& sequence : sequences) {
        const int64_t first_key = FirstKey(windows, layer, sequence.tokens);
        for (const RunShape& run : sequence.runs) {
          if (run.first_pos < range.first_pos || run.first_pos >= range.end_pos) continue;
          const int64_t end = std::min(sequence.tokens, run.first_pos + run.capacity_tokens);
          tokens += std::max<int64_t>(0, end - std::max(run.first_pos, first_key));
        }
      }
      bytes[static_cast<int>(range.lane)] +=
          static_cast<double>(tokens * (range.kv_head_end - range.kv_head_begin) *
                              geometry.BytesPerTokenPerHead());
    }
  }
  return bytes;
}

Placement PlaceByBudget(const KvGeometry& geometry, int64_t budget_bytes, const LaneCosts& costs,
                        const std::vector<SequenceShape>& sequences, const LayerWindows& windows) {
  Placement placement =
      PlaceByBudget(geometry, budget_bytes, /*fetched_share=*/1.0, sequences, windows);
  const double bytes = BytesOfStep(geometry, placement, sequences, windows)[kFetched];
  const double share = BestFetchedShare(costs, bytes);
  return share == 1 ? placement : PlaceByBudget(geometry, budget_bytes, share, sequences, windows);
}

void StepModel::Reset(const LaneCosts& costs) {
  calibrated_ = costs_ = costs;
  corrections_ = {1, 1, 1};
  steps_since_ = 0;
}

void StepModel::Observe(const LaneBytes& bytes, const LaneBytes& busy_seconds) {
  ++steps_since_;
  const LaneBytes expected = BusySeconds(calibrated_, bytes);
  for (int lane = 0; lane < kNumLanes; ++lane) {
    if (bytes[lane] <= 0 || expected[lane] <= 0 || busy_seconds[lane] <= 0) continue;
    const double correction =
        std::clamp(busy_seconds[lane] / expected[lane], 1 / kMostCorrection, kMostCorrection);
    corrections_[lane] += kWeight * (correction - corrections_[lane]);
    costs_.seconds_per_byte[lane] = calibrated_.seconds_per_byte[lane] * corrections_[lane];
  }
}

bool StepModel::WantsAnotherShare(const LaneBytes& bytes) {
  if (!costs_.known() || steps_since_ < kPatience) return false;
  steps_since_ = 0;
  const double elsewhere = bytes[kFetched] + bytes[kInPlace];
  const double share = BestFetchedShare(costs_, elsewhere);
  const LaneBytes better = {bytes[kResident], share * elsewhere, (1 - share) * elsewhere};
  return StepSeconds(costs_, better) < kWorthwhile * StepSeconds(costs_, bytes);
}

}  // namespace headroom::coordinator
