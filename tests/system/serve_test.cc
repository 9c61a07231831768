// `headroom serve` and the commands beside it, as a user types them.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <regex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

using nlohmann::json;

std::set<std::string> KeysOf(const json& object) {
  std::set<std::string> keys;
  for (const auto& [key, value] : object.items()) keys.insert(key);
  return keys;
}

// serve with all its defaults but the sizes, in a runtime folder of its own.
class Serve : public testing::Test {
 protected:
  void SetUp() override {
    model_ = dir_.File("model");
    MustWriteModel(SystemTestModel(), model_);
    std::filesystem::create_directory(runtime_dir());
    setenv("XDG_RUNTIME_DIR", runtime_dir().c_str(), 1);
  }
  void Start(const std::vector<std::string>& more = {}) {
    std::vector<std::string> args = {HeadroomBinary(), "serve",        "--model",       model_,
                                     "--device",       "cpu",          "--gpu-memory",  "48MiB",
                                     "--host-memory",  "64MiB",        "--threads",     "1",
                                     "--listen",       api_address(),  "--admin",
                                     admin_address()};
    args.insert(args.end(), more.begin(), more.end());
    shared_memory_before_ = SharedMemoryFolders();
    serve_ = std::make_unique<Process>(args, dir_.File("serve.log"));
    client_ = std::make_unique<TestClient>(api_address(), admin_address());
    ASSERT_TRUE(client_->AwaitHealth("SERVING", absl::Seconds(20))) << client_->Health();
  }
  // The child that runs this subcommand; 0 if there is none.
  pid_t Child(const std::string& subcommand) const {
    for (const pid_t pid : DescendantsOf(serve_->pid())) {
      if (absl::StrContains(CommandLineOf(pid), absl::StrCat("headroom ", subcommand))) return pid;
    }
    return 0;
  }
  CommandResult Headroom(std::vector<std::string> args) const {
    args.insert(args.begin(), HeadroomBinary());
    return RunCommand(args, Patience(absl::Seconds(30)));
  }
  json GenerateJson(std::vector<std::string> args) const {
    args.insert(args.begin(), {"generate", "--server", api_address(), "--json"});
    const CommandResult result = Headroom(args);
    EXPECT_EQ(result.exit_code, 0) << result.err;
    return json::parse(result.out, nullptr, /*allow_exceptions=*/false);
  }
  // What must be gone in the end: folders of segments, sockets and their folders.
  static std::set<std::string> SharedMemoryFolders() {
    std::set<std::string> found;
    for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
      if (absl::StrContains(entry.path().string(), "headroom-private-")) {
        found.insert(entry.path());
      }
    }
    return found;
  }
  void ExpectNothingIsLeft(const std::vector<pid_t>& children) const {
    for (const pid_t pid : children) EXPECT_EQ(CommandLineOf(pid), "") << pid;
    EXPECT_TRUE(std::filesystem::is_empty(runtime_dir()));
    EXPECT_FALSE(std::filesystem::exists(dir_.File("api.sock")));
    EXPECT_FALSE(std::filesystem::exists(dir_.File("admin.sock")));
    for (const std::string& folder : SharedMemoryFolders()) {
      if (shared_memory_before_.count(folder) > 0) continue;
      // Tests run side by side: it may be another's, which a store holds, will hold or has just left.
      EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&folder] {
        return !std::filesystem::exists(folder) || AStoreHolds(folder);
      })) << folder << " is left";
    }
  }
  // By the kernel's list of locks: to try the lock would keep a store from having it.
  static bool AStoreHolds(const std::string& folder) {
    struct stat segment;
    if (stat((folder + "/segment").c_str(), &segment) != 0) return false;
    std::ifstream locks("/proc/locks");
    for (std::string line; std::getline(locks, line);) {
      if (absl::StrContains(line, absl::StrCat(":", segment.st_ino, " "))) return true;
    }
    return false;
  }
  std::string runtime_dir() const { return dir_.File("run"); }
  std::string api_address() const { return "unix:" + dir_.File("api.sock"); }
  std::string admin_address() const { return "unix:" + dir_.File("admin.sock"); }
  const TestClient& client() const { return *client_; }

  const TestDir dir_;
  std::string model_;
  std::set<std::string> shared_memory_before_;
  std::unique_ptr<Process> serve_;
  std::unique_ptr<TestClient> client_;
};

