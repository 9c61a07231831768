#include "services/worker/model/model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numbers>
#include <utility>

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

// Which layers see a window of the last tokens only, where a file does not list them (layer_types).
enum class WindowRule {
  kNone,
  kAll,
  kEven,      // layers 0, 2, 4 ...
  kBySwitch,  // with use_sliding_window, those from max_window_layers on
};

// An architecture: what it does that no member of its config.json says, and what a file may leave out, as
// transformers fills that in.
struct Family {
  absl::string_view architecture;
  int64_t kv_heads_otherwise = 0;  // of num_key_value_heads; 0: num_attention_heads
  int64_t head_dim_otherwise = 0;  // of head_dim; 0: hidden_size / num_attention_heads
  WindowRule window = WindowRule::kNone;
  bool qkv_bias = false;
  bool qk_norm = false;
  // GeGLU, soft caps, post-norms, weights of norms less 1, scaled embeddings, a scalar for the scores.
  bool gemma = false;
};
constexpr Family kFamilies[] = {
    {.architecture = "LlamaForCausalLM"},
    {.architecture = "MistralForCausalLM", .kv_heads_otherwise = 8, .window = WindowRule::kAll},
    {.architecture = "Qwen2ForCausalLM",
     .kv_heads_otherwise = 32,
     .window = WindowRule::kBySwitch,
     .qkv_bias = true},
    {.architecture = "Qwen3ForCausalLM",
     .kv_heads_otherwise = 32,
     .head_dim_otherwise = 128,
     .window = WindowRule::kBySwitch,
     .qk_norm = true},
    {.architecture = "Gemma2ForCausalLM",
     .kv_heads_otherwise = 4,
     .head_dim_otherwise = 256,
     .window = WindowRule::kEven,
     .gemma = true},
};

absl::StatusOr<const Family*> FindFamily(const JsonReader& config) {
  const Json* list = config.object().Find("architectures");
  if (list == nullptr || !list->is_array() || list->as_array().size() != 1 ||
      !list->as_array()[0].is_string()) {
    return config.Wrong("architectures", "a list of one name");
  }
  const std::string& name = list->as_array()[0].as_string();
  std::string known;
  for (const Family& family : kFamilies) {
    if (family.architecture == name) return &family;
    absl::StrAppend(&known, known.empty() ? "" : ", ", family.architecture);
  }
  return Unsupported(config, "architectures", BriefText(name), known);
}

// Not even null: what a file does not name at all is as the family has it.
bool IsLeftOut(const JsonReader& config, absl::string_view name) {
  const Json::Object& members = config.object().as_object();
  return std::none_of(members.begin(), members.end(),
                      [name](const Json::Member& member) { return member.first == name; });
}

bool SameValue(const Json& a, const Json& b) {
  if (a.is_number() && b.is_number()) return a.as_number() == b.as_number();
  if (a.is_bool() && b.is_bool()) return a.as_bool() == b.as_bool();
  return a.is_string() && b.is_string() && a.as_string() == b.as_string();
}

// Options of these families and of their relatives that change the maths: each must be absent, null, or
// say what the decoder does; a null here, that nothing else will do.
absl::Status CheckOptions(const JsonReader& config, const Family& family) {
  const char* const activation = family.gemma ? "gelu_pytorch_tanh" : "silu";
  const std::pair<const char*, Json> options[] = {
      {"alibi", false},
      {"attention_bias", false},
      {"attention_chunk_size", nullptr},
      {"attention_multiplier", nullptr},
      {"clip_qkv", nullptr},
      {"embedding_multiplier", 1},
      {"hidden_act", activation},
      {"hidden_activation", activation},
      {"is_causal", true},
      {"kv_lora_rank", nullptr},
      {"logit_scale", 1},
      {"logits_scaling", 1},
      {"mlp_bias", false},
      {"no_rope_layers", nullptr},
      {"num_experts", 0},
      {"num_local_experts", 0},
      {"partial_rotary_factor", 1},
      {"pretraining_tp", 1},
      {"qk_layernorm", false},
      {"quantization_config", nullptr},
      {"residual_multiplier", 1},
      {"rope_interleaved", false},
      {"rope_local_base_freq", nullptr},
      {"use_bidirectional_attention", false},
      {"use_mrope", false},
      {"use_qk_norm", false},
  };
  for (const auto& [name, supported] : options) {
    const Json* const found = config.object().Find(name);
    if (found == nullptr || SameValue(*found, supported)) continue;
    const std::string value = found->is_string() ? BriefText(found->as_string()) : Brief(*found);
    const std::string wanted = supported.is_null()     ? "absent"
                               : supported.is_string() ? supported.as_string()
                                                       : Brief(supported);
    return Unsupported(config, name, value, wanted);
  }
  constexpr const char* kOfGemma[] = {"attn_logit_softcapping", "final_logit_softcapping",
                                      "query_pre_attn_scalar"};
  for (const char* name : kOfGemma) {
    const Json* const found = family.gemma ? nullptr : config.object().Find(name);
    if (found != nullptr) return Unsupported(config, name, Brief(*found), "absent");
  }
  return absl::OkStatus();
}

