#include "services/headroom/generate_report.h"

#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "common/bytes_text.h"
#include "services/headroom/lane_text.h"

namespace headroom::cli {
namespace {

using LaneUses = google::protobuf::RepeatedPtrField<v1::LaneUse>;

// Means over steps carry the last bits of divisions.
double Rounded(double value) { return std::round(value * 1e6) / 1e6; }

double Ms(int64_t ns) { return static_cast<double>(ns) / 1e6; }

int64_t TotalBytes(const LaneUses& lanes) {
  int64_t total = 0;
  for (const v1::LaneUse& use : lanes) total += use.bytes();
  return total;
}

v1::LaneUse UseOf(const LaneUses& lanes, v1::Lane lane) {
  for (const v1::LaneUse& use : lanes) {
    if (use.lane() == lane) return use;
  }
  return v1::LaneUse();
}

// 0 of nothing. Bytes in nanoseconds are gigabytes in seconds.
double ShareOf(int64_t bytes, int64_t total) {
  return total > 0 ? static_cast<double>(bytes) / static_cast<double>(total) : 0.0;
}

Json LanesAsJson(const LaneUses& lanes) {
  const int64_t total = TotalBytes(lanes);
  Json::Object object;
  for (const v1::Lane lane : kLanes) {
    const v1::LaneUse use = UseOf(lanes, lane);
    object.emplace_back(LaneKey(LaneText(lane)),
                        Json::Object{{"kv_heads", Rounded(use.kv_heads())},
                                     {"bytes", use.bytes()},
                                     {"ms", Ms(use.busy_ns())},
                                     {"share", ShareOf(use.bytes(), total)}});
  }
  return object;
}

Json TokenAsJson(const v1::TokenRecord& token) {
  Json::Array top;
  for (const v1::TokenLogprob& candidate : token.top()) {
    top.emplace_back(Json::Object{{"token_id", candidate.token_id()},
                               {"logprob", double{candidate.logprob()}}});
  }
  return Json::Object{{"token_id", token.token_id()},
                      {"logprob", double{token.logprob()}},
                      {"top", std::move(top)}};
}

Json::Array IdsAsJson(const google::protobuf::RepeatedField<int32_t>& ids) {
  Json::Array array;
  for (const int32_t id : ids) array.emplace_back(id);
  return array;
}

std::string FinishReasonName(v1::FinishReason reason) {
  const std::string name = v1::FinishReason_Name(reason);
  return std::string(absl::StripPrefix(name, "FINISH_REASON_"));
}

using TokenRecords = google::protobuf::RepeatedPtrField<v1::TokenRecord>;

void AddText(const std::string& text, const TokenRecords& tokens, Json::Object& object) {
  Json::Array token_ids;
  for (const v1::TokenRecord& token : tokens) token_ids.emplace_back(token.token_id());
  object.emplace_back("text", text);
  object.emplace_back("token_ids", std::move(token_ids));
}

void AddPrompt(const v1::GenerateOnceResponse& response, const v1::Finished& finished,
               bool prompt_logprobs, Json::Object& object) {
  object.emplace_back("prompt_token_ids", IdsAsJson(response.prompt_token_ids()));
  if (!prompt_logprobs) return;
  Json::Array scores;
  scores.emplace_back(nullptr);  // nothing predicts the first token
  for (const v1::TokenRecord& token : finished.prompt_logprobs()) {
    scores.emplace_back(double{token.logprob()});
  }
  object.emplace_back("prompt_logprobs", std::move(scores));
}

Json::Array TimesAsJson(const TokenTimes& times, int32_t index) {
  Json::Array array;
  const auto at = times.find(index);
  if (at == times.end()) return array;
  for (const absl::Duration time : at->second) {
    array.emplace_back(static_cast<double>(absl::ToInt64Microseconds(time)) / 1e3);
  }
  return array;
}

void AddRest(const TokenRecords& records, const v1::Finished& finished, Json::Array token_ms,
             bool logprobs, Json::Object& object) {
  const v1::Explanation& explanation = finished.explanation();
  if (logprobs) {
    Json::Array tokens;
    for (const v1::TokenRecord& token : records) tokens.emplace_back(TokenAsJson(token));
    object.emplace_back("logprobs", std::move(tokens));
  }
  object.emplace_back("finish_reason", FinishReasonName(finished.reason()));
  const v1::Usage& usage = finished.usage();
  object.emplace_back("usage", Json::Object{{"prompt_tokens", usage.prompt_tokens()},
                                            {"cached_tokens", usage.cached_tokens()},
                                            {"completion_tokens", usage.completion_tokens()}});
  const v1::Timings& timings = finished.timings();
  object.emplace_back("timings", Json::Object{{"queue_ms", Ms(timings.queue_ns())},
                                              {"prefill_ms", Ms(timings.prefill_ns())},
                                              {"ttft_ms", Ms(timings.ttft_ns())},
                                              {"decode_ms", Ms(timings.decode_ns())},
                                              {"tpot_ms", Ms(timings.tpot_ns())}});
  object.emplace_back("token_ms", std::move(token_ms));
  const LaneUses& lanes = explanation.decode_lanes_size() > 0 ? explanation.decode_lanes()
                                                              : explanation.prefill_lanes();
  object.emplace_back(
      "placement",
      Json::Object{{"lanes", LanesAsJson(lanes)},
                   {"gpu_memory", Json::Object{{"budget_bytes", explanation.budget_bytes()},
                                               {"peak_bytes", explanation.peak_bytes()}}}});
}

}  // namespace

Json GenerateAsJson(const v1::GenerateOnceResponse& response, const TokenTimes& times,
                    bool prompt_logprobs, bool logprobs) {
  Json::Object object;
  if (response.answers_size() == 0) {
    AddText(response.text(), response.tokens(), object);
    AddPrompt(response, response.finished(), prompt_logprobs, object);
    AddRest(response.tokens(), response.finished(), TimesAsJson(times, 0), logprobs, object);
    return object;
  }
  AddPrompt(response, response.answers(0).finished(), prompt_logprobs, object);
  Json::Array answers;
  for (int i = 0; i < response.answers_size(); ++i) {
    const v1::Answer& answer = response.answers(i);
    Json::Object one;
    AddText(answer.text(), answer.tokens(), one);
    AddRest(answer.tokens(), answer.finished(), TimesAsJson(times, i), logprobs, one);
    answers.emplace_back(std::move(one));
  }
  object.emplace_back("answers", std::move(answers));
  return object;
}

std::string ExplainAsText(const v1::Finished& finished) {
  const v1::Explanation& explanation = finished.explanation();
  std::string text = absl::StrFormat("%-8s %-9s %9s %12s %13s %6s %13s %7s\n", "", "lane",
                                     "KV heads", "bytes", "busy", "GB/s", "idle", "share");
  const std::pair<const char*, const LaneUses&> kPhases[] = {
      {"prefill", explanation.prefill_lanes()}, {"decode", explanation.decode_lanes()}};
  for (const auto& [phase, lanes] : kPhases) {
    const int64_t total = TotalBytes(lanes);
    for (const v1::Lane lane : kLanes) {
      const v1::LaneUse use = UseOf(lanes, lane);
      absl::StrAppendFormat(&text, "%-8s %-9s %9.2f %12s %10.1f ms %6.1f %10.1f ms %6.1f%%\n",
                            phase, LaneText(lane), use.kv_heads(),
                            FormatBytes(use.bytes()), Ms(use.busy_ns()),
                            ShareOf(use.bytes(), use.busy_ns()), Ms(use.idle_ns()),
                            100 * ShareOf(use.bytes(), total));
    }
  }
  absl::StrAppendFormat(&text, "device memory: %s of %s at most in use (%s)\n",
                        FormatBytes(explanation.peak_bytes()),
                        FormatBytes(explanation.budget_bytes()), explanation.device());
  absl::StrAppendFormat(&text,
                        "sealed to host memory: %s; waited for tiles: %.1f ms, for keys in place: "
                        "%.1f ms; steps: %d, run again: %d\n",
                        FormatBytes(explanation.sealed_bytes()), Ms(explanation.fetch_wait_ns()),
                        Ms(explanation.in_place_wait_ns()), explanation.steps(),
                        explanation.retried_steps());
  const v1::Usage& usage = finished.usage();
  absl::StrAppendFormat(&text, "tokens: %d of prompt (%d of them cached), %d of answer\n",
                        usage.prompt_tokens(), usage.cached_tokens(), usage.completion_tokens());
  const v1::Timings& timings = finished.timings();
  absl::StrAppendFormat(
      &text,
      "queue %.1f ms, prefill %.1f ms, first token %.1f ms, decode %.1f ms, a token %.1f ms\n",
      Ms(timings.queue_ns()), Ms(timings.prefill_ns()), Ms(timings.ttft_ns()),
      Ms(timings.decode_ns()), Ms(timings.tpot_ns()));
  return text;
}

}  // namespace headroom::cli
