#include "services/worker/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <numbers>
#include <string>
#include <vector>

#include "absl/strings/str_replace.h"
#include "tests/unit/services/worker_model/test_folder.h"

namespace headroom {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// SmolLM2-135M's, as published.
constexpr char kConfig[] = R"({
  "architectures": ["LlamaForCausalLM"],
  "attention_bias": false,
  "hidden_act": "silu",
  "hidden_size": 576,
  "intermediate_size": 1536,
  "max_position_embeddings": 8192,
  "mlp_bias": false,
  "num_attention_heads": 9,
  "num_hidden_layers": 30,
  "num_key_value_heads": 3,
  "pretraining_tp": 1,
  "rms_norm_eps": 1e-05,
  "rope_scaling": null,
  "rope_theta": 100000,
  "tie_word_embeddings": true,
  "torch_dtype": "bfloat16",
  "vocab_size": 49152
})";
constexpr char kLlama3[] =
    R"({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192})";

// 29 layers of full attention and a last one of another kind.
std::string LayerTypes(const std::string& last) {
  std::string list = "[";
  for (int layer = 0; layer < 29; ++layer) list += "\"full_attention\", ";
  return list + "\"" + last + "\"]";
}

class ReadModelConfigTest : public testing::Test {
 protected:
  absl::StatusOr<ModelConfig> Read(const std::string& json) {
    folder_.Write("config.json", json);
    return ReadModelConfig(folder_.path());
  }
  // With one member's value replaced; "" leaves the member out.
  absl::StatusOr<ModelConfig> ReadWith(const std::string& name, const std::string& value) {
    std::string json = "{";
    std::istringstream lines(kConfig);
    for (std::string line; std::getline(lines, line);) {
      const bool is_brace = line == "{" || line == "}";
      if (is_brace || line.find("\"" + name + "\"") != std::string::npos) continue;
      json += line + (line.back() == ',' ? "" : ",");
    }
    json += value.empty() ? R"("last": 0})" : "\"" + name + "\": " + value + "}";
    return Read(json);
  }
  // Whether that is refused with this code, in words that name the file, the member and `words`.
  testing::AssertionResult IsRefused(const std::string& name, const std::string& value,
                                     absl::StatusCode code, const std::string& words = "") {
    const absl::Status status = ReadWith(name, value).status();
    const std::string message(status.message());
    const auto has = [&](const std::string& text) {
      return message.find(text) != std::string::npos;
    };
    if (status.code() == code && has(folder_.path() + "/config.json") && has("'" + name + "'") &&
        has(words)) {
      return testing::AssertionSuccess();
    }
    return testing::AssertionFailure() << name << " = " << value << " gives " << status;
  }
  testing::AssertionResult IsWrong(const std::string& name, const std::string& value,
                                   const std::string& words = "") {
    return IsRefused(name, value, absl::StatusCode::kInvalidArgument, words);
  }
  testing::AssertionResult IsUnsupported(const std::string& name, const std::string& value,
                                         const std::string& words = "") {
    return IsRefused(name, value, absl::StatusCode::kUnimplemented, words);
  }

  TestFolder folder_;
};

TEST_F(ReadModelConfigTest, TakesAPublishedFile) {
  const absl::StatusOr<ModelConfig> config = Read(kConfig);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->architecture, "LlamaForCausalLM");
  EXPECT_EQ(config->num_layers, 30);
  EXPECT_EQ(config->num_q_heads, 9);
  EXPECT_EQ(config->num_kv_heads, 3);
  EXPECT_EQ(config->head_dim, 64);  // from hidden_size / num_attention_heads
  EXPECT_EQ(config->hidden, 576);
  EXPECT_EQ(config->intermediate, 1536);
  EXPECT_EQ(config->vocab, 49152);
  EXPECT_EQ(config->max_position_tokens, 8192);
  EXPECT_EQ(config->rms_norm_epsilon, 1e-5);
  EXPECT_EQ(config->rope_theta, 100000);
  EXPECT_FALSE(config->rope_scaling.has_value());
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_EQ(config->qkv_width(), (9 + 2 * 3) * 64);
}

