// Processes that are started, watched and stopped. The children are this program itself, see
// main().
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <string>
#include <thread>

#include "absl/time/clock.h"
#include "services/headroom/child_process.h"
#include "services/headroom/private_dir.h"
#include "services/headroom/process_signals.h"
#include "services/headroom/supervisor.h"
#include "tests/common/eventually.h"

namespace headroom::cli {
namespace {

constexpr absl::Duration kPatience = absl::Seconds(20);

std::string ReadAll(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

void Append(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::app) << text;
}

class Processes : public ::testing::Test {
 protected:
  Processes() : dir_(::testing::TempDir() + "process_test." + std::to_string(getpid())) {
    std::filesystem::create_directory(dir_);
  }
  ~Processes() override { std::filesystem::remove_all(dir_); }

  std::string File(const std::string& name) const { return dir_ + "/" + name; }

  // Runs a supervisor of `specs` here while `meanwhile` runs on another thread.
  int Supervise(std::vector<ChildSpec> specs, const std::function<void()>& meanwhile) {
    absl::StatusOr<ProcessSignals> signals = ProcessSignals::Block({SIGTERM, SIGINT});
    EXPECT_TRUE(signals.ok());
    std::thread other(meanwhile);
    const int code =
        Supervisor(std::move(specs), *std::move(signals), absl::Seconds(5)).Run();
    other.join();
    // A signal that came after the end would be the next test's.
    sigset_t both;
    sigemptyset(&both);
    sigaddset(&both, SIGTERM);
    sigaddset(&both, SIGINT);
    const timespec at_once = {};
    while (sigtimedwait(&both, nullptr, &at_once) > 0) {
    }
    return code;
  }

