#include "services/headroom/flags.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "services/headroom/generate_request.h"
#include "services/headroom/nearest_name.h"
#include "services/headroom/service_flags.h"
#include "tests/unit/services/headroom/flags_test_util.h"

namespace headroom::cli {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Flags of every kind.
struct AllKinds {
  AllKinds() {
    flags.Group("Values");
    flags.Text("model", "DIR", &model, "A folder.");
    flags.TextList("stop", "TEXT", &stop, "A text.");
    flags.Choice("device", {"auto", "cpu", "cuda"}, &device, "A device.");
    flags.Switch("log-json", &log_json, "Whether.");
    flags.Integer("threads", &threads, 0, 1024, "Threads.", "all");
    flags.Bytes("gpu-memory", &gpu_memory, "Memory.", "all");
    flags.Duration("timeout", &timeout, "A time.");
    flags.Number("temperature", &temperature, "A number.");
    flags.Seed("seed", &seed, "A seed.");
    flags.Group("");
    flags.Integer("secret", &secret, 0, 10, "For tests.");
  }
  absl::Status Parse(const std::vector<std::string>& args) { return flags.Parse(args).status(); }
  std::string ErrorOf(const std::vector<std::string>& args) {
    const absl::Status status = Parse(args);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  }

  std::string model;
  std::vector<std::string> stop;
  std::string device = "auto";
  bool log_json = false;
  int32_t threads = 0;
  int64_t gpu_memory = 0;
  absl::Duration timeout = absl::Seconds(5);
  std::optional<float> temperature;
  std::optional<uint64_t> seed;
  int32_t secret = 0;
  Flags flags{"headroom test", "Tests flags."};
};

TEST(Flags, ReadEveryKindOfValue) {
  AllKinds all;
  ASSERT_TRUE(all.Parse({"--model", "a b", "--stop", "[x]", "--stop=y,z", "--device=cpu",
                         "--log-json", "--threads", "7", "--gpu-memory", "1.5GiB", "--timeout",
                         "90s", "--temperature", "0.5", "--seed", "18446744073709551615",
                         "--secret=3"})
                  .ok());
  EXPECT_EQ(all.model, "a b");
  EXPECT_THAT(all.stop, ElementsAre("[x]", "y,z"));
  EXPECT_EQ(all.device, "cpu");
  EXPECT_TRUE(all.log_json);
  EXPECT_EQ(all.threads, 7);
  EXPECT_EQ(all.gpu_memory, int64_t{3} << 29);
  EXPECT_EQ(all.timeout, absl::Seconds(90));
  EXPECT_EQ(all.temperature, 0.5f);
  EXPECT_EQ(all.seed, UINT64_MAX);
  EXPECT_EQ(all.secret, 3);
}

TEST(Flags, KeepTheirDefaultsWhereNothingIsGiven) {
  AllKinds all;
  ASSERT_TRUE(all.Parse({}).ok());
  EXPECT_EQ(all.device, "auto");
  EXPECT_EQ(all.timeout, absl::Seconds(5));
  EXPECT_FALSE(all.temperature.has_value());
}

TEST(Flags, TheLastOfTwoValuesWins) {
  AllKinds all;
  ASSERT_TRUE(all.Parse({"--threads", "1", "--threads", "2"}).ok());
  EXPECT_EQ(all.threads, 2);
}

TEST(Flags, AnUnknownFlagNamesTheNearest) {
  for (const char* typed : {"--gpu-memmory", "--gpu_memory", "--gpumemory", "--gpu-memory-size=1",
                            "--gpu"}) {
    EXPECT_THAT(AllKinds().ErrorOf({typed, "1GiB"}), HasSubstr("nearest is '--gpu-memory'"))
        << typed;
  }
  EXPECT_THAT(AllKinds().ErrorOf({"--modle", "x"}),
              HasSubstr("there is no flag '--modle'; the nearest is '--model'"));
  EXPECT_THAT(AllKinds().ErrorOf({"stray"}), HasSubstr("'stray' belongs to no flag"));
}

TEST(Flags, AWrongValueNamesFlagValueAndWhatWasExpected) {
  EXPECT_THAT(AllKinds().ErrorOf({"--threads", "many"}),
              HasSubstr("--threads: 'many', expected a whole number from 0 to 1024"));
  EXPECT_THAT(AllKinds().ErrorOf({"--threads", "1025"}), HasSubstr("from 0 to 1024"));
  EXPECT_THAT(AllKinds().ErrorOf({"--threads=-1"}), HasSubstr("'-1'"));
  EXPECT_THAT(AllKinds().ErrorOf({"--device", "cdua"}), HasSubstr("the nearest is 'cuda'"));
  EXPECT_THAT(AllKinds().ErrorOf({"--gpu-memory", "340Mib?"}),
              HasSubstr("--gpu-memory: '340Mib?'"));
  EXPECT_THAT(AllKinds().ErrorOf({"--timeout", "soon"}), HasSubstr("--timeout: 'soon'"));
  EXPECT_THAT(AllKinds().ErrorOf({"--timeout=-1s"}), HasSubstr("--timeout"));
  EXPECT_THAT(AllKinds().ErrorOf({"--temperature", "nan"}), HasSubstr("--temperature"));
  EXPECT_THAT(AllKinds().ErrorOf({"--seed", "-1"}), HasSubstr("--seed"));
  EXPECT_THAT(AllKinds().ErrorOf({"--threads"}), HasSubstr("--threads"));
}

TEST(Flags, TheCommandLineWinsOverTheEnvironmentAndThatOverTheFile) {
  const ConfigFile file("threads = 1\nsecret = 1\ngpu-memory = 1MiB\n");
  const Variable threads("HEADROOM_THREADS", "2"), secret("HEADROOM_SECRET", "2");
  AllKinds all;
  ASSERT_TRUE(all.Parse({file.flag(), "--threads=3"}).ok());
  EXPECT_EQ(all.threads, 3);
  EXPECT_EQ(all.secret, 2);
  EXPECT_EQ(all.gpu_memory, 1 << 20);
}

TEST(Flags, TheEnvironmentSetsSwitchesAndNamesTheFile) {
  const ConfigFile file("model = 'a # b'\n");
  {
    const Variable log_json("HEADROOM_LOG_JSON", "true");
    AllKinds all;
    ASSERT_TRUE(all.Parse({}).ok());
    EXPECT_TRUE(all.log_json);
  }
  const Variable config("HEADROOM_CONFIG", file.path());
  EXPECT_THAT(AllKinds().ErrorOf({}), HasSubstr("quotes of 'model' do not match"));
}

TEST(Flags, AWrongVariableIsAnError) {
  const Variable threads("HEADROOM_THREADS", "many");
  EXPECT_THAT(AllKinds().ErrorOf({}), HasSubstr("--threads: 'many'"));
}

TEST(Flags, TheFileSetsEveryKind) {
  const ConfigFile file(
      "# a comment\nmodel = \"/a b/c\"\nstop = [\"x\", \"y\"]\nlog-json = true\n"
      "device=cuda # the other\ntimeout = 2m\n");
  AllKinds all;
  ASSERT_TRUE(all.Parse({file.flag()}).ok());
  EXPECT_EQ(all.model, "/a b/c");
  EXPECT_THAT(all.stop, ElementsAre("x", "y"));
  EXPECT_TRUE(all.log_json);
  EXPECT_EQ(all.device, "cuda");
  EXPECT_EQ(all.timeout, absl::Minutes(2));
}

TEST(Flags, TheFileIsCheckedByName) {
  {
    const ConfigFile file("gpu-memry = 1MiB\n");
    EXPECT_THAT(AllKinds().ErrorOf({file.flag()}),
                HasSubstr(file.path() + ":1: 'gpu-memry' is no flag; the nearest is 'gpu-memory'"));
  }
  {
    const ConfigFile file("[worker]\nthreads = 1\n");
    EXPECT_THAT(AllKinds().ErrorOf({file.flag()}), HasSubstr("section [worker]"));
  }
  {
    const ConfigFile file("model = a,b\n");
    EXPECT_THAT(AllKinds().ErrorOf({file.flag()}), HasSubstr("'model' has 2 values"));
  }
  {
    const ConfigFile file("threads = 9999\n");
    EXPECT_THAT(AllKinds().ErrorOf({file.flag()}), HasSubstr("--threads: '9999'"));
  }
  EXPECT_THAT(AllKinds().ErrorOf({"--config=/nonexistent"}), HasSubstr("/nonexistent"));
}

TEST(Flags, TheHelpShowsGroupsAndDefaultsAndHidesWhatIsForTests) {
  AllKinds all;
  const absl::StatusOr<Parsed> parsed = all.flags.Parse({"--help"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(*parsed, Parsed::kHelp);
  const std::string help = all.flags.Help();
  EXPECT_THAT(help, HasSubstr("Values:"));
  EXPECT_THAT(help, HasSubstr("--gpu-memory SIZE"));
  EXPECT_THAT(help, HasSubstr("Default: all."));
  EXPECT_THAT(help, HasSubstr("Default: 5s."));
  EXPECT_THAT(help, HasSubstr("HEADROOM_SOME_FLAG"));
  EXPECT_EQ(help.find("secret"), std::string::npos);
}

TEST(NearestName, CountsLettersAndKnowsBeginnings) {
  const std::vector<std::string> names = {"serve", "status", "generate", "bench", "health"};
  EXPECT_EQ(NearestName("sevre", names), "serve");
  EXPECT_EQ(NearestName("stats", names), "status");
  EXPECT_EQ(NearestName("gen", names), "generate");
  EXPECT_EQ(NearestName("helth", names), "health");
  EXPECT_EQ(NearestName("", {}), "");
}

// ---------------------------------------------------------------- services

template <typename Options>
void ParseAgain(std::vector<std::string> args, const std::string& subcommand,
                const std::function<void(Flags&, Options*)>& add, Options* options,
                LogOptions* log) {
  ASSERT_EQ(args.at(0), subcommand);
  args.erase(args.begin());
  Flags flags("headroom " + subcommand, "");
  add(flags, options);
  AddLogFlags(flags, log);
  const absl::StatusOr<Parsed> parsed = flags.Parse(args);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
}

TEST(ServiceFlags, AWrittenCommandLineReadsAsTheSameWorker) {
  WorkerOptions written;
  written.listen_address = "unix:/run/x/worker.sock";
  written.model_dir = "models/a b";
  written.device = "cpu";
  written.gpu_memory_bytes = 356515840;
  written.compute_threads = 2;
  written.max_chunk_tokens = 256;
  written.max_context_tokens = 4096;
  written.max_sequences = 3;
  written.delay_seed = 0;
  written.fail_file = "/dev/shm/lost";
  WorkerOptions read;
  LogOptions log;
  ParseAgain<WorkerOptions>(
      WorkerArguments(written, {LogLevel::kDebug, true, ""}), "worker",
      [](Flags& flags, WorkerOptions* options) {
        flags.Text("model", "DIR", &options->model_dir, "");
        flags.Text("listen", "ADDR", &options->listen_address, "");
        AddWorkerFlags(flags, options);
      },
      &read, &log);
  EXPECT_EQ(read.listen_address, written.listen_address);
  EXPECT_EQ(read.model_dir, written.model_dir);
  EXPECT_EQ(read.device, written.device);
  EXPECT_EQ(read.gpu_memory_bytes, written.gpu_memory_bytes);
  EXPECT_EQ(read.compute_threads, written.compute_threads);
  EXPECT_EQ(read.max_chunk_tokens, written.max_chunk_tokens);
  EXPECT_EQ(read.max_context_tokens, written.max_context_tokens);
  EXPECT_EQ(read.max_sequences, written.max_sequences);
  EXPECT_EQ(read.delay_seed, written.delay_seed);
  EXPECT_EQ(read.fail_file, written.fail_file);
  EXPECT_EQ(log.level, LogLevel::kDebug);
  EXPECT_TRUE(log.json);
}

TEST(ServiceFlags, AWrittenCommandLineReadsAsTheSameStore) {
  kvstore::KvStoreOptions written;
  written.listen_address = "unix:/run/x/kvstore.sock";
  written.segment_dir = "/dev/shm/headroom-abc/segment";
  written.host_memory_bytes = 123456789;
  written.max_extents = 5000;
  kvstore::KvStoreOptions read;
  LogOptions log;
  ParseAgain<kvstore::KvStoreOptions>(
      StoreArguments(written, {}), "kvstore",
      [](Flags& flags, kvstore::KvStoreOptions* options) {
        flags.Text("listen", "ADDR", &options->listen_address, "");
        AddStoreFlags(flags, options);
      },
      &read, &log);
  EXPECT_EQ(read.listen_address, written.listen_address);
  EXPECT_EQ(read.segment_dir, written.segment_dir);
  EXPECT_EQ(read.host_memory_bytes, written.host_memory_bytes);
  EXPECT_EQ(read.max_extents, written.max_extents);
}

TEST(ServiceFlags, AWrittenCommandLineReadsAsTheSameCoordinator) {
  CoordinatorProcessOptions written;
  written.server.listen_address = "127.0.0.1:0";
  written.server.admin_address = "unix:/run/x/admin.sock";
  written.server.worker_address = "unix:/run/x/worker.sock";
  written.server.store_address = "unix:/run/x/kvstore.sock";
  written.server.model_dir = "models/a";
  written.server.max_queue = 7;
  written.server.max_sessions = 8;
  written.server.context_limit_tokens = 9000;
  written.server.max_message_bytes = 1234567;
  written.server.allow_clean_segment = true;
  written.server.reflection = true;
  written.drain_timeout = absl::Milliseconds(1500);
  CoordinatorProcessOptions read;
  LogOptions log;
  ParseAgain<CoordinatorProcessOptions>(
      CoordinatorArguments(written, {}), "coordinator",
      [](Flags& flags, CoordinatorProcessOptions* options) {
        flags.Text("model", "DIR", &options->server.model_dir, "");
        flags.Text("worker", "ADDR", &options->server.worker_address, "");
        flags.Text("kvstore", "ADDR", &options->server.store_address, "");
        flags.Text("admin", "ADDR", &options->server.admin_address, "");
        AddCoordinatorFlags(flags, options);
      },
      &read, &log);
  EXPECT_EQ(read.server.listen_address, written.server.listen_address);
  EXPECT_EQ(read.server.admin_address, written.server.admin_address);
  EXPECT_EQ(read.server.worker_address, written.server.worker_address);
  EXPECT_EQ(read.server.store_address, written.server.store_address);
  EXPECT_EQ(read.server.model_dir, written.server.model_dir);
  EXPECT_EQ(read.server.max_queue, written.server.max_queue);
  EXPECT_EQ(read.server.max_sessions, written.server.max_sessions);
  EXPECT_EQ(read.server.context_limit_tokens, written.server.context_limit_tokens);
  EXPECT_EQ(read.server.max_message_bytes, written.server.max_message_bytes);
  EXPECT_TRUE(read.server.allow_clean_segment);
  EXPECT_TRUE(read.server.reflection);
  EXPECT_EQ(read.drain_timeout, written.drain_timeout);
}

TEST(Flags, AnAddressHasAPort) {
  const auto error = [](const std::string& text) {
    std::string address;
    Flags flags("test", "");
    flags.Address("listen", &address, "Where.");
    const absl::Status status = flags.Parse({"--listen", text}).status();
    if (status.ok()) {
      EXPECT_EQ(address, text);
    }
    return std::string(status.message());
  };
  for (const char* const right : {"127.0.0.1:7410", "localhost:0", "[::1]:65535", "0.0.0.0:1", "dns:///host:80",
                                  "ipv6:[::]:80", "unix:/tmp/a.sock", "unix:relative", ""}) {
    EXPECT_EQ(error(right), "") << right;
  }
  for (const char* const wrong : {"127.0.0.1", "foo", "127.0.0.1:", ":7410", "127.0.0.1:65536", "127.0.0.1:99999",
                                  "127.0.0.1:110536", "127.0.0.1:-1", "127.0.0.1:+1", "127.0.0.1:7a", "::1", "[]:1",
                                  "127.0.0.1:000001"}) {
    EXPECT_THAT(error(wrong), HasSubstr("--listen")) << wrong;
    EXPECT_THAT(error(wrong), HasSubstr("expected HOST:PORT")) << wrong;
  }
}

TEST(ServiceFlags, ASocketPathThatIsTooLongIsRefused) {
  EXPECT_TRUE(CheckListenAddress("--listen", "127.0.0.1:7410").ok());
  EXPECT_TRUE(CheckListenAddress("--listen", "unix:/tmp/nobody-listens-here.sock").ok());
  const absl::Status status = CheckListenAddress("--listen", "unix:/" + std::string(107, 'x'));
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("108 bytes, expected 1 to 107"));
}

// ---------------------------------------------------------------- generate

TEST(GenerateRequest, TakesOverWhatWasGivenAndNothingElse) {
  GenerateOptions options;
  options.prompt = "Once";
  options.max_tokens = 3;
  options.temperature = 0.0f;
  options.stop = {"\n\n"};
  options.logprobs = 0;
  options.placement = "resident=0.25,fetched=0.75";
  options.session = "s";
  const absl::StatusOr<v1::GenerateRequest> request = BuildRequest(options);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->prompt(), "Once");
  EXPECT_EQ(request->stopping().max_tokens(), 3);
  EXPECT_THAT(request->stopping().stop_strings(), ElementsAre("\n\n"));
  EXPECT_FALSE(request->stopping().has_ignore_eos());
  EXPECT_TRUE(request->sampling().has_temperature());
  EXPECT_FALSE(request->sampling().has_top_p());
  EXPECT_TRUE(request->logprobs().has_num_top());
  EXPECT_FALSE(request->logprobs().has_prompt());
  EXPECT_EQ(request->placement().mode(), v1::PlacementOptions::MODE_SHARES);
  ASSERT_EQ(request->placement().shares_size(), 2);
  EXPECT_EQ(request->placement().shares(0).lane(), v1::LANE_RESIDENT);
  EXPECT_EQ(request->placement().shares(0).share(), 0.25);
  EXPECT_EQ(request->placement().shares(1).lane(), v1::LANE_FETCHED);
  EXPECT_EQ(request->session_id(), "s");
  EXPECT_FALSE(request->explain());
}

TEST(GenerateRequest, PenaltiesAndBias) {
  GenerateOptions options;
  options.prompt = "Once";
  options.min_tokens = 4;
  options.repetition_penalty = 1.25f;
  options.frequency_penalty = 0.5f;
  options.presence_penalty = -0.5f;
  options.logit_bias = {"42:-1.5, 7:100", "8:2"};
  const absl::StatusOr<v1::GenerateRequest> request = BuildRequest(options);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->stopping().min_tokens(), 4);
  EXPECT_EQ(request->sampling().repetition_penalty(), 1.25f);
  EXPECT_EQ(request->sampling().frequency_penalty(), 0.5f);
  EXPECT_EQ(request->sampling().presence_penalty(), -0.5f);
  ASSERT_EQ(request->sampling().logit_bias_size(), 3);
  EXPECT_EQ(request->sampling().logit_bias().at(42), -1.5f);
  EXPECT_EQ(request->sampling().logit_bias().at(7), 100);
  for (const char* wrong :
       {"42", "42:", ":1", "-1:1", "x:1", "1:nan", "1:inf", "1:2:3", "8:1,8:1"}) {
    options.logit_bias = {wrong};
    const absl::Status status = BuildRequest(options).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << wrong;
    EXPECT_THAT(std::string(status.message()), HasSubstr("--logit-bias")) << wrong;
  }
}

