// What a process says, and how it ends, when what it is given is wrong: exit code 2 and a line that
// names the file, the tensor or the flag.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/fd.h"
#include "tests/common/tmpfs_mount.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr absl::Duration kSoon = absl::Seconds(10);

class Startup : public testing::Test {
 protected:
  void SetUp() override { MustWriteModel(SystemTestModel(), model_); }

  CommandResult Worker(const std::vector<std::string>& more) const {
    std::vector<std::string> args = {HeadroomBinary(), "worker",   "--listen",
                                     Address("w"),     "--device", "cpu"};
    args.insert(args.end(), more.begin(), more.end());
    return RunCommand(args, Patience(kSoon));
  }
  CommandResult WorkerOfModel() const {
    return Worker({"--model", model_, "--gpu-memory", "48MiB"});
  }
  std::string Address(const std::string& name) const {
    return absl::StrCat("unix:", dir_.File(name + ".sock"));
  }

  // Changes the first `from` in the header of the weights, in place.
  void EditHeader(const std::string& from, const std::string& to) const {
    ASSERT_EQ(from.size(), to.size());
    std::fstream weights(model_ + "/model.safetensors",
                         std::ios::in | std::ios::out | std::ios::binary);
    std::string head(1 << 16, '\0');
    weights.read(head.data(), static_cast<std::streamsize>(head.size()));
    const size_t at = head.find(from);
    ASSERT_NE(at, std::string::npos);
    weights.clear();
    weights.seekp(static_cast<std::streamoff>(at));
    weights << to;
  }

  // Exit code 2, and one line with all of these words.
  static void ExpectRefused(const CommandResult& result, const std::vector<std::string>& words) {
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    for (const std::string& word : words) {
      EXPECT_TRUE(absl::StrContains(result.err, word)) << word << " in: " << result.err;
    }
  }

  const TestDir dir_;
  const std::string model_ = dir_.File("model");
};

TEST_F(Startup, AModelFolderThatIsNotThere) {
  const std::string missing = dir_.File("nowhere");
  ExpectRefused(Worker({"--model", missing}), {missing});
  ExpectRefused(
      RunCommand({HeadroomBinary(), "coordinator", "--listen", Address("a"), "--worker",
                  Address("w"), "--kvstore", Address("k"), "--model", missing},
                 Patience(kSoon)),
      {missing});
  // Its children say it, among what they log.
  const CommandResult serve = RunCommand({HeadroomBinary(), "serve", "--listen", Address("a"),
                                          "--host-memory", "64MiB", "--model", missing},
                                         Patience(kSoon));
  EXPECT_EQ(serve.exit_code, 2) << serve.err;
  EXPECT_TRUE(absl::StrContains(serve.err, missing)) << serve.err;
}

TEST_F(Startup, AConfigThatIsNoJson) {
  std::ofstream(model_ + "/config.json") << "{\"architectures\": [";
  ExpectRefused(WorkerOfModel(), {"config.json"});
}

TEST_F(Startup, AConfigWithANumberThatIsTooLarge) {
  std::ifstream file(model_ + "/config.json");
  std::string config(std::istreambuf_iterator<char>(file), {});
  config = std::regex_replace(config, std::regex("\"vocab_size\": [0-9]+"),
                              "\"vocab_size\": 18446744073709551617");
  std::ofstream(model_ + "/config.json") << config;
  ExpectRefused(WorkerOfModel(), {"config.json", "an integer beyond 64 bits"});
}

TEST_F(Startup, AConfigOfAnotherArchitecture) {
  std::ofstream(model_ + "/config.json") << R"({"architectures": ["BertModel"]})";
  ExpectRefused(WorkerOfModel(), {"config.json", "BertModel"});
}

