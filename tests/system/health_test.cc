// Health says what a caller would find: a process that is dead or stopped is told within 2 s, work that
// takes long is no reason.
#include <gtest/gtest.h>

#include <signal.h>

#include <thread>

#include "absl/time/clock.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr absl::Duration kTold = absl::Seconds(2);

TEST(Health, APeerThatIsStoppedOrDeadIsToldAndItsReturnToo) {
  Cluster cluster;
  cluster.AwaitServing();
  const struct {
    Process& (Cluster::*process)();
    void (Cluster::*start)();
  } peers[] = {{&Cluster::worker, &Cluster::StartWorker}, {&Cluster::kvstore, &Cluster::StartKvStore}};
  for (const auto& peer : peers) {
    (cluster.*peer.process)().Signal(SIGSTOP);
    EXPECT_TRUE(cluster.client().AwaitHealth("NOT_SERVING", kTold));
    (cluster.*peer.process)().Signal(SIGCONT);
    EXPECT_TRUE(cluster.client().AwaitHealth("SERVING", absl::Seconds(20)));
    (cluster.*peer.process)().Kill();
    EXPECT_TRUE(cluster.client().AwaitHealth("NOT_SERVING", kTold));
    (cluster.*peer.start)();
    EXPECT_TRUE(cluster.client().AwaitHealth("SERVING", absl::Seconds(20)));
  }
}

TEST(Health, AWorkerWhoseProcessorsAreAllBusyServes) {
  ClusterOptions options;
  options.worker_args = {"--threads", "2", "--max-chunk-tokens", "4096"};
  Cluster cluster(options);
  cluster.AwaitServing();
  std::thread client([&cluster] {
    v1::GenerateRequest request = Ask(RandomPrompt(1, 8000), 1);
    request.mutable_logprobs()->clear_prompt();
    EXPECT_TRUE(cluster.client().Generate(request).status.ok());
  });
  int asked = 0;
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)),
                        [&] { return cluster.client().Load().running_requests() == 1; }));
  for (; cluster.client().Load().running_requests() == 1; ++asked) {
    EXPECT_EQ(cluster.client().Health(), "SERVING");
    absl::SleepFor(absl::Milliseconds(20));
  }
  client.join();
  EXPECT_GT(asked, 0);
}

}  // namespace
}  // namespace headroom
