#include "services/coordinator/request_validation.h"

#include <algorithm>
#include <random>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/status.h"
#include "services/coordinator/session_table.h"

namespace headroom::coordinator {
namespace {

// Collects what is wrong with a request.
class Checker {
 public:
  void Wrong(std::string field, std::string description) {
    violations_.push_back({std::move(field), std::move(description)});
  }
  // False, and a violation, unless low <= value <= high. NaN is in no range.
  template <typename T>
  bool InRange(const std::string& field, T value, T low, T high) {
    if (value >= low && value <= high) return true;
    Wrong(field, absl::StrCat("is ", value, ", expected ", low, " to ", high));
    return false;
  }
  bool ok() const { return violations_.empty(); }
  absl::Status status() const { return BadRequestError(violations_); }

 private:
  std::vector<FieldViolation> violations_;
};

uint64_t DrawSeed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

void CheckIds(const google::protobuf::RepeatedField<int32_t>& ids, int64_t vocab_size,
              const std::string& field, Checker& checker) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < vocab_size) continue;
    checker.Wrong(absl::StrCat(field, "[", i, "]"),
                  absl::StrCat("is ", ids[i], ", the vocabulary is 0 to ", vocab_size - 1));
    return;  // one says it; a million would not help
  }
}

void CheckLogitBias(const v1::SamplingParams& sampling, const RequestLimits& limits,
                    Checker& checker) {
  if (sampling.logit_bias_size() > kMaxLogitBias) {
    checker.Wrong("sampling.logit_bias", absl::StrCat("has ", sampling.logit_bias_size(),
                                                      " entries, at most ", kMaxLogitBias));
    return;
  }
  for (const auto& [token_id, bias] : sampling.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", token_id, "]");
    if (token_id < 0 || token_id >= limits.vocab_size) {
      checker.Wrong(field, absl::StrCat("is no token: the vocabulary is 0 to ",
                                        limits.vocab_size - 1));
      return;
    }
    if (!checker.InRange<double>(field, bias, -100, 100)) return;
  }
}

void TakeSampling(const v1::GenerateRequest& proto, const ServedModel& model,
                  const RequestLimits& limits, Checker& checker, Request& request) {
  v1::SamplingParams& sampling = request.sampling;
  sampling = model.default_sampling();
  sampling.MergeFrom(proto.sampling());
  if (!proto.sampling().has_top_k()) {  // a default made for a larger vocabulary means: all
    sampling.set_top_k(
        static_cast<int32_t>(std::min<int64_t>(sampling.top_k(), limits.vocab_size)));
  }
  checker.InRange<double>("sampling.temperature", sampling.temperature(), 0, 100);
  checker.InRange<int64_t>("sampling.top_k", sampling.top_k(), 0, limits.vocab_size);
  if (!(sampling.top_p() > 0 && sampling.top_p() <= 1)) {
    checker.Wrong("sampling.top_p",
                  absl::StrCat("is ", sampling.top_p(), ", expected more than 0, at most 1"));
  }
  checker.InRange<double>("sampling.min_p", sampling.min_p(), 0, 1);
  checker.InRange<float>("sampling.repetition_penalty", sampling.repetition_penalty(), 0.01f, 100);
  checker.InRange<double>("sampling.frequency_penalty", sampling.frequency_penalty(), -2, 2);
  checker.InRange<double>("sampling.presence_penalty", sampling.presence_penalty(), -2, 2);
  if (!sampling.has_seed()) sampling.set_seed(DrawSeed());
  CheckLogitBias(sampling, limits, checker);
  sampling.mutable_logit_bias()->swap(request.logit_bias);
}

