// What `headroom generate` is told, and the request that it makes of it.
#ifndef HEADROOM_SERVICES_HEADROOM_GENERATE_REQUEST_H_
#define HEADROOM_SERVICES_HEADROOM_GENERATE_REQUEST_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "headroom/v1/inference.pb.h"
#include "services/headroom/flags.h"

namespace headroom::cli {

struct GenerateOptions {
  // Exactly one of these three.
  std::optional<std::string> prompt;
  std::optional<std::string> prompt_file;  // "-": standard input
  std::optional<std::string> token_ids;    // "1,2,3"
  bool chat = false;

  std::string session;
  std::optional<int32_t> max_tokens;
  std::optional<int32_t> min_tokens;
  std::vector<std::string> stop;
  bool ignore_eos = false;

  std::optional<float> temperature;
  std::optional<int32_t> top_k;
  std::optional<float> top_p;
  std::optional<float> min_p;
  std::optional<float> repetition_penalty;
  std::optional<float> frequency_penalty;
  std::optional<float> presence_penalty;
  std::vector<std::string> logit_bias;  // "ID:BIAS" each
  std::optional<uint64_t> seed;
  std::optional<int32_t> n;

  std::string placement = "auto";
  bool deterministic = false;
  std::optional<int32_t> chunk_tokens;

  int32_t prompt_logprobs = 0;  // 0 or 1
  std::optional<int32_t> logprobs;
  bool explain = false;
  bool json = false;
};

void AddGenerateFlags(Flags& flags, GenerateOptions* options);

// Reads the prompt's file if there is one. INVALID_ARGUMENT names the flag; NOT_FOUND the file.
absl::StatusOr<v1::GenerateRequest> BuildRequest(const GenerateOptions& options);

// Whole numbers with commas or white space between. INVALID_ARGUMENT.
absl::StatusOr<std::vector<int32_t>> ParseTokenIds(absl::string_view text);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_GENERATE_REQUEST_H_
