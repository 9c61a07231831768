#include "services/worker/model/weights.h"

#include <xxhash.h>

#include <algorithm>
#include <memory>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/status.h"
#include "services/worker/model/read_ahead.h"
#include "services/worker/model/safetensors.h"

namespace headroom {
namespace {

using kernels::BFloat16;
using kernels::PackedWeight;

constexpr int64_t kPieceBytes = 4 << 20;  // the fingerprint hangs on it: with another comes another kSegmentFormatVersion
constexpr int64_t kBuffers = 16;
constexpr int kMostReaders = 8;

}  // namespace

// Finds a model's tensors, one after the other; alone, it checks a folder whose weights nobody loads.
class WeightLoading::Finder {
 public:
  using Parts = std::vector<std::pair<std::string, int64_t>>;

  explicit Finder(std::unique_ptr<SafetensorsReader> reader) : reader_(std::move(reader)) {}
  virtual ~Finder() = default;

  // One matrix made of several tensors, one below the other: names and rows.
  virtual absl::StatusOr<PackedWeight> Matrix(const Parts& parts, int64_t k) {
    int64_t n = 0;
    for (const auto& [name, rows] : parts) {
      HEADROOM_RETURN_IF_ERROR(Find(name, {rows, k}).status());
      n += rows;
    }
    return PackedWeight{nullptr, n, k};
  }

  // One vector made of several tensors, one behind the other: names and sizes.
  virtual absl::StatusOr<const BFloat16*> Vector(const Parts& parts) {
    for (const auto& [name, size] : parts) HEADROOM_RETURN_IF_ERROR(Find(name, {size}).status());
    return nullptr;
  }
  absl::StatusOr<const BFloat16*> Vector(const std::string& name, int64_t size) {
    return Vector(Parts{{name, size}});
  }

  // A tensor that was not asked for: a wrong guess about the architecture must not pass silently. A
  // copy of a tied embedding and stored frequencies, which older files have, say nothing new.
  absl::Status CheckNoneLeftOver(const ModelConfig& config) const {
    for (const auto& [name, tensor] : reader_->tensors()) {
      if (used_.contains(&tensor) || name.ends_with(".rotary_emb.inv_freq") ||
          (config.tied_embeddings && name == "lm_head.weight")) {
        continue;
      }
      return absl::InvalidArgumentError(
          absl::StrCat(reader_->file_name(tensor), ": tensor '", BriefText(name), "' is no part of a ",
                       config.architecture, " with ", config.num_layers, " layers"));
    }
    return absl::OkStatus();
  }

 protected:
  absl::StatusOr<const TensorInfo*> Find(const std::string& name,
                                         const std::vector<int64_t>& shape) {
    HEADROOM_ASSIGN_OR_RETURN(const TensorInfo* const tensor, reader_->Expect(name, "BF16", shape));
    used_.insert(tensor);
    return tensor;
  }
  const SafetensorsReader& reader() const { return *reader_; }

 private:
  const std::unique_ptr<SafetensorsReader> reader_;
  std::set<const TensorInfo*> used_;
};

// Makes room for the tensors too; then fills it, hashing the digests of what passes.
class WeightLoading::Loader : public WeightLoading::Finder {
 public:
  Loader(std::unique_ptr<SafetensorsReader> reader, Device& device, int64_t total_bytes)
      : Finder(std::move(reader)),
        device_(device),
        total_bytes_(total_bytes),
        hash_(XXH3_createState(), &XXH3_freeState) {
    XXH3_128bits_reset(hash_.get());
  }

  absl::StatusOr<PackedWeight> Matrix(const Parts& parts, int64_t k) override {
    // Before memory is taken for what may not be there.
    HEADROOM_ASSIGN_OR_RETURN(const PackedWeight found, Finder::Matrix(parts, k));
    const int64_t n = found.n;
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const packed,
                              device_.Allocate(device_.PackedBytes(n, k), "weights"));
    products_.insert({n, k});
    int64_t row = 0;
    for (const auto& [name, rows] : parts) {
      HEADROOM_ASSIGN_OR_RETURN(const TensorInfo* const tensor, Find(name, {rows, k}));
      const int64_t row_bytes = k * static_cast<int64_t>(sizeof(BFloat16));
      const int64_t rows_a_piece = std::max<int64_t>(1, kPieceBytes / row_bytes);
      for (int64_t done = 0; done < rows; done += rows_a_piece) {
        const int64_t count = std::min(rows_a_piece, rows - done);
        Add({tensor, done * row_bytes, count * row_bytes},
            {done == 0 ? name : "", packed, row + done, count, n, k});
      }
      row += rows;
    }
    return PackedWeight{reinterpret_cast<const BFloat16*>(packed), n, k};
  }