// Served all the same, each of these models would say something else than it should.
TEST_F(Startup, AConfigWithAnOptionThatWouldChangeTheMaths) {
  std::ifstream file(model_ + "/config.json");
  const std::string config(std::istreambuf_iterator<char>(file), {});
  const std::pair<const char*, const char*> options[] = {
      {"alibi", "true"},
      {"attention_chunk_size", "8192"},
      {"attention_multiplier", "0.0078125"},
      {"clip_qkv", "8.0"},
      {"embedding_multiplier", "12.0"},
      {"is_causal", "false"},
      {"kv_lora_rank", "512"},
      {"layer_types",
       "[\"full_attention\", \"full_attention\", \"chunked_attention\", \"full_attention\"]"},
      {"logit_scale", "0.0625"},
      {"logits_scaling", "8.0"},
      {"no_rope_layers", "[1, 1, 1, 0]"},
      {"num_experts", "128"},
      {"num_local_experts", "8"},
      {"partial_rotary_factor", "0.5"},
      {"qk_layernorm", "true"},
      {"quantization_config", "{\"quant_method\": \"awq\"}"},
      {"residual_multiplier", "0.22"},
      {"rope_local_base_freq", "10000.0"},
      {"rope_parameters", "{\"rope_type\": \"yarn\", \"factor\": 4.0}"},
      {"use_bidirectional_attention", "true"},
      {"use_mrope", "true"},
      {"use_qk_norm", "true"},
  };
  for (const auto& [name, value] : options) {
    std::ofstream(model_ + "/config.json")
        << "{\"" << name << "\": " << value << "," << config.substr(config.find('{') + 1);
    const bool rope = std::string(name) == "rope_parameters";
    const std::string named = rope ? "'rope_type'" : name;
    ExpectRefused(WorkerOfModel(), {"config.json", named});
    ExpectRefused(RunCommand({HeadroomBinary(), "plan", "--model", model_, "--context", "100",
                              "--gpu-memory", "48MiB", "--host-memory", "64MiB", "--device", "cpu"},
                             Patience(kSoon)),
                  {"config.json", named});
  }
  EXPECT_GE(std::size(options), 20u);
  std::ofstream(model_ + "/config.json") << config;
  ExpectRefused(Worker({"--model", model_, "--gpu-memory", "1MiB"}), {"--gpu-memory"});
}

TEST_F(Startup, WeightsThatAreMissingOrCutOff) {
  const std::string weights = model_ + "/model.safetensors";
  std::filesystem::resize_file(weights, std::filesystem::file_size(weights) - 1000);
  ExpectRefused(WorkerOfModel(), {"model.safetensors"});
  std::filesystem::resize_file(weights, 100);
  ExpectRefused(WorkerOfModel(), {"model.safetensors"});
  std::filesystem::remove(weights);
  ExpectRefused(WorkerOfModel(), {"model.safetensors"});
}

TEST_F(Startup, ATensorThatIsMissingIsNamed) {
  EditHeader("model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.XX_proj.weight");
  ExpectRefused(WorkerOfModel(), {"model.layers.2.mlp.up_proj.weight"});
}

TEST_F(Startup, ATensorOfAnotherTypeIsNamed) {
  EditHeader("\"BF16\"", "\"F16\" ");
  ExpectRefused(WorkerOfModel(), {"model.safetensors", "tensor '", "is F16 [", "expected BF16 ["});
  // serve says what its worker says, and ends as it does.
  const CommandResult serve = RunCommand({HeadroomBinary(), "serve", "--listen", Address("a"),
                                          "--host-memory", "64MiB", "--gpu-memory", "48MiB",
                                          "--device", "cpu", "--model", model_},
                                         Patience(kSoon));
  EXPECT_EQ(serve.exit_code, 2) << serve.err;
  EXPECT_TRUE(absl::StrContains(serve.err, "expected BF16 [")) << serve.err;
}

TEST_F(Startup, OffsetsThatLieAreNamed) {
  EditHeader("\"data_offsets\":[0,", "\"data_offsets\":[1,");
  ExpectRefused(WorkerOfModel(), {"model.safetensors", "tensor '", "'data_offsets' is [1,"});
}

TEST_F(Startup, AnIndexThatLeavesTheFolderIsNamed) {
  std::filesystem::rename(model_ + "/model.safetensors", dir_.File("outside.safetensors"));
  const std::string index = model_ + "/model.safetensors.index.json";
  std::ofstream(index) << R"({"weight_map": {"model.norm.weight": "../outside.safetensors"}})";
  ExpectRefused(WorkerOfModel(), {index, "model.norm.weight", "../outside.safetensors"});
  std::filesystem::create_symlink(dir_.File("outside.safetensors"), model_ + "/link.safetensors");
  std::ofstream(index) << R"({"weight_map": {"model.norm.weight": "link.safetensors"}})";
  ExpectRefused(WorkerOfModel(), {index, "model.norm.weight", dir_.File("outside.safetensors")});
}

