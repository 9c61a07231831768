#include "services/worker/model/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "common/device/cpu/cpu_device.h"
#include "services/worker/model/model_config.h"
#include "tests/common/random_model.h"
#include "tests/unit/services/worker_model/test_folder.h"

namespace headroom {
namespace {

using testing::AllOf;
using testing::HasSubstr;

RandomModelSpec Spec() {
  RandomModelSpec spec;
  spec.num_layers = 2;
  spec.hidden_size = 96;
  spec.num_q_heads = 2;
  spec.num_kv_heads = 1;
  spec.intermediate_size = 80;
  spec.vocab_size = 67;
  return spec;
}

class LoadWeightsTest : public testing::Test {
 protected:
  void Write(const RandomModelSpec& spec) {
    const absl::Status status = WriteRandomModel(spec, folder_.path());
    ASSERT_TRUE(status.ok()) << status;
  }
  // Loads into a device with an arena of `spare_bytes` beside what WeightBytes() says.
  absl::StatusOr<ModelWeights> Load(int64_t spare_bytes = 0) {
    absl::StatusOr<ModelConfig> config = ReadModelConfig(folder_.path());
    if (!config.ok()) return config.status();
    config_ = *config;
    CpuDeviceOptions options;
    options.arena_bytes = 1 << 20;
    device_ = *CreateCpuDevice(options);
    options.arena_bytes = WeightBytes(config_, *device_) + spare_bytes;
    device_ = *CreateCpuDevice(options);
    progress_.clear();
    return LoadWeights(folder_.path(), config_, *device_,
                       [this](double share) { progress_.push_back(share); });
  }
  std::array<uint8_t, 16> Fingerprint() {
    const absl::StatusOr<ModelWeights> weights = Load();
    EXPECT_TRUE(weights.ok()) << weights.status();
    return weights.ok() ? weights->fingerprint : std::array<uint8_t, 16>{};
  }
  // Replaces text in a file's header (of the same length) or a JSON file.
  void Replace(const std::string& name, const std::string& from, const std::string& to) {
    const std::string before = folder_.Read(name);
    const std::string after = absl::StrReplaceAll(before, {{from, to}});
    ASSERT_NE(before, after) << from << " is not in " << name;
    folder_.Write(name, after);
  }
  // Adds a tensor of two bytes to model.safetensors, or leaves one out.
  void Rewrite(const std::string& add, const std::string& leave_out);
  testing::AssertionResult IsRefused(const std::string& tensor, const std::string& words) {
    const absl::Status status = Load().status();
    const std::string message(status.message());
    if (!status.ok() && message.find(folder_.path() + "/model.safetensors") == 0 &&
        message.find("tensor '" + tensor + "'") != std::string::npos &&
        message.find(words) != std::string::npos) {
      return testing::AssertionSuccess();
    }
    return testing::AssertionFailure() << status;
  }

