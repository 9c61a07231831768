#include "tests/common/random_model.h"

#include <algorithm>
#include <bit>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <map>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "tests/common/byte_tokenizer.h"

namespace headroom {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

using Json = nlohmann::json;  // objects sorted by key, as make_goldens.py dumps them

constexpr uint64_t kGolden = 0x9E3779B97F4A7C15u;
// Standard deviation of 2 * (sum of four 16-bit uniforms) - 262140.
constexpr double kSumDeviation = 75674.5;
constexpr int64_t kMaxDimension = int64_t{1} << 24;
constexpr int64_t kMaxElements = int64_t{1} << 36;
constexpr int64_t kBufferElements = int64_t{1} << 16;

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

uint64_t Fnv1a64(std::string_view text) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (const unsigned char c : text) hash = (hash ^ c) * 0x100000001B3u;
  return hash;
}

uint16_t ToBfloat16(double value) {
  const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

struct Tensor {
  std::string name;
  int64_t rows;  // 0: a vector, a norm's or a bias
  int64_t columns;
  double gain;
  int64_t zero_rows = 0;
  double norm_shift = 0;

  bool IsNorm() const { return name.ends_with("norm.weight"); }

  int64_t Elements() const { return std::max<int64_t>(rows, 1) * columns; }
  int64_t Bytes() const { return Elements() * 2; }
};

class TensorValues {
 public:
  TensorValues(uint64_t seed, const Tensor& tensor)
      : key_(Mix(Mix(seed + kGolden) ^ Fnv1a64(tensor.name))),
        is_norm_(tensor.IsNorm()),
        gain_(tensor.gain),
        norm_shift_(tensor.norm_shift),
        scale_(tensor.gain /
               std::sqrt(static_cast<double>(tensor.rows == 0 ? 1 : tensor.columns)) /
               kSumDeviation),
        zero_below_(tensor.zero_rows * tensor.columns) {}

  uint16_t operator[](int64_t index) const {
    if (index < zero_below_) return 0;
    const uint64_t bits = Mix(key_ + (static_cast<uint64_t>(index) + 1) * kGolden);
    if (is_norm_) {
      return ToBfloat16(gain_ * (0.5 + static_cast<double>(bits >> 56) / 256) - norm_shift_);
    }
    const int64_t sum = static_cast<int64_t>((bits & 0xFFFF) + ((bits >> 16) & 0xFFFF) +
                                             ((bits >> 32) & 0xFFFF) + (bits >> 48));
    return ToBfloat16(static_cast<double>(2 * sum - 262140) * scale_);
  }

 private:
  const uint64_t key_;
  const bool is_norm_;
  const double gain_;
  const double norm_shift_;
  const double scale_;
  const int64_t zero_below_;
};

// All tensors in the order of their names, which is their order in the files.
std::vector<Tensor> Tensors(const RandomModelSpec& spec) {
  const RandomModelGains& gains = spec.gains;
  const int64_t hidden = spec.hidden_size, inner = spec.intermediate_size;
  const int64_t q_rows = spec.num_q_heads * spec.head_dim;
  const int64_t kv_rows = spec.num_kv_heads * spec.head_dim;
  std::vector<Tensor> tensors = {
      {"model.embed_tokens.weight", spec.vocab_size, hidden, gains.embed},
      {"model.norm.weight", 0, hidden, 1}};
  const bool gemma = spec.architecture == "Gemma2ForCausalLM";
  if (!spec.tie_word_embeddings) {
    tensors.push_back({"lm_head.weight", spec.vocab_size, hidden, gains.lm_head,
                       spec.never_ends ? kByteTokenizerFirstByte : 0});
  }
  for (int64_t layer = 0; layer < spec.num_layers; ++layer) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    const auto add = [&](const char* name, int64_t rows, int64_t columns, double gain) {
      tensors.push_back({absl::StrCat(prefix, name, ".weight"), rows, columns, gain});
    };
    add("input_layernorm", 0, hidden, 1);
    add("post_attention_layernorm", 0, hidden, gains.post_attention_norm);
    if (gemma) {
      add("pre_feedforward_layernorm", 0, hidden, 1);
      add("post_feedforward_layernorm", 0, hidden, gains.post_feedforward_norm);
    }
    if (spec.architecture == "Qwen3ForCausalLM") {
      add("self_attn.q_norm", 0, spec.head_dim, gains.q_norm);
      add("self_attn.k_norm", 0, spec.head_dim, gains.k_norm);
    }
    if (spec.architecture == "Qwen2ForCausalLM") {
      const auto add_bias = [&](const char* name, int64_t rows, double gain) {
        tensors.push_back({absl::StrCat(prefix, "self_attn.", name, "_proj.bias"), 0, rows, gain});
      };
      add_bias("q", q_rows, gains.bias);
      add_bias("k", kv_rows, gains.k_bias);
      add_bias("v", kv_rows, gains.bias);
    }
    add("self_attn.q_proj", q_rows, hidden, gains.q);
    add("self_attn.k_proj", kv_rows, hidden, gains.k);
    add("self_attn.v_proj", kv_rows, hidden, gains.v);
    add("self_attn.o_proj", hidden, q_rows, gains.o);
    add("mlp.gate_proj", inner, hidden, gains.gate);
    add("mlp.up_proj", inner, hidden, gains.up);
    add("mlp.down_proj", hidden, inner, gains.down);
  }
  for (Tensor& tensor : tensors) tensor.norm_shift = gemma ? 1 : 0;
  std::sort(tensors.begin(), tensors.end(),
            [](const Tensor& a, const Tensor& b) { return a.name < b.name; });
  return tensors;
}