TEST_F(Startup, ATokenizerThatIsBroken) {
  // The second one makes the tokenizers crate panic.
  for (const char* text : {"{]", R"({"decoder": {5)"}) {
    std::ofstream(model_ + "/tokenizer.json") << text;
    ExpectRefused(
        RunCommand({HeadroomBinary(), "coordinator", "--listen", Address("a"), "--worker",
                    Address("w"), "--kvstore", Address("k"), "--model", model_},
                   Patience(kSoon)),
        {"tokenizer.json"});
  }
}

TEST_F(Startup, TooLittleDeviceMemorySaysTheLeastAndThatWorks) {
  const CommandResult refused = Worker({"--model", model_, "--gpu-memory", "6MiB"});
  ExpectRefused(refused, {"--gpu-memory", "at least"});
  std::smatch least;
  ASSERT_TRUE(std::regex_search(refused.err, least, std::regex("at least ([0-9]+) MiB")))
      << refused.err;
  const int64_t mib = std::stoll(least[1]);
  ExpectRefused(Worker({"--model", model_, "--gpu-memory", absl::StrCat(mib - 1, "MiB")}),
                {"at least"});

  ClusterOptions options;
  options.model_dir = model_;
  options.gpu_memory = absl::StrCat(mib, "MiB");
  Cluster cluster(options);
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  v1::GenerateRequest request = Ask(RandomPrompt(1, 400), 10);
  request.set_explain(true);
  const Generation generation = cluster.client().Generate(request);
  EXPECT_EQ(generation.tokens.size(), 10u) << generation.status;
  // What costs less here, the planner decides.
  EXPECT_GT(generation.LaneBytes(v1::LANE_FETCHED) + generation.LaneBytes(v1::LANE_IN_PLACE), 0);
  EXPECT_LE(generation.finished.explanation().peak_bytes(), mib << 20);
}

TEST_F(Startup, AFlagThatIsWrongGetsTheNearestName) {
  ExpectRefused(Worker({"--model", model_, "--gpu-memroy", "48MiB"}),
                {"--gpu-memroy", "--gpu-memory"});
  ExpectRefused(Worker({"--model", model_, "--gpu-memory", "48XiB"}), {"--gpu-memory", "48XiB"});
  ExpectRefused(Worker({"--model", model_, "--max-sequences", "0"}), {"--max-sequences"});
  ExpectRefused(Worker({}), {"--model"});
  ExpectRefused(RunCommand({HeadroomBinary(), "generat"}, Patience(kSoon)),
                {"generat", "generate"});
}

// --check-config: what each process finds wrong without starting, and one line if nothing is.
TEST_F(Startup, AConfigurationIsCheckedWithoutStarting) {
  const TestDir segments("/dev/shm");
  const std::string config = dir_.File("headroom.toml");
  const auto check = [&](const std::string& command, std::vector<std::string> more) {
    more.insert(more.begin(), {HeadroomBinary(), command, "--check-config"});
    return RunCommand(more, Patience(kSoon));
  };
  const auto right = [&](const std::string& command, const std::vector<std::string>& more) {
    const CommandResult result = check(command, more);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    EXPECT_EQ(result.err, "");
    EXPECT_EQ(result.out, absl::StrCat("headroom ", command, ": the configuration is right\n"));
  };
  std::ofstream(config) << "gpu-memory = '48MiB'\nmodel = '" << model_ << "'\n";
  right("serve", {"--config", config, "--host-memory", "64MiB", "--device", "cpu"});
  right("coordinator", {"--model", model_});
  right("worker", {"--config", config, "--device", "cpu"});
  right("kvstore", {"--segment-dir", segments.File("segment"), "--host-memory", "64MiB"});
  EXPECT_FALSE(std::filesystem::exists(segments.File("segment"))) << "nothing is made";

  const std::string missing = dir_.File("nowhere");
  for (const char* command : {"serve", "coordinator", "worker"}) {
    ExpectRefused(check(command, {"--model", missing}), {missing});
    ExpectRefused(check(command, {}), {"--model"});
  }
  ExpectRefused(check("worker", {"--config", config, "--gpu-memory", "6MiB", "--device", "cpu"}),
                {"--gpu-memory", "at least"});
  ExpectRefused(check("kvstore", {"--host-memory", "64XiB"}), {"--host-memory", "64XiB"});
  ExpectRefused(check("kvstore", {"--host-memory", "60TiB"}), {"--host-memory", "left"});
  ExpectRefused(check("serve", {"--config", config, "--tls-cert", missing, "--tls-key", missing}),
                {"--tls-cert", missing});
  for (const char* command : {"coordinator", "worker"}) {
    ExpectRefused(check(command, {"--model", model_, "--peer-cert", missing}), {"--peer-"});
  }
  ExpectRefused(check("kvstore", {"--peer-ca", missing}), {"--peer-"});
  ExpectRefused(check("kvstore", {"--listen", absl::StrCat("unix:/", std::string(107, 'x'))}),
                {"--listen"});
  std::ofstream(config) << "gpu-memroy = '48MiB'\n";
  ExpectRefused(check("worker", {"--config", config}), {"gpu-memroy", "gpu-memory"});
  std::filesystem::remove(model_ + "/model.safetensors");
  right("coordinator", {"--model", model_});
  ExpectRefused(check("worker", {"--model", model_}), {"model.safetensors"});
}