// What a member left out is, or null, which says that there is none.
absl::StatusOr<double> NumberOrNone(const JsonReader& config, absl::string_view name,
                                    double left_out) {
  if (IsLeftOut(config, name)) return left_out;
  return config.NumberOr(name, 0, 1e-3, 1e9);
}

absl::Status ReadGemma(const JsonReader& config, ModelConfig& model) {
  model.activation = kernels::GateActivation::kGeluTanh;
  model.post_norms = true;
  model.norm_weight_offset = 1;
  model.embedding_scale = static_cast<float>(std::sqrt(static_cast<double>(model.hidden)));
  HEADROOM_ASSIGN_OR_RETURN(const double scalar, config.NumberOr("query_pre_attn_scalar", 256, 1e-3, 1e9));
  model.query_scalar = scalar;
  HEADROOM_ASSIGN_OR_RETURN(const double scores, NumberOrNone(config, "attn_logit_softcapping", 50));
  model.attention_soft_cap = static_cast<float>(scores);
  HEADROOM_ASSIGN_OR_RETURN(const double logits, NumberOrNone(config, "final_logit_softcapping", 30));
  model.logit_soft_cap = static_cast<float>(logits);
  return absl::OkStatus();
}

// The layers that a file says see a window.
absl::StatusOr<std::vector<bool>> WindowedLayers(const JsonReader& config, const Family& family,
                                                 int32_t num_layers) {
  std::vector<bool> windowed(num_layers, family.window == WindowRule::kAll);
  if (family.window == WindowRule::kEven) {
    for (int32_t layer = 0; layer < num_layers; layer += 2) windowed[layer] = true;
  }
  if (family.window == WindowRule::kBySwitch) {
    HEADROOM_ASSIGN_OR_RETURN(const bool use, config.BoolOr("use_sliding_window", false));
    if (!use) return windowed;  // whatever is listed
    HEADROOM_ASSIGN_OR_RETURN(const int64_t from, config.IntOr("max_window_layers", 28, 0, 1 << 20));
    for (int64_t layer = from; layer < num_layers; ++layer) windowed[layer] = true;
  }
  const Json* const types = config.object().Find("layer_types");
  if (types == nullptr) return windowed;
  if (!types->is_array() || static_cast<int64_t>(types->as_array().size()) != num_layers) {
    return config.Wrong("layer_types", absl::StrCat("a list of ", num_layers, " kinds of layers"));
  }
  for (int32_t layer = 0; layer < num_layers; ++layer) {
    const Json& type = types->as_array()[layer];
    const bool full = type.is_string() && type.as_string() == "full_attention";
    const bool sliding = type.is_string() && type.as_string() == "sliding_attention";
    const bool may_slide = family.window == WindowRule::kEven || family.window == WindowRule::kBySwitch;
    if (!full && !(sliding && may_slide)) {
      return Unsupported(config, "layer_types", Brief(type),
                         may_slide ? "full_attention, sliding_attention" : "full_attention");
    }
    if (may_slide) windowed[layer] = sliding;
  }
  return windowed;
}