absl::Status Invalid(const std::string& field, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat("RandomModelSpec.", field, ": ", why));
}

absl::Status CheckSpec(const RandomModelSpec& spec) {
  const std::initializer_list<std::pair<const char*, int64_t>> sizes = {
      {"num_layers", spec.num_layers},   {"hidden_size", spec.hidden_size},
      {"num_q_heads", spec.num_q_heads}, {"num_kv_heads", spec.num_kv_heads},
      {"head_dim", spec.head_dim},       {"intermediate_size", spec.intermediate_size},
      {"vocab_size", spec.vocab_size},   {"max_position_embeddings", spec.max_position_embeddings},
      {"num_shards", spec.num_shards}};
  for (const auto& [name, size] : sizes) {
    if (size < 1 || size > kMaxDimension) return Invalid(name, absl::StrCat(size, " out of range"));
  }
  if (spec.num_layers > 1024) return Invalid("num_layers", "over 1024");
  if (spec.num_q_heads % spec.num_kv_heads != 0) {
    return Invalid("num_q_heads", "no multiple of num_kv_heads");
  }
  if (spec.head_dim > 4096 || spec.num_q_heads > 4096) return Invalid("head_dim", "too large");
  int64_t elements = 0;
  for (const Tensor& tensor : Tensors(spec)) {  // each below 2^48, so no sum of two overflows
    elements += tensor.Elements();
    if (elements > kMaxElements) return Invalid("hidden_size", "over 128 GiB of weights");
  }
  if (spec.with_tokenizer && spec.vocab_size < kByteTokenizerMinVocab) {
    return Invalid("vocab_size", absl::StrCat("below ", kByteTokenizerMinVocab, ", tokenizer"));
  }
  if (spec.never_ends && (spec.tie_word_embeddings || spec.vocab_size < kByteTokenizerFirstByte)) {
    return Invalid("never_ends", "needs an LM head of its own that has the special ids");
  }
  return absl::OkStatus();
}

absl::Status WriteText(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", path));
}

// One safetensors file of `tensors`; the header is padded with spaces to a multiple of 8 bytes.
absl::Status WriteSafetensors(uint64_t seed, const std::vector<Tensor>& tensors,
                              const std::string& path) {
  Json header = {{"__metadata__", {{"format", "pt"}}}};
  int64_t offset = 0;
  for (const Tensor& tensor : tensors) {
    Json shape = Json::array({tensor.columns});
    if (tensor.rows > 0) shape = Json::array({tensor.rows, tensor.columns});
    header[tensor.name] = {{"dtype", "BF16"},
                           {"shape", std::move(shape)},
                           {"data_offsets", {offset, offset + tensor.Bytes()}}};
    offset += tensor.Bytes();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  const uint64_t header_bytes = text.size();

  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));
  file << text;
  std::vector<uint16_t> buffer(kBufferElements);
  for (const Tensor& tensor : tensors) {
    const TensorValues values(seed, tensor);
    for (int64_t begin = 0; begin < tensor.Elements() && file; begin += kBufferElements) {
      const int64_t count = std::min(kBufferElements, tensor.Elements() - begin);
      for (int64_t i = 0; i < count; ++i) buffer[i] = values[begin + i];
      file.write(reinterpret_cast<const char*>(buffer.data()), count * 2);
    }
  }
  file.close();
  return file ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", path));
}

// A tensor goes to the shard in whose share of the bytes it begins; shards that get none are
// skipped.
std::vector<std::vector<Tensor>> CutIntoShards(std::vector<Tensor> tensors, int64_t num_shards,
                                               int64_t total_bytes) {
  std::map<int64_t, std::vector<Tensor>> by_share;
  const int64_t share_bytes = total_bytes / num_shards + 1;
  int64_t offset = 0;
  for (Tensor& tensor : tensors) {
    const int64_t bytes = tensor.Bytes();
    by_share[offset / share_bytes].push_back(std::move(tensor));
    offset += bytes;
  }
  std::vector<std::vector<Tensor>> shards;
  for (auto& [share, members] : by_share) shards.push_back(std::move(members));
  return shards;
}