TEST_F(ReadModelConfigTest, WhatIsLeftOutIsAsTransformersHasIt) {
  EXPECT_EQ(ReadWith("num_key_value_heads", "")->num_kv_heads, 9);
  EXPECT_EQ(ReadWith("rms_norm_eps", "")->rms_norm_epsilon, 1e-6);
  EXPECT_EQ(ReadWith("rope_theta", "")->rope_theta, 10000);
  EXPECT_FALSE(ReadWith("tie_word_embeddings", "")->tied_embeddings);
  EXPECT_EQ(ReadWith("head_dim", "null")->head_dim, 64);
  EXPECT_EQ(ReadWith("head_dim", "128")->head_dim, 128);
}

TEST_F(ReadModelConfigTest, AFileThatIsNoConfigIsNamed) {
  const std::string path = folder_.path() + "/config.json";
  absl::Status status = ReadModelConfig(folder_.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr(path));
  for (const char* text : {"", "{", "[]", "3", "{\"hidden_size\": 1, \"hidden_size\": 2}"}) {
    status = Read(text).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(status.message(), HasSubstr(path)) << text;
  }
  EXPECT_THAT(Read(std::string(2 << 20, ' ')).status().message(),
              AllOf(HasSubstr(path), HasSubstr("at most")));
}

TEST_F(ReadModelConfigTest, EachWrongMemberIsNamed) {
  for (const char* name : {"hidden_size", "intermediate_size", "max_position_embeddings",
                           "num_attention_heads", "num_hidden_layers", "vocab_size"}) {
    for (const char* value : {"", "null", "0", "-1", "1.5", "\"8\"", "[8]", "1099511627776"}) {
      EXPECT_TRUE(IsWrong(name, value, "expected an integer from 1 to"));
    }
  }
  EXPECT_TRUE(IsWrong("num_key_value_heads", "0"));
  EXPECT_TRUE(IsWrong("num_key_value_heads", "2", "a divisor of num_attention_heads, 9"));
  EXPECT_TRUE(IsWrong("num_key_value_heads", "18"));
  EXPECT_TRUE(IsWrong("head_dim", "0"));
  EXPECT_TRUE(IsWrong("rms_norm_eps", "-1e-5"));
  EXPECT_TRUE(IsWrong("rms_norm_eps", "\"1e-5\""));
  EXPECT_TRUE(IsWrong("rope_theta", "0"));
  EXPECT_TRUE(IsWrong("tie_word_embeddings", "1"));
  EXPECT_TRUE(IsWrong("architectures", ""));
  EXPECT_TRUE(IsWrong("architectures", "[]"));
  EXPECT_TRUE(IsWrong("architectures", "[3]"));
  EXPECT_TRUE(IsWrong("architectures", "\"LlamaForCausalLM\""));
  EXPECT_TRUE(IsWrong("rope_scaling", "3"));
  EXPECT_TRUE(IsWrong("rope_parameters", "[]"));
  EXPECT_TRUE(IsWrong("layer_types", "3"));
  EXPECT_TRUE(IsWrong("layer_types", "[\"full_attention\"]", "a list of 30"));
}