absl::Status ReadWindows(const JsonReader& config, const Family& family, ModelConfig& model) {
  // What the family does not have, and does not look at.
  const auto refuse = [&config](absl::string_view name) -> absl::Status {
    const Json* const found = config.object().Find(name);
    if (found == nullptr || SameValue(*found, false)) return absl::OkStatus();
    return Unsupported(config, name, Brief(*found), "absent");
  };
  if (family.window == WindowRule::kNone) HEADROOM_RETURN_IF_ERROR(refuse("sliding_window"));
  if (family.window != WindowRule::kBySwitch) {
    HEADROOM_RETURN_IF_ERROR(refuse("use_sliding_window"));
  }
  HEADROOM_ASSIGN_OR_RETURN(const std::vector<bool> windowed,
                            WindowedLayers(config, family, model.num_layers));
  int64_t window = 4096;
  if (!IsLeftOut(config, "sliding_window")) {
    HEADROOM_ASSIGN_OR_RETURN(window, config.IntOr("sliding_window", 0, 1, int64_t{1} << 31));
  }
  if (window == 0 || std::find(windowed.begin(), windowed.end(), true) == windowed.end()) {
    return absl::OkStatus();
  }
  for (const bool is : windowed) model.windows.push_back(is ? window : 0);
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

absl::StatusOr<ModelConfig> ReadModelConfigJson(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": expected a JSON object"));
  }
  const JsonReader config(json, where);
  HEADROOM_ASSIGN_OR_RETURN(const Family* const family, FindFamily(config));
  HEADROOM_RETURN_IF_ERROR(CheckOptions(config, *family));
  ModelConfig model;
  model.architecture = std::string(family->architecture);
  model.qkv_bias = family->qkv_bias;
  model.qk_norm = family->qk_norm;
  HEADROOM_ASSIGN_OR_RETURN(model.num_layers, config.Int("num_hidden_layers", 1, 1024));
  HEADROOM_ASSIGN_OR_RETURN(model.num_q_heads, config.Int("num_attention_heads", 1, 1024));
  const int64_t kv_heads_otherwise =
      family->kv_heads_otherwise == 0 || !IsLeftOut(config, "num_key_value_heads")
          ? model.num_q_heads
          : family->kv_heads_otherwise;
  HEADROOM_ASSIGN_OR_RETURN(
      model.num_kv_heads,
      config.IntOr("num_key_value_heads", kv_heads_otherwise, 1, model.num_q_heads));
  if (model.num_q_heads % model.num_kv_heads != 0) {
    return config.Wrong("num_key_value_heads",
                        absl::StrCat("a divisor of num_attention_heads, ", model.num_q_heads));
  }
  HEADROOM_ASSIGN_OR_RETURN(model.hidden, config.Int("hidden_size", 1, 1 << 20));
  const int64_t head_dim_otherwise = family->head_dim_otherwise != 0
                                         ? family->head_dim_otherwise
                                         : model.hidden / model.num_q_heads;
  HEADROOM_ASSIGN_OR_RETURN(
      model.head_dim, config.IntOr("head_dim", head_dim_otherwise, 1, 1024));
  if (model.head_dim != 64 && model.head_dim != 128 && model.head_dim != 256) {
    return Unsupported(config, "head_dim", absl::StrCat(model.head_dim), "64, 128, 256");
  }
  HEADROOM_ASSIGN_OR_RETURN(model.intermediate, config.Int("intermediate_size", 1, 1 << 24));
  HEADROOM_ASSIGN_OR_RETURN(model.vocab, config.Int("vocab_size", 1, 1 << 24));
  HEADROOM_ASSIGN_OR_RETURN(model.max_position_tokens,
                            config.Int("max_position_embeddings", 1, int64_t{1} << 31));
  HEADROOM_ASSIGN_OR_RETURN(model.rms_norm_epsilon, config.NumberOr("rms_norm_eps", 1e-6, 0, 1));
  HEADROOM_ASSIGN_OR_RETURN(model.tied_embeddings, config.BoolOr("tie_word_embeddings", family->gemma));
  HEADROOM_RETURN_IF_ERROR(ReadRope(config, model));
  HEADROOM_RETURN_IF_ERROR(ReadWindows(config, *family, model));
  if (family->gemma) HEADROOM_RETURN_IF_ERROR(ReadGemma(config, model));
  return model;
}

}  // namespace

float ModelConfig::attention_scale() const {
  const double scalar = query_scalar != 0 ? query_scalar : static_cast<double>(head_dim);
  return 1.0f / std::sqrt(static_cast<float>(scalar));
}

std::vector<double> ModelConfig::NumbersBehindKeys() const {
  std::vector<double> numbers = {rms_norm_epsilon,
                                 static_cast<double>(post_norms),
                                 norm_weight_offset,
                                 embedding_scale,
                                 static_cast<double>(activation),
                                 query_scalar,
                                 attention_soft_cap};
  for (const int64_t window : windows) numbers.push_back(static_cast<double>(window));
  return numbers;
}

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
  return ReadModelConfigJson(json, path);
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, const std::string& where) {
  HEADROOM_ASSIGN_OR_RETURN(const Json json, Json::Parse(text, kMaxConfigBytes));
  return ReadModelConfigJson(json, where);
}

}  // namespace headroom
