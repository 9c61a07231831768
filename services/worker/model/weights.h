// The weights of a decoder in a device's arena.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_
#define HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_

#include <array>
#include <cstdint>
#include <functional>
#include <memory>
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
  // XXH3-128 over names, shapes and digests of the weights, piece by piece, the RoPE frequencies and the
  // options: all that keys and values hang on.
  std::array<uint8_t, 16> fingerprint = {};
};

// What LoadWeights will allocate on a device that packs an [n, k] matrix into packed_bytes(n, k).
int64_t WeightBytes(const ModelConfig& config,
                    const std::function<int64_t(int64_t n, int64_t k)>& packed_bytes);
int64_t WeightBytes(const ModelConfig& config, const Device& device);

// Weights on their way from the safetensors of a folder into a device's arena, in two parts, so that all
// that wants to know where they will lie can be made meanwhile: plans of attention took 3.5 s, where 16 GB
// come in two.
class WeightLoading {
 public:
  // Finds all tensors and makes room for them. Errors (NOT_FOUND, INVALID_ARGUMENT) name file and tensor, be
  // it wrong, missing or one too many; RESOURCE_EXHAUSTED: the arena is too small.
  static absl::StatusOr<std::unique_ptr<WeightLoading>> Begin(const std::string& model_dir,
                                                              const ModelConfig& config,
                                                              Device& device);
  // What Begin() would say of the tensors, from the files' headers: no device, no memory.
  static absl::Status Check(const std::string& model_dir, const ModelConfig& config);
  ~WeightLoading();

  // All but the fingerprint; to be read when Fill() is done.
  const ModelWeights& weights() const { return weights_; }

  // Device::PrepareGemm() for all matrices. May run beside Fill().
  absl::Status PrepareProducts();

  // Reads them, once, piece by piece (with 64 MiB of host memory, more where one row of a matrix is longer
  // than 4 MiB), by threads of its own; returns the fingerprint. `progress` gets the share done, never
  // falling, at the end 1. DATA_LOSS names the file.
  absl::StatusOr<std::array<uint8_t, 16>> Fill(const std::function<void(double)>& progress);

 private:
  class Finder;
  class Loader;

  WeightLoading(ModelConfig config, Device& device);
  absl::Status Init(const std::string& model_dir);
  static absl::StatusOr<ModelWeights> FindAll(Finder& finder, const ModelConfig& config);
  static absl::StatusOr<LayerWeights> FindLayer(Finder& finder, const ModelConfig& config,
                                                int32_t layer);

  const ModelConfig config_;
  Device& device_;
  ModelWeights weights_;
  std::unique_ptr<Loader> loader_;
};

// All of it, one after the other.
absl::StatusOr<ModelWeights> LoadWeights(const std::string& model_dir, const ModelConfig& config,
                                         Device& device,
                                         const std::function<void(double)>& progress);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_WEIGHTS_H_