  absl::StatusOr<const BFloat16*> Vector(const Parts& parts) override {
    HEADROOM_RETURN_IF_ERROR(Finder::Vector(parts).status());
    int64_t bytes = 0;
    for (const auto& [name, size] : parts) bytes += size * static_cast<int64_t>(sizeof(BFloat16));
    HEADROOM_ASSIGN_OR_RETURN(uint8_t* const data, device_.Allocate(bytes, parts[0].first));
    int64_t at = 0;
    for (const auto& [name, size] : parts) {
      HEADROOM_ASSIGN_OR_RETURN(const TensorInfo* const tensor, Find(name, {size}));
      Add({tensor, 0, tensor->size_bytes}, {name, data + at, 0, 0, 0, 0});
      at += tensor->size_bytes;
    }
    return reinterpret_cast<const BFloat16*>(data);
  }

  absl::Status PrepareProducts() {
    for (const auto& [n, k] : products_) HEADROOM_RETURN_IF_ERROR(device_.PrepareGemm(n, k));
    return absl::OkStatus();
  }

  absl::Status Fill(const std::function<void(double)>& progress) {
    int64_t piece_bytes = 1;
    for (const TensorPiece& piece : pieces_) piece_bytes = std::max(piece_bytes, piece.size_bytes);
    const int64_t buffers_bytes = kBuffers * piece_bytes;
    const auto buffers = std::make_unique<uint8_t[]>(static_cast<size_t>(buffers_bytes));
    // A GPU copies from registered memory by itself, from other memory by way of the driver's.
    HEADROOM_RETURN_IF_ERROR(device_.RegisterHost(buffers.get(), buffers_bytes));
    const absl::Status filled = FillFrom(buffers.get(), piece_bytes, progress);
    const absl::Status released = device_.UnregisterHost(buffers.get());
    return filled.ok() ? released : filled;
  }

  // What else keys and values hang on.
  void HashNumber(double value) { XXH3_128bits_update(hash_.get(), &value, sizeof(value)); }

  std::array<uint8_t, 16> Fingerprint() const {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(hash_.get()));
    std::array<uint8_t, 16> bytes;
    std::copy(std::begin(canonical.digest), std::end(canonical.digest), bytes.begin());
    return bytes;
  }

 private:
  // Where a piece goes: rows of an [n, k] matrix, or plain bytes where `rows` is 0.
  struct Target {
    std::string begins;  // the tensor's name, of its first piece
    uint8_t* data;
    int64_t row_begin, rows, n, k;
  };

  void Add(const TensorPiece& piece, Target target) {
    pieces_.push_back(piece);
    targets_.push_back(std::move(target));
  }

  absl::Status FillFrom(uint8_t* buffers, int64_t buffer_bytes,
                        const std::function<void(double)>& progress) {
    const int readers =
        std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, kMostReaders);
    ReadAhead ahead(reader(), pieces_, buffers, buffer_bytes, kBuffers, readers);
    int64_t done_bytes = 0;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      const TensorPiece& piece = pieces_[i];
      const Target& to = targets_[i];
      HEADROOM_ASSIGN_OR_RETURN(const PieceBytes bytes, ahead.Next());
      if (!to.begins.empty()) HashName(to.begins, *piece.tensor);
      XXH3_128bits_update(hash_.get(), bytes.digest.data(), bytes.digest.size());
      HEADROOM_RETURN_IF_ERROR(
          to.rows == 0
              ? device_.Upload(to.data, bytes.data, piece.size_bytes)
              : device_.LoadWeightRows(reinterpret_cast<const BFloat16*>(bytes.data), to.row_begin,
                                       to.rows, to.n, to.k, to.data));
      done_bytes += piece.size_bytes;
      // The total counts padding: the last piece ends short of 1.
      const double share = static_cast<double>(done_bytes) / static_cast<double>(total_bytes_);
      if (progress) progress(std::min(1.0, share));
    }
    return absl::OkStatus();
  }

  void HashName(const std::string& name, const TensorInfo& tensor) {
    XXH3_128bits_update(hash_.get(), name.data(), name.size());
    XXH3_128bits_update(hash_.get(), tensor.shape.data(), tensor.shape.size() * sizeof(int64_t));
  }

  Device& device_;
  const int64_t total_bytes_;
  std::vector<TensorPiece> pieces_;
  std::vector<Target> targets_;  // of each piece
  std::set<std::pair<int64_t, int64_t>> products_;  // n and k of all matrices
  std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash_;
};