absl::Status WriteWeights(const RandomModelSpec& spec, const std::string& dir) {
  if (spec.num_shards == 1) {
    return WriteSafetensors(spec.seed, Tensors(spec), dir + "/model.safetensors");
  }
  const int64_t total_bytes = RandomModelWeightBytes(spec);
  const auto shards = CutIntoShards(Tensors(spec), spec.num_shards, total_bytes);
  Json weight_map = Json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name =
        absl::StrFormat("model-%05d-of-%05d.safetensors", i + 1, shards.size());
    for (const Tensor& tensor : shards[i]) weight_map[tensor.name] = name;
    if (absl::Status status = WriteSafetensors(spec.seed, shards[i], dir + "/" + name);
        !status.ok()) {
      return status;
    }
  }
  const Json index = {{"metadata", {{"total_size", total_bytes}}},
                      {"weight_map", std::move(weight_map)}};
  return WriteText(dir + "/model.safetensors.index.json", index.dump(2) + "\n");
}

// model_type of an architecture.
std::string ModelType(const std::string& architecture) {
  std::string type = architecture.substr(0, architecture.find("ForCausalLM"));
  for (char& c : type) c = static_cast<char>(std::tolower(c));
  return type;
}

// The keys that transformers 4 writes for a LlamaForCausalLM, and those of the other families.
Json Config(const RandomModelSpec& spec) {
  Json rope_scaling = nullptr;
  if (spec.rope_scaling.has_value()) {
    const RandomRopeScaling& scaling = *spec.rope_scaling;
    rope_scaling = {{"rope_type", "llama3"},
                    {"factor", scaling.factor},
                    {"low_freq_factor", scaling.low_freq_factor},
                    {"high_freq_factor", scaling.high_freq_factor},
                    {"original_max_position_embeddings", scaling.original_max_position_embeddings}};
  }
  const bool gemma = spec.architecture == "Gemma2ForCausalLM";
  Json config = {{"architectures", {spec.architecture}},
          {"attention_bias", false},
          {"attention_dropout", 0.0},
          {"bos_token_id", kByteTokenizerBos},
          {"eos_token_id", kByteTokenizerEos},
          {"head_dim", spec.head_dim},
          {"hidden_act", gemma ? "gelu_pytorch_tanh" : "silu"},
          {"hidden_size", spec.hidden_size},
          {"initializer_range", 0.02},
          {"intermediate_size", spec.intermediate_size},
          {"max_position_embeddings", spec.max_position_embeddings},
          {"mlp_bias", false},
          {"model_type", ModelType(spec.architecture)},
          {"num_attention_heads", spec.num_q_heads},
          {"num_hidden_layers", spec.num_layers},
          {"num_key_value_heads", spec.num_kv_heads},
          {"pad_token_id", kByteTokenizerPad},
          {"pretraining_tp", 1},
          {"rms_norm_eps", spec.rms_norm_eps},
          {"rope_scaling", std::move(rope_scaling)},
          {"rope_theta", spec.rope_theta},
          {"tie_word_embeddings", spec.tie_word_embeddings},
          {"torch_dtype", "bfloat16"},
          {"use_cache", true},
          {"vocab_size", spec.vocab_size}};
  if (gemma) config["hidden_activation"] = "gelu_pytorch_tanh";
  const auto put = [&config](const char* name, const auto& option) {
    if (!option.has_value()) return;
    config[name] = *option;
    if (*option == 0 && !config[name].is_boolean()) config[name] = nullptr;
  };
  put("sliding_window", spec.sliding_window);
  if (spec.max_window_layers.has_value()) config["max_window_layers"] = *spec.max_window_layers;
  put("use_sliding_window", spec.use_sliding_window);
  put("attn_logit_softcapping", spec.attn_logit_softcapping);
  put("final_logit_softcapping", spec.final_logit_softcapping);
  put("query_pre_attn_scalar", spec.query_pre_attn_scalar);
  return config;
}

template <typename T>
void Take(Json& json, const char* key, T& value) {
  const auto it = json.find(key);
  if (it == json.end()) return;
  value = it->get<T>();
  json.erase(it);
}

template <typename T>
void Take(Json& json, const char* key, std::optional<T>& value) {
  if (json.contains(key)) Take(json, key, value.emplace());
}

// What is left in `json` was taken by nobody.
absl::Status NothingLeft(const Json& json) {
  if (json.empty()) return absl::OkStatus();
  return Invalid(json.items().begin().key(), "no such field");
}

}  // namespace

