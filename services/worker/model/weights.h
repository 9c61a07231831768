// The weights of a decoder in a device's arena.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_
#define HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_

#include <array>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "kernels/gemm.h"
#include "services/worker/model/model_config.h"

namespace headroom {

// Linear layers packed as the device's Gemm reads them; q, k and v are one matrix, gate and up too.
struct LayerWeights {
  const kernels::BFloat16* attention_norm = nullptr;  // [hidden]
  kernels::PackedWeight qkv;                          // [(q + 2 kv heads) * head_dim, hidden]
  const kernels::BFloat16* qkv_bias = nullptr;        // [(q + 2 kv heads) * head_dim], or none
  const kernels::BFloat16* q_norm = nullptr;          // [head_dim], or none
  const kernels::BFloat16* k_norm = nullptr;          // likewise
  kernels::PackedWeight output;                       // [hidden, q heads * head_dim]
  const kernels::BFloat16* mlp_norm = nullptr;        // [hidden]
  const kernels::BFloat16* post_attention_norm = nullptr;  // [hidden], or none
  const kernels::BFloat16* post_mlp_norm = nullptr;        // likewise
  kernels::PackedWeight gate_up;                      // [2 * intermediate, hidden]
  kernels::PackedWeight down;                         // [hidden, intermediate]
};

struct ModelWeights {
  kernels::PackedWeight embedding;  // [vocab, hidden]
  std::vector<LayerWeights> layers;
  const kernels::BFloat16* final_norm = nullptr;  // [hidden]
  kernels::PackedWeight lm_head;                  // [vocab, hidden]; the embedding where tied
  const float* inverse_frequency = nullptr;       // [head_dim / 2]
  // XXH3-128 over names, shapes and bytes of the weights, the RoPE frequencies and the options: all
  // that keys and values hang on.
  std::array<uint8_t, 16> fingerprint = {};
};

// What LoadWeights will allocate on a device that packs an [n, k] matrix into packed_bytes(n, k).
int64_t WeightBytes(const ModelConfig& config,
                    const std::function<int64_t(int64_t n, int64_t k)>& packed_bytes);
int64_t WeightBytes(const ModelConfig& config, const Device& device);

// Reads the safetensors of `model_dir` piece by piece into the arena (at most 8 MiB of host memory
// at a time). `progress` gets the share done, never falling, at the end 1. Errors (NOT_FOUND,
// INVALID_ARGUMENT, DATA_LOSS) name file and tensor, be it wrong, missing or one too many.
absl::StatusOr<ModelWeights> LoadWeights(const std::string& model_dir, const ModelConfig& config,
                                         Device& device,
                                         const std::function<void(double)>& progress);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_