  TestFolder folder_;
  ModelConfig config_;
  std::unique_ptr<Device> device_;
  std::vector<double> progress_;
};

TEST_F(LoadWeightsTest, TakesExactlyTheBytesItSays) {
  for (const bool tied : {false, true}) {
    RandomModelSpec spec = Spec();
    spec.tie_word_embeddings = tied;
    Write(spec);
    const absl::StatusOr<ModelWeights> weights = Load();
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(device_->arena_use().used_bytes, device_->arena_use().capacity_bytes);
    EXPECT_EQ(weights->layers.size(), 2u);
    EXPECT_EQ(weights->embedding.n, 67);
    EXPECT_EQ(weights->embedding.k, 96);
    EXPECT_EQ(weights->lm_head.data == weights->embedding.data, tied);
    EXPECT_EQ(weights->layers[1].qkv.n, (2 + 2) * 64);
    EXPECT_EQ(weights->layers[1].output.k, 2 * 64);
    EXPECT_EQ(weights->layers[1].gate_up.n, 2 * 80);
    EXPECT_EQ(weights->layers[1].down.k, 80);
  }
}

TEST_F(LoadWeightsTest, NormsAndFrequenciesAreInTheArenaAsInTheFile) {
  Write(Spec());
  const absl::StatusOr<ModelWeights> weights = Load();
  ASSERT_TRUE(weights.ok()) << weights.status();
  const std::string file = folder_.Read("model.safetensors");
  const std::string norm(reinterpret_cast<const char*>(weights->final_norm), 96 * 2);
  EXPECT_NE(file.find(norm), std::string::npos);
  const std::vector<float> frequencies = config_.InverseFrequencies();
  EXPECT_EQ(std::memcmp(weights->inverse_frequency, frequencies.data(),
                        frequencies.size() * sizeof(float)),
            0);
}

TEST_F(LoadWeightsTest, ProgressRisesToOne) {
  Write(Spec());
  ASSERT_TRUE(Load().ok());
  ASSERT_GT(progress_.size(), 2u);
  EXPECT_TRUE(std::is_sorted(progress_.begin(), progress_.end()));
  EXPECT_GT(progress_.front(), 0);
  EXPECT_EQ(progress_.back(), 1);
}

TEST_F(LoadWeightsTest, AnArenaThatIsTooSmallIsSaid) {
  Write(Spec());
  const absl::Status status = Load(-256).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
}

TEST_F(LoadWeightsTest, AMissingTensorIsNamed) {
  Write(Spec());
  for (const char* name :
       {"model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "lm_head.weight",
        "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight"}) {
    Write(Spec());
    Rewrite("", name);
    EXPECT_TRUE(IsRefused(name, "is missing")) << name;
  }
}

TEST_F(LoadWeightsTest, ATensorTooManyIsNamed) {
  for (const char* name :
       {"model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight",
        "model.layers.2.mlp.up_proj.weight", "score.weight"}) {
    Write(Spec());
    Rewrite(name, "");
    EXPECT_TRUE(IsRefused(name, "no part of a LlamaForCausalLM with 2 layers")) << name;
  }
}

TEST_F(LoadWeightsTest, AModelWithMoreLayersThanItsConfigSaysIsRefused) {
  Write(Spec());
  Replace("config.json", "\"num_hidden_layers\": 2", "\"num_hidden_layers\": 1");
  EXPECT_TRUE(IsRefused("model.layers.1.input_layernorm.weight", "with 1 layers"));
}

TEST_F(LoadWeightsTest, WhatOlderFilesHoldBesideIsIgnored) {
  RandomModelSpec spec = Spec();
  spec.tie_word_embeddings = true;
  Write(spec);
  Rewrite("model.layers.0.self_attn.rotary_emb.inv_freq", "");
  EXPECT_TRUE(Load().ok());
  Write(spec);
  Rewrite("lm_head.weight", "");  // tied: the embedding is used
  EXPECT_TRUE(Load().ok());
}

TEST_F(LoadWeightsTest, AWrongShapeOrDtypeIsNamed) {
  Write(Spec());
  Replace("config.json", "\"intermediate_size\": 80", "\"intermediate_size\": 81");
  EXPECT_TRUE(IsRefused("model.layers.0.mlp.gate_proj.weight", "expected BF16 [81, 96]"));
  Write(Spec());
  Replace("model.safetensors", "BF16", "F16 ");
  EXPECT_TRUE(IsRefused("lm_head.weight", "dtype"));
  Write(Spec());
  Replace("model.safetensors", "\"BF16\"", "\"F16\" ");
  EXPECT_TRUE(IsRefused("model.embed_tokens.weight", "is F16 [67, 96], expected BF16 [67, 96]"));
}

// A config that asks for terabytes: said before memory is taken.
TEST_F(LoadWeightsTest, AShapeOutOfAllProportionIsNamed) {
  Write(Spec());
  ASSERT_TRUE(Load().ok());
  config_.vocab = 1 << 24;
  const absl::Status status = LoadWeights(folder_.path(), config_, *device_, {}).status();
  EXPECT_THAT(status.message(), AllOf(HasSubstr("tensor 'model.embed_tokens.weight'"),
                                      HasSubstr("expected BF16 [16777216, 96]")));
}

TEST_F(LoadWeightsTest, ShardsGiveTheSameWeights) {
  Write(Spec());
  const auto single = Fingerprint();
  std::filesystem::remove(folder_.path() + "/model.safetensors");
  RandomModelSpec sharded = Spec();
  sharded.num_shards = 3;
  Write(sharded);
  ASSERT_FALSE(std::filesystem::exists(folder_.path() + "/model.safetensors"));
  EXPECT_EQ(Fingerprint(), single);
}

TEST_F(LoadWeightsTest, TheFingerprintIsTheSameWhereTheModelIs) {
  Write(Spec());
  const auto once = Fingerprint();
  EXPECT_EQ(Fingerprint(), once);
  EXPECT_NE(once, (std::array<uint8_t, 16>{}));
}

TEST_F(LoadWeightsTest, OneBitOfAnyTensorChangesTheFingerprint) {
  Write(Spec());
  const auto before = Fingerprint();
  const std::string file = folder_.Read("model.safetensors");
  const size_t data = file.size() - static_cast<size_t>(RandomModelWeightBytes(Spec()));
  for (const size_t at : {data, data + (file.size() - data) / 2, file.size() - 1}) {
    std::string damaged = file;
    damaged[at] ^= 1;
    folder_.Write("model.safetensors", damaged);
    EXPECT_NE(Fingerprint(), before) << "byte " << at;
  }
  folder_.Write("model.safetensors", file);
  EXPECT_EQ(Fingerprint(), before);
}

TEST_F(LoadWeightsTest, WhatElseKeysHangOnChangesTheFingerprint) {
  Write(Spec());
  const auto before = Fingerprint();
  RandomModelSpec spec = Spec();
  spec.rope_theta = 10001;
  Write(spec);
  EXPECT_NE(Fingerprint(), before);
  spec = Spec();
  spec.rope_scaling.emplace();
  Write(spec);
  const auto scaled = Fingerprint();
  EXPECT_NE(scaled, before);
  spec.rope_scaling->factor = 9;
  Write(spec);
  EXPECT_NE(Fingerprint(), scaled);
  spec = Spec();
  spec.rms_norm_eps = 1e-6;
  Write(spec);
  EXPECT_NE(Fingerprint(), before);
  // How many positions are allowed is not part of what a key is.
  spec = Spec();
  spec.max_position_embeddings = 4096;
  Write(spec);
  EXPECT_EQ(Fingerprint(), before);
}

void LoadWeightsTest::Rewrite(const std::string& add, const std::string& leave_out) {
  const std::string file = folder_.Read("model.safetensors");
  uint64_t length = 0;
  std::memcpy(&length, file.data(), sizeof(length));
  std::string header = file.substr(8, length);
  std::string data = file.substr(8 + length);
  if (!leave_out.empty()) {  // its bytes stay, under a name that is ignored
    header = absl::StrReplaceAll(header, {{"\"" + leave_out + "\"", "\"x.rotary_emb.inv_freq\""}});
  }
  if (!add.empty()) {
    header.insert(header.rfind('}'), ",\"" + add + "\":{\"dtype\":\"BF16\",\"shape\":[1]," +
                                         "\"data_offsets\":[" + std::to_string(data.size()) + "," +
                                         std::to_string(data.size() + 2) + "]}");
    data += "ab";
  }
  length = header.size();
  std::string prefix(sizeof(length), '\0');
  std::memcpy(prefix.data(), &length, sizeof(length));
  folder_.Write("model.safetensors", prefix + header + data);
}

}  // namespace
}  // namespace headroom
