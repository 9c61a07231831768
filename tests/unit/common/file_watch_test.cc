#include "common/file_watch.h"

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <string>

#include "absl/time/clock.h"

namespace headroom {
namespace {

class FileWatchTest : public ::testing::Test {
 protected:
  FileWatchTest() {
    char name[] = "/tmp/headroom-watch-XXXXXX";
    dir_ = mkdtemp(name);
  }
  ~FileWatchTest() override { std::filesystem::remove_all(dir_); }

  std::string Write(const std::string& name, const std::string& contents) const {
    std::ofstream(dir_ / name, std::ios::binary) << contents;
    return dir_ / name;
  }
  void Start(FileWatch& watch) {
    watch.Start(absl::Milliseconds(5), [this] { ++changes_; });
  }
  // Whether something has changed since it was asked last. (A file that is emptied and written may be two
  // changes.)
  bool Changed() {
    for (int i = 0; i < 6000 && changes_ == seen_; ++i) absl::SleepFor(absl::Milliseconds(5));
    const bool changed = changes_ != seen_;
    absl::SleepFor(absl::Milliseconds(50));
    seen_ = changes_;
    return changed;
  }

  std::filesystem::path dir_;
  std::atomic<int> changes_{0};
  int seen_ = 0;
};

TEST_F(FileWatchTest, TellsOfEachWayToChangeAFile) {
  const std::string path = Write("file", "one");
  FileWatch watch({path, ""});
  Start(watch);
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(changes_, 0);
  Write("file", "three");
  EXPECT_TRUE(Changed());
  Write("other", "three");  // as an editor saves
  std::filesystem::rename(dir_ / "other", path);
  EXPECT_TRUE(Changed());
  std::filesystem::remove(path);
  EXPECT_TRUE(Changed());
  Write("file", "three");
  EXPECT_TRUE(Changed());
}

// As Kubernetes replaces a secret: the path stays, a link to its folder moves.
TEST_F(FileWatchTest, TellsOfALinkThatMoves) {
  for (const char* folder : {"a", "b"}) {
    std::filesystem::create_directory(dir_ / folder);
    Write(std::string(folder) + "/file", "same");
  }
  std::filesystem::create_directory_symlink("a", dir_ / "now");
  FileWatch watch({dir_ / "now" / "file"});
  Start(watch);
  std::filesystem::create_directory_symlink("b", dir_ / "next");
  std::filesystem::rename(dir_ / "next", dir_ / "now");
  EXPECT_TRUE(Changed());
}

// Who reads the files between the two has not read what comes after.
TEST_F(FileWatchTest, TellsOfWhatChangesBeforeItStarts) {
  const std::string path = Write("file", "one");
  FileWatch watch({path});
  Write("file", "three");
  Start(watch);
  EXPECT_TRUE(Changed());
}

TEST_F(FileWatchTest, EndsInTheMiddleOfAnIntervalAndWithoutAStart) {
  const std::string path = Write("file", "one");
  FileWatch never({path});
  FileWatch watch({path});
  watch.Start(absl::Hours(1), [] {});  // the test would take as long
}

}  // namespace
}  // namespace headroom
