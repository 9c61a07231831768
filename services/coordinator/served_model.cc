#include "services/coordinator/served_model.h"

#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/log.h"
#include "common/status.h"
#include "common/text/stream_decoder.h"

namespace headroom::coordinator {
namespace {

constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;

class StreamTokenDecoder : public TokenDecoder {
 public:
  StreamTokenDecoder(const Tokenizer* tokenizer, const std::vector<int32_t>& prompt)
      : decoder_(tokenizer, prompt) {}

  // Ids come from the worker, which checks them against the vocabulary: none is negative.
  std::string Push(int32_t token_id) override { return decoder_.Push(token_id).value_or(""); }
  std::string Finish() override { return decoder_.Finish().value_or(""); }

 private:
  StreamDecoder decoder_;
};

// The folder's own name: "models/SmolLM2" and "models/SmolLM2/" are both "SmolLM2".
std::string NameOf(std::string model_dir) {
  while (model_dir.size() > 1 && model_dir.back() == '/') model_dir.pop_back();
  return model_dir.substr(model_dir.find_last_of('/') + 1);
}

absl::StatusOr<v1::SamplingParams> ReadDefaults(const std::string& model_dir) {
  v1::SamplingParams defaults;
  defaults.set_temperature(1);
  defaults.set_top_k(0);
  defaults.set_top_p(1);
  defaults.set_min_p(0);
  defaults.set_repetition_penalty(1);
  defaults.set_frequency_penalty(0);
  defaults.set_presence_penalty(0);
  const std::string path = absl::StrCat(model_dir, "/generation_config.json");
  absl::StatusOr<Json> json = Json::ParseFile(path, kMaxConfigBytes);
  if (absl::IsNotFound(json.status())) return defaults;
  HEADROOM_RETURN_IF_ERROR(json.status());
  if (!json->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a JSON object"));
  }
  const JsonReader reader(*json, path);
  HEADROOM_ASSIGN_OR_RETURN(const double temperature, reader.NumberOr("temperature", 1, 0, 100));
  HEADROOM_ASSIGN_OR_RETURN(const int64_t top_k,
                            reader.IntOr("top_k", 0, 0, std::numeric_limits<int32_t>::max()));
  HEADROOM_ASSIGN_OR_RETURN(const double top_p, reader.NumberOr("top_p", 1, 1e-9, 1));
  HEADROOM_ASSIGN_OR_RETURN(const double min_p, reader.NumberOr("min_p", 0, 0, 1));
  HEADROOM_ASSIGN_OR_RETURN(const double repetition_penalty,
                            reader.NumberOr("repetition_penalty", 1, 0.01, 100));
  // Only a file that says so makes greedy the default: many leave do_sample out and mean sampling.
  HEADROOM_ASSIGN_OR_RETURN(const bool do_sample, reader.BoolOr("do_sample", true));
  defaults.set_temperature(do_sample ? static_cast<float>(temperature) : 0);
  defaults.set_top_k(static_cast<int32_t>(top_k));
  defaults.set_top_p(static_cast<float>(top_p));
  defaults.set_min_p(static_cast<float>(min_p));
  defaults.set_repetition_penalty(static_cast<float>(repetition_penalty));
  return defaults;
}

absl::StatusOr<std::string> ReadArchitecture(const std::string& model_dir) {
  const std::string path = absl::StrCat(model_dir, "/config.json");
  HEADROOM_ASSIGN_OR_RETURN(const Json json, Json::ParseFile(path, kMaxConfigBytes));
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a JSON object"));
  }
  const Json* const names = json.Find("architectures");
  if (names == nullptr) return std::string("unknown");
  if (!names->is_array() || names->as_array().empty() || !names->as_array()[0].is_string()) {
    return JsonReader(json, path).Wrong("architectures", "a list of names");
  }
  return names->as_array()[0].as_string();
}

}  // namespace

ServedModel::ServedModel(std::string name, std::string architecture, v1::SamplingParams defaults,
                         std::vector<int32_t> eos_ids, std::unique_ptr<Tokenizer> tokenizer,
                         std::unique_ptr<ChatTemplate> chat_template)
    : name_(std::move(name)),
      architecture_(std::move(architecture)),
      default_sampling_(std::move(defaults)),
      eos_ids_(std::move(eos_ids)),
      tokenizer_(std::move(tokenizer)),
      chat_template_(std::move(chat_template)) {}

absl::StatusOr<std::unique_ptr<ServedModel>> ServedModel::Load(const std::string& model_dir) {
  HEADROOM_ASSIGN_OR_RETURN(std::string architecture, ReadArchitecture(model_dir));
  HEADROOM_ASSIGN_OR_RETURN(v1::SamplingParams defaults, ReadDefaults(model_dir));
  absl::StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::FromModelDir(model_dir);
  if (!tokenizer.ok() && !absl::IsNotFound(tokenizer.status())) return tokenizer.status();
  absl::StatusOr<std::unique_ptr<ChatTemplate>> chat_template =
      ChatTemplate::FromModelDir(model_dir);
  if (!chat_template.ok() && !absl::IsNotFound(chat_template.status())) {
    return chat_template.status();
  }
  std::vector<int32_t> eos_ids;
  if (tokenizer.ok()) {
    eos_ids = (*tokenizer)->eos_ids();
  } else {
    LogWarning(absl::StrCat(tokenizer.status().message(),
                            ": prompts must come as token ids, answers have no text"));
  }
  return std::make_unique<ServedModel>(NameOf(model_dir), std::move(architecture),
                                       std::move(defaults), std::move(eos_ids),
                                       tokenizer.ok() ? *std::move(tokenizer) : nullptr,
                                       chat_template.ok() ? *std::move(chat_template) : nullptr);
}

std::unique_ptr<TokenDecoder> ServedModel::MakeDecoder(const std::vector<int32_t>& prompt) const {
  if (tokenizer_ == nullptr) return nullptr;
  return std::make_unique<StreamTokenDecoder>(tokenizer_.get(), prompt);
}

}  // namespace headroom::coordinator
