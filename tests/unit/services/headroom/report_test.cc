// What is printed for people and for programs, from messages that are written down here.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <regex>
#include <string>

#include "common/errors.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/generate_report.h"
#include "services/headroom/plan.h"
#include "services/headroom/status_report.h"

namespace headroom::cli {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;

void AddLane(v1::Lane lane, double kv_heads, int64_t bytes, int64_t busy_ns, v1::LaneUse* use) {
  use->set_lane(lane);
  use->set_kv_heads(kv_heads);
  use->set_bytes(bytes);
  use->set_busy_ns(busy_ns);
}

v1::GenerateOnceResponse Response() {
  v1::GenerateOnceResponse response;
  response.set_text("Paris \"é\"\n");
  v1::TokenRecord* const first = response.add_tokens();
  first->set_token_id(7);
  first->set_logprob(-0.5f);
  v1::TokenLogprob* const top = first->add_top();
  top->set_token_id(7);
  top->set_logprob(-0.5f);
  response.add_tokens()->set_token_id(8);
  for (const int32_t id : {1, 2, 3}) response.add_prompt_token_ids(id);
  v1::Finished& finished = *response.mutable_finished();
  finished.set_reason(v1::FINISH_REASON_STOP);
  finished.mutable_usage()->set_prompt_tokens(3);
  finished.mutable_usage()->set_cached_tokens(1);
  finished.mutable_usage()->set_completion_tokens(2);
  finished.mutable_timings()->set_queue_ns(1'000'000);
  finished.mutable_timings()->set_prefill_ns(2'500'000);
  finished.mutable_timings()->set_ttft_ns(4'000'000);
  finished.mutable_timings()->set_decode_ns(6'000'000);
  finished.mutable_timings()->set_tpot_ns(3'000'000);
  finished.add_prompt_logprobs()->set_logprob(-1.5f);
  finished.add_prompt_logprobs()->set_logprob(-2.0f);
  v1::Explanation& explanation = *finished.mutable_explanation();
  AddLane(v1::LANE_FETCHED, 3, 512, 5'000'000, explanation.add_prefill_lanes());
  AddLane(v1::LANE_RESIDENT, 0.75, 1024, 2'000'000, explanation.add_decode_lanes());
  AddLane(v1::LANE_FETCHED, 2.25, 3072, 1'500'000, explanation.add_decode_lanes());
  explanation.set_budget_bytes(4096);
  explanation.set_peak_bytes(4000);
  return response;
}

TEST(GenerateJson, IsTheContract) {
  const TokenTimes times = {{0, {absl::Microseconds(4250), absl::Nanoseconds(7'001'900)}}};
  EXPECT_EQ(GenerateAsJson(Response(), times, true, true).Dump(),
            R"({"text":"Paris \"é\"\n","token_ids":[7,8],"prompt_token_ids":[1,2,3],)"
            R"("prompt_logprobs":[null,-1.5,-2.0],)"
            R"("logprobs":[{"token_id":7,"logprob":-0.5,"top":[{"token_id":7,"logprob":-0.5}]},)"
            R"({"token_id":8,"logprob":0.0,"top":[]}],)"
            R"("finish_reason":"STOP",)"
            R"("usage":{"prompt_tokens":3,"cached_tokens":1,"completion_tokens":2},)"
            R"("timings":{"queue_ms":1.0,"prefill_ms":2.5,"ttft_ms":4.0,"decode_ms":6.0,)"
            R"("tpot_ms":3.0},)"
            R"("token_ms":[4.25,7.001],)"
            R"("placement":{"lanes":{)"
            R"("resident":{"kv_heads":0.75,"bytes":1024,"ms":2.0,"share":0.25},)"
            R"("fetched":{"kv_heads":2.25,"bytes":3072,"ms":1.5,"share":0.75},)"
            R"("in_place":{"kv_heads":0.0,"bytes":0,"ms":0.0,"share":0.0}},)"
            R"("gpu_memory":{"budget_bytes":4096,"peak_bytes":4000}}})");
}

TEST(GenerateJson, HasLogprobsOnlyIfAskedFor) {
  const Json json = GenerateAsJson(Response(), {}, false, false);
  EXPECT_EQ(json.Find("prompt_logprobs"), nullptr);
  EXPECT_EQ(json.Find("logprobs"), nullptr);
  EXPECT_NE(json.Find("usage"), nullptr);
}

