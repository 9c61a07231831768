#include "services/worker/model/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>

#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr int64_t kMaxConfigBytes = 1 << 20;

absl::Status Unsupported(const JsonReader& config, absl::string_view name, absl::string_view value,
                         absl::string_view supported) {
  return absl::UnimplementedError(absl::StrCat(config.where(), ": '", BriefText(name), "' is ",
                                               value, ", supported: ", supported));
}

absl::Status CheckArchitecture(const JsonReader& config, ModelConfig& model) {
  const Json* list = config.object().Find("architectures");
  if (list == nullptr || !list->is_array() || list->as_array().size() != 1 ||
      !list->as_array()[0].is_string()) {
    return config.Wrong("architectures", "a list of one name");
  }
  model.architecture = list->as_array()[0].as_string();
  if (model.architecture != "LlamaForCausalLM") {
    return Unsupported(config, "architectures", BriefText(model.architecture), "LlamaForCausalLM");
  }
  return absl::OkStatus();
}

// Options that change the maths: each must be absent or say what the decoder does.
absl::Status CheckOptions(const JsonReader& config) {
  HEADROOM_ASSIGN_OR_RETURN(const std::string activation, config.StringOr("hidden_act", "silu"));
  if (activation != "silu") {
    return Unsupported(config, "hidden_act", BriefText(activation), "silu");
  }
  for (const char* name : {"attention_bias", "mlp_bias"}) {
    HEADROOM_ASSIGN_OR_RETURN(const bool bias, config.BoolOr(name, false));
    if (bias) return Unsupported(config, name, "true", "false");
  }
  HEADROOM_ASSIGN_OR_RETURN(const double partial,
                            config.NumberOr("partial_rotary_factor", 1, 0, 1));
  if (partial != 1) return Unsupported(config, "partial_rotary_factor", absl::StrCat(partial), "1");
  constexpr std::array kRefused = {"quantization_config", "sliding_window",
                                   "attn_logit_softcapping", "final_logit_softcapping",
                                   "query_pre_attn_scalar"};
  for (const char* name : kRefused) {
    if (const Json* found = config.object().Find(name); found != nullptr) {
      return Unsupported(config, name, Brief(*found), "absent");
    }
  }
  HEADROOM_ASSIGN_OR_RETURN(const int64_t tp, config.IntOr("pretraining_tp", 1, 1, 1 << 20));
  if (tp != 1) return Unsupported(config, "pretraining_tp", absl::StrCat(tp), "1");
  return absl::OkStatus();
}