TEST(GenerateRequest, AChatPromptBecomesAUserMessage) {
  GenerateOptions options;
  options.prompt = "Hello";
  options.chat = true;
  options.json = true;
  const absl::StatusOr<v1::GenerateRequest> request = BuildRequest(options);
  ASSERT_TRUE(request.ok()) << request.status();
  ASSERT_EQ(request->chat().messages_size(), 1);
  EXPECT_EQ(request->chat().messages(0).role(), "user");
  EXPECT_EQ(request->chat().messages(0).content(), "Hello");
  EXPECT_TRUE(request->explain());  // the JSON shows lanes
}

TEST(GenerateRequest, NeedsExactlyOnePrompt) {
  const auto message_of = [](const GenerateOptions& options) {
    const absl::Status status = BuildRequest(options).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  GenerateOptions options;
  EXPECT_THAT(message_of(options), HasSubstr("no prompt"));
  options.prompt = "a";
  options.token_ids = "1";
  EXPECT_THAT(message_of(options), HasSubstr("more than one prompt"));
  options.prompt.reset();
  options.chat = true;
  EXPECT_THAT(message_of(options), HasSubstr("--chat needs text"));
  options.chat = false;
  options.token_ids = "1,x";
  EXPECT_THAT(message_of(options), HasSubstr("'x' is no token id"));
  options.token_ids.reset();
  options.prompt = "\xff";
  EXPECT_THAT(message_of(options), HasSubstr("--prompt is not UTF-8 at byte 0"));
  options.prompt = "a";
  options.placement = "residnet";
  EXPECT_THAT(message_of(options), HasSubstr("--placement"));
}

TEST(GenerateRequest, ReadsThePromptFromAFile) {
  const ConfigFile file("A document.\n");
  GenerateOptions options;
  options.prompt_file = file.path();
  const absl::StatusOr<v1::GenerateRequest> request = BuildRequest(options);
  ASSERT_TRUE(request.ok()) << request.status();
  EXPECT_EQ(request->prompt(), "A document.\n");
  options.prompt_file = "/nonexistent";
  EXPECT_THAT(std::string(BuildRequest(options).status().message()), HasSubstr("/nonexistent"));
}

TEST(GenerateRequest, TokenIdsHaveCommasOrSpacesBetween) {
  const absl::StatusOr<std::vector<int32_t>> ids = ParseTokenIds(" 1, 2,3\n4 ");
  ASSERT_TRUE(ids.ok()) << ids.status();
  EXPECT_THAT(*ids, ElementsAre(1, 2, 3, 4));
  for (const char* wrong : {"", ",", "-1", "2147483648", "1.5"}) {
    EXPECT_FALSE(ParseTokenIds(wrong).ok()) << wrong;
  }
}

}  // namespace
}  // namespace headroom::cli
