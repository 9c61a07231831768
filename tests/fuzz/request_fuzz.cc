// A GenerateRequest as bytes: what validation lets through is within every limit, and what it does
// not is the caller's fault, never ours.
#include <google/protobuf/stubs/logging.h>

#include <cmath>
#include <memory>

#include "common/errors.h"
#include "services/coordinator/request_validation.h"
#include "services/coordinator/served_model.h"
#include "tests/common/byte_tokenizer.h"
#include "tests/fuzz/fuzz.h"

using headroom::ChatTemplate;
using headroom::Tokenizer;
using headroom::coordinator::Request;
using headroom::coordinator::RequestLimits;
using headroom::coordinator::ServedModel;
using headroom::fuzz::Require;

namespace {

constexpr int64_t kVocab = 517;
constexpr int64_t kContext = 2048;

std::unique_ptr<ServedModel> MakeModel() {
  const headroom::fuzz::Folder folder;
  Require(headroom::WriteByteTokenizer(kVocab, kContext, folder.path()).ok(), "a tokenizer");
  auto tokenizer = Tokenizer::FromModelDir(folder.path());
  auto chat_template = ChatTemplate::FromModelDir(folder.path());
  Require(tokenizer.ok() && chat_template.ok(), "the model's text");
  headroom::v1::SamplingParams defaults;
  defaults.set_temperature(1);
  defaults.set_top_p(1);
  defaults.set_repetition_penalty(1);
  return std::make_unique<ServedModel>("model", "LlamaForCausalLM", defaults,
                                       std::vector<int32_t>{2}, *std::move(tokenizer),
                                       *std::move(chat_template));
}

void CheckAccepted(const Request& request) {
  Require(request.n >= 1 && request.n <= headroom::coordinator::kMaxAnswers, "n");
  Require(!request.prompt.empty(), "there is a prompt");
  for (const int32_t id : request.prompt) Require(id >= 0 && id < kVocab, "an id of the prompt");
  Require(request.max_tokens >= 0 && request.min_tokens >= 0, "counts of tokens");
  Require(static_cast<int64_t>(request.prompt.size()) + request.max_tokens <= kContext,
          "the answer ends within the context");
  const headroom::v1::SamplingParams& sampling = request.sampling;
  Require(sampling.temperature() >= 0 && sampling.temperature() <= 100, "temperature");
  Require(sampling.top_k() >= 0 && sampling.top_k() <= kVocab, "top_k");
  Require(sampling.top_p() > 0 && sampling.top_p() <= 1, "top_p");
  Require(sampling.min_p() >= 0 && sampling.min_p() <= 1, "min_p");
  Require(sampling.repetition_penalty() > 0 && std::isfinite(sampling.repetition_penalty()),
          "repetition_penalty");
  Require(std::abs(sampling.frequency_penalty()) <= 2 && std::abs(sampling.presence_penalty()) <= 2,
          "penalties");
  for (const auto& [id, bias] : request.logit_bias) {
    Require(id >= 0 && id < kVocab && std::abs(bias) <= 100, "logit_bias");
  }
  for (const int32_t id : request.held_back_token_ids) {
    Require(id >= 0 && id < kVocab, "a token that is held back");
  }
  Require(request.chunk_tokens >= 1 && request.num_top_logprobs >= 0 &&
              request.num_top_logprobs <= headroom::coordinator::kMaxTopLogprobs,
          "chunk_tokens, num_top");
  for (int32_t index = 0; index < request.n; ++index) {
    Require(RequestOfAnswer(request, index)->index == index, "each answer is a request");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const ServedModel* const model = MakeModel().release();
  // A line for each text that is not UTF-8 is most of the time that an input takes.
  static const google::protobuf::LogSilencer silencer;
  headroom::v1::GenerateRequest proto;
  if (!proto.ParseFromArray(data, static_cast<int>(size))) return 0;
  RequestLimits limits;
  limits.vocab_size = kVocab;
  limits.max_context_tokens = kContext;
  limits.max_chunk_tokens = 128;
  const auto request = headroom::coordinator::ValidateRequest(proto, *model, limits);
  const absl::Status status =
      request.ok() ? TakePrompt(proto, *model, limits, **request) : request.status();
  if (status.ok()) {
    CheckAccepted(**request);
    return 0;
  }
  Require(absl::IsInvalidArgument(status) || absl::IsNotFound(status), status.ToString());
  Require(!absl::IsInvalidArgument(status) || !headroom::FieldViolationsOf(status).empty(),
          "the field is named");
  return 0;
}