// ---------------------------------------------------------------- the life of serve

TEST_F(Serve, SigtermDrainsAndLeavesNothing) {
  constexpr int kStreams = 8;
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::vector<pid_t> children = DescendantsOf(serve_->pid());
  EXPECT_EQ(children.size(), 3u);
  std::vector<v1::GenerateRequest> requests;
  std::vector<Generation> expected, drained(kStreams);
  for (int i = 0; i < kStreams; ++i) {
    requests.push_back(AskIn("", RandomPrompt(i, 100 + 30 * i), 400));
    expected.push_back(client().Generate(requests[i]));
  }
  std::vector<std::thread> streams;
  std::atomic<int> begun{0}, ended{0};
  for (int i = 0; i < kStreams; ++i) {
    streams.emplace_back([&, i] {
      drained[i] = client().Generate(requests[i], [&](int tokens) { begun += tokens == 10; });
      ++ended;
    });
  }
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return begun.load() == kStreams; }));
  EXPECT_EQ(ended.load(), 0) << "some are over before";
  serve_->Signal(SIGTERM);
  // What comes is refused from then on; what runs is finished as if nothing were.
  absl::Status refused;
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(1)), [&] {
    refused = client().Generate(AskIn("", {5, 6, 7}, 1)).status;
    return !refused.ok();
  }));
  EXPECT_TRUE(absl::IsUnavailable(refused)) << refused;
  EXPECT_EQ(ReasonOf(refused), "DRAINING");
  EXPECT_EQ(client().Health(), "NOT_SERVING");
  EXPECT_LT(ended.load(), kStreams) << "none runs any more";
  for (std::thread& stream : streams) stream.join();
  for (int i = 0; i < kStreams; ++i) EXPECT_EQ(Difference(drained[i], expected[i]), "") << i;
  client_.reset();  // a client that nobody polls is waited for until it closes, at most 5 s
  EXPECT_EQ(serve_->Wait(Patience(absl::Seconds(20))), 0);
  ExpectNothingIsLeft(children);
}

TEST_F(Serve, ItsOwnDeathTakesTheChildrenAlong) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::vector<pid_t> children = DescendantsOf(serve_->pid());
  serve_->Kill();
  for (const pid_t pid : children) {
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] { return CommandLineOf(pid).empty(); }));
  }
  // The next one sweeps what this one could not, and takes over the address.
  ASSERT_NO_FATAL_FAILURE(Start());
  client_.reset();
  serve_->Signal(SIGTERM);
  EXPECT_EQ(serve_->Wait(Patience(absl::Seconds(20))), 0);
  EXPECT_TRUE(std::filesystem::is_empty(runtime_dir()));
}

TEST_F(Serve, AKilledStoreIsStartedAgainAndKeepsItsExtents) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::vector<int32_t> first = RandomPrompt(2, 500);
  std::vector<int32_t> second = first;
  for (const int32_t id : RandomPrompt(3, 100)) second.push_back(id);
  const Generation expected = client().Generate(AskIn("", second, 30));
  ASSERT_TRUE(client().Generate(AskIn("s", first, 5)).status.ok());
  EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));
  const pid_t store = Child("kvstore");
  ASSERT_GT(store, 0);
  const uint64_t before = client().Status().processes(2).life();
  kill(store, SIGKILL);
  // It may be back before the coordinator has looked at it.
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    return client().Health() == "SERVING" && client().Status().processes(2).life() != before;
  }));
  EXPECT_NE(Child("kvstore"), store);
  const Generation continued = client().Generate(AskIn("s", second, 30));
  EXPECT_EQ(Difference(continued, expected), "");
  EXPECT_GE(continued.cached_tokens(), 448);
}