// max_tokens comes later: it depends on the prompt.
void TakeStopping(const v1::Stopping& stopping, const ServedModel& model,
                  const RequestLimits& limits, Checker& checker, Request& request) {
  if (stopping.has_max_tokens()) {
    checker.InRange<int64_t>("stopping.max_tokens", stopping.max_tokens(), 0, INT32_MAX);
  }
  const int64_t most = stopping.has_max_tokens() ? std::max(0, stopping.max_tokens()) : INT32_MAX;
  checker.InRange<int64_t>("stopping.min_tokens", stopping.min_tokens(), 0, most);
  request.min_tokens = stopping.min_tokens();
  if (stopping.stop_strings_size() > kMaxStopStrings) {
    checker.Wrong("stopping.stop_strings", absl::StrCat("has ", stopping.stop_strings_size(),
                                                        " strings, at most ", kMaxStopStrings));
  }
  for (int i = 0; i < std::min(stopping.stop_strings_size(), kMaxStopStrings); ++i) {
    const size_t bytes = stopping.stop_strings(i).size();
    if (bytes >= 1 && bytes <= kMaxStopStringBytes) continue;
    checker.Wrong(absl::StrCat("stopping.stop_strings[", i, "]"),
                  absl::StrCat("has ", bytes, " bytes, expected 1 to ", kMaxStopStringBytes));
  }
  if (stopping.stop_strings_size() > 0 && model.tokenizer() == nullptr) {
    checker.Wrong("stopping.stop_strings", "the model has no tokenizer: its answers have no text");
  }
  if (stopping.stop_token_ids_size() > kMaxStopTokenIds) {
    checker.Wrong("stopping.stop_token_ids", absl::StrCat("has ", stopping.stop_token_ids_size(),
                                                          " ids, at most ", kMaxStopTokenIds));
  }
  CheckIds(stopping.stop_token_ids(), limits.vocab_size, "stopping.stop_token_ids", checker);
  if (stopping.has_time_limit_ms()) {
    checker.InRange<int64_t>("stopping.time_limit_ms", stopping.time_limit_ms(), 1, INT64_MAX);
    request.time_limit = absl::Milliseconds(stopping.time_limit_ms());
  }
  request.stop_strings.assign(stopping.stop_strings().begin(), stopping.stop_strings().end());
  request.stop_token_ids.assign(stopping.stop_token_ids().begin(), stopping.stop_token_ids().end());
  if (!stopping.ignore_eos()) request.eos_token_ids = model.eos_ids();
  if (request.min_tokens > 0) {
    std::set<int32_t> ids(request.eos_token_ids.begin(), request.eos_token_ids.end());
    ids.insert(request.stop_token_ids.begin(), request.stop_token_ids.end());
    ids.erase(ids.lower_bound(static_cast<int32_t>(limits.vocab_size)), ids.end());
    request.held_back_token_ids.assign(ids.begin(), ids.end());
  }
  request.include_stop = stopping.include_stop_in_output();
}

int LaneIndex(v1::Lane lane) {
  switch (lane) {
    case v1::LANE_RESIDENT:
      return static_cast<int>(Lane::kResident);
    case v1::LANE_FETCHED:
      return static_cast<int>(Lane::kFetched);
    case v1::LANE_IN_PLACE:
      return static_cast<int>(Lane::kInPlace);
    default:
      return -1;
  }
}

void TakeShares(const v1::PlacementOptions& options, Checker& checker, Request& request) {
  request.placement.automatic = false;
  if (options.shares_size() > kNumLanes) {
    checker.Wrong("placement.shares", absl::StrCat("has ", options.shares_size(),
                                                   " entries, there are ", kNumLanes, " lanes"));
    return;
  }
  bool seen[kNumLanes] = {};
  for (int i = 0; i < options.shares_size(); ++i) {
    const int lane = LaneIndex(options.shares(i).lane());
    if (lane < 0) {
      checker.Wrong(absl::StrCat("placement.shares[", i, "].lane"), "names no lane");
    } else if (std::exchange(seen[lane], true)) {
      checker.Wrong(absl::StrCat("placement.shares[", i, "].lane"), "is there twice");
    } else {
      request.placement.shares[lane] = options.shares(i).share();
    }
  }
  if (!checker.ok()) return;
  const absl::Status shares = CheckShares(request.placement.shares);
  if (!shares.ok()) checker.Wrong("placement.shares", std::string(shares.message()));
}