TEST_F(ReadModelConfigTest, EachOptionThatWouldChangeTheMathsIsRefusedByName) {
  EXPECT_TRUE(IsUnsupported("architectures", "[\"GPT2LMHeadModel\"]", "GPT2LMHeadModel"));
  EXPECT_TRUE(IsUnsupported("hidden_act", "\"gelu\"", "gelu, supported: silu"));
  EXPECT_TRUE(IsUnsupported("attention_bias", "true"));
  EXPECT_TRUE(IsUnsupported("mlp_bias", "true"));
  EXPECT_TRUE(IsUnsupported("partial_rotary_factor", "0.5"));
  EXPECT_TRUE(IsUnsupported("quantization_config", "{\"quant_method\": \"gptq\"}", "gptq"));
  EXPECT_TRUE(IsUnsupported("sliding_window", "4096"));
  EXPECT_TRUE(IsUnsupported("attn_logit_softcapping", "50.0"));
  EXPECT_TRUE(IsUnsupported("final_logit_softcapping", "30.0"));
  EXPECT_TRUE(IsUnsupported("query_pre_attn_scalar", "256"));
  EXPECT_TRUE(IsUnsupported("use_sliding_window", "true"));
  EXPECT_TRUE(IsUnsupported("layer_types", LayerTypes("sliding_attention")));
  EXPECT_TRUE(IsUnsupported("layer_types", LayerTypes("chunked_attention")));
  EXPECT_TRUE(IsUnsupported("attention_chunk_size", "8192"));
  EXPECT_TRUE(IsUnsupported("no_rope_layers", "[1, 1, 1, 0]"));
  EXPECT_TRUE(IsUnsupported("rope_local_base_freq", "10000"));
  EXPECT_TRUE(IsUnsupported("is_causal", "false", "false, supported: true"));
  EXPECT_TRUE(IsUnsupported("embedding_multiplier", "12.0", "supported: 1"));
  EXPECT_TRUE(IsUnsupported("residual_multiplier", "0.22"));
  EXPECT_TRUE(IsUnsupported("attention_multiplier", "0.0078125"));
  EXPECT_TRUE(IsUnsupported("logits_scaling", "8.0"));
  EXPECT_TRUE(IsUnsupported("logit_scale", "0.0625"));
  EXPECT_TRUE(IsUnsupported("clip_qkv", "8.0"));
  EXPECT_TRUE(IsUnsupported("num_local_experts", "8"));
  EXPECT_TRUE(IsUnsupported("num_experts", "128"));
  EXPECT_TRUE(IsUnsupported("use_qk_norm", "true"));
  EXPECT_TRUE(IsUnsupported("qk_layernorm", "true"));
  EXPECT_TRUE(IsUnsupported("kv_lora_rank", "512"));
  EXPECT_TRUE(IsUnsupported("pretraining_tp", "2"));
  EXPECT_TRUE(IsUnsupported("head_dim", "96", "96, supported: 64, 128"));
  // Absent is what null says.
  EXPECT_TRUE(ReadWith("sliding_window", "null").ok());
  EXPECT_TRUE(ReadWith("quantization_config", "null").ok());
  // ... and what is done anyway may be said.
  EXPECT_TRUE(ReadWith("is_causal", "true").ok());
  EXPECT_TRUE(ReadWith("residual_multiplier", "1.0").ok());
  EXPECT_TRUE(ReadWith("use_mrope", "false").ok());
  EXPECT_TRUE(ReadWith("layer_types", LayerTypes("full_attention")).ok());
}

