// TLS, client certificates and tokens, with the real programs: who is let in, who is not, and what happens
// when the files change.
#include <gtest/gtest.h>

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/common/test_certificates.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr char kName[] = "headroom.test";
// gRPC writes a line for each handshake that is refused; here they are meant to be.
[[maybe_unused]] const int kQuiet = setenv("GRPC_VERBOSITY", "NONE", 0);
constexpr char kLocal[] = "localhost";  // the name that a socket's address stands for
constexpr char kToken[] = "a-token-of-many-characters";

class SecurityTest : public ::testing::Test {
 protected:
  // As an editor saves: beside it, then in its place.
  std::string Write(const std::string& name, const std::string& contents) const {
    const std::string path = dir_.File(name);
    std::ofstream(path + ".new", std::ios::binary) << contents;
    EXPECT_EQ(std::rename((path + ".new").c_str(), path.c_str()), 0);
    return path;
  }
  std::vector<std::string> WriteServer(const TestCertificate& server) const {
    return {"--tls-cert", Write("server.pem", server.certificate), "--tls-key",
            Write("server.key", server.key)};
  }
  // TLS by this CA, with a certificate and a token if there are.
  static TestSecurity Client(const TestCa& ca, const TestCertificate& own = {},
                             const std::string& token = "") {
    grpc::SslCredentialsOptions ssl;
    ssl.pem_root_certs = ca.certificate();
    ssl.pem_cert_chain = own.certificate;
    ssl.pem_private_key = own.key;
    auto credentials = grpc::SslCredentials(ssl);
    if (!token.empty()) {
      credentials =
          grpc::CompositeChannelCredentials(credentials, grpc::AccessTokenCredentials(token));
    }
    return {credentials, kName};
  }
  // What one call comes to for a client that has not called before.
  static grpc::Status Call(const Cluster& cluster, const TestSecurity& security) {
    const TestClient client(cluster.api_address(), cluster.admin_address(), security);
    v1::GetLoadResponse response;
    return client.api().GetLoad(TestClient::Context().get(), v1::GetLoadRequest(), &response);
  }
  static grpc::Status CallAdmin(const Cluster& cluster, const TestSecurity& security) {
    const TestClient client(cluster.api_address(), cluster.admin_address(), security);
    v1::GetStatusResponse response;
    return client.admin().GetStatus(TestClient::Context().get(), v1::GetStatusRequest(), &response);
  }
  static CommandResult Run(std::vector<std::string> args) {
    args.insert(args.begin(), HeadroomBinary());
    return RunCommand(args, Patience(absl::Seconds(20)));
  }

  const TestDir dir_;
  const TestCa ca_{"ca"};
  const TestCa other_ca_{"other ca"};
};