absl::Status WriteRandomModel(const RandomModelSpec& spec, const std::string& dir) {
  if (absl::Status status = CheckSpec(spec); !status.ok()) return status;
  std::error_code error;
  std::filesystem::create_directories(dir, error);
  if (error) return absl::InternalError(absl::StrCat("cannot make ", dir, ": ", error.message()));
  const Json generation = {{"bos_token_id", kByteTokenizerBos},
                           {"eos_token_id", kByteTokenizerEos},
                           {"pad_token_id", kByteTokenizerPad}};
  absl::Status status = WriteText(dir + "/config.json", Config(spec).dump(2) + "\n");
  if (status.ok()) status = WriteText(dir + "/generation_config.json", generation.dump(2) + "\n");
  if (status.ok()) status = WriteWeights(spec, dir);
  if (status.ok() && spec.with_tokenizer) {
    status = WriteByteTokenizer(spec.vocab_size, spec.max_position_embeddings, dir);
  }
  return status;
}

absl::StatusOr<RandomModelSpec> ParseRandomModelSpec(std::string_view text) {
  Json json = Json::parse(text, /*cb=*/nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return absl::InvalidArgumentError("RandomModelSpec: no JSON object");
  RandomModelSpec spec;
  try {  // nlohmann's get<T>() throws on a wrong type
    Take(json, "architecture", spec.architecture);
    Take(json, "sliding_window", spec.sliding_window);
    Take(json, "max_window_layers", spec.max_window_layers);
    Take(json, "use_sliding_window", spec.use_sliding_window);
    Take(json, "attn_logit_softcapping", spec.attn_logit_softcapping);
    Take(json, "final_logit_softcapping", spec.final_logit_softcapping);
    Take(json, "query_pre_attn_scalar", spec.query_pre_attn_scalar);
    Take(json, "seed", spec.seed);
    Take(json, "num_layers", spec.num_layers);
    Take(json, "hidden_size", spec.hidden_size);
    Take(json, "num_q_heads", spec.num_q_heads);
    Take(json, "num_kv_heads", spec.num_kv_heads);
    Take(json, "head_dim", spec.head_dim);
    Take(json, "intermediate_size", spec.intermediate_size);
    Take(json, "vocab_size", spec.vocab_size);
    Take(json, "max_position_embeddings", spec.max_position_embeddings);
    Take(json, "rope_theta", spec.rope_theta);
    Take(json, "rms_norm_eps", spec.rms_norm_eps);
    Take(json, "tie_word_embeddings", spec.tie_word_embeddings);
    Take(json, "num_shards", spec.num_shards);
    Take(json, "with_tokenizer", spec.with_tokenizer);
    Take(json, "never_ends", spec.never_ends);
    Json gains = Json::object(), scaling = nullptr;
    Take(json, "gains", gains);
    for (auto [name, gain] :
         std::initializer_list<std::pair<const char*, double*>>{{"embed", &spec.gains.embed},
                                                                {"q", &spec.gains.q},
                                                                {"k", &spec.gains.k},
                                                                {"v", &spec.gains.v},
                                                                {"o", &spec.gains.o},
                                                                {"gate", &spec.gains.gate},
                                                                {"up", &spec.gains.up},
                                                                {"down", &spec.gains.down},
                                                                {"lm_head", &spec.gains.lm_head},
                                                                {"bias", &spec.gains.bias},
                                                                {"k_bias", &spec.gains.k_bias},
                                                                {"post_feedforward_norm",
                                                                 &spec.gains.post_feedforward_norm},
                                                                {"q_norm", &spec.gains.q_norm},
                                                                {"k_norm", &spec.gains.k_norm},
                                                                {"post_attention_norm",
                                                                 &spec.gains.post_attention_norm}}) {
      Take(gains, name, *gain);
    }
    Take(json, "rope_scaling", scaling);
    if (!scaling.is_null()) {
      RandomRopeScaling& values = spec.rope_scaling.emplace();
      Take(scaling, "factor", values.factor);
      Take(scaling, "low_freq_factor", values.low_freq_factor);
      Take(scaling, "high_freq_factor", values.high_freq_factor);
      Take(scaling, "original_max_position_embeddings", values.original_max_position_embeddings);
    }
    for (const Json* rest : {&gains, &scaling, &json}) {
      if (absl::Status status = NothingLeft(*rest); !status.ok()) return status;
    }
  } catch (const Json::exception& e) {
    return absl::InvalidArgumentError(absl::StrCat("RandomModelSpec: ", e.what()));
  }
  return spec;
}

int64_t RandomModelWeightBytes(const RandomModelSpec& spec) {
  int64_t bytes = 0;
  for (const Tensor& tensor : Tensors(spec)) bytes += tensor.Bytes();
  return bytes;
}

}  // namespace headroom