// What published files of the families say beside the members of a Llama.
TEST_F(ReadModelConfigTest, AFamilyIsWhatItsArchitectureSays) {
  const auto read = [&](const std::string& architecture, const std::string& members) {
    return Read(absl::StrReplaceAll(
        kConfig, {{"LlamaForCausalLM", architecture}, {"\"attention_bias\": false", members}}));
  };
  absl::StatusOr<ModelConfig> config =
      read("Qwen2ForCausalLM",
           R"("use_sliding_window": false, "sliding_window": 131072, "max_window_layers": 28)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_TRUE(config->qkv_bias);
  EXPECT_FALSE(config->qk_norm);
  EXPECT_EQ(config->head_dim, 64);
  config = read("Qwen3ForCausalLM", R"("attention_bias": false, "sliding_window": null)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->qkv_bias);
  EXPECT_TRUE(config->qk_norm);
  EXPECT_EQ(config->head_dim, 128);  // whatever hidden_size is
  config = read("MistralForCausalLM", R"("sliding_window": null)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->qkv_bias || config->qk_norm);
  EXPECT_TRUE(config->windows.empty());
  // A window that a Mistral's file has, and one that it leaves to transformers.
  for (const char* members : {R"("sliding_window": 4096)", R"("attention_bias": false)"}) {
    config = read("MistralForCausalLM", members);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->windows, std::vector<int64_t>(30, 4096)) << members;
  }
  EXPECT_THAT(read("MistralForCausalLM", R"("use_sliding_window": true)").status().message(),
              HasSubstr("'use_sliding_window'"));
  // Qwen's windows hang on a switch, and on a list if there is one.
  const std::string use = R"("use_sliding_window": true, "sliding_window": 100)";
  config = read("Qwen2ForCausalLM", use + R"(, "max_window_layers": 27)");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->window(26), 0);
  EXPECT_EQ(config->window(27), 100);
  EXPECT_EQ(config->window(29), 100);
  config = read("Qwen3ForCausalLM", use + ", \"layer_types\": " + LayerTypes("sliding_attention"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->window(28), 0);
  EXPECT_EQ(config->window(29), 100);
  // Qwen2's bias is no option, so its file does not name one.
  EXPECT_THAT(read("Qwen2ForCausalLM", R"("attention_bias": true)").status().message(),
              HasSubstr("'attention_bias'"));
  EXPECT_THAT(read("Qwen3ForCausalLM", R"("attention_bias": true)").status().message(),
              HasSubstr("'attention_bias'"));
}

// Gemma-2-9B's, as published, and what transformers takes where a file says nothing.
TEST_F(ReadModelConfigTest, GemmaIsMadeOfItsOptions) {
  const std::string published = R"({
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": false,
    "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
    "query_pre_attn_scalar": 224, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
    "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000})";
  absl::StatusOr<ModelConfig> config = Read(published);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 256);
  EXPECT_TRUE(config->tied_embeddings);
  EXPECT_TRUE(config->post_norms);
  EXPECT_EQ(config->norm_weight_offset, 1);
  EXPECT_EQ(config->embedding_scale, std::sqrt(3584.0f));
  EXPECT_EQ(config->activation, kernels::GateActivation::kGeluTanh);
  EXPECT_EQ(config->attention_soft_cap, 50);
  EXPECT_EQ(config->logit_soft_cap, 30);
  EXPECT_EQ(config->attention_scale(), 1 / std::sqrt(224.0f));
  ASSERT_EQ(config->windows.size(), 42u);
  EXPECT_EQ(config->window(0), 4096);
  EXPECT_EQ(config->window(1), 0);
  EXPECT_EQ(config->window(40), 4096);
  // A null is none, what is left out is as published.
  config = Read(absl::StrReplaceAll(published, {{"\"attn_logit_softcapping\": 50.0", "\"attn_logit_softcapping\": null"},
                                                {"\"final_logit_softcapping\": 30.0,", ""},
                                                {"\"query_pre_attn_scalar\": 224,", ""}}));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->attention_soft_cap, 0);
  EXPECT_EQ(config->logit_soft_cap, 30);
  EXPECT_EQ(config->attention_scale(), 1 / std::sqrt(256.0f));
  const absl::Status status =
      Read(absl::StrReplaceAll(published, {{"gelu_pytorch_tanh", "gelu"}})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("'hidden_act'"));
  // Two models whose keys differ for one option only have other fingerprints.
  EXPECT_NE(Read(published)->NumbersBehindKeys(), config->NumbersBehindKeys());
}

TEST_F(ReadModelConfigTest, WhatIsQuotedFromTheFileIsOneShortLine) {
  const std::string text = "\"" + std::string(5000, 'x') + "\\nTraceback\"";
  for (const auto& [name, value] : std::vector<std::pair<std::string, std::string>>{
           {"architectures", "[" + text + "]"},
           {"hidden_act", text},
           {"quantization_config", "{\"a\":" + text + "}"},
           {"rope_scaling", "{\"type\":" + text + "}"},
           {"rope_scaling", "{" + text + ":" + text + "}"},
           {"vocab_size", text},
           {"vocab_size", "1" + std::string(5000, '0')},
           {"rms_norm_eps", "[" + text + "]"},
           {"rope_theta", "1e400"},
       }) {
    const absl::Status status = ReadWith(name, value).status();
    EXPECT_THAT(status.message(), HasSubstr(folder_.path() + "/config.json")) << name;
    EXPECT_EQ(status.message().find('\n'), std::string::npos) << status;
    EXPECT_LT(status.message().size(), folder_.path().size() + 300) << status;
  }
}

