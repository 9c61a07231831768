// What a Hugging Face config.json says of a decoder, checked.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_MODEL_CONFIG_H_
#define HEADROOM_SERVICES_WORKER_MODEL_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/kv_layout.h"
#include "kernels/swiglu.h"

namespace headroom {

// Llama-3's stretching of the low RoPE frequencies.
struct Llama3RopeScaling {
  double factor = 1;
  double low_freq_factor = 1;
  double high_freq_factor = 4;
  double original_max_position_tokens = 8192;
};

struct ModelConfig {
  std::string architecture;
  int32_t num_layers = 0;
  int32_t num_q_heads = 0;
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;
  int64_t hidden = 0;
  int64_t intermediate = 0;
  int64_t vocab = 0;
  int64_t max_position_tokens = 0;
  double rms_norm_epsilon = 1e-5;
  double rope_theta = 10000;
  std::optional<Llama3RopeScaling> rope_scaling;
  bool tied_embeddings = false;
  bool qkv_bias = false;  // q, k and v have one
  bool qk_norm = false;   // each head of q and k is normalised before it is turned
  bool post_norms = false;  // what attention and MLP come to is normalised before it is added
  float norm_weight_offset = 0;  // added to the norms' weights
  float embedding_scale = 1;
  kernels::GateActivation activation = kernels::GateActivation::kSilu;
  double query_scalar = 0;     // scores are q . k / sqrt(query_scalar); 0: head_dim
  float attention_soft_cap = 0;  // of scores; 0: none
  float logit_soft_cap = 0;      // likewise
  // Per layer the tokens that a query sees, its own among them; 0, or no entry: all up to it.
  std::vector<int64_t> windows;

  int64_t window(int32_t layer) const {
    return layer < static_cast<int32_t>(windows.size()) ? windows[layer] : 0;
  }
  float attention_scale() const;
  KvGeometry kv_geometry() const { return {num_layers, num_kv_heads, head_dim}; }
  int64_t qkv_width() const { return int64_t{num_q_heads + 2 * num_kv_heads} * head_dim; }
  // Radians per position of each of the head_dim / 2 pairs, rounded to float32 where Hugging Face
  // rounds them.
  std::vector<float> InverseFrequencies() const;
  // All else of the options that keys and values hang on, in a fixed order.
  std::vector<double> NumbersBehindKeys() const;
};

// Reads `model_dir`/config.json. INVALID_ARGUMENT names the member and what was expected; an
// architecture or an option that changes the maths and is not implemented is refused by name
// (UNIMPLEMENTED), never ignored.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::string& model_dir);
// ... of a file of any name.
absl::StatusOr<ModelConfig> ReadModelConfigFile(const std::string& path);
// ... of such a file's content; errors name `where`.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view text, const std::string& where);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_MODEL_CONFIG_H_