absl::StatusOr<LayerWeights> WeightLoading::FindLayer(Finder& finder, const ModelConfig& config,
                                                      int32_t layer) {
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const int64_t kv_width = int64_t{config.num_kv_heads} * config.head_dim;
  LayerWeights weights;
  HEADROOM_ASSIGN_OR_RETURN(weights.attention_norm,
                            finder.Vector(prefix + "input_layernorm.weight", config.hidden));
  HEADROOM_ASSIGN_OR_RETURN(
      weights.qkv, finder.Matrix({{prefix + "self_attn.q_proj.weight", q_width},
                                  {prefix + "self_attn.k_proj.weight", kv_width},
                                  {prefix + "self_attn.v_proj.weight", kv_width}},
                                 config.hidden));
  if (config.qkv_bias) {
    HEADROOM_ASSIGN_OR_RETURN(weights.qkv_bias,
                              finder.Vector({{prefix + "self_attn.q_proj.bias", q_width},
                                             {prefix + "self_attn.k_proj.bias", kv_width},
                                             {prefix + "self_attn.v_proj.bias", kv_width}}));
  }
  if (config.qk_norm) {
    HEADROOM_ASSIGN_OR_RETURN(weights.q_norm,
                              finder.Vector(prefix + "self_attn.q_norm.weight", config.head_dim));
    HEADROOM_ASSIGN_OR_RETURN(weights.k_norm,
                              finder.Vector(prefix + "self_attn.k_norm.weight", config.head_dim));
  }
  HEADROOM_ASSIGN_OR_RETURN(
      weights.output,
      finder.Matrix({{prefix + "self_attn.o_proj.weight", config.hidden}}, q_width));
  // With post-norms the name that a Llama has for the norm before the MLP is that of the one after
  // attention.
  const char* const mlp_norm =
      config.post_norms ? "pre_feedforward_layernorm.weight" : "post_attention_layernorm.weight";
  HEADROOM_ASSIGN_OR_RETURN(weights.mlp_norm, finder.Vector(prefix + mlp_norm, config.hidden));
  if (config.post_norms) {
    HEADROOM_ASSIGN_OR_RETURN(
        weights.post_attention_norm,
        finder.Vector(prefix + "post_attention_layernorm.weight", config.hidden));
    HEADROOM_ASSIGN_OR_RETURN(
        weights.post_mlp_norm,
        finder.Vector(prefix + "post_feedforward_layernorm.weight", config.hidden));
  }
  HEADROOM_ASSIGN_OR_RETURN(
      weights.gate_up, finder.Matrix({{prefix + "mlp.gate_proj.weight", config.intermediate},
                                      {prefix + "mlp.up_proj.weight", config.intermediate}},
                                     config.hidden));
  HEADROOM_ASSIGN_OR_RETURN(
      weights.down,
      finder.Matrix({{prefix + "mlp.down_proj.weight", config.hidden}}, config.intermediate));
  return weights;
}

int64_t WeightBytes(const ModelConfig& config, const Device& device) {
  return WeightBytes(config, [&](int64_t n, int64_t k) { return device.PackedBytes(n, k); });
}

int64_t WeightBytes(const ModelConfig& config,
                    const std::function<int64_t(int64_t n, int64_t k)>& packed_bytes) {
  constexpr int64_t kAlign = 256;
  const auto aligned = [](int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; };
  const int64_t q_width = int64_t{config.num_q_heads} * config.head_dim;
  const auto vector = [&](int64_t size) {
    return aligned(size * static_cast<int64_t>(sizeof(BFloat16)));
  };
  const int64_t norm = vector(config.hidden);
  const int64_t bias = config.qkv_bias ? vector(config.qkv_width()) : 0;
  const int64_t head_norms = config.qk_norm ? 2 * vector(config.head_dim) : 0;
  const auto packed = [&](int64_t n, int64_t k) { return aligned(packed_bytes(n, k)); };
  const int64_t layer = (config.post_norms ? 4 : 2) * norm + bias + head_norms + packed(config.qkv_width(), config.hidden) +
                        packed(config.hidden, q_width) +
                        packed(2 * config.intermediate, config.hidden) +
                        packed(config.hidden, config.intermediate);
  const int64_t vocab_matrices = config.tied_embeddings ? 1 : 2;
  return config.num_layers * layer + vocab_matrices * packed(config.vocab, config.hidden) + norm +
         aligned(config.head_dim / 2 * static_cast<int64_t>(sizeof(float)));
}