// What can be known is refused by both, in the same words.
TEST_F(Startup, CheckingRefusesWhatStartingWouldInItsWords) {
  const TestDir segments("/dev/shm");
  const std::string missing = dir_.File("nowhere/file");
  std::vector<std::string> args;
  const auto refused = [&](const std::vector<std::string>& more,
                           const std::vector<std::string>& words) {
    std::vector<std::string> all = args;
    all.insert(all.end(), more.begin(), more.end());
    const CommandResult started = RunCommand(all, Patience(kSoon));
    all.push_back("--check-config");
    const CommandResult checked = RunCommand(all, Patience(kSoon));
    ExpectRefused(checked, words);
    const std::string prefix = absl::StrCat("headroom ", all[1], ": ");
    ASSERT_TRUE(absl::StartsWith(checked.err, prefix)) << checked.err;
    EXPECT_GT(started.exit_code, 0);
    EXPECT_TRUE(absl::StrContains(started.err, checked.err.substr(prefix.size())))
        << started.err << checked.err;
  };
  const std::vector<std::string> listen = {"--listen", absl::StrCat("unix:", missing)};
  const std::vector<std::string> trace = {"--trace", missing};

  args = {HeadroomBinary(), "kvstore", "--listen", Address("k"), "--segment-dir",
          segments.File("segment")};
  refused({"--host-memory", "1"}, {"--host-memory", "1 bytes", "1.0 MiB"});
  refused(trace, {"--trace", missing});
  refused(listen, {"--listen", missing});

  args = {HeadroomBinary(), "coordinator", "--listen", Address("a"), "--model", model_};
  refused(trace, {"--trace", missing});
  refused(listen, {"--listen", missing});
  refused({"--admin", absl::StrCat("unix:", missing)}, {"--admin", missing});

  args = {HeadroomBinary(), "worker", "--listen", Address("w"), "--model", model_};
  if (!std::filesystem::exists("/dev/nvidiactl")) refused({"--device", "cuda"}, {"--device cuda"});
  args.insert(args.end(), {"--device", "cpu", "--gpu-memory", "48MiB"});
  refused({"--in-place-deadline", "0s"}, {"--in-place-deadline 0"});
  refused(trace, {"--trace", missing});
  refused(listen, {"--listen", missing});

  args[1] = "serve";
  args[3] = Address("a");
  refused({"--host-memory", "1"}, {"--host-memory", "1 bytes", "1.0 MiB"});
  args.insert(args.end(), {"--host-memory", "64MiB"});
  refused(listen, {"--listen", missing});
  refused({"--admin", absl::StrCat("unix:", missing)}, {"--admin", missing});
  refused(trace, {"--trace", missing});
  refused({"--in-place-deadline", "0s"}, {"--in-place-deadline 0"});

  std::ifstream file(model_ + "/config.json");
  const std::string config(std::istreambuf_iterator<char>(file), {});
  std::ofstream(model_ + "/config.json")
      << std::regex_replace(config, std::regex("\"num_hidden_layers\": 4"),
                            "\"num_hidden_layers\": 5");
  refused({}, {"model.safetensors", "model.layers.4."});
}

TEST_F(Startup, AVariableThatIsWrongIsNamed) {
  const std::vector<std::string> commands[] = {
      {"serve", "--model", model_, "--device", "cpu", "--listen", Address("a")},
      {"kvstore", "--listen", Address("k"), "--segment-dir", dir_.File("segment")},
      {"kvstore", "--check-config"}};
  setenv("HEADROOM_HOST_MEMORY", "1", 1);
  for (std::vector<std::string> args : commands) {
    args.insert(args.begin(), HeadroomBinary());
    ExpectRefused(RunCommand(args, Patience(kSoon)),
                  {"--host-memory is 1 bytes", "HEADROOM_HOST_MEMORY=1 of the environment"});
  }
  unsetenv("HEADROOM_HOST_MEMORY");
}

