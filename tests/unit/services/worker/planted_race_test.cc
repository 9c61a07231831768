// A missing wait between streams is a data race that ThreadSanitizer reports. The test starts itself
// again with one kind of wait taken out: the child must end with TSan's exit code. Without TSan the
// same scenarios run complete, with every wait in place.
#include <gtest/gtest.h>

#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "tests/common/forwarding_device.h"
#include "tests/common/worker_harness.h"

extern char** environ;

namespace headroom {
namespace {

constexpr int kTsanExitCode = 66;
constexpr int kFailedExitCode = 3;

// What is not waited for; names of streams as the executor gives them.
struct Planted {
  const char* name;
  const char* waiting;   // the stream that waits
  const char* recorded;  // the stream whose work it waits for
  int with_account;      // 1: only waits that are accounted, 0: only others
  const char* scenario;
};
constexpr Planted kPlanted[] = {
    {"tile-fill", "compute", "copy", 1, "fetch"},
    {"tile-release", "copy", "compute", 0, "fetch"},
    {"seal-appended", "seal", "compute", 0, "fetch"},
    {"sealed-before-fetch", "copy", "seal", 0, "chunks"},
    {"sealed-before-tail-reuse", "compute", "seal", 0, "chunks"},
    {"sealed-before-chunk-buffer-reuse", "compute", "seal", 0, "long-chunk"},
    {"promoted-before-read", "compute", "copy", 0, "promote"},
};

// Drops the waits of one kind.
class DroppingDevice : public ForwardingDevice {
 public:
  DroppingDevice(std::unique_ptr<Device> device, const Planted& planted)
      : ForwardingDevice(std::move(device)), planted_(planted) {}

  absl::StatusOr<StreamId> CreateStream(absl::string_view name) override {
    HEADROOM_ASSIGN_OR_RETURN(const StreamId stream, ForwardingDevice::CreateStream(name));
    streams_[stream.index] = std::string(name);
    return stream;
  }
  absl::Status Record(StreamId stream, EventId event) override {
    recorded_[event.index] = stream.index;
    return ForwardingDevice::Record(stream, event);
  }
  absl::Status Wait(StreamId stream, EventId event, OpAccount* account) override {
    const auto recorded = recorded_.find(event.index);
    if (recorded != recorded_.end() && streams_[stream.index] == planted_.waiting &&
        streams_[recorded->second] == planted_.recorded &&
        (account != nullptr) == (planted_.with_account != 0)) {
      return absl::OkStatus();
    }
    return ForwardingDevice::Wait(stream, event, account);
  }