TEST_F(SecurityTest, TlsAndTokens) {
  ClusterOptions options;
  options.coordinator_args = WriteServer(ca_.Issue(kName));
  const std::string tokens =
      Write("tokens", absl::StrCat("# of the backend\n", kToken, "\nanother-token-of-someone\n"));
  options.coordinator_args.insert(options.coordinator_args.end(), {"--auth-token-file", tokens});
  options.security = Client(ca_, {}, kToken);
  Cluster cluster(options);
  cluster.AwaitServing();
  const Generation answer = cluster.client().Generate(Ask(RandomPrompt(1, 100), 4));
  EXPECT_TRUE(answer.status.ok()) << answer.status;
  EXPECT_EQ(answer.tokens.size(), 4u);
  EXPECT_TRUE(CallAdmin(cluster, options.security).ok());
  EXPECT_TRUE(Call(cluster, Client(ca_, {}, "another-token-of-someone")).ok());

  for (const char* wrong : {"", "a-token-of-many-characterS", "a-token-of-many-character",
                            "# of the backend"}) {
    const TestSecurity security = Client(ca_, {}, wrong);
    EXPECT_EQ(Call(cluster, security).error_code(), grpc::StatusCode::UNAUTHENTICATED) << wrong;
    EXPECT_EQ(CallAdmin(cluster, security).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  }
  EXPECT_EQ(Call(cluster, TestSecurity()).error_code(), grpc::StatusCode::UNAVAILABLE) << "plain";
  EXPECT_EQ(Call(cluster, Client(other_ca_, {}, kToken)).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  TestSecurity other_name = Client(ca_, {}, kToken);
  other_name.server_name = "other.test";
  EXPECT_EQ(Call(cluster, other_name).error_code(), grpc::StatusCode::UNAVAILABLE);

  // Probes need no token; and the program as a client.
  EXPECT_EQ(TestClient(cluster.api_address(), cluster.admin_address(), Client(ca_)).Health(),
            "SERVING");
  const std::string ca = Write("ca.pem", ca_.certificate());
  const std::vector<std::string> to = {"--tls-ca", ca, "--tls-server-name", kName};
  const auto with = [](std::vector<std::string> args, const std::vector<std::string>& more) {
    args.insert(args.end(), more.begin(), more.end());
    return args;
  };
  const CommandResult health = Run(with({"health", "--server", cluster.api_address()}, to));
  EXPECT_EQ(health.exit_code, 0) << health.err;
  const std::vector<std::string> generate = {"generate", "--server", cluster.api_address(),
                                             "--prompt", "abc", "--max-tokens", "2"};
  EXPECT_NE(Run(with(generate, to)).exit_code, 0) << "without a token";
  const CommandResult told = Run(with(with(generate, to), {"--auth-token-file", tokens}));
  EXPECT_EQ(told.exit_code, 0) << told.err;
  EXPECT_EQ(Run(with(with({"status", "--server", cluster.admin_address()}, to),
                     {"--auth-token-file", tokens}))
                .exit_code,
            0);
  const CommandResult clear = Run(with(generate, {"--auth-token-file", tokens}));
  EXPECT_EQ(clear.exit_code, 2) << "a token in the clear";
  EXPECT_EQ(Run(with(generate, {"--tls-server-name", kName})).exit_code, 2) << "of no use";

  // Another token from now on.
  Write("tokens", "the-token-of-the-day-after\n");
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    return Call(cluster, Client(ca_, {}, "the-token-of-the-day-after")).ok();
  }));
  EXPECT_EQ(Call(cluster, Client(ca_, {}, kToken)).error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(SecurityTest, ClientCertificates) {
  ClusterOptions options;
  options.coordinator_args = WriteServer(ca_.Issue(kName));
  options.coordinator_args.insert(options.coordinator_args.end(),
                                  {"--tls-client-ca", Write("clients.pem", ca_.certificate())});
  options.security = Client(ca_, ca_.Issue("client"));
  Cluster cluster(options);
  cluster.AwaitServing();
  EXPECT_TRUE(Call(cluster, options.security).ok());
  EXPECT_FALSE(Call(cluster, Client(ca_)).ok()) << "no certificate";
  EXPECT_FALSE(Call(cluster, Client(ca_, other_ca_.Issue("client"))).ok());
  EXPECT_FALSE(Call(cluster, Client(ca_, ca_.Issue("client", true))).ok()) << "expired";
}

TEST_F(SecurityTest, PeersThatShowNoCertificateAreRefused) {
  const auto peer = [&](const std::string& who, const TestCa& ca) {
    const TestCertificate own = ca.Issue(kLocal);
    return std::vector<std::string>{
        "--peer-cert", Write(who + ".pem", own.certificate), "--peer-key",
        Write(who + ".key", own.key), "--peer-ca", Write(who + ".ca.pem", ca_.certificate())};
  };
  ClusterOptions options;
  options.kvstore_args = peer("kvstore", ca_);
  options.worker_args = peer("worker", ca_);
  options.worker_args.insert(options.worker_args.end(), {"--threads", "1"});
  options.coordinator_args = peer("coordinator", ca_);
  Cluster cluster(options);
  cluster.AwaitServing();
  EXPECT_TRUE(cluster.client().Generate(Ask(RandomPrompt(1, 100), 4)).status.ok());
  // A coordinator of somebody else finds nobody.
  for (const bool signed_by_another : {true, false}) {
    const std::vector<std::string> stranger =
        signed_by_another ? peer("stranger", other_ca_) : std::vector<std::string>();
    const TestDir dir;
    std::vector<std::string> args = {HeadroomBinary(), "coordinator", "--listen",
                                     "unix:" + dir.File("api"), "--model", cluster.model_dir(),
                                     "--worker", cluster.worker_address(), "--kvstore",
                                     cluster.kvstore_address()};
    args.insert(args.end(), stranger.begin(), stranger.end());
    Process process(args, dir.File("log"));
    EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
      return absl::StrContains(process.Log(), "connecting: worker: failed");
    })) << process.Log();
    EXPECT_TRUE(process.running());
    EXPECT_EQ(TestClient("unix:" + dir.File("api"), cluster.admin_address()).Health(),
              "NOT_SERVING");
  }
  EXPECT_EQ(cluster.client().Health(), "SERVING");
}

