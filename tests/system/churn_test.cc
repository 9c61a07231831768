// Clients that go away at any moment: what they had is given back, and nobody else notices.
#include <fcntl.h>
#include <grpcpp/create_channel_posix.h>
#include <gtest/gtest.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "headroom/v1/kv_store.grpc.pb.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr int kStreams = kSanitized ? 150 : 1000;
constexpr int kClients = 16;       // more than host memory holds: some wait in the queue
constexpr int32_t kAnswer = 1000;  // more than a stream lives to see
constexpr uint64_t kSeed = 20261125;

// A connection that can be cut as a network does it: no call on it is told before.
class OwnConnection {
 public:
  explicit OwnConnection(const std::string& address) {
    sockaddr_un to = {};
    to.sun_family = AF_UNIX;
    const std::string path(absl::StripPrefix(address, "unix:"));
    std::strncpy(to.sun_path, path.c_str(), sizeof(to.sun_path) - 1);
    const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
      ADD_FAILURE() << path << ": " << std::strerror(errno);
    }
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    fd_ = dup(fd);
    stub_ = v1::InferenceService::NewStub(grpc::CreateInsecureChannelFromFd("coordinator", fd));
  }
  ~OwnConnection() { close(fd_); }
  OwnConnection(const OwnConnection&) = delete;
  OwnConnection& operator=(const OwnConnection&) = delete;

  void Cut() { shutdown(fd_, SHUT_RDWR); }
  v1::InferenceService::Stub& stub() { return *stub_; }

 private:
  int fd_ = -1;
  std::unique_ptr<v1::InferenceService::Stub> stub_;
};

enum Way { kCancel, kCut, kDeadline, kNumWays };

struct Counts {
  std::atomic<int> ways[kNumWays] = {};
  // How far the server had come when the client went, as the client saw it.
  std::atomic<int> before_acceptance{0};
  std::atomic<int> before_first_token{0};
  std::atomic<int> while_decoding{0};
  std::atomic<int> unexpected{0};
};

// One stream that goes after up to 400 ms, half of them within 100, in a way of its own; a build with
// sanitizers comes to its first token later.
void StreamAndGo(const std::string& address, v1::InferenceService::Stub& shared,
                 std::mt19937_64& random, Counts& counts) {
  const Way way = static_cast<Way>(random() % kNumWays);
  // One prompt in eight takes several chunks of prefill.
  const int64_t prompt_tokens = random() % 8 == 0 ? 200 + random() % 200 : 5 + random() % 60;
  const v1::GenerateRequest request = Ask(RandomPrompt(random(), prompt_tokens), kAnswer);
  const double share = static_cast<double>(random() % 1000) / 1000;
  const auto after =
      absl::ToChronoMicroseconds(Patience(absl::Milliseconds(400)) * (share * share));

  grpc::ClientContext context;
  std::unique_ptr<OwnConnection> own;
  if (way == kCut) own = std::make_unique<OwnConnection>(address);
  if (way == kDeadline) context.set_deadline(std::chrono::system_clock::now() + after);
  const auto stream = (own != nullptr ? own->stub() : shared).Generate(&context, request);
  std::thread goes([&] {
    if (way == kDeadline) return;
    std::this_thread::sleep_for(after);
    if (way == kCut) own->Cut();
    if (way == kCancel) context.TryCancel();
  });
  bool accepted = false, drawn = false;
  for (v1::GenerateResponse event; stream->Read(&event);) {
    accepted |= event.has_accepted();
    drawn |= event.has_delta();
  }
  const grpc::StatusCode code = stream->Finish().error_code();
  goes.join();
  ++(drawn      ? counts.while_decoding
     : accepted ? counts.before_first_token
                : counts.before_acceptance);
  ++counts.ways[way];
  const grpc::StatusCode expected[] = {grpc::StatusCode::CANCELLED, grpc::StatusCode::UNAVAILABLE,
                                       grpc::StatusCode::DEADLINE_EXCEEDED};
  if (code != expected[way]) {
    ++counts.unexpected;
    ADD_FAILURE() << "way " << way << " ended with code " << code;
  }
}