void TakePlacement(const v1::PlacementOptions& options, const RequestLimits& limits,
                   Checker& checker, Request& request) {
  switch (options.mode()) {
    case v1::PlacementOptions::MODE_SHARES:
      TakeShares(options, checker, request);
      break;
    case v1::PlacementOptions::MODE_UNSPECIFIED:
    case v1::PlacementOptions::MODE_AUTO:
      if (options.shares_size() > 0) {
        checker.Wrong("placement.shares", "are there, but placement.mode is not MODE_SHARES");
      }
      break;
    default:
      checker.Wrong("placement.mode", absl::StrCat("is ", static_cast<int>(options.mode()),
                                                   ", which this server does not know"));
  }
  request.deterministic = options.deterministic();
  request.chunk_tokens = limits.max_chunk_tokens;
  if (options.has_chunk_tokens() &&
      checker.InRange<int64_t>("placement.chunk_tokens", options.chunk_tokens(), 1, INT32_MAX)) {
    request.chunk_tokens = std::min<int64_t>(options.chunk_tokens(), limits.max_chunk_tokens);
  }
}

void TakeLogprobs(const v1::LogprobOptions& options, Checker& checker, Request& request) {
  request.want_logprobs = options.has_num_top();
  checker.InRange<int64_t>("logprobs.num_top", options.num_top(), 0, kMaxTopLogprobs);
  request.num_top_logprobs = options.num_top();
  request.score_prompt = options.prompt();
}

void TakeSession(const v1::GenerateRequest& proto, Checker& checker, Request& request) {
  if (proto.has_session_id() && !SessionTable::IsValidId(proto.session_id())) {
    checker.Wrong("session_id", "expected 1 to 128 characters of A-Z, a-z, 0-9, '_', '.', '-'");
  }
  if (proto.cache_salt().size() > kMaxCacheSaltBytes) {
    checker.Wrong("cache_salt", absl::StrCat("has ", proto.cache_salt().size(), " bytes, at most ",
                                             kMaxCacheSaltBytes));
  }
  request.session_id = proto.session_id();
  request.cache_salt = proto.cache_salt();
  request.bypass_prefix_cache = proto.bypass_prefix_cache();
}

// Whether `tokens` tokens of a prompt leave room for an answer.
absl::Status CheckPromptTokens(const v1::GenerateRequest& proto, const std::string& field,
                               int64_t tokens, const RequestLimits& limits) {
  if (tokens == 0) return BadRequestError({{field, "has no tokens"}});
  const bool only_prompt = proto.stopping().has_max_tokens() && proto.stopping().max_tokens() == 0;
  if (tokens <= limits.max_context_tokens - (only_prompt ? 0 : 1)) return absl::OkStatus();
  return BadRequestError(
      {{field,
        absl::StrCat("has ", tokens, " tokens, the context limit is ", limits.max_context_tokens,
                     only_prompt ? "" : " with at least one token of the answer")}});
}