TEST(GenerateJson, TimesTheTokensOfEachAnswer) {
  v1::GenerateOnceResponse response;
  for (int i = 0; i < 2; ++i) response.add_answers()->add_tokens()->set_token_id(i);
  const Json json = GenerateAsJson(
      response, {{0, {absl::Milliseconds(2)}}, {1, {absl::Milliseconds(3)}}}, false, false);
  for (size_t i = 0; i < 2; ++i) {
    const Json& answer = json.Find("answers")->as_array().at(i);
    const Json::Array& times = answer.Find("token_ms")->as_array();
    ASSERT_EQ(times.size(), 1u);
    EXPECT_EQ(times[0].as_number(), 2.0 + static_cast<double>(i));
  }
}

TEST(GenerateJson, ShowsThePrefillsLanesWithoutADecodeStep) {
  v1::GenerateOnceResponse response = Response();
  response.mutable_finished()->mutable_explanation()->clear_decode_lanes();
  const Json json = GenerateAsJson(response, {}, false, false);
  const Json* const fetched = json.Find("placement")->Find("lanes")->Find("fetched");
  EXPECT_EQ(fetched->Find("bytes")->as_int(), 512);
  EXPECT_EQ(fetched->Find("share")->as_number(), 1);
}

TEST(GenerateJson, EveryFloatComesBackBitForBit) {
  v1::GenerateOnceResponse response;
  std::vector<float> written;
  uint32_t bits = 0x3f800001;
  for (int i = 0; i < 2000; ++i) {
    bits = bits * 1664525 + 1013904223;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) continue;
    written.push_back(value);
  }
  written.push_back(-std::numeric_limits<float>::denorm_min());
  written.push_back(-0.0f);
  for (const float value : written) {
    response.mutable_finished()->add_prompt_logprobs()->set_logprob(value);
  }
  const absl::StatusOr<Json> json =
      Json::Parse(GenerateAsJson(response, {}, true, false).Dump(), 1 << 20);
  ASSERT_TRUE(json.ok()) << json.status();
  const Json::Array& read = json->Find("prompt_logprobs")->as_array();
  ASSERT_EQ(read.size(), written.size() + 1);
  EXPECT_TRUE(read[0].is_null());
  for (size_t i = 0; i < written.size(); ++i) {
    const auto value = static_cast<float>(read[i + 1].as_number());
    EXPECT_EQ(std::memcmp(&value, &written[i], sizeof(value)), 0) << written[i];
  }
}

TEST(Explain, ShowsBothPhasesMemoryAndTimes) {
  const std::string text = ExplainAsText(Response().finished());
  EXPECT_THAT(text, HasSubstr("prefill  fetched        3.00    512 bytes        5.0 ms    0.0        0.0 ms  100.0%"));
  EXPECT_THAT(text, HasSubstr("decode   resident       0.75      1.0 KiB        2.0 ms    0.0        0.0 ms   25.0%"));
  EXPECT_THAT(text, HasSubstr("3.9 KiB of 4.0 KiB"));
  EXPECT_THAT(text, HasSubstr("3 of prompt (1 of them cached), 2 of answer"));
  EXPECT_THAT(text, HasSubstr("prefill 2.5 ms, first token 4.0 ms"));
}