// Refusals of a segment: nobody waits for a store that cannot be.
constexpr absl::Duration kRefused = absl::Seconds(2);

TEST_F(Startup, AStoreThatDoesNotFitSaysSo) {
  const TestDir segments("/dev/shm");
  const auto store = [&](const std::string& memory) {
    return RunCommand({HeadroomBinary(), "kvstore", "--listen", Address("k"), "--segment-dir",
                       segments.File("segment"), "--host-memory", memory},
                      Patience(kRefused));
  };
  ExpectRefused(store("900TiB"), {"--host-memory"});
  EXPECT_FALSE(std::filesystem::exists(segments.File("segment") + "/data"));
}

TEST_F(Startup, AStoreOnASmallOrReadOnlyFileSystemSaysSo) {
  const TestDir segments("/dev/shm");
  const auto store = [&] {
    return RunCommand({HeadroomBinary(), "kvstore", "--listen", Address("k"), "--segment-dir",
                       segments.File("segment"), "--host-memory", "64MiB"},
                      Patience(kRefused));
  };
  {
    const TmpfsMount tmpfs(segments.path(), "size=2m");
    if (!tmpfs.mounted()) GTEST_SKIP() << "this user may not mount a tmpfs";
    ExpectRefused(store(), {"--host-memory", "--segment-dir", segments.path()});
  }
  const TmpfsMount tmpfs(segments.path(), "size=256m", MS_RDONLY);
  ASSERT_TRUE(tmpfs.mounted());
  ExpectRefused(store(), {"--segment-dir", segments.path(), "Read-only"});
}

TEST_F(Startup, ASecondStoreOnASegmentIsRefused) {
  ClusterOptions options;
  options.model_dir = model_;
  Cluster cluster(options);
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  ExpectRefused(RunCommand({HeadroomBinary(), "kvstore", "--listen", Address("k"), "--segment-dir",
                            cluster.segment_dir(), "--host-memory", "64MiB"},
                           Patience(kRefused)),
                {cluster.segment_dir()});
  // It has done the first no harm.
  EXPECT_EQ(cluster.client().Generate(Ask(RandomPrompt(1, 300), 5)).tokens.size(), 5u);
}

TEST_F(Startup, AnAddressInUseIsAFailure) {
  ClusterOptions options;
  options.model_dir = model_;
  Cluster cluster(options);
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  const CommandResult second =
      RunCommand({HeadroomBinary(), "coordinator", "--listen", cluster.api_address(), "--worker",
                  Address("w"), "--kvstore", Address("k"), "--model", model_},
                 Patience(kSoon));
  EXPECT_EQ(second.exit_code, 1) << second.err;
  EXPECT_EQ(cluster.client().Health(), "SERVING");
}

TEST_F(Startup, APortInUseIsOneLineWithTheReason) {
  const TestDir segments("/dev/shm");
  const Fd taken(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in name = {};
  name.sin_family = AF_INET;
  name.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(name);
  auto* const address = reinterpret_cast<sockaddr*>(&name);
  ASSERT_EQ(bind(taken.get(), address, size), 0);
  ASSERT_EQ(listen(taken.get(), 1), 0);
  ASSERT_EQ(getsockname(taken.get(), address, &size), 0);
  const std::string in_use = absl::StrCat("127.0.0.1:", ntohs(name.sin_port));
  const std::vector<std::string> commands[] = {
      {"coordinator", "--listen", in_use, "--model", model_},
      {"coordinator", "--listen", Address("a"), "--admin", in_use, "--model", model_},
      {"worker", "--listen", in_use, "--model", model_, "--device", "cpu"},
      {"kvstore", "--listen", in_use, "--segment-dir", segments.File("segment"), "--host-memory",
       "64MiB"}};
  for (std::vector<std::string> args : commands) {
    args.insert(args.begin(), HeadroomBinary());
    args.insert(args.end(), {"--log-level", "error"});
    const CommandResult result = RunCommand(args, Patience(kSoon));
    EXPECT_EQ(result.exit_code, 1) << result.err;
    EXPECT_EQ(std::count(result.err.begin(), result.err.end(), '\n'), 1) << result.err;
    EXPECT_TRUE(absl::StrContains(
        result.err, absl::StrCat("cannot listen on ", in_use, ": Address already in use\n")))
        << result.err;
  }
}

}  // namespace
}  // namespace headroom