TEST_F(ReadModelConfigTest, RopeScalingIsLlama3sOrNone) {
  absl::StatusOr<ModelConfig> config = ReadWith("rope_scaling", kLlama3);
  ASSERT_TRUE(config.ok()) << config.status();
  ASSERT_TRUE(config->rope_scaling.has_value());
  EXPECT_EQ(config->rope_scaling->factor, 8);
  EXPECT_EQ(config->rope_scaling->low_freq_factor, 1);
  EXPECT_EQ(config->rope_scaling->high_freq_factor, 4);
  EXPECT_EQ(config->rope_scaling->original_max_position_tokens, 8192);
  config = ReadWith("rope_scaling", R"({"rope_type": "default"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_FALSE(config->rope_scaling.has_value());
  for (const char* type : {"linear", "dynamic", "yarn", "longrope"}) {
    for (const char* key : {"rope_type", "type"}) {  // older files say "type"
      const std::string value = std::string("{\"") + key + "\": \"" + type + "\", \"factor\": 2}";
      const absl::Status status = ReadWith("rope_scaling", value).status();
      EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << value;
      EXPECT_THAT(status.message(), AllOf(HasSubstr("rope_type"), HasSubstr(type)));
    }
  }
}

TEST_F(ReadModelConfigTest, AWrongMemberOfRopeScalingIsNamed) {
  const auto refused = [&](const char* from, const char* to, const char* name,
                           absl::StatusCode code) {
    const std::string value = absl::StrReplaceAll(kLlama3, {{from, to}});
    const absl::Status status = ReadWith("rope_scaling", value).status();
    EXPECT_EQ(status.code(), code) << value;
    EXPECT_THAT(status.message(), AllOf(HasSubstr("config.json"), HasSubstr(name))) << value;
  };
  using enum absl::StatusCode;
  refused("8.0", "0.5", "'factor'", kInvalidArgument);
  refused("\"factor\": 8.0,", "", "'factor'", kInvalidArgument);
  refused("1.0", "0", "'low_freq_factor'", kInvalidArgument);
  refused("4.0", "1.0", "'high_freq_factor'", kInvalidArgument);
  refused("8192", "0", "'original_max_position_embeddings'", kInvalidArgument);
  refused("8192", "8192, \"attention_factor\": 1.2", "'attention_factor'", kUnimplemented);
  refused("8192", "8192, \"partial_rotary_factor\": 0.5", "'partial_rotary_factor'",
          kUnimplemented);
}

// transformers 5 writes theta and scaling together.
TEST_F(ReadModelConfigTest, RopeParametersStandForThetaAndScaling) {
  const std::string both =
      absl::StrReplaceAll(kLlama3, {{"{", "{\"rope_theta\": 500000.0, "}});
  absl::StatusOr<ModelConfig> config = ReadWith("rope_parameters", both);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_theta, 500000);
  EXPECT_EQ(config->rope_scaling->factor, 8);
  // Without a theta there, the one outside holds.
  config = ReadWith("rope_parameters", R"({"rope_type": "default"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_theta, 100000);
  // One per kind of layer: not what this decoder does.
  const absl::Status status =
      ReadWith("rope_parameters", R"({"full_attention": {"rope_theta": 10000}})").status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(), HasSubstr("full_attention"));
}

TEST(InverseFrequencies, StretchOnlyTheLowOnes) {
  ModelConfig config;
  config.head_dim = 128;
  config.rope_theta = 500000;
  const std::vector<float> plain = config.InverseFrequencies();
  ASSERT_EQ(plain.size(), 64u);
  for (int i = 0; i < 64; ++i) {
    EXPECT_NEAR(plain[i] / std::pow(500000.0, -i / 64.0), 1, 1e-6) << i;
  }
  config.rope_scaling = Llama3RopeScaling{8, 1, 4, 8192};
  const std::vector<float> scaled = config.InverseFrequencies();
  int between = 0;
  for (int i = 0; i < 64; ++i) {
    const double wavelength = 2 * std::numbers::pi / plain[i];
    if (wavelength < 8192.0 / 4) {
      EXPECT_EQ(scaled[i], plain[i]) << i;
    } else if (wavelength > 8192) {
      EXPECT_EQ(scaled[i], plain[i] / 8) << i;
    } else {
      EXPECT_LT(scaled[i], plain[i]) << i;
      EXPECT_GT(scaled[i], plain[i] / 8) << i;
      ++between;
    }
  }
  EXPECT_GT(between, 0);
}

}  // namespace
}  // namespace headroom