TEST(Status, ShowsWhoIsNotConnectedAndWhy) {
  v1::GetStatusResponse status;
  status.set_version("0.1.0");
  status.set_model("m");
  v1::ProcessStatus* const worker = status.add_processes();
  worker->set_name("worker");
  worker->set_connected(false);
  worker->set_address("unix:/w");
  worker->set_message("connection refused");
  worker->set_life(UINT64_MAX);
  AddLane(v1::LANE_FETCHED, 0, int64_t{3} << 30, 1'500'000'000, status.add_lanes());
  status.mutable_device_memory()->set_registered_host_bytes(int64_t{5} << 30);
  status.set_plans_at_start(40);
  status.set_plans_built(42);
  EXPECT_THAT(StatusAsText(status), HasSubstr("NOT CONNECTED unix:/w: connection refused"));
  EXPECT_THAT(StatusAsText(status), HasSubstr("3.0 GiB in 1.50 s"));
  EXPECT_THAT(StatusAsText(status), HasSubstr("registered with the device: 5.0 GiB"));
  EXPECT_THAT(StatusAsText(status), HasSubstr("40 built at start, 2 since"));
  const Json json = StatusAsJson(status);
  EXPECT_EQ(json.Find("device_memory")->Find("registered_host_bytes")->as_int(), int64_t{5} << 30);
  EXPECT_EQ(json.Find("plans_at_start")->as_int(), 40);
  EXPECT_EQ(json.Find("plans_built")->as_int(), 42);
  EXPECT_EQ(json.Find("processes")->as_array().at(0).Find("life")->as_string(), "ffffffffffffffff");
  EXPECT_EQ(json.Find("lanes")->Find("fetched")->Find("bytes")->as_int(), int64_t{3} << 30);
  AddLane(v1::LANE_IN_PLACE, 2, 4096, 1000, status.add_lanes());
  EXPECT_THAT(StatusAsText(status), HasSubstr("  in-place     4.0 KiB in"));
  EXPECT_EQ(StatusAsJson(status).Find("lanes")->Find("in_place")->Find("bytes")->as_int(), 4096);
}

TEST(ExitCode, SaysWhoseFaultItIs) {
  EXPECT_EQ(ExitCodeOfCall(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOfCall(absl::InvalidArgumentError("")), 2);
  EXPECT_EQ(ExitCodeOfCall(absl::FailedPreconditionError("")), 2);
  EXPECT_EQ(ExitCodeOfCall(absl::UnavailableError("")), 1);
  EXPECT_EQ(ExitCodeOfCall(absl::ResourceExhaustedError("")), 1);
  EXPECT_EQ(ExitCodeOfStart(absl::ResourceExhaustedError("")), 2);
  EXPECT_EQ(ExitCodeOfStart(absl::NotFoundError("")), 2);
  EXPECT_EQ(ExitCodeOfStart(absl::UnavailableError("")), 1);
}

TEST(ExitCode, AnErrorIsOneLineThatNamesEachFieldOnce) {
  const absl::Status status = BadRequestError({{"sampling.top_p", "is 2"}});
  EXPECT_EQ(DescribeError(status), "INVALID_ARGUMENT: sampling.top_p: is 2");
  absl::Status bare = absl::InvalidArgumentError("wrong\nrequest");
  bare.SetPayload(kBadRequestUrl, *status.GetPayload(kBadRequestUrl));
  EXPECT_EQ(DescribeError(bare), "INVALID_ARGUMENT: wrong request; sampling.top_p: is 2");
}

// ---------------------------------------------------------------- plan

class Plan : public ::testing::Test {
 protected:
  Plan() : dir_(::testing::TempDir() + "report_test." + std::to_string(getpid())) {
    std::filesystem::create_directory(dir_);
    std::ofstream(dir_ + "/config.json")
        << R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576,
               "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
               "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
               "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000,
               "tie_word_embeddings": true, "hidden_act": "silu"})";
    options_.model_dir = dir_;
    options_.context_tokens = 7500;
    options_.max_tokens = 8;
    options_.gpu_memory_bytes = int64_t{340} << 20;
    options_.host_memory_bytes = int64_t{512} << 20;
  }
  ~Plan() override { std::filesystem::remove_all(dir_); }

  const std::string dir_;
  PlanOptions options_;
  LaneCosts costs_;
  MeasureCosts measure_ = [this](const PlanOptions&) -> absl::StatusOr<LaneCosts> {
    if (!costs_.known()) return absl::NotFoundError("there are no weights");
    return costs_;
  };
};

TEST_F(Plan, PredictsAStepFromWhatWasMeasured) {
  EXPECT_THAT(PlanAsText(*MakePlan(options_, measure_)),
              HasSubstr("no time is predicted: there are no weights"));
  // 10 ms, and 10 GB/s for fetched keys: as fast as that in place, so nothing is there.
  costs_.base_seconds = 0.01;
  costs_.seconds_per_byte[1] = costs_.seconds_per_byte[2] = 1e-10;
  options_.placement = "fetched";
  const absl::StatusOr<PlanReport> report = MakePlan(options_, measure_);
  ASSERT_TRUE(report.ok()) << report.status();
  const double expected = 0.01 + 117 * 64 * 23040 * 1e-10;
  EXPECT_NEAR(PlanAsJson(*report).Find("step_seconds")->as_number(), expected, 1e-9);
  EXPECT_THAT(PlanAsText(*report), HasSubstr("27.25 ms predicted, 36.7 tokens a second"));
  EXPECT_THAT(PlanAsText(*report), HasSubstr("measured here: 10.00 ms without keys, then"));
  costs_.resident_base_seconds = 0.008;
  EXPECT_THAT(PlanAsText(*MakePlan(options_, measure_)),
              HasSubstr("measured here: 10.00 ms without keys (8.00 where all are resident), then"));
  options_.no_measure = true;
  EXPECT_EQ(MakePlan(options_, measure_)->prediction.step_seconds, 0);
}