WeightLoading::WeightLoading(ModelConfig config, Device& device)
    : config_(std::move(config)), device_(device) {}
WeightLoading::~WeightLoading() = default;

absl::StatusOr<std::unique_ptr<WeightLoading>> WeightLoading::Begin(const std::string& model_dir,
                                                                    const ModelConfig& config,
                                                                    Device& device) {
  auto loading = std::unique_ptr<WeightLoading>(new WeightLoading(config, device));
  HEADROOM_RETURN_IF_ERROR(loading->Init(model_dir));
  return loading;
}

absl::StatusOr<ModelWeights> WeightLoading::FindAll(Finder& finder, const ModelConfig& config) {
  ModelWeights weights;
  HEADROOM_ASSIGN_OR_RETURN(
      weights.embedding, finder.Matrix({{"model.embed_tokens.weight", config.vocab}}, config.hidden));
  for (int32_t layer = 0; layer < config.num_layers; ++layer) {
    HEADROOM_ASSIGN_OR_RETURN(LayerWeights layer_weights, FindLayer(finder, config, layer));
    weights.layers.push_back(layer_weights);
  }
  HEADROOM_ASSIGN_OR_RETURN(weights.final_norm, finder.Vector("model.norm.weight", config.hidden));
  weights.lm_head = weights.embedding;
  if (!config.tied_embeddings) {
    HEADROOM_ASSIGN_OR_RETURN(weights.lm_head,
                              finder.Matrix({{"lm_head.weight", config.vocab}}, config.hidden));
  }
  HEADROOM_RETURN_IF_ERROR(finder.CheckNoneLeftOver(config));
  return weights;
}

absl::Status WeightLoading::Check(const std::string& model_dir, const ModelConfig& config) {
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsReader> reader,
                            SafetensorsReader::Open(model_dir));
  Finder finder(std::move(reader));
  return FindAll(finder, config).status();
}

absl::Status WeightLoading::Init(const std::string& model_dir) {
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsReader> reader,
                            SafetensorsReader::Open(model_dir));
  loader_ = std::make_unique<Loader>(std::move(reader), device_, WeightBytes(config_, device_));
  HEADROOM_ASSIGN_OR_RETURN(weights_, FindAll(*loader_, config_));
  const std::vector<float> frequencies = config_.InverseFrequencies();
  const int64_t bytes = static_cast<int64_t>(frequencies.size() * sizeof(float));
  HEADROOM_ASSIGN_OR_RETURN(uint8_t* const data, device_.Allocate(bytes, "weights"));
  HEADROOM_RETURN_IF_ERROR(device_.Upload(data, frequencies.data(), bytes));
  weights_.inverse_frequency = reinterpret_cast<const float*>(data);
  return absl::OkStatus();
}

absl::Status WeightLoading::PrepareProducts() { return loader_->PrepareProducts(); }

absl::StatusOr<std::array<uint8_t, 16>> WeightLoading::Fill(
    const std::function<void(double)>& progress) {
  HEADROOM_RETURN_IF_ERROR(loader_->Fill(progress));
  for (const float frequency : config_.InverseFrequencies()) loader_->HashNumber(frequency);
  for (const double option : config_.NumbersBehindKeys()) loader_->HashNumber(option);
  if (progress) progress(1);
  return loader_->Fingerprint();
}

absl::StatusOr<ModelWeights> LoadWeights(const std::string& model_dir, const ModelConfig& config,
                                         Device& device,
                                         const std::function<void(double)>& progress) {
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<WeightLoading> loading,
                            WeightLoading::Begin(model_dir, config, device));
  HEADROOM_RETURN_IF_ERROR(loading->PrepareProducts());
  ModelWeights weights = loading->weights();
  HEADROOM_ASSIGN_OR_RETURN(weights.fingerprint, loading->Fill(progress));
  return weights;
}

}  // namespace headroom