uint32_t UsedExtents(const std::string& kvstore_address) {
  const auto store = v1::KvStoreService::NewStub(
      grpc::CreateChannel(kvstore_address, grpc::InsecureChannelCredentials()));
  v1::GetStoreInfoResponse info;
  EXPECT_TRUE(
      store->GetStoreInfo(TestClient::Context().get(), v1::GetStoreInfoRequest(), &info).ok());
  return info.used_extents();
}

TEST(Churn, ExtentsOfStreamsThatWentAreFreeWithinASecondAndOthersDoNotNotice) {
  Cluster cluster;
  ASSERT_NO_FATAL_FAILURE(cluster.AwaitServing());
  v1::GenerateRequest keeps = Ask(RandomPrompt(1, 300), 10);
  keeps.set_session_id("kept");
  ASSERT_TRUE(cluster.client().Generate(keeps).status.ok());
  const v1::GenerateRequest bystander = Ask(RandomPrompt(2, 150), 400);
  const Generation expected = cluster.client().Generate(bystander);
  ASSERT_TRUE(cluster.client().AwaitIdle(absl::Seconds(10)));
  uint32_t at_start = 0;
  ASSERT_TRUE(WaitUntil(Patience(absl::Seconds(5)), [&] {  // those of the session alone
    at_start = UsedExtents(cluster.kvstore_address());
    absl::SleepFor(absl::Milliseconds(300));
    return UsedExtents(cluster.kvstore_address()) == at_start;
  }));
  ASSERT_GT(at_start, 0u);

  Counts counts;
  std::atomic<int> streams_left{kStreams};
  std::atomic<bool> over{false};
  int bystanders = 0;
  std::thread stays([&] {
    do {
      EXPECT_EQ(Difference(cluster.client().Generate(bystander), expected), "") << bystanders;
      ++bystanders;
    } while (!over.load());
  });
  const absl::Time begin = absl::Now();
  std::vector<std::thread> clients;
  for (int i = 0; i < kClients; ++i) {
    clients.emplace_back([&, i] {
      std::mt19937_64 random(kSeed + i);
      while (--streams_left >= 0) {
        StreamAndGo(cluster.api_address(), cluster.client().api(), random, counts);
      }
    });
  }
  for (std::thread& client : clients) client.join();
  const absl::Duration took = absl::Now() - begin;
  over.store(true);
  stays.join();

  const absl::Time gone = absl::Now();
  uint32_t used = 0;
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(1)), [&] {
    used = UsedExtents(cluster.kvstore_address());
    return used == at_start;
  })) << used << " extents are used, " << at_start << " were at the start";
  std::printf(
      "%d streams in %.1f s: %d cancelled, %d cut, %d out of time; %d before acceptance, %d before "
      "the first token, %d while decoding; %d bystanders; extents back at %u after %.0f ms\n",
      kStreams, absl::ToDoubleSeconds(took), counts.ways[kCancel].load(), counts.ways[kCut].load(),
      counts.ways[kDeadline].load(), counts.before_acceptance.load(),
      counts.before_first_token.load(), counts.while_decoding.load(), bystanders, used,
      absl::ToDoubleMilliseconds(absl::Now() - gone));
  // Each moment has been tried.
  EXPECT_GE(counts.before_acceptance.load(), kStreams / 50);
  EXPECT_GE(counts.before_first_token.load(), kStreams / 50);
  EXPECT_GE(counts.while_decoding.load(), kStreams / 50);
  EXPECT_TRUE(cluster.client().AwaitIdle(absl::Seconds(1)));
  keeps.mutable_logprobs()->set_prompt(false);
  EXPECT_EQ(cluster.client().Generate(keeps).cached_tokens(), 256) << "the session is whole";
}

}  // namespace
}  // namespace headroom
