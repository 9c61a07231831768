#include "services/worker/step_proto.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom {
namespace {

absl::Status Wrong(absl::string_view field, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": ", what));
}

absl::StatusOr<Run> RunFromProto(const v1::ExtentRun& proto, absl::string_view field) {
  Run run;
  run.first_pos = proto.first_pos();
  run.capacity_tokens = proto.capacity_tokens();
  run.data_offsets.reserve(proto.extents_size());
  for (int i = 0; i < proto.extents_size(); ++i) {
    const v1::Extent& extent = proto.extents(i);
    if (extent.layer() != i) {
      return Wrong(absl::StrCat(field, ".extents[", i, "].layer"),
                   absl::StrCat(extent.layer(), ", expected ", i));
    }
    if (extent.vacated()) {
      run.data_offsets.push_back(Run::kVacated);
      continue;
    }
    if (extent.data_offset() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Wrong(absl::StrCat(field, ".extents[", i, "].data_offset"), "beyond 2^63");
    }
    run.data_offsets.push_back(static_cast<int64_t>(extent.data_offset()));
  }
  return run;
}

absl::Status SamplingFromProto(const v1::SamplingParams& proto, absl::string_view field,
                               kernels::SampleRow* row) {
  // Written so that a NaN fails.
  if (!(proto.temperature() >= 0 && proto.temperature() <= 100)) {
    return Wrong(absl::StrCat(field, ".temperature"),
                 absl::StrCat(proto.temperature(), ", expected 0 to 100"));
  }
  if (!(proto.top_p() > 0 && proto.top_p() <= 1)) {
    return Wrong(absl::StrCat(field, ".top_p"),
                 absl::StrCat(proto.top_p(), ", expected more than 0, at most 1"));
  }
  if (!(proto.min_p() >= 0 && proto.min_p() <= 1)) {
    return Wrong(absl::StrCat(field, ".min_p"), absl::StrCat(proto.min_p(), ", expected 0 to 1"));
  }
  if (proto.top_k() < 0) {
    return Wrong(absl::StrCat(field, ".top_k"), absl::StrCat(proto.top_k(), ", expected 0 or more"));
  }
  const float repetition = proto.has_repetition_penalty() ? proto.repetition_penalty() : 1.0f;
  if (!(repetition >= 0.01f && repetition <= 100)) {
    return Wrong(absl::StrCat(field, ".repetition_penalty"),
                 absl::StrCat(repetition, ", expected 0.01 to 100"));
  }
  if (!(std::abs(proto.frequency_penalty()) <= 2)) {
    return Wrong(absl::StrCat(field, ".frequency_penalty"),
                 absl::StrCat(proto.frequency_penalty(), ", expected -2 to 2"));
  }
  if (!(std::abs(proto.presence_penalty()) <= 2)) {
    return Wrong(absl::StrCat(field, ".presence_penalty"),
                 absl::StrCat(proto.presence_penalty(), ", expected -2 to 2"));
  }
  row->repetition_penalty = repetition;
  row->frequency_penalty = proto.frequency_penalty();
  row->presence_penalty = proto.presence_penalty();
  row->temperature = proto.temperature();
  row->top_p = proto.top_p();
  row->min_p = proto.min_p();
  row->top_k = proto.top_k();
  row->seed = proto.seed();
  return absl::OkStatus();
}

absl::StatusOr<DrawHistory> HistoryFromProto(const v1::DrawHistory& proto,
                                             absl::string_view field) {
  DrawHistory history;
  history.prompt_token_ids.assign(proto.prompt_token_ids().begin(), proto.prompt_token_ids().end());
  history.drawn_token_ids.assign(proto.drawn_token_ids().begin(), proto.drawn_token_ids().end());
  history.known_tokens = proto.known_tokens();
  history.held_back_token_ids.assign(proto.held_back_token_ids().begin(),
                                     proto.held_back_token_ids().end());
  history.held_back_end = proto.held_back_end();
  if (history.held_back_token_ids.size() > kernels::kMaxHeldBack) {
    return Wrong(absl::StrCat(field, ".held_back_token_ids"),
                 absl::StrCat("has ", history.held_back_token_ids.size(), " ids, at most ",
                              kernels::kMaxHeldBack));
  }
  if (proto.logit_bias_size() > kernels::kMaxLogitBias) {
    return Wrong(absl::StrCat(field, ".logit_bias"),
                 absl::StrCat("has ", proto.logit_bias_size(), " entries, at most ",
                              kernels::kMaxLogitBias));
  }
  for (const auto& [token_id, bias] : proto.logit_bias()) {
    if (!(std::abs(bias) <= 100)) {
      return Wrong(absl::StrCat(field, ".logit_bias[", token_id, "]"),
                   absl::StrCat(bias, ", expected -100 to 100"));
    }
    history.bias.push_back({token_id, bias});
  }
  if (history.known_tokens < 0 || history.known_tokens > kMaxPositions ||
      history.held_back_end < 0) {
    return Wrong(field, "a position is out of range");
  }
  return history;
}

