// Models with random weights, written as Hugging Face folders: the goldens are computed on
// such a folder in Python (tests/golden/make_goldens.py), which draws the same bytes, so no weight
// is ever committed; system tests serve them where no real model is needed.
//
// Every weight is a function of (seed, tensor name, index in the tensor) alone, made of 64-bit
// integer operations, one double multiplication and two roundings to nearest even (float32,
// bfloat16): the same bits on every machine, compiler and language.
//   G = 0x9E3779B97F4A7C15, Mix = splitmix64's finaliser
//   key     = Mix(Mix(seed + G) ^ Fnv1a64(name))
//   bits(i) = Mix(key + (i + 1) * G)
//   matrix: (2 * (sum of the four 16-bit fields of bits) - 262140) * scale,
//           scale = gain / sqrt(columns) / 75674.5:
//           close to a normal of standard deviation gain / sqrt(columns), cut at 3.46 of them
//   bias:   as a matrix of one column
//   norm:   gain * (0.5 + (bits >> 56) / 256), less 1 where the family adds it
#ifndef HEADROOM_TESTS_COMMON_RANDOM_MODEL_H_
#define HEADROOM_TESTS_COMMON_RANDOM_MODEL_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace headroom {

// Llama 3's stretching of the low RoPE frequencies, as in config.json's rope_scaling.
struct RandomRopeScaling {
  double factor = 8.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 64;
};

// A matrix's entries have standard deviation gain / sqrt(columns), so with inputs of unit size its
// outputs have standard deviation `gain`. q x k is the standard deviation of the attention scores:
// near 2 the softmax is peaked enough for one wrong block of keys to show in the logits, and not so
// peaked that bfloat16's rounding shows more. o and down make attention outweigh the MLP.
struct RandomModelGains {
  double embed = 2.5;  // the residual stream starts at 2.5 / sqrt(hidden)
  double q = 1.4;
  double k = 1.4;
  double v = 1.0;
  double o = 3.0;
  double gate = 1.0;
  double up = 1.0;
  double down = 0.6;
  double lm_head = 2.5;  // the standard deviation of the logits (embed's where embeddings are tied)
  // Of families that have such weights. After norms of its heads q has size q_norm, whatever q is.
  double bias = 1.0;
  double k_bias = 2.0;
  double q_norm = 1.4;
  double k_norm = 1.4;
  double post_attention_norm = 1.0;
  double post_feedforward_norm = 1.0;
};

// The default is a model for system tests: 4 layers, 12 query heads on 4 KV heads (group 3),
// 4.8 MiB of weights.
struct RandomModelSpec {
  // Of services/worker/model/model_config.cc's families.
  std::string architecture = "LlamaForCausalLM";
  uint64_t seed = 1;  // below 2^53 if it is to survive JSON
  int64_t num_layers = 4;
  int64_t hidden_size = 192;
  int64_t num_q_heads = 12;
  int64_t num_kv_heads = 4;
  int64_t head_dim = 64;
  int64_t intermediate_size = 328;
  int64_t vocab_size = 517;
  int64_t max_position_embeddings = 8192;
  double rope_theta = 10000.0;
  double rms_norm_eps = 1e-5;
  bool tie_word_embeddings = false;
  std::optional<RandomRopeScaling> rope_scaling;
  // Of config.json, where they are set; null there where they are 0.
  std::optional<int64_t> sliding_window;
  std::optional<int64_t> max_window_layers;
  std::optional<bool> use_sliding_window;
  std::optional<double> attn_logit_softcapping;
  std::optional<double> final_logit_softcapping;
  std::optional<double> query_pre_attn_scalar;
  RandomModelGains gains;

  // Weights are cut into at most this many files of about the same size, with an index; 1 writes
  // model.safetensors alone.
  int64_t num_shards = 1;
  // Writes a byte-level tokenizer and a chat template too (byte_tokenizer.h).
  // REQUIRES: vocab_size >= kByteTokenizerMinVocab
  bool with_tokenizer = false;
  // Zeroes the LM head's rows of the tokenizer's special ids: their logits are exactly 0, so greedy
  // decoding practically never stops by itself. REQUIRES: not tie_word_embeddings
  bool never_ends = false;
};

// Writes config.json, generation_config.json, the weights and, if asked for, the tokenizer into
// `dir`, which is made where absent; files of those names are replaced. Needs memory for one buffer
// of 128 KiB only, whatever the model's size. Errors: INVALID_ARGUMENT (the spec's field named),
// INTERNAL (a file cannot be written).
absl::Status WriteRandomModel(const RandomModelSpec& spec, const std::string& dir);

// The `spec` object of a golden's sidecar: keys are the members' names above, all optional.
// Errors: INVALID_ARGUMENT (not JSON, an unknown key, a value of the wrong type).
absl::StatusOr<RandomModelSpec> ParseRandomModelSpec(std::string_view json);

// Bytes of all weights: what the folder's safetensors hold beside their headers.
// REQUIRES: a spec that WriteRandomModel accepts.
int64_t RandomModelWeightBytes(const RandomModelSpec& spec);

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_RANDOM_MODEL_H_
