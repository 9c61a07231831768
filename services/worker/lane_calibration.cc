#include "services/worker/lane_calibration.h"

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom {
namespace {

// Versions that no coordinator uses: theirs count microseconds since 1970.
constexpr uint64_t kFirstPlan = 1;
constexpr int kResidentIndex = static_cast<int>(Lane::kResident);
constexpr int kFetchedIndex = static_cast<int>(Lane::kFetched);
constexpr int kInPlaceIndex = static_cast<int>(Lane::kInPlace);
constexpr int kWarmSteps = 2;
constexpr int kMeasuredSteps = 5;
constexpr int kMostRounds = 3;
// Time limits that the first round may take beside its own.
constexpr int kMostOver = 3;
constexpr int64_t kFewTokens = 64;
constexpr int64_t kManyTokens = 4096;
// A GPU is ten times as fast. 32,768 tokens of Llama-3-8B are 128 MiB of a layer, as are 8,192 of Llama-2-7B,
// of which 32,768 would take all the time there is.
constexpr int64_t kMostTokens = 32768;
constexpr int64_t kManyBytesOfALayer = int64_t{128} << 20;

// Every head in `lane`.
Plan PlanOf(uint64_t version, const KvGeometry& geometry, Lane lane) {
  Plan plan;
  plan.version = version;
  LaneRange range;
  range.lane = lane;
  range.kv_head_end = geometry.num_kv_heads;
  plan.layers.assign(geometry.num_layers, {range});
  return plan;
}

// The first heads of each layer fetched and the rest in place. Layers take turns so that of all heads
// `fetched_share` is fetched.
Plan PlanOfBoth(uint64_t version, const KvGeometry& geometry, double fetched_share) {
  Plan plan;
  plan.version = version;
  plan.layers.resize(geometry.num_layers);
  const double per_layer = fetched_share * geometry.num_kv_heads;
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    const auto fetched = static_cast<int32_t>(std::floor((layer + 1) * per_layer) -
                                              std::floor(layer * per_layer));
    if (fetched > 0) plan.layers[layer].push_back({Lane::kFetched, 0, fetched});
    if (fetched < geometry.num_kv_heads) {
      plan.layers[layer].push_back({Lane::kInPlace, fetched, geometry.num_kv_heads});
    }
  }
  return plan;
}

class Calibration {
 public:
  Calibration(StepExecutor& executor, const ModelConfig& config, const CalibrationOptions& options,
              const StepPort& port)
      : executor_(executor),
        config_(config),
        geometry_(config.kv_geometry()),
        options_(options),
        port_(port),
        many_tokens_(CalibrationTokens(geometry_, options.budget)),
        deadline_(absl::Now() + options.time_limit) {}

  absl::StatusOr<LaneCosts> Find() {
    const int64_t pool = options_.budget.kv_pool_bytes - options_.budget.tail_bytes_per_sequence;
    int64_t resident_tokens = many_tokens_;
    while (resident_tokens > kFewTokens &&
           2 * resident_tokens * geometry_.BytesPerToken() > pool) {
      resident_tokens /= 2;
    }
    Probe none{Lane::kFetched, kFewTokens};
    Probe lanes[kNumLanes] = {{Lane::kResident, resident_tokens},
                              {Lane::kFetched, many_tokens_},
                              {Lane::kInPlace, many_tokens_}};
    Probe half{Lane::kFetched, HalfTokens()};
    Probe half_in_place{Lane::kInPlace, HalfTokens()};
    HEADROOM_RETURN_IF_ERROR(Measure(
        {&none, &lanes[0], &lanes[1], &lanes[2], &half, &half_in_place}, options_.time_limit / 2));

    LaneCosts costs;
    costs.base_seconds = none.times.median_step_seconds;
    for (const Probe& probe : lanes) Fit(probe.times, static_cast<int>(probe.lane), costs);
    FitResidentBase(lanes[0].times, costs);
    FitHiddenBase(lanes[1].times, half.times, costs);
    FitInPlaceSeconds(lanes[2].times, half_in_place.times, costs);
    // Shared as their costs are, so that both are busy all the time: then they meet in memory as they do
    // in a plan that balances them. Half and half, one had 45 of its 54 GB/s and it did not show. In several
    // rounds, for which time is kept: in a single one, on a busy host, it told of lanes that had better not run
    // side by side, and four sequences of 32,768 tokens took 164 ms for 134.
    const double fetch = costs.seconds_per_byte[kFetchedIndex];
    const double in_place = costs.seconds_per_byte[kInPlaceIndex];
    Probe both{Lane::kFetched, many_tokens_, true};
    both.fetched_share = fetch + in_place > 0 ? in_place / (fetch + in_place) : 1;
    HEADROOM_RETURN_IF_ERROR(Measure({&both}, options_.time_limit / 4));
    FitSlowdowns(both.times, costs);
    return Slower(costs, UsualToBest({&none, &lanes[0], &lanes[1], &lanes[2], &half, &half_in_place,
                                      &both}));
  }

 private:
  // Steps of one kind and the best that came of them.
  struct Probe {
    Lane lane;
    int64_t tokens;
    bool both = false;
    double fetched_share = 0;  // of both
    DecodeTimes times = {};
    int rounds = 0;
    double step_seconds = 0;  // of all rounds
  };

  // All probes in turn, once more while more than `keep` is left and it finds something: what else the
  // machine does makes steps slower, never faster, and what lasts for a while does not meet the same probe
  // twice.
  absl::Status Measure(const std::vector<Probe*>& probes, absl::Duration keep) {
    constexpr double kSame = 0.98;
    bool found = true;
    for (int round = 0; round < kMostRounds && found; ++round) {
      found = round == 0;
      for (Probe* const probe : probes) {
        if (round > 0 && deadline_ - absl::Now() < keep) return absl::OkStatus();
        HEADROOM_ASSIGN_OR_RETURN(const DecodeTimes times, MeasureOnce(*probe));
        ++probe->rounds;
        probe->step_seconds += times.median_step_seconds;
        const double best = probe->times.median_step_seconds;
        if (round > 0 && times.median_step_seconds >= best) continue;
        found = found || times.median_step_seconds < kSame * best;
        probe->times = times;
      }
    }
    return absl::OkStatus();
  }

  // Costs fit together only where all probes met the machine alike, so they are found from the best of each.
  // Steps take what they usually take: where neighbours leave memory 34 or 54 GB/s from one second to the
  // next, predictions from the best were up to 32% too low.
  static double UsualToBest(std::initializer_list<const Probe*> probes) {
    double sum = 0;
    for (const Probe* const probe : probes) {
      sum += probe->step_seconds / (probe->rounds * probe->times.median_step_seconds);
    }
    return sum / static_cast<double>(probes.size());
  }

  absl::StatusOr<DecodeTimes> MeasureOnce(const Probe& probe) {
    const absl::Duration left = deadline_ - absl::Now();
    if (left < -kMostOver * options_.time_limit) {
      return absl::DeadlineExceededError("the calibration takes too long");
    }
    // Few steps where they are slow, and in what the rounds before have left.
    const bool hurry = left < options_.time_limit / 2;
    const uint64_t version =
        kFirstPlan + static_cast<uint64_t>(probe.lane) + (probe.both ? kNumLanes : 0);
    HEADROOM_RETURN_IF_ERROR(executor_.PreparePlan(
        probe.both ? PlanOfBoth(version, geometry_, probe.fetched_share)
                   : PlanOf(version, geometry_, probe.lane)));
    DecodeWork work;
    work.plan_version = version;
    work.context_tokens = probe.tokens;
    work.warm_steps = hurry ? 1 : kWarmSteps;
    work.measured_steps = hurry ? 3 : kMeasuredSteps;
    work.sequences.push_back(Layout(probe.tokens));
    absl::StatusOr<DecodeTimes> times = MeasureDecode(work, port_);
    HEADROOM_RETURN_IF_ERROR(executor_.CloseAll());
    return times;
  }

  // Extents over and over the memory that may be read; within a block of the end, so that nothing is
  // ever sealed.
  OpenSequence Layout(int64_t tokens) const {
    OpenSequence open;
    open.sequence_id = 1;
    int64_t used = 0;
    for (int64_t have = 0; have < tokens + kBlockTokens;) {
      Run run;
      run.first_pos = have;
      run.capacity_tokens = NextExtentTokens(geometry_, have, tokens + kBlockTokens - have);
      const int64_t bytes = run.capacity_tokens * geometry_.BytesPerTokenPerLayer();
      for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
        if (used % kRegistrationBytes + bytes > kRegistrationBytes) {
          used = (used / kRegistrationBytes + 1) * kRegistrationBytes;
        }
        if (used + bytes > options_.segment_bytes) used = 0;
        run.data_offsets.push_back(used);
        used += bytes;
      }
      have += run.capacity_tokens;
      open.runs.push_back(std::move(run));
    }
    return open;
  }

  // Of keys that a step reads, about half: where all layers have a window, half of the widest.
  int64_t HalfTokens() const {
    int64_t most = 0;
    for (int32_t layer = 0; layer < geometry_.num_layers; ++layer) {
      const int64_t window = config_.window(layer);
      most = window == 0 ? many_tokens_ : std::max(most, std::min(window, many_tokens_));
    }
    return std::max(kFewTokens, FloorToBlock(most / 2));
  }

  // A lane's costs from a step over many keys of it, against one over none.
  static void Fit(const DecodeTimes& times, int lane, LaneCosts& costs) {
    // Where no store attends, the bytes in place were fetched.
    const int as = times.lane_bytes[lane] > 0 ? lane : static_cast<int>(Lane::kFetched);
    const double bytes = times.lane_bytes[as];
    if (bytes <= 0) return;
    costs.busy_seconds_per_byte[lane] = times.lane_busy_seconds[as] / bytes;
    // Resident keys are attended to on the stream that computes all else.
    costs.seconds_per_byte[lane] =
        lane == static_cast<int>(Lane::kResident)
            ? costs.busy_seconds_per_byte[lane]
            : std::max(0.0, times.median_step_seconds - costs.base_seconds) / bytes;
  }

  // What is left of a step over resident keys without these. Of steps that are hardly longer than the keys are
  // busy, a small model's on a slow machine, that is noise.
  static void FitResidentBase(const DecodeTimes& times, LaneCosts& costs) {
    constexpr double kLeastOfBase = 0.5;
    const double keys = times.lane_bytes[kResidentIndex] * costs.seconds_per_byte[kResidentIndex];
    costs.resident_base_seconds = std::clamp(times.median_step_seconds - keys,
                                             kLeastOfBase * costs.base_seconds, costs.base_seconds);
  }

  // A copy engine works beside the base; a core that copies does not compute. Two contexts tell: where
  // the second is twice the first, time that is hidden does not double.
  static void FitHiddenBase(const DecodeTimes& many, const DecodeTimes& half, LaneCosts& costs) {
    const int lane = kFetchedIndex;
    const double more_bytes = many.lane_bytes[lane] - half.lane_bytes[lane];
    if (more_bytes <= 0) return;  // both reach over all windows
    const double slope = (many.median_step_seconds - half.median_step_seconds) / more_bytes;
    const double cost = costs.seconds_per_byte[lane];
    // All hidden: what the copies alone take is what they were busy.
    const double alone = std::max(slope, costs.busy_seconds_per_byte[lane]);
    if (alone < 1.2 * cost) return;
    const double hidden = (alone - cost) * many.lane_bytes[lane] / costs.base_seconds;
    costs.hidden_base = std::clamp(hidden, 0.0, 1.0);
    costs.seconds_per_byte[lane] = alone;
  }

  // What twice the keys do not double.
  static void FitInPlaceSeconds(const DecodeTimes& many, const DecodeTimes& half, LaneCosts& costs) {
    const double bytes = many.lane_bytes[kInPlaceIndex];
    const double more_bytes = bytes - half.lane_bytes[kInPlaceIndex];
    if (half.lane_bytes[kInPlaceIndex] <= 0 || more_bytes <= 0) return;
    const double busy = many.lane_busy_seconds[kInPlaceIndex];
    const double slope = (busy - half.lane_busy_seconds[kInPlaceIndex]) / more_bytes;
    constexpr double kMostOfIt = 0.25;  // more is a machine that was busy with something else
    costs.in_place_seconds = std::clamp(busy - slope * bytes, 0.0, kMostOfIt * busy);
    costs.busy_seconds_per_byte[kInPlaceIndex] = (busy - costs.in_place_seconds) / bytes;
    costs.seconds_per_byte[kInPlaceIndex] =
        std::max(0.0, many.median_step_seconds - costs.base_seconds - costs.in_place_seconds) / bytes;
  }

  // BusySeconds() the other way round, then as much of it as explains the step.
  static void FitSlowdowns(const DecodeTimes& both, LaneCosts& costs) {
    LaneValues bytes, alone;
    for (int lane = 0; lane < kNumLanes; ++lane) {
      bytes[lane] = both.lane_bytes[lane];
      alone[lane] = bytes[lane] * costs.busy_seconds_per_byte[lane];
    }
    if (bytes[kFetchedIndex] <= 0 || bytes[kInPlaceIndex] <= 0) return;
    const double fetched = both.lane_busy_seconds[kFetchedIndex];
    const double in_place = both.lane_busy_seconds[kInPlaceIndex] - costs.in_place_seconds;
    const double hidden = costs.hidden_base * costs.base_seconds + costs.in_place_seconds;
    const double side_by_side = std::min(fetched - hidden, in_place);
    if (side_by_side <= 0) return;
    // Shares of its rate that a lane loses while the other runs; together at most 1, or turns were better.
    const auto lost = [&](double more) { return std::clamp(more / side_by_side, 0.0, 1.0); };
    double fetched_loses = lost(fetched - alone[kFetchedIndex]);
    double in_place_loses = lost(in_place - alone[kInPlaceIndex]);
    const double sum = fetched_loses + in_place_loses;
    if (sum == 0) fetched_loses = in_place_loses = 0.5;
    const auto lose = [&](double times) {
      // Neither may stand still.
      constexpr double kMostLost = 0.9;
      costs.fetched_slowdown = 1 / (1 - std::min(times * fetched_loses, kMostLost));
      costs.in_place_slowdown = 1 / (1 - std::min(times * in_place_loses, kMostLost));
    };
    double low = 0, high = 1 / (fetched_loses + in_place_loses);
    for (int i = 0; i < 40; ++i) {
      const double times = (low + high) / 2;
      lose(times);
      (StepSeconds(costs, bytes) < both.median_step_seconds ? low : high) = times;
    }
  }

  StepExecutor& executor_;
  const ModelConfig& config_;
  const KvGeometry geometry_;
  const CalibrationOptions options_;
  const StepPort& port_;
  const int64_t many_tokens_;
  const absl::Time deadline_;
};

}  // namespace

int64_t CalibrationTokens(const KvGeometry& geometry, const DeviceBudget& budget) {
  if (budget.product_type == kernels::ElementType::kFloat32) return kManyTokens;
  int64_t tokens = kMostTokens;
  while (tokens > kManyTokens && (tokens * geometry.BytesPerTokenPerLayer() > kManyBytesOfALayer ||
                                  tokens + kBlockTokens > budget.max_context_tokens)) {
    tokens /= 2;
  }
  return tokens;
}

absl::StatusOr<LaneCosts> CalibrateLanes(StepExecutor& executor, const ModelConfig& config,
                                         const CalibrationOptions& options, const StepPort& port) {
  return Calibration(executor, config, options, port).Find();
}

}  // namespace headroom
