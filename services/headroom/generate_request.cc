#include "services/headroom/generate_request.h"

#include <cerrno>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/status.h"
#include "common/text/utf8.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::cli {
namespace {

constexpr int32_t kMostInt32 = std::numeric_limits<int32_t>::max();
// More than any context: some 60 million tokens of English.
constexpr size_t kMaxPromptBytes = size_t{256} << 20;

struct CloseFile {
  void operator()(std::FILE* file) const {
    if (file != stdin) std::fclose(file);
  }
};

absl::StatusOr<std::string> ReadPromptFile(const std::string& path) {
  const std::unique_ptr<std::FILE, CloseFile> file(path == "-" ? stdin
                                                               : std::fopen(path.c_str(), "rb"));
  if (file == nullptr) return absl::ErrnoToStatus(errno, absl::StrCat("--prompt-file ", path));
  std::string text;
  char buffer[1 << 16];
  while (const size_t bytes = std::fread(buffer, 1, sizeof(buffer), file.get())) {
    text.append(buffer, bytes);
    if (text.size() > kMaxPromptBytes) {
      return absl::InvalidArgumentError(absl::StrCat("--prompt-file ", path, " has more than ",
                                                     kMaxPromptBytes, " bytes"));
    }
  }
  if (std::ferror(file.get())) {
    return absl::ErrnoToStatus(errno, absl::StrCat("reading --prompt-file ", path));
  }
  return text;
}

absl::Status SetInput(const GenerateOptions& options, v1::GenerateRequest* request) {
  const int given = options.prompt.has_value() + options.prompt_file.has_value() +
                    options.token_ids.has_value();
  if (given != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat(given == 0 ? "no prompt: " : "more than one prompt: ",
                     "give one of --prompt, --prompt-file, --token-ids"));
  }
  if (options.token_ids.has_value()) {
    if (options.chat) {
      return absl::InvalidArgumentError("--chat needs text, --token-ids has none");
    }
    HEADROOM_ASSIGN_OR_RETURN(const std::vector<int32_t> ids, ParseTokenIds(*options.token_ids));
    request->mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
    return absl::OkStatus();
  }
  std::string text;
  if (options.prompt.has_value()) {
    text = *options.prompt;
  } else {
    HEADROOM_ASSIGN_OR_RETURN(text, ReadPromptFile(*options.prompt_file));
  }
  HEADROOM_RETURN_IF_ERROR(CheckUtf8(
      text, options.prompt.has_value() ? "--prompt"
                                       : absl::StrCat("--prompt-file ", *options.prompt_file)));
  if (options.chat) {
    v1::ChatMessage* const message = request->mutable_chat()->add_messages();
    message->set_role("user");
    message->set_content(std::move(text));
  } else {
    request->set_prompt(std::move(text));
  }
  return absl::OkStatus();
}

absl::Status AddLogitBias(absl::string_view text, v1::SamplingParams* sampling) {
  for (const absl::string_view entry : absl::StrSplit(text, ',', absl::SkipWhitespace())) {
    const std::vector<absl::string_view> parts = absl::StrSplit(entry, ':');
    int32_t id;
    float bias;
    if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &id) || id < 0 ||
        !absl::SimpleAtof(parts[1], &bias) || !std::isfinite(bias)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--logit-bias: '", entry, "' is not ID:BIAS, such as 42:-1.5"));
    }
    if (!sampling->mutable_logit_bias()->insert({id, bias}).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("--logit-bias: token ", id, " is there twice"));
    }
  }
  return absl::OkStatus();
}

