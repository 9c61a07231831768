// The three processes of Headroom as a system test has them, and a client of theirs.
#ifndef HEADROOM_TESTS_SYSTEM_TEST_ENV_H_
#define HEADROOM_TESTS_SYSTEM_TEST_ENV_H_

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "headroom/v1/admin.grpc.pb.h"
#include "headroom/v1/inference.grpc.pb.h"
#include "tests/common/random_model.h"
#include "tests/common/test_processes.h"

namespace headroom {

// A build with sanitizers gets some times longer for everything.
inline absl::Duration Patience(absl::Duration usual) { return kSanitized ? 5 * usual : usual; }

// 4 layers of 4 KV heads of 64: 4 KiB of keys and values a token. Byte tokenizer; greedy decoding does
// not end by itself.
RandomModelSpec SystemTestModel();
inline constexpr int32_t kTestVocab = 517;
inline constexpr int64_t kTestTokenBytes = 4096;
inline constexpr int64_t kTestContext = 8192;

// ---------------------------------------------------------------- requests and answers

// `count` ids that are no specials, drawn from `seed`.
std::vector<int32_t> RandomPrompt(uint64_t seed, int64_t count);

// Greedy, to the last of `max_tokens`, with log-probabilities of prompt and answer.
v1::GenerateRequest Ask(const std::vector<int32_t>& prompt, int32_t max_tokens);

using Shares = std::vector<std::pair<v1::Lane, double>>;
inline Shares AllResident() { return {{v1::LANE_RESIDENT, 1}}; }
inline Shares AllFetched() { return {{v1::LANE_FETCHED, 1}}; }
inline Shares ResidentShare(double share) {
  return {{v1::LANE_RESIDENT, share}, {v1::LANE_FETCHED, 1 - share}};
}
// Deterministic, explained, placed by these shares.
void Place(v1::GenerateRequest& request, const Shares& shares);
// Ask(), placed, without the prompt's log-probabilities; in a session if it has a name.
v1::GenerateRequest AskIn(const std::string& session, const std::vector<int32_t>& prompt,
                          int32_t max_tokens, const Shares& shares = AllFetched());

struct Generation {
  absl::Status status;  // of the call
  int accepted_events = 0;
  v1::Accepted accepted;
  std::string text;
  std::vector<v1::TokenRecord> tokens;
  v1::Finished finished;

  std::vector<int32_t> ids() const;
  int64_t cached_tokens() const { return finished.usage().cached_tokens(); }
  // Of one lane in prefill and decode together.
  int64_t LaneBytes(v1::Lane lane) const;
  // Of one lane in decode, the mean per layer.
  double KvHeads(v1::Lane lane) const;
};

// "" if both hold the same tokens and the same log-probabilities, of prompt and answer, to the bit;
// else the first difference.
std::string Difference(const Generation& a, const Generation& b);

// ---------------------------------------------------------------- the client

// How a client speaks to the coordinator; no credentials: in the clear.
struct TestSecurity {
  std::shared_ptr<grpc::ChannelCredentials> credentials;
  std::string server_name;  // in the server's certificate
};

class TestClient {
 public:
  TestClient(const std::string& api_address, const std::string& admin_address,
             const TestSecurity& security = {});

  // Streams to the end, at most 60 s.
  Generation Generate(const v1::GenerateRequest& request,
                      const std::function<void(int tokens)>& on_token = nullptr) const;
  Generation GenerateOnce(const v1::GenerateRequest& request) const;
  // All at the same time; answers in the order of the requests.
  std::vector<Generation> GenerateAll(const std::vector<v1::GenerateRequest>& requests) const;

  v1::GetLoadResponse Load() const;
  v1::GetStatusResponse Status() const;
  // What the health service says: "SERVING", "NOT_SERVING", or why it says nothing.
  std::string Health(const std::string& service = "") const;
  // A call of any method, as bytes: for services whose generated code no test has.
  grpc::Status Call(const std::string& method, const std::string& request,
                    std::string* response) const;
  bool AwaitHealth(const std::string& wanted, absl::Duration most) const;
  // No request runs or waits.
  bool AwaitIdle(absl::Duration most) const;

  v1::InferenceService::Stub& api() const { return *api_; }
  v1::AdminService::Stub& admin() const { return *admin_; }
  // With a deadline.
  static std::unique_ptr<grpc::ClientContext> Context(absl::Duration most = absl::Seconds(20));

 private:
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::InferenceService::Stub> api_;
  const std::unique_ptr<v1::AdminService::Stub> admin_;
};

// ---------------------------------------------------------------- the processes

struct ClusterOptions {
  std::string model_dir;  // empty: SystemTestModel()
  std::string gpu_memory = "48MiB";
  std::string host_memory = "64MiB";
  std::vector<std::string> worker_args = {"--threads", "1"};
  std::vector<std::string> kvstore_args;
  std::vector<std::string> coordinator_args;
  TestSecurity security;
};

// Coordinator, worker and kvstore as three processes, each started by the test.
class Cluster {
 public:
  explicit Cluster(const ClusterOptions& options = {});

  // Each replaces the process before it.
  void StartKvStore();
  void StartWorker();
  void StartCoordinator();
  // From the next StartCoordinator() on.
  void AddCoordinatorArg(const std::string& arg) { options_.coordinator_args.push_back(arg); }
  Process& kvstore() { return *kvstore_; }
  Process& worker() { return *worker_; }
  Process& coordinator() { return *coordinator_; }

  // All three run and the coordinator says SERVING; else a test failure.
  void AwaitServing();
  const TestClient& client() const { return *client_; }

  const std::string& model_dir() const { return options_.model_dir; }
  std::string segment_dir() const { return segments_.File("segment"); }
  std::string api_address() const { return Address("api"); }
  std::string admin_address() const { return Address("admin"); }
  std::string worker_address() const { return Address("worker"); }
  std::string kvstore_address() const { return Address("kvstore"); }

 private:
  std::string Address(const std::string& name) const {
    return "unix:" + dir_.File(name + ".sock");
  }
  std::unique_ptr<Process> Start(const std::string& subcommand, std::vector<std::string> args,
                                 const std::vector<std::string>& more);

  const TestDir dir_;
  const TestDir segments_{"/dev/shm"};
  ClusterOptions options_;
  std::unique_ptr<TestClient> client_;
  std::unique_ptr<Process> kvstore_;
  std::unique_ptr<Process> worker_;
  std::unique_ptr<Process> coordinator_;
};

// Writes `spec` into `dir`; aborts if that fails.
void MustWriteModel(const RandomModelSpec& spec, const std::string& dir);

}  // namespace headroom

#endif  // HEADROOM_TESTS_SYSTEM_TEST_ENV_H_