TEST_F(Serve, AKilledWorkerIsStartedAgainAndTheStreamGoesOn) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const std::vector<int32_t> prompt = RandomPrompt(4, 300);
  const Generation expected = client().Generate(AskIn("", prompt, 600));
  Generation generation;
  std::atomic<int> generated{0};
  std::thread streams([&] {
    generation = client().Generate(AskIn("", prompt, 600),
                                   [&](int tokens) { generated.store(tokens); });
  });
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return generated.load() >= 30; }));
  const pid_t worker = Child("worker");
  ASSERT_GT(worker, 0);
  kill(worker, SIGKILL);
  streams.join();
  if (generation.status.ok()) {
    EXPECT_EQ(Difference(generation, expected), "");
  } else {
    EXPECT_TRUE(absl::IsUnavailable(generation.status)) << generation.status;
  }
  EXPECT_EQ(Difference(client().Generate(AskIn("", prompt, 600)), expected), "");
}

// ---------------------------------------------------------------- the commands

TEST_F(Serve, HealthAndStatusTellTheirState) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const CommandResult healthy = Headroom({"health", "--server", api_address()});
  EXPECT_EQ(healthy.exit_code, 0) << healthy.err;
  EXPECT_EQ(healthy.out, "SERVING\n");
  EXPECT_EQ(Headroom({"health", "--server", "unix:" + dir_.File("no.sock"), "--timeout", "1s"})
                .exit_code,
            1);
  const CommandResult status = Headroom({"status", "--server", admin_address(), "--json"});
  EXPECT_EQ(status.exit_code, 0) << status.err;
  EXPECT_TRUE(json::accept(status.out)) << status.out;
}

TEST_F(Serve, GenerateJsonKeepsItsContract) {
  ASSERT_NO_FATAL_FAILURE(Start());
  std::vector<int32_t> prompt = RandomPrompt(5, 400);
  const json answer = GenerateJson({"--token-ids", absl::StrJoin(prompt, ","), "--max-tokens", "20",
                                    "--temperature", "0", "--ignore-eos", "--placement",
                                    "resident=0.25,fetched=0.75", "--prompt-logprobs", "1",
                                    "--logprobs", "3", "--deterministic", "--explain"});
  ASSERT_TRUE(answer.is_object());
  EXPECT_EQ(KeysOf(answer),
            (std::set<std::string>{"text", "token_ids", "prompt_token_ids", "prompt_logprobs",
                                   "logprobs", "finish_reason", "usage", "timings", "token_ms",
                                   "placement"}));
  EXPECT_TRUE(answer["text"].is_string());
  EXPECT_EQ(answer["prompt_token_ids"].get<std::vector<int32_t>>(), prompt);
  ASSERT_EQ(answer["token_ids"].size(), 20u);
  EXPECT_EQ(answer["finish_reason"], "LENGTH");

  ASSERT_EQ(answer["prompt_logprobs"].size(), 400u);
  EXPECT_TRUE(answer["prompt_logprobs"][0].is_null());
  for (size_t i = 1; i < 400; ++i) EXPECT_LT(answer["prompt_logprobs"][i].get<double>(), 0);
  ASSERT_EQ(answer["logprobs"].size(), 20u);
  for (size_t i = 0; i < 20; ++i) {
    const json& token = answer["logprobs"][i];
    EXPECT_EQ(KeysOf(token), (std::set<std::string>{"token_id", "logprob", "top"}));
    EXPECT_EQ(token["token_id"], answer["token_ids"][i]);
    ASSERT_EQ(token["top"].size(), 3u);
    EXPECT_EQ(KeysOf(token["top"][0]), (std::set<std::string>{"token_id", "logprob"}));
    EXPECT_EQ(token["top"][0]["token_id"], token["token_id"]) << "greedy";
    EXPECT_EQ(token["top"][0]["logprob"], token["logprob"]);
  }

  EXPECT_EQ(KeysOf(answer["usage"]),
            (std::set<std::string>{"prompt_tokens", "cached_tokens", "completion_tokens"}));
  EXPECT_EQ(answer["usage"]["prompt_tokens"], 400);
  EXPECT_EQ(answer["usage"]["cached_tokens"], 0);
  EXPECT_EQ(answer["usage"]["completion_tokens"], 20);
  EXPECT_EQ(KeysOf(answer["timings"]), (std::set<std::string>{"queue_ms", "prefill_ms", "ttft_ms",
                                                              "decode_ms", "tpot_ms"}));
  for (const auto& [key, value] : answer["timings"].items()) EXPECT_GE(value.get<double>(), 0);
  // The client's own, each token when it came: the last not before the server had drawn it.
  const auto token_ms = answer["token_ms"].get<std::vector<double>>();
  ASSERT_EQ(token_ms.size(), 20u);
  EXPECT_TRUE(std::is_sorted(token_ms.begin(), token_ms.end()));
  EXPECT_GE(token_ms.back(), answer["timings"]["ttft_ms"].get<double>() +
                                 answer["timings"]["decode_ms"].get<double>());

  const json& placement = answer["placement"];
  EXPECT_EQ(KeysOf(placement), (std::set<std::string>{"lanes", "gpu_memory"}));
  EXPECT_EQ(KeysOf(placement["lanes"]),
            (std::set<std::string>{"resident", "fetched", "in_place"}));
  for (const auto& [name, lane] : placement["lanes"].items()) {
    EXPECT_EQ(KeysOf(lane), (std::set<std::string>{"kv_heads", "bytes", "ms", "share"})) << name;
  }
  EXPECT_EQ(placement["lanes"]["resident"]["kv_heads"], 1);
  EXPECT_EQ(placement["lanes"]["fetched"]["kv_heads"], 3);
  EXPECT_EQ(placement["lanes"]["in_place"]["bytes"], 0);
  // Decode reads each position's keys and values once a step.
  int64_t keys_read = 0;
  for (int64_t pos = 400; pos < 419; ++pos) keys_read += pos + 1;
  EXPECT_EQ(placement["lanes"]["resident"]["bytes"].get<int64_t>() +
                placement["lanes"]["fetched"]["bytes"].get<int64_t>(),
            keys_read * kTestTokenBytes);
  EXPECT_EQ(placement["gpu_memory"]["budget_bytes"], 48 << 20);
  EXPECT_LE(placement["gpu_memory"]["peak_bytes"], 48 << 20);
  EXPECT_GT(placement["gpu_memory"]["peak_bytes"], 4 << 20);
}