absl::Status SetSampling(const GenerateOptions& options, v1::GenerateRequest* request) {
  v1::SamplingParams sampling;
  if (options.temperature.has_value()) sampling.set_temperature(*options.temperature);
  if (options.top_k.has_value()) sampling.set_top_k(*options.top_k);
  if (options.top_p.has_value()) sampling.set_top_p(*options.top_p);
  if (options.min_p.has_value()) sampling.set_min_p(*options.min_p);
  if (options.seed.has_value()) sampling.set_seed(*options.seed);
  if (options.repetition_penalty.has_value()) {
    sampling.set_repetition_penalty(*options.repetition_penalty);
  }
  if (options.frequency_penalty.has_value()) {
    sampling.set_frequency_penalty(*options.frequency_penalty);
  }
  if (options.presence_penalty.has_value()) {
    sampling.set_presence_penalty(*options.presence_penalty);
  }
  for (const std::string& text : options.logit_bias) {
    HEADROOM_RETURN_IF_ERROR(AddLogitBias(text, &sampling));
  }
  *request->mutable_sampling() = sampling;
  return absl::OkStatus();
}

absl::Status SetStopping(const GenerateOptions& options, v1::GenerateRequest* request) {
  v1::Stopping* const stopping = request->mutable_stopping();
  if (options.max_tokens.has_value()) stopping->set_max_tokens(*options.max_tokens);
  if (options.min_tokens.has_value()) stopping->set_min_tokens(*options.min_tokens);
  for (const std::string& stop : options.stop) {
    HEADROOM_RETURN_IF_ERROR(CheckUtf8(stop, "--stop"));
    stopping->add_stop_strings(stop);
  }
  if (options.ignore_eos) stopping->set_ignore_eos(true);
  return absl::OkStatus();
}

absl::Status SetPlacement(const GenerateOptions& options, v1::GenerateRequest* request) {
  v1::PlacementOptions* const placement = request->mutable_placement();
  absl::StatusOr<coordinator::PlacementSpec> spec = coordinator::ParsePlacement(options.placement);
  if (!spec.ok()) return Annotate(spec.status(), "--placement");
  if (spec->automatic) {
    placement->set_mode(v1::PlacementOptions::MODE_AUTO);
  } else {
    placement->set_mode(v1::PlacementOptions::MODE_SHARES);
    constexpr v1::Lane kLanes[] = {v1::LANE_RESIDENT, v1::LANE_FETCHED, v1::LANE_IN_PLACE};
    for (int lane = 0; lane < coordinator::kNumLanes; ++lane) {
      if (spec->shares[lane] == 0) continue;
      v1::LaneShare* const share = placement->add_shares();
      share->set_lane(kLanes[lane]);
      share->set_share(spec->shares[lane]);
    }
  }
  if (options.deterministic) placement->set_deterministic(true);
  if (options.chunk_tokens.has_value()) placement->set_chunk_tokens(*options.chunk_tokens);
  return absl::OkStatus();
}

}  // namespace