 private:
  const Planted planted_;
  std::map<int32_t, std::string> streams_;
  std::map<int32_t, int32_t> recorded_;  // event: stream. The executor's thread only.
};

absl::Status RunScenario(const std::string& scenario, const Planted* planted) {
  RandomModelSpec spec;
  spec.num_layers = scenario == "long-chunk" ? 4 : 2;
  spec.hidden_size = 64;
  spec.num_q_heads = 2;
  spec.num_kv_heads = 2;
  spec.head_dim = 64;
  spec.intermediate_size = 72;
  spec.vocab_size = 67;
  HEADROOM_ASSIGN_OR_RETURN(const auto folder, RandomModelFolder::Create(spec));
  WorkerHarnessOptions options;
  options.budget_bytes = int64_t{48} << 20;
  options.chunk_limit_tokens = 512;
  options.max_context_tokens = 1024;
  options.segment_bytes = int64_t{2} << 20;
  options.ring_bytes = kNumContexts * 2 * kBlockTokens * 256;
  options.delay_seed = 11;
  if (planted != nullptr) {
    options.wrap_device = [planted](std::unique_ptr<Device> device) {
      return std::make_unique<DroppingDevice>(std::move(device), *planted);
    };
  }
  HEADROOM_ASSIGN_OR_RETURN(const auto harness, WorkerHarness::Create(folder->path(), options));
  StepExecutor& executor = harness->executor();
  HEADROOM_RETURN_IF_ERROR(executor.PreparePlan(ResidentPlan(1, harness->geometry())));
  HEADROOM_RETURN_IF_ERROR(executor.PreparePlan(FetchedPlan(2, harness->geometry())));
  TestRequest request;
  request.score = false;
  request.max_run_tokens = 128;
  RunOptions run;
  run.plan_version = 2;
  run.sealed = SealedRule::kAtOnce;
  if (scenario == "fetch") {
    request.prompt = RandomTokens(1, 250, spec.vocab_size);
    request.num_draws = 8;
  } else if (scenario == "chunks") {
    request.prompt = RandomTokens(1, 900, spec.vocab_size);
    request.chunk_tokens = 120;
  } else if (scenario == "long-chunk") {
    request.prompt = RandomTokens(1, 400, spec.vocab_size);
  } else {
    request.prompt = RandomTokens(1, 300, spec.vocab_size);
    request.chunk_tokens = 100;
    run.plan_cycle = {2, 1};
  }
  HEADROOM_ASSIGN_OR_RETURN(const TestOutput output, harness->RunOne(request, run));
  if (output.sealed_tokens == 0) return absl::InternalError("nothing was sealed");
  return absl::OkStatus();
}

// Runs this program again; its exit code, and what it wrote.
int RunChild(const std::vector<std::string>& args, std::string* output) {
  std::string log = "/tmp/headroom-planted-XXXXXX";
  const int fd = mkstemp(log.data());
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fd, STDOUT_FILENO);
  posix_spawn_file_actions_adddup2(&actions, fd, STDERR_FILENO);
  std::vector<char*> argv;
  for (const std::string& arg : args) argv.push_back(const_cast<char*>(arg.c_str()));
  argv.push_back(nullptr);
  std::string tsan = absl::StrCat("TSAN_OPTIONS=halt_on_error=1:exitcode=", kTsanExitCode);
  std::vector<char*> environment;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    if (std::strncmp(*variable, "TSAN_OPTIONS=", 13) != 0) environment.push_back(*variable);
  }
  environment.push_back(tsan.data());
  environment.push_back(nullptr);
  pid_t child = -1;
  int status = -1;
  if (posix_spawn(&child, "/proc/self/exe", &actions, nullptr, argv.data(), environment.data()) ==
      0) {
    waitpid(child, &status, 0);
  }
  posix_spawn_file_actions_destroy(&actions);
  close(fd);
  std::ifstream in(log);
  output->assign(std::istreambuf_iterator<char>(in), {});
  unlink(log.c_str());
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

void PrintTo(const Planted& planted, std::ostream* out) { *out << planted.name; }

class PlantedRace : public ::testing::TestWithParam<Planted> {};

TEST_P(PlantedRace, IsReported) {
  const Planted& planted = GetParam();
  std::string output;
  EXPECT_EQ(RunChild({"planted_race_test", "--scenario", planted.scenario}, &output), 0) << output;
#if defined(__SANITIZE_THREAD__)
  EXPECT_EQ(RunChild({"planted_race_test", "--scenario", planted.scenario, "--without",
                      planted.name},
                     &output),
            kTsanExitCode)
      << output;
  EXPECT_NE(output.find("WARNING: ThreadSanitizer: data race"), std::string::npos) << output;
#endif
}

INSTANTIATE_TEST_SUITE_P(All, PlantedRace, ::testing::ValuesIn(kPlanted), [](const auto& info) {
  std::string name = info.param.name;
  for (char& c : name) c = c == '-' ? '_' : c;
  return name;
});

int RunAsChild(int argc, char** argv) {
  const Planted* planted = nullptr;
  for (const Planted& candidate : kPlanted) {
    if (argc == 5 && std::string(argv[4]) == candidate.name) planted = &candidate;
  }
  const absl::Status status = RunScenario(argv[2], planted);
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  return kFailedExitCode;
}

}  // namespace
}  // namespace headroom

int main(int argc, char** argv) {
  if (argc >= 3 && std::string(argv[1]) == "--scenario") return headroom::RunAsChild(argc, argv);
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