// The prompt's ids. Their number is looked at before any of them: it may be millions.
absl::StatusOr<std::vector<int32_t>> PromptIds(const v1::GenerateRequest& proto,
                                               const ServedModel& model,
                                               const RequestLimits& limits) {
  std::string field;
  std::vector<int32_t> ids;
  switch (proto.input_case()) {
    case v1::GenerateRequest::kPrompt: {
      field = "prompt";
      HEADROOM_ASSIGN_OR_RETURN(ids, EncodeText(model, proto.prompt(), field, &limits));
      break;
    }
    case v1::GenerateRequest::kChat: {
      field = "chat";
      HEADROOM_ASSIGN_OR_RETURN(ids, EncodeChat(model, proto.chat(), field, &limits));
      break;
    }
    case v1::GenerateRequest::kTokenIds: {
      field = "token_ids.ids";
      const auto& given = proto.token_ids().ids();
      HEADROOM_RETURN_IF_ERROR(CheckPromptTokens(proto, field, given.size(), limits));
      Checker checker;
      CheckIds(given, limits.vocab_size, field, checker);
      HEADROOM_RETURN_IF_ERROR(checker.status());
      return std::vector<int32_t>(given.begin(), given.end());
    }
    case v1::GenerateRequest::INPUT_NOT_SET:
      return BadRequestError({{"input", "is not set: expected prompt, token_ids or chat"}});
  }
  HEADROOM_RETURN_IF_ERROR(
      CheckPromptTokens(proto, field, static_cast<int64_t>(ids.size()), limits));
  return ids;
}

// Tokenizing takes a second a MB: a text that is longer than the context's number of longest tokens is
// refused before. (A text of nothing but characters that the vocabulary leaves out would have fit.)
// `limits` may be null: no text is too long.
absl::Status CheckFits(const Tokenizer& tokenizer, int64_t text_bytes, const RequestLimits* limits) {
  if (limits == nullptr) return absl::OkStatus();
  const int64_t longest = tokenizer.longest_token_bytes();
  if (text_bytes <= limits->max_context_tokens * longest) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("text has ", text_bytes, " bytes, the context limit is ",
                   limits->max_context_tokens, " tokens of at most ", longest));
}

absl::StatusOr<std::vector<int32_t>> EncodeMessages(const ServedModel& model,
                                                    const v1::ChatMessages& chat,
                                                    const RequestLimits* limits) {
  // Rendering takes some ten times as long as receiving: what is too long already is not rendered.
  HEADROOM_RETURN_IF_ERROR(CheckFits(*model.tokenizer(), TextBytes(chat), limits));
  std::vector<ChatMessage> messages;
  for (const v1::ChatMessage& message : chat.messages()) {
    messages.push_back({message.role(), message.content()});
  }
  HEADROOM_ASSIGN_OR_RETURN(
      const std::string text,
      model.chat_template()->Render(
          messages, !chat.has_add_generation_prompt() || chat.add_generation_prompt()));
  HEADROOM_RETURN_IF_ERROR(CheckFits(*model.tokenizer(), static_cast<int64_t>(text.size()), limits));
  // The template's output spells what goes around a text.
  return model.tokenizer()->Encode(text, Tokenizer::Special::kWithout);
}

// What is wrong with a text is wrong with its field.
absl::StatusOr<std::vector<int32_t>> NameField(absl::StatusOr<std::vector<int32_t>> ids,
                                               absl::string_view field) {
  if (!absl::IsInvalidArgument(ids.status())) return ids;
  return BadRequestError({{std::string(field), std::string(ids.status().message())}});
}

}  // namespace

absl::StatusOr<std::vector<int32_t>> EncodeText(const ServedModel& model, absl::string_view text,
                                                absl::string_view field,
                                                const RequestLimits* limits) {
  if (model.tokenizer() == nullptr) {
    return BadRequestError({{std::string(field), "the model has no tokenizer: send token_ids"}});
  }
  const absl::Status fits = CheckFits(*model.tokenizer(), static_cast<int64_t>(text.size()), limits);
  if (!fits.ok()) return NameField(fits, field);
  return NameField(model.tokenizer()->Encode(text), field);
}

