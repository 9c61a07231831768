#include "services/headroom/bench/geometries.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace headroom {
namespace {

// The members of each model's published config.json that a decoder is made of.
constexpr struct {
  const char* name;
  const char* config;
} kGeometries[] = {
    {"llama-3-8b", R"({
       "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
       "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
       "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
       "tie_word_embeddings": false, "vocab_size": 128256})"},
    {"llama-2-7b", R"({
       "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
       "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32,
       "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
       "vocab_size": 32000})"},
    {"mistral-7b", R"({
       "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
       "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
       "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
       "sliding_window": 4096, "tie_word_embeddings": false, "vocab_size": 32000})"},
    {"qwen2-7b", R"({
       "architectures": ["Qwen2ForCausalLM"], "hidden_size": 3584, "intermediate_size": 18944,
       "max_position_embeddings": 131072, "max_window_layers": 28, "num_attention_heads": 28,
       "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
       "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false,
       "use_sliding_window": false, "vocab_size": 152064})"},
    {"qwen3-8b", R"({
       "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "head_dim": 128,
       "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
       "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
       "rms_norm_eps": 1e-06, "rope_theta": 1000000, "sliding_window": null,
       "tie_word_embeddings": false, "use_sliding_window": false, "vocab_size": 151936})"},
    {"gemma-2-9b", R"({
       "architectures": ["Gemma2ForCausalLM"], "attn_logit_softcapping": 50.0,
       "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
       "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
       "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
       "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
       "sliding_window": 4096, "tie_word_embeddings": true, "vocab_size": 256000})"},
};

}  // namespace

std::vector<std::string> GeometryNames() {
  std::vector<std::string> names;
  for (const auto& geometry : kGeometries) names.emplace_back(geometry.name);
  return names;
}

absl::StatusOr<ModelConfig> GeometryOf(absl::string_view name) {
  for (const auto& geometry : kGeometries) {
    if (name == geometry.name) return ParseModelConfig(geometry.config, geometry.name);
  }
  return absl::NotFoundError(
      absl::StrCat("no geometry '", name, "'; there are ", absl::StrJoin(GeometryNames(), ", ")));
}

}  // namespace headroom