absl::StatusOr<StepSequence> SequenceFromProto(const v1::StepSequence& proto,
                                               absl::string_view field) {
  StepSequence sequence;
  sequence.sequence_id = proto.sequence_id();
  sequence.first_pos = proto.first_pos();
  sequence.sealed_tokens = proto.sealed_tokens();
  sequence.token_ids.assign(proto.token_ids().begin(), proto.token_ids().end());
  sequence.score_token_ids.assign(proto.score_token_ids().begin(), proto.score_token_ids().end());
  sequence.num_top_logprobs = proto.num_top_logprobs();
  if (sequence.first_pos < 0 || sequence.first_pos >= kMaxPositions) {
    return Wrong(absl::StrCat(field, ".first_pos"),
                 absl::StrCat(sequence.first_pos, ", expected 0 to 2^40"));
  }
  if (sequence.num_top_logprobs < 0 || sequence.num_top_logprobs > kernels::kMaxTopLogprobs) {
    return Wrong(absl::StrCat(field, ".num_top_logprobs"),
                 absl::StrCat(sequence.num_top_logprobs, ", expected 0 to ",
                              kernels::kMaxTopLogprobs));
  }
  sequence.draw = proto.has_sampling();
  if (sequence.draw) {
    HEADROOM_RETURN_IF_ERROR(SamplingFromProto(proto.sampling(), absl::StrCat(field, ".sampling"),
                                               &sequence.sampling));
    sequence.known_tokens = proto.known_tokens();
  }
  return sequence;
}

absl::StatusOr<Lane> LaneFromProto(v1::Lane lane, absl::string_view field) {
  switch (lane) {
    case v1::LANE_RESIDENT:
      return Lane::kResident;
    case v1::LANE_FETCHED:
      return Lane::kFetched;
    case v1::LANE_IN_PLACE:
      return Lane::kInPlace;
    default:
      return Wrong(field, absl::StrCat("no lane ", static_cast<int>(lane)));
  }
}

void RecordToProto(const kernels::SampleResult& result, v1::TokenRecord* record) {
  record->set_token_id(result.token_id);
  record->set_logprob(result.logprob);
  for (int32_t i = 0; i < result.num_top; ++i) {
    v1::TokenLogprob* const top = record->add_top();
    top->set_token_id(result.top_ids[i]);
    top->set_logprob(result.top_logprobs[i]);
  }
}

constexpr v1::Lane kLanes[kNumLanes] = {v1::LANE_RESIDENT, v1::LANE_FETCHED, v1::LANE_IN_PLACE};

void LanesToProto(const StepResult& result, v1::StepResponse* response) {
  for (int i = 0; i < kNumLanes; ++i) {
    const LaneAccount& account = result.lanes[i];
    v1::LaneUse* const lane = response->add_lanes();
    lane->set_lane(kLanes[i]);
    lane->set_kv_heads(account.kv_heads);
    lane->set_bytes(account.bytes);
    lane->set_busy_ns(account.busy_ns);
    lane->set_idle_ns(account.idle_ns);
  }
}

}  // namespace