// What other kinds of scaling add, settings per kind of layer: all would turn keys differently.
absl::Status CheckRopeMembers(const JsonReader& rope) {
  constexpr std::array kKnown = {"rope_type",       "type",
                                 "rope_theta",      "factor",
                                 "low_freq_factor", "high_freq_factor",
                                 "original_max_position_embeddings"};
  for (const auto& [name, value] : rope.object().as_object()) {
    if (name == "partial_rotary_factor") {
      HEADROOM_ASSIGN_OR_RETURN(const double partial, rope.NumberOr(name, 1, 0, 1));
      if (partial != 1) return Unsupported(rope, name, absl::StrCat(partial), "1");
    } else if (!value.is_null() &&
               std::find(kKnown.begin(), kKnown.end(), name) == kKnown.end()) {
      return Unsupported(rope, name, Brief(value), "absent");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadRope(const JsonReader& config, ModelConfig& model) {
  // Newer files keep theta and scaling together in rope_parameters.
  const Json* parameters = config.object().Find("rope_parameters");
  const Json* scaling = config.object().Find("rope_scaling");
  if (parameters != nullptr && !parameters->is_object()) {
    return config.Wrong("rope_parameters", "an object");
  }
  if (scaling != nullptr && !scaling->is_object()) {
    return config.Wrong("rope_scaling", "an object or null");
  }
  HEADROOM_ASSIGN_OR_RETURN(model.rope_theta, config.NumberOr("rope_theta", 10000, 1, 1e12));
  if (parameters != nullptr) {
    const JsonReader newer(*parameters, config.where() + ": rope_parameters");
    HEADROOM_ASSIGN_OR_RETURN(model.rope_theta,
                              newer.NumberOr("rope_theta", model.rope_theta, 1, 1e12));
  }
  if (scaling == nullptr) scaling = parameters;
  if (scaling == nullptr) return absl::OkStatus();
  const JsonReader rope(*scaling, config.where() + ": rope scaling");
  HEADROOM_RETURN_IF_ERROR(CheckRopeMembers(rope));
  HEADROOM_ASSIGN_OR_RETURN(std::string type, rope.StringOr("rope_type", ""));
  if (type.empty()) {
    HEADROOM_ASSIGN_OR_RETURN(type, rope.StringOr("type", "default"));
  }
  if (type == "default") return absl::OkStatus();
  if (type != "llama3") return Unsupported(rope, "rope_type", BriefText(type), "default, llama3");
  Llama3RopeScaling llama3;
  HEADROOM_ASSIGN_OR_RETURN(llama3.factor, rope.Number("factor", 1, 1e6));
  HEADROOM_ASSIGN_OR_RETURN(llama3.low_freq_factor, rope.Number("low_freq_factor", 1e-6, 1e6));
  HEADROOM_ASSIGN_OR_RETURN(llama3.high_freq_factor, rope.Number("high_freq_factor", 1e-6, 1e6));
  if (llama3.high_freq_factor <= llama3.low_freq_factor) {
    return rope.Wrong("high_freq_factor", "more than low_freq_factor");
  }
  HEADROOM_ASSIGN_OR_RETURN(
      llama3.original_max_position_tokens,
      rope.Number("original_max_position_embeddings", 1, 1e12));
  model.rope_scaling = llama3;
  return absl::OkStatus();
}

}  // namespace

std::vector<float> ModelConfig::InverseFrequencies() const {
  std::vector<float> frequencies(head_dim / 2);
  for (int32_t i = 0; i < head_dim / 2; ++i) {
    // float32 as torch forms it: theta ** (2 i / d), then the reciprocal.
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float power = std::pow(static_cast<float>(rope_theta), exponent);
    float frequency = 1.0f / power;
    if (rope_scaling.has_value()) {
      const Llama3RopeScaling& s = *rope_scaling;
      const double wavelength = 2 * std::numbers::pi / frequency;
      const double low = s.original_max_position_tokens / s.low_freq_factor;
      const double high = s.original_max_position_tokens / s.high_freq_factor;
      if (wavelength > low) {
        frequency = static_cast<float>(frequency / s.factor);
      } else if (wavelength >= high) {
        const double smooth =
            (s.original_max_position_tokens / wavelength - s.low_freq_factor) /
            (s.high_freq_factor - s.low_freq_factor);
        frequency =
            static_cast<float>((1 - smooth) * frequency / s.factor + smooth * frequency);
      }
    }
    frequencies[i] = frequency;
  }
  return frequencies;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir) {
  return ReadModelConfigFile(model_dir + "/config.json");
}

absl::StatusOr<ModelConfig> ReadModelConfigFile(const std::string& path) {
  HEADROOM_ASSIGN_OR_RETURN(const Json json, Json::ParseFile(path, kMaxConfigBytes));
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a JSON object"));
  }
  const JsonReader config(json, path);
  ModelConfig model;
  HEADROOM_RETURN_IF_ERROR(CheckArchitecture(config, model));
  HEADROOM_RETURN_IF_ERROR(CheckOptions(config));
  HEADROOM_ASSIGN_OR_RETURN(model.num_layers, config.Int("num_hidden_layers", 1, 1024));
  HEADROOM_ASSIGN_OR_RETURN(model.num_q_heads, config.Int("num_attention_heads", 1, 1024));
  HEADROOM_ASSIGN_OR_RETURN(
      model.num_kv_heads,
      config.IntOr("num_key_value_heads", model.num_q_heads, 1, model.num_q_heads));
  if (model.num_q_heads % model.num_kv_heads != 0) {
    return config.Wrong("num_key_value_heads",
                        absl::StrCat("a divisor of num_attention_heads, ", model.num_q_heads));
  }
  HEADROOM_ASSIGN_OR_RETURN(model.hidden, config.Int("hidden_size", 1, 1 << 20));
  HEADROOM_ASSIGN_OR_RETURN(
      model.head_dim, config.IntOr("head_dim", model.hidden / model.num_q_heads, 1, 1024));
  if (model.head_dim != 64 && model.head_dim != 128) {
    return Unsupported(config, "head_dim", absl::StrCat(model.head_dim), "64, 128");
  }
  HEADROOM_ASSIGN_OR_RETURN(model.intermediate, config.Int("intermediate_size", 1, 1 << 24));
  HEADROOM_ASSIGN_OR_RETURN(model.vocab, config.Int("vocab_size", 1, 1 << 24));
  HEADROOM_ASSIGN_OR_RETURN(model.max_position_tokens,
                            config.Int("max_position_embeddings", 1, int64_t{1} << 31));
  HEADROOM_ASSIGN_OR_RETURN(model.rms_norm_epsilon, config.NumberOr("rms_norm_eps", 1e-6, 0, 1));
  HEADROOM_ASSIGN_OR_RETURN(model.tied_embeddings, config.BoolOr("tie_word_embeddings", false));
  HEADROOM_RETURN_IF_ERROR(ReadRope(config, model));
  return model;
}

}  // namespace headroom