TEST_F(SecurityTest, ACertificateIsReplacedUnderStreams) {
  ClusterOptions options;
  options.coordinator_args = WriteServer(ca_.Issue(kName));
  options.security = Client(ca_);
  Cluster cluster(options);
  cluster.AwaitServing();
  const v1::GenerateRequest request = Ask(RandomPrompt(1, 64), 12);
  const Generation undisturbed = cluster.client().Generate(request);
  ASSERT_TRUE(undisturbed.status.ok()) << undisturbed.status;

  // Eight streams that begin before and end after: each asks until the new certificate is there.
  std::atomic<bool> replaced{false};
  std::atomic<int> begun{0};
  std::atomic<int> failed{0};
  std::vector<std::thread> streams;
  for (int i = 0; i < 8; ++i) {
    streams.emplace_back([&] {
      bool last = false;
      for (bool first = true; !last; first = false) {
        last = replaced.load();
        const Generation answer = cluster.client().Generate(request);
        if (!answer.status.ok() || answer.ids() != undisturbed.ids()) ++failed;
        if (first) ++begun;
      }
    });
  }
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(60)), [&] { return begun == 8; }));
  EXPECT_FALSE(Call(cluster, Client(other_ca_)).ok());
  WriteServer(other_ca_.Issue(kName));
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    return Call(cluster, Client(other_ca_)).ok();
  })) << "the new certificate is not taken";
  replaced.store(true);
  for (std::thread& stream : streams) stream.join();
  EXPECT_EQ(failed, 0);
  EXPECT_FALSE(Call(cluster, Client(ca_)).ok());

  // Garbage, and a key that belongs to no certificate: what was there stays.
  Write("server.key", ca_.Issue(kName).key);
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    return absl::StrContains(cluster.coordinator().Log(), "is not the key of");
  }));
  Write("server.pem", "no certificate");
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(20)), [&] {
    return absl::StrContains(cluster.coordinator().Log(), "holds no certificate");
  }));
  absl::SleepFor(absl::Seconds(2));  // gRPC would have looked at it by now
  EXPECT_TRUE(Call(cluster, Client(other_ca_)).ok());
}

TEST_F(SecurityTest, WhatIsWrongIsNamedBeforeAnythingIsServed) {
  const TestDir model;
  MustWriteModel(SystemTestModel(), model.File("model"));
  const TestCertificate good = ca_.Issue(kName);
  const std::string cert = Write("cert.pem", good.certificate);
  const std::string key = Write("key.pem", good.key);
  const std::string other = Write("other.key", ca_.Issue(kName).key);
  const std::string garbage = Write("garbage", std::string("\0\xff garbage", 10));
  const std::string tokens = Write("tokens", "a-token-of-many-characters\n");
  struct Case {
    std::vector<std::string> args;
    std::string says;
  };
  const std::vector<Case> cases = {
      {{"--tls-cert", cert}, "--tls-key is missing"},
      {{"--tls-key", key}, "--tls-cert is missing"},
      {{"--tls-cert", cert, "--tls-key", other}, "--tls-key " + other + ": is not the key of"},
      {{"--tls-cert", garbage, "--tls-key", key}, garbage + ": holds no certificate"},
      {{"--tls-cert", cert, "--tls-key", garbage}, garbage + ": holds no unencrypted private key"},
      {{"--tls-cert", cert, "--tls-key", dir_.File("none")}, "none: No such file"},
      {{"--tls-cert", cert, "--tls-key", dir_.path()}, "Is a directory"},
      {{"--tls-cert", "/dev/zero", "--tls-key", key}, "/dev/zero: has more than"},
      {{"--tls-client-ca", cert}, "needs --tls-cert"},
      {{"--auth-token-file", tokens}, "needs --tls-cert"},
      {{"--tls-cert", cert, "--tls-key", key, "--auth-token-file", Write("short", "abc\n")},
       "short: line 1: expected a token"},
      {{"--tls-cert", cert, "--tls-key", key, "--auth-token-file", Write("empty", "# none\n")},
       "empty: holds no token"},
      {{"--peer-cert", cert, "--peer-key", key}, "--peer-ca is missing"},
      {{"--peer-ca", cert}, "--peer-cert is missing"},
  };
  const auto expect = [](std::vector<std::string> args, const Case& c) {
    args.insert(args.end(), c.args.begin(), c.args.end());
    const CommandResult result = Run(args);
    EXPECT_EQ(result.exit_code, 2) << c.says << "\n" << result.err;
    EXPECT_TRUE(absl::StrContains(result.err, c.says)) << c.says << "\n" << result.err;
  };
  for (const Case& c : cases) {
    expect({"coordinator", "--listen", "unix:" + model.File("api"), "--model", model.File("model")},
           c);
  }
  // These two tell before they read weights or take memory.
  const Case half = {{"--peer-cert", cert, "--peer-key", key}, "--peer-ca is missing"};
  expect({"worker", "--listen", "unix:" + model.File("api"), "--model", model.File("none")}, half);
  expect({"kvstore", "--listen", "unix:" + model.File("api"), "--segment-dir", model.File("seg"),
          "--host-memory", "1MiB"},
         half);
  EXPECT_FALSE(std::filesystem::exists(model.File("seg")));
}

}  // namespace
}  // namespace headroom