TEST_F(Serve, GenerateTakesTextFilesAndSessions) {
  ASSERT_NO_FATAL_FAILURE(Start());
  std::string document;
  for (int i = 0; i < 100; ++i) absl::StrAppend(&document, "line ", i, " of the document.\n");
  std::ofstream(dir_.File("doc.txt")) << document;
  const std::vector<std::string> common = {"--temperature", "0", "--max-tokens", "8",
                                           "--ignore-eos"};
  const auto ask = [&](std::vector<std::string> args) {
    args.insert(args.end(), common.begin(), common.end());
    return GenerateJson(args);
  };
  const json first = ask({"--prompt-file", dir_.File("doc.txt"), "--session", "doc"});
  EXPECT_EQ(first["usage"]["cached_tokens"], 0);
  const json longer = ask({"--prompt", document + "What was it about?", "--session", "doc"});
  EXPECT_GT(longer["usage"]["cached_tokens"].get<int64_t>(), 256);
  EXPECT_EQ(longer["usage"]["cached_tokens"].get<int64_t>() % 64, 0);
  const json alone = ask({"--prompt", document + "What was it about?"});
  EXPECT_EQ(longer["token_ids"], alone["token_ids"]);
  EXPECT_EQ(longer["text"], alone["text"]);
  const json chat = ask({"--prompt", "hi", "--chat"});
  EXPECT_GT(chat["prompt_token_ids"].size(), 3u);

  std::vector<std::string> plain = {"generate", "--server", api_address(), "--prompt", "hello"};
  plain.insert(plain.end(), common.begin(), common.end());
  const CommandResult text = Headroom(plain);
  EXPECT_EQ(text.exit_code, 0) << text.err;
  EXPECT_TRUE(absl::StrContains(text.out, ask({"--prompt", "hello"})["text"].get<std::string>()));
  const std::vector<std::string> three = {"--n", "3", "--temperature", "1", "--seed", "7"};
  std::vector<std::string> as_json = {"--prompt", "hello"};
  as_json.insert(as_json.end(), common.begin(), common.end());
  as_json.insert(as_json.end(), three.begin(), three.end());
  const json several = GenerateJson(as_json);
  ASSERT_EQ(several["answers"].size(), 3u) << several;
  plain.insert(plain.end(), three.begin(), three.end());
  const CommandResult texts = Headroom(plain);
  std::string expected;
  for (int i = 0; i < 3; ++i) {
    absl::StrAppend(&expected, "--- answer ", i, "\n",
                    several["answers"][i]["text"].get<std::string>(), "\n");
  }
  EXPECT_EQ(texts.out, expected);
}