TEST_F(Plan, ShowsLanesAndMemoryThatAddUp) {
  const absl::StatusOr<PlanReport> report = MakePlan(options_, measure_);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->fits());
  EXPECT_THAT(PlanAsText(*report), HasSubstr("all of it fits"));
  const Json json = PlanAsJson(*report);
  double heads = 0, share = 0;
  int64_t bytes = 0;
  for (const auto& [name, lane] : json.Find("lanes")->as_object()) {
    heads += lane.Find("kv_heads")->as_number();
    share += lane.Find("share")->as_number();
    bytes += lane.Find("bytes")->as_int();
  }
  EXPECT_NEAR(heads, 3, 1e-9);
  EXPECT_NEAR(share, 1, 1e-9);
  // All sealed blocks of the prompt: 117 x 64 tokens of 23,040 bytes.
  EXPECT_EQ(bytes, int64_t{117} * 64 * 23040);
  const Json& memory = *json.Find("gpu_memory");
  EXPECT_EQ(memory.Find("weights_bytes")->as_int() + memory.Find("ring_bytes")->as_int() +
                memory.Find("activation_bytes")->as_int() + memory.Find("kv_pool_bytes")->as_int(),
            options_.gpu_memory_bytes);
  EXPECT_LE(memory.Find("tail_bytes")->as_int() + memory.Find("resident_bytes")->as_int(),
            memory.Find("kv_pool_bytes")->as_int());
}

TEST_F(Plan, SaysWhatDoesNotFit) {
  options_.host_memory_bytes = int64_t{64} << 20;
  options_.context_tokens = 9000;
  options_.placement = "resident";
  const absl::StatusOr<PlanReport> report = MakePlan(options_, measure_);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_FALSE(report->fits());
  const std::string text = PlanAsText(*report);
  EXPECT_THAT(text, ContainsRegex("does not fit: resident keys take [0-9.]+ MiB of device memory, the KV "
                                  "pool has [0-9.]+ MiB beside tails: raise --gpu-memory, or have less "
                                  "resident by --placement\n"));
  EXPECT_THAT(text, ContainsRegex("does not fit: extents take [0-9.]+ MiB, --host-memory is 64.0 MiB: raise "
                                  "it to [0-9]+MiB\n"));
  EXPECT_THAT(text, HasSubstr("does not fit: a sequence of 9008 tokens, the model was trained for 8192: "
                              "lower --context or --max-tokens\n"));
  EXPECT_EQ(PlanAsJson(*report).Find("does_not_fit")->as_array().size(), 3u);
}

TEST_F(Plan, TheHostMemoryThatItAsksForIsEnoughAndNoMoreThanThat) {
  options_.host_memory_bytes = int64_t{64} << 20;
  const std::string text = PlanAsText(*MakePlan(options_, measure_));
  std::smatch least;
  ASSERT_TRUE(std::regex_search(text, least, std::regex("raise it to ([0-9]+)MiB"))) << text;
  options_.host_memory_bytes = std::stoll(least[1]) << 20;
  EXPECT_TRUE(MakePlan(options_, measure_)->fits());
  options_.host_memory_bytes -= int64_t{1} << 20;
  EXPECT_FALSE(MakePlan(options_, measure_)->fits());
}

TEST_F(Plan, SequencesWhoseTailsDoNotFitAreTooMany) {
  options_.sequences = 100;
  EXPECT_THAT(PlanAsText(*MakePlan(options_, measure_)),
              ContainsRegex("does not fit: tails of 100 sequences take [0-9.]+ MiB of device memory, the KV pool "
                            "has [0-9.]+ MiB: raise --gpu-memory, or lower --sequences\n"));
}

TEST_F(Plan, NamesTheLeastDeviceMemory) {
  options_.gpu_memory_bytes = int64_t{100} << 20;
  const absl::Status status = MakePlan(options_, measure_).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("needs at least"));
}

TEST_F(Plan, RefusesNumbersBeyondAllBytes) {
  options_.context_tokens = int64_t{1} << 26;
  options_.sequences = int64_t{1} << 40;
  EXPECT_TRUE(absl::IsInvalidArgument(MakePlan(options_, measure_).status()));
}

}  // namespace
}  // namespace headroom::cli