void AddGenerateFlags(Flags& flags, GenerateOptions* options) {
  flags.Group("Prompt (one of the first three)");
  flags.Text("prompt", "TEXT", &options->prompt, "The prompt itself.");
  flags.Text("prompt-file", "FILE", &options->prompt_file,
             "A file that holds the prompt; - is standard input.");
  flags.Text("token-ids", "1,2,3", &options->token_ids, "The prompt as token ids.");
  flags.Switch("chat", &options->chat,
               "The prompt is what a user says, put through the model's chat template.");
  flags.Text("session", "ID", &options->session,
             "Continues this session from the longest common prefix of tokens, and keeps its keys "
             "and values; made if it is not there.");
  flags.Group("Answer");
  flags.Integer("max-tokens", &options->max_tokens, 0, kMostInt32,
                "Most tokens of the answer; 0 only processes the prompt. Default: what the context "
                "leaves.");
  flags.Integer("min-tokens", &options->min_tokens, 0, kMostInt32,
                "No end-of-sequence token is drawn before this many tokens.");
  flags.TextList("stop", "TEXT", &options->stop,
                 "Ends the answer where this text comes up. May be given several times.");
  flags.Switch("ignore-eos", &options->ignore_eos,
               "An end-of-sequence token does not end the answer.");
  flags.Group("Sampling (defaults: the model's)");
  flags.Number("temperature", &options->temperature, "0 takes the likeliest token.");
  flags.Integer("top-k", &options->top_k, 0, kMostInt32,
                "Draws among the K likeliest tokens; 0 is off.");
  flags.Number("top-p", &options->top_p,
               "Draws among the likeliest tokens that come to this probability; 1 is off.");
  flags.Number("min-p", &options->min_p,
               "Leaves out tokens less likely than this share of the likeliest; 0 is off.");
  flags.Number("repetition-penalty", &options->repetition_penalty,
               "Divides positive logits of tokens that are in the prompt or the answer, multiplies "
               "others; 1 is off.");
  flags.Number("frequency-penalty", &options->frequency_penalty,
               "Taken from a token's logit for each time that it is in the answer; 0 is off.");
  flags.Number("presence-penalty", &options->presence_penalty,
               "Taken from the logit of each token that is in the answer; 0 is off.");
  flags.TextList("logit-bias", "ID:BIAS", &options->logit_bias,
                 "Added to the logit of this token; several with commas between. May be given "
                 "several times.");
  flags.Seed("seed", &options->seed, "Fixes what is drawn.");
  flags.Integer("n", &options->n, 1, kMostInt32,
                "Answers to draw, each with a seed of its own that follows from --seed; several "
                "are printed when all have ended. The server says how many are too many.");
  flags.Group("Placement");
  flags.Text("placement", "WHERE", &options->placement,
             "Where keys are attended: auto, resident, fetched, in-place, or shares of the KV "
             "heads of each layer that sum to 1, such as resident=0.25,fetched=0.75.");
  flags.Switch("deterministic", &options->deterministic,
               "Freezes shares and chunk borders: the same request gives the same bits.");
  flags.Integer("chunk-tokens", &options->chunk_tokens, 1, kMostInt32,
                "Most tokens of one prefill pass. Default: the worker's.");
  flags.Group("Output");
  flags.Integer("prompt-logprobs", &options->prompt_logprobs, 0, 1,
                "1 scores the prompt's tokens; in --json only.");
  flags.Integer("logprobs", &options->logprobs, 0, 20,
                "Log-probability of each token of the answer and of the N likeliest beside it; in "
                "--json only.");
  flags.Switch("explain", &options->explain,
               "Shows on standard error what each lane did: KV heads (mean a layer), bytes, time, "
               "share of the bytes; device memory; timings.");
  flags.Switch("json", &options->json,
               "One JSON object in place of the text. placement.lanes are those of the decode "
               "steps; of the prefill if there was no decode step. timings are the server's; "
               "token_ms says when each of token_ids came here, in ms since the call began.");
}

absl::StatusOr<v1::GenerateRequest> BuildRequest(const GenerateOptions& options) {
  v1::GenerateRequest request;
  HEADROOM_RETURN_IF_ERROR(SetInput(options, &request));
  HEADROOM_RETURN_IF_ERROR(SetSampling(options, &request));
  HEADROOM_RETURN_IF_ERROR(SetStopping(options, &request));
  HEADROOM_RETURN_IF_ERROR(SetPlacement(options, &request));
  if (options.n.has_value()) request.set_n(*options.n);
  if (options.logprobs.has_value()) request.mutable_logprobs()->set_num_top(*options.logprobs);
  if (options.prompt_logprobs != 0) request.mutable_logprobs()->set_prompt(true);
  if (!options.session.empty()) {
    HEADROOM_RETURN_IF_ERROR(CheckUtf8(options.session, "--session"));
    request.set_session_id(options.session);
  }
  // The JSON shows lanes, too.
  if (options.explain || options.json) request.set_explain(true);
  return request;
}

absl::StatusOr<std::vector<int32_t>> ParseTokenIds(absl::string_view text) {
  std::vector<int32_t> ids;
  for (const absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(", \t\r\n"), absl::SkipEmpty())) {
    int32_t id;
    if (!absl::SimpleAtoi(word, &id) || id < 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--token-ids: '", word, "' is no token id: expected 0 to ", kMostInt32));
    }
    ids.push_back(id);
  }
  if (ids.empty()) return absl::InvalidArgumentError("--token-ids has no ids");
  return ids;
}

}  // namespace headroom::cli