TEST_F(Serve, GenerateRefusesWhatIsWrongWithExitCode2) {
  ASSERT_NO_FATAL_FAILURE(Start());
  const auto refused = [&](std::vector<std::string> args, const std::string& word) {
    args.insert(args.begin(), {"generate", "--server", api_address()});
    const CommandResult result = Headroom(args);
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_TRUE(absl::StrContains(result.err, word)) << word << " in: " << result.err;
  };
  refused({}, "--prompt");
  refused({"--token-ids", "5,99999"}, "token_ids");
  refused({"--token-ids", "5,x"}, "--token-ids");
  refused({"--prompt", "a", "--placement", "resident=0.5"}, "--placement");
  refused({"--prompt", "a", "--temperature", "nan"}, "--temperature");
  refused({"--prompt", "a", "--max-token", "5"}, "--max-tokens");
  refused({"--prompt-file", dir_.File("none.txt")}, "none.txt");
}

TEST_F(Serve, AKilledClientFreesItsSequence) {
  ASSERT_NO_FATAL_FAILURE(Start());
  {
    Process generate({HeadroomBinary(), "generate", "--server", api_address(), "--prompt", "hello",
                      "--temperature", "0", "--ignore-eos"},
                     dir_.File("client.log"));
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)),
                          [&] { return client().Load().running_requests() == 1; }));
    generate.Kill();
  }
  EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));
}

TEST_F(Serve, GenerateWithAModelStartsAndStopsItsOwn) {
  shared_memory_before_ = SharedMemoryFolders();
  const CommandResult result = Headroom(
      {"generate", "--model", model_, "--device", "cpu", "--gpu-memory", "48MiB", "--host-memory",
       "64MiB", "--threads", "1", "--prompt", "hello", "--max-tokens", "5", "--temperature", "0",
       "--ignore-eos", "--json"});
  EXPECT_EQ(result.exit_code, 0) << result.err;
  EXPECT_EQ(json::parse(result.out, nullptr, false)["token_ids"].size(), 5u) << result.out;
  ExpectNothingIsLeft({});
  const CommandResult broken = Headroom({"generate", "--model", dir_.File("none"), "--prompt", "a"});
  EXPECT_EQ(broken.exit_code, 2) << broken.err;
  EXPECT_TRUE(absl::StrContains(broken.err, dir_.File("none"))) << broken.err;
  ExpectNothingIsLeft({});
}

TEST_F(Serve, GenerateSaysHowItsOwnEnded) {
  Process generate({HeadroomBinary(), "generate", "--model", model_, "--device", "cpu", "--gpu-memory",
                    "48MiB", "--host-memory", "64MiB", "--threads", "1", "--prompt", "hello",
                    "--ignore-eos"},
                   dir_.File("generate.log"));
  ASSERT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] { return !generate.Log().empty(); }));
  for (const pid_t pid : DescendantsOf(generate.pid())) {
    if (absl::StrContains(CommandLineOf(pid), "headroom serve")) kill(pid, SIGKILL);
  }
  EXPECT_EQ(generate.Wait(Patience(absl::Seconds(20))), 1);
  EXPECT_TRUE(absl::StrContains(generate.Log(), "; the private serve was killed by signal 9 (Killed)\n"))
      << generate.Log();
}

}  // namespace
}  // namespace headroom