absl::StatusOr<std::vector<int32_t>> EncodeChat(const ServedModel& model,
                                                const v1::ChatMessages& chat,
                                                absl::string_view field,
                                                const RequestLimits* limits) {
  if (model.chat_template() == nullptr || model.tokenizer() == nullptr) {
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("model ", model.name(), " has no chat template")),
                      "NO_CHAT_TEMPLATE");
  }
  Checker checker;
  if (chat.messages_size() < 1 || chat.messages_size() > kMaxChatMessages) {
    checker.Wrong(
        absl::StrCat(field, ".messages"),
        absl::StrCat("has ", chat.messages_size(), " messages, expected 1 to ", kMaxChatMessages));
  }
  const auto role = std::find_if(chat.messages().begin(), chat.messages().end(),
                                 [](const v1::ChatMessage& message) { return message.role().empty(); });
  if (role != chat.messages().end()) {
    checker.Wrong(absl::StrCat(field, ".messages[", role - chat.messages().begin(), "].role"),
                  "is empty");
  }
  HEADROOM_RETURN_IF_ERROR(checker.status());
  return NameField(EncodeMessages(model, chat, limits), field);
}

int64_t MostRequestBytes(const ServedModel& model, const RequestLimits& limits) {
  constexpr int64_t kMostIdBytes = 10;  // of a negative one
  constexpr int64_t kAllElseBytes = int64_t{1} << 20;
  const int64_t longest = model.tokenizer() == nullptr ? 0 : model.tokenizer()->longest_token_bytes();
  return limits.max_context_tokens * std::max(longest, kMostIdBytes) + kAllElseBytes;
}

absl::Status CheckRequestId(absl::string_view id) {
  const bool visible = std::all_of(id.begin(), id.end(), [](char c) { return c > ' ' && c < 127; });
  if (!id.empty() && id.size() <= kMaxRequestIdBytes && visible) return absl::OkStatus();
  return BadRequestError({{"x-request-id", "expected 1 to 128 visible ASCII characters"}});
}

absl::Status CheckSessionId(absl::string_view id) {
  if (SessionTable::IsValidId(id)) return absl::OkStatus();
  return BadRequestError(
      {{"session_id", "expected 1 to 128 characters of A-Z, a-z, 0-9, '_', '.', '-'"}});
}

absl::StatusOr<std::unique_ptr<Request>> ValidateRequest(const v1::GenerateRequest& proto,
                                                         const ServedModel& model,
                                                         const RequestLimits& limits) {
  if (!proto.model().empty() && proto.model() != model.name()) {
    return WithReason(
        absl::NotFoundError(absl::StrCat("model '", proto.model(), "' is not served here, '",
                                         model.name(), "' is")),
        "MODEL_UNKNOWN");
  }
  auto request = std::make_unique<Request>();
  Checker checker;
  TakeSampling(proto, model, limits, checker, *request);
  TakeStopping(proto.stopping(), model, limits, checker, *request);
  TakeLogprobs(proto.logprobs(), checker, *request);
  TakePlacement(proto.placement(), limits, checker, *request);
  TakeSession(proto, checker, *request);
  if (proto.has_n()) {
    checker.InRange<int64_t>("n", proto.n(), 1, kMaxAnswers);
    request->n = proto.n();
  }
  request->explain = proto.explain();
  HEADROOM_RETURN_IF_ERROR(checker.status());
  return request;
}

absl::Status TakePrompt(const v1::GenerateRequest& proto, const ServedModel& model,
                        const RequestLimits& limits, Request& request) {
  HEADROOM_ASSIGN_OR_RETURN(request.prompt, PromptIds(proto, model, limits));
  const int64_t left = limits.max_context_tokens - static_cast<int64_t>(request.prompt.size());
  request.max_tokens = proto.stopping().has_max_tokens()
                           ? std::min<int64_t>(proto.stopping().max_tokens(), left)
                           : left;
  return absl::OkStatus();
}

int64_t TextBytes(const v1::ChatMessages& chat) {
  int64_t bytes = 0;
  for (const v1::ChatMessage& message : chat.messages()) {
    bytes += static_cast<int64_t>(message.role().size() + message.content().size());
  }
  return bytes;
}

int64_t TextBytes(const v1::GenerateRequest& proto) {
  return static_cast<int64_t>(proto.prompt().size()) + TextBytes(proto.chat());
}

}  // namespace headroom::coordinator