absl::StatusOr<std::unique_ptr<Step>> StepFromProto(const v1::StepRequest& request) {
  auto step = std::make_unique<Step>();
  step->number = request.number();
  step->attempt = request.attempt();
  step->plan_version = request.plan_version();
  step->close.assign(request.close_sequence_ids().begin(), request.close_sequence_ids().end());
  for (int i = 0; i < request.open_sequences_size(); ++i) {
    const v1::OpenSequence& proto = request.open_sequences(i);
    OpenSequence& open = step->open.emplace_back();
    open.sequence_id = proto.sequence_id();
    open.sealed_tokens = proto.sealed_tokens();
    for (int r = 0; r < proto.runs_size(); ++r) {
      HEADROOM_ASSIGN_OR_RETURN(
          Run run,
          RunFromProto(proto.runs(r), absl::StrCat("open_sequences[", i, "].runs[", r, "]")));
      open.runs.push_back(std::move(run));
    }
    if (proto.has_history()) {
      HEADROOM_ASSIGN_OR_RETURN(
          open.history,
          HistoryFromProto(proto.history(), absl::StrCat("open_sequences[", i, "].history")));
    }
  }
  for (int i = 0; i < request.grants_size(); ++i) {
    HEADROOM_ASSIGN_OR_RETURN(
        Run run, RunFromProto(request.grants(i).run(), absl::StrCat("grants[", i, "].run")));
    step->grants.push_back({request.grants(i).sequence_id(), std::move(run)});
  }
  for (int i = 0; i < request.sequences_size(); ++i) {
    HEADROOM_ASSIGN_OR_RETURN(
        StepSequence sequence,
        SequenceFromProto(request.sequences(i), absl::StrCat("sequences[", i, "]")));
    step->sequences.push_back(std::move(sequence));
  }
  return step;
}

absl::StatusOr<Plan> PlanFromProto(const v1::Plan& proto) {
  Plan plan;
  plan.version = proto.version();
  for (int layer = 0; layer < proto.layers_size(); ++layer) {
    std::vector<LaneRange>& ranges = plan.layers.emplace_back();
    for (int i = 0; i < proto.layers(layer).ranges_size(); ++i) {
      const v1::LaneRange& in = proto.layers(layer).ranges(i);
      const std::string field = absl::StrCat("plan.layers[", layer, "].ranges[", i, "]");
      LaneRange range;
      HEADROOM_ASSIGN_OR_RETURN(range.lane, LaneFromProto(in.lane(), absl::StrCat(field, ".lane")));
      range.kv_head_begin = in.kv_head_begin();
      range.kv_head_end = in.kv_head_end();
      range.first_pos = in.first_pos();
      if (in.has_end_pos()) range.end_pos = in.end_pos();
      if (range.kv_head_begin < 0 || range.kv_head_end <= range.kv_head_begin ||
          range.first_pos < 0 || range.end_pos <= range.first_pos) {
        return Wrong(field, "an empty or negative range");
      }
      ranges.push_back(range);
    }
  }
  return plan;
}

void StepToProto(const Step& step, v1::StepResponse* response) {
  const StepResult& result = step.result;
  response->set_number(step.number);
  response->set_attempt(step.attempt);
  response->set_code(static_cast<int32_t>(result.status.code()));
  response->set_duration_ns(result.duration_ns);
  if (!result.status.ok()) {
    response->set_message(std::string(result.status.message()));
    if (result.retry) response->set_retry(true);
    return;
  }
  size_t next = 0;
  for (const StepSequence& sequence : step.sequences) {
    v1::StepSequenceResult* const out = response->add_results();
    out->set_sequence_id(sequence.sequence_id);
    out->set_sealed_tokens(FloorToBlock(sequence.end_pos()));
    for (size_t i = 0; i < sequence.score_token_ids.size(); ++i) {
      RecordToProto(result.tokens[next++], out->add_scored());
    }
    if (sequence.draw) RecordToProto(result.tokens[next++], out->mutable_token());
  }
  LanesToProto(result, response);
  response->set_fetch_wait_ns(result.fetch_wait_ns);
  response->set_in_place_wait_ns(result.in_place_wait_ns);
  response->set_sealed_bytes(result.sealed_bytes);
}

void CostsToProto(const LaneCosts& costs, v1::MeasureLanesResponse* response) {
  response->set_base_seconds(costs.base_seconds);
  response->set_resident_base_seconds(costs.resident_base_seconds);
  for (int lane = 0; lane < kNumLanes; ++lane) {
    v1::LaneCost* const out = response->add_lanes();
    out->set_lane(kLanes[lane]);
    out->set_seconds_per_byte(costs.seconds_per_byte[lane]);
    out->set_busy_seconds_per_byte(costs.busy_seconds_per_byte[lane]);
  }
  response->set_hidden_base(costs.hidden_base);
  response->set_overlap(
      std::max(0.0, 2 - std::max(costs.fetched_slowdown, costs.in_place_slowdown)));
  response->set_in_place_seconds(costs.in_place_seconds);
  response->set_fetched_slowdown(costs.fetched_slowdown);
  response->set_in_place_slowdown(costs.in_place_slowdown);
}

}  // namespace headroom