  const std::string dir_;
};

TEST_F(Processes, AChildReportsHowItEnded) {
  absl::StatusOr<ChildProcess> child = ChildProcess::Start({"exit", "3"}, SIGKILL);
  ASSERT_TRUE(child.ok()) << child.status();
  std::optional<ExitStatus> status = child->WaitFor(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(status->ToString(), "exited with code 3");

  child = ChildProcess::Start({"sleep"}, SIGKILL);
  ASSERT_TRUE(child.ok()) << child.status();
  EXPECT_FALSE(child->WaitFor(absl::Milliseconds(20)).has_value());
  child->Signal(SIGKILL);
  status = child->WaitFor(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(status->ToString(), "was killed by signal 9 (Killed)");
}

TEST_F(Processes, AChildInheritsNeitherFlagsNorBlockedSignalsNorInput) {
  setenv("HEADROOM_LISTEN", "127.0.0.1:1", 1);
  absl::StatusOr<ProcessSignals> signals = ProcessSignals::Block({SIGTERM, SIGINT});
  absl::StatusOr<ChildProcess> child = ChildProcess::Start({"check"}, SIGKILL);
  unsetenv("HEADROOM_LISTEN");
  ASSERT_TRUE(child.ok()) << child.status();
  const std::optional<ExitStatus> status = child->WaitFor(kPatience);
  ASSERT_TRUE(status.has_value());
  EXPECT_EQ(status->code, 0);
}

TEST_F(Processes, AChildDiesWithItsParent) {
  absl::StatusOr<ChildProcess> parent = ChildProcess::Start({"nest", File("pid")}, SIGKILL);
  ASSERT_TRUE(parent.ok()) << parent.status();
  ASSERT_TRUE(Eventually([&] { return ReadAll(File("pid")).find('\n') != std::string::npos; }));
  const pid_t grandchild = std::stoi(ReadAll(File("pid")));
  EXPECT_EQ(kill(grandchild, 0), 0);
  parent->Signal(SIGKILL);
  // Gone, or waiting for whoever is the reaper here.
  EXPECT_TRUE(Eventually([&] {
    const std::string stat = ReadAll("/proc/" + std::to_string(grandchild) + "/stat");
    return stat.empty() || stat.find(") Z ") != std::string::npos;
  }));
}

TEST_F(Processes, WhatDiesIsStartedAgain) {
  const int code = Supervise({{"victim", {"append-and-die", File("log")}, "", false}}, [&] {
    EXPECT_TRUE(Eventually([&] { return ReadAll(File("log")).size() >= 3; }));
    kill(getpid(), SIGTERM);
  });
  EXPECT_EQ(code, 0);
}

// Not an error of its start, however soon.
TEST_F(Processes, AWorkerWithoutADeviceIsStartedAgain) {
  const int code = Supervise({{"worker", {"append-and-exit", File("log"), "3"}, "", false}}, [&] {
    EXPECT_TRUE(Eventually([&] { return ReadAll(File("log")).size() >= 2; }));
    kill(getpid(), SIGTERM);
  });
  EXPECT_EQ(code, 0);
}

TEST_F(Processes, AnErrorAtTheFirstStartEndsAllWithItsCode) {
  const int code = Supervise({{"good", {"until-term", File("log"), "good"}, "", false},
                              {"bad", {"exit", "2"}, "", true}},
                             [] {});
  EXPECT_EQ(code, 2);
}

TEST_F(Processes, StoppingGoesInOrder) {
  const int code = Supervise({{"first", {"until-term", File("log"), "store"}, "", false},
                              {"second", {"until-term", File("log"), "api"}, "", true}},
                             [&] {
                               EXPECT_TRUE(Eventually(
                                   [&] { return ReadAll(File("log")).size() == 2; }));
                               kill(getpid(), SIGINT);
                             });
  EXPECT_EQ(code, 0);
  EXPECT_EQ(ReadAll(File("log")), "++api store ");
}

TEST_F(Processes, ASecondSignalKills) {
  const int code = Supervise({{"deaf", {"deaf", File("log")}, "", true}}, [&] {
    EXPECT_TRUE(Eventually([&] { return !ReadAll(File("log")).empty(); }));
    kill(getpid(), SIGTERM);
    absl::SleepFor(2 * kSameSignal);
    kill(getpid(), SIGTERM);
  });
  EXPECT_EQ(code, 1);
}

TEST_F(Processes, TheSameSignalTwiceIsOne) {
  const int code = Supervise({{"slow", {"until-term", File("log"), "x"}, "", true}}, [&] {
    EXPECT_TRUE(Eventually([&] { return !ReadAll(File("log")).empty(); }));
    kill(getpid(), SIGTERM);
    kill(getpid(), SIGINT);
  });
  EXPECT_EQ(code, 0);
}

TEST_F(Processes, AStaleSocketFileIsRemovedBeforeAStart) {
  Append(File("socket"), "stale");
  const ChildSpec spec = {"one", {"until-term", File("log"), "x"}, File("socket"), false};
  const int code = Supervise({spec}, [&] {
    EXPECT_TRUE(Eventually([&] { return !ReadAll(File("log")).empty(); }));
    kill(getpid(), SIGTERM);
  });
  EXPECT_EQ(code, 0);
  EXPECT_FALSE(std::filesystem::exists(File("socket")));
}

TEST(RestartDelay, DoublesToFiveSecondsAndStartsAnewAfterALongLife) {
  RestartDelay delay;
  for (const int64_t ms : {100, 200, 400, 800, 1600, 3200, 5000, 5000}) {
    EXPECT_EQ(delay.Next(absl::Seconds(1)), absl::Milliseconds(ms));
  }
  EXPECT_EQ(delay.Next(absl::Seconds(30)), absl::Milliseconds(100));
  EXPECT_EQ(delay.Next(absl::Seconds(29)), absl::Milliseconds(200));
}

TEST_F(Processes, APrivateFolderIsOursAloneAndGoesWithUs) {
  std::string path;
  {
    absl::StatusOr<PrivateDir> dir = PrivateDir::Make(dir_);
    ASSERT_TRUE(dir.ok()) << dir.status();
    path = dir->path();
    struct stat stat_of = {};
    ASSERT_EQ(stat(path.c_str(), &stat_of), 0);
    EXPECT_EQ(stat_of.st_mode & 0777, 0700u);
    Append(path + "/file", "x");
  }
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(Processes, AFolderThatAKilledProcessLeftIsSweptAwayAndALiveOneIsNot) {
  const std::string left = File("headroom-private-abcdef");
  const std::string other = File("headroom-private-abcdefg");
  std::filesystem::create_directory(left);
  Append(left + "/data", "x");
  std::filesystem::create_directory(other);
  const absl::StatusOr<PrivateDir> live = PrivateDir::Make(dir_);
  const absl::StatusOr<PrivateDir> next = PrivateDir::Make(dir_);
  ASSERT_TRUE(live.ok() && next.ok());
  EXPECT_FALSE(std::filesystem::exists(left));
  EXPECT_TRUE(std::filesystem::exists(other));
  EXPECT_TRUE(std::filesystem::exists(live->path()));
}

TEST_F(Processes, AFolderThatCannotBeMadeIsNamed) {
  const absl::Status status = PrivateDir::Make("/nonexistent/folder").status();
  EXPECT_NE(std::string(status.message()).find("/nonexistent/folder"), std::string::npos) << status;
}

// ---------------------------------------------------------------- what children do

int Child(const std::vector<std::string>& args) {
  const std::string& what = args[0];
  if (what == "exit") return std::atoi(args[1].c_str());
  if (what == "check") {
    sigset_t blocked;
    sigprocmask(SIG_SETMASK, nullptr, &blocked);
    char byte;
    return getenv("HEADROOM_LISTEN") == nullptr && !sigismember(&blocked, SIGTERM) &&
                   getpgrp() == getpid() && read(STDIN_FILENO, &byte, 1) == 0
               ? 0
               : 1;
  }
  if (what == "nest") {
    absl::StatusOr<ChildProcess> child = ChildProcess::Start({"sleep"}, SIGKILL);
    if (!child.ok()) return 1;
    Append(args[1], std::to_string(child->pid()) + "\n");
    pause();
  }
  if (what == "append-and-exit") {
    Append(args[1], "x");
    return std::stoi(args[2]);
  }
  if (what == "append-and-die") {
    Append(args[1], "x");
    raise(SIGKILL);
  }
  if (what == "until-term") {
    absl::StatusOr<ProcessSignals> signals = ProcessSignals::Block({SIGTERM});
    Append(args[1], "+");
    while (signals->Take() == 0) absl::SleepFor(absl::Milliseconds(1));
    Append(args[1], args[2] + " ");
    return 0;
  }
  if (what == "deaf") {
    signal(SIGTERM, SIG_IGN);
    Append(args[1], "x");
  }
  for (;;) pause();
}

}  // namespace
}  // namespace headroom::cli

int main(int argc, char** argv) {
  // A child's first argument is no flag of the test framework.
  if (argc > 1 && argv[1][0] != '-') {
    return headroom::cli::Child(std::vector<std::string>(argv + 1, argv + argc));
  }
  ::testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
