#include "services/kvstore/memory_limits.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "common/fd.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

void Write(const std::string& path, const std::string& text) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path) << text;
}

TEST(MemoryLimits, ReadsNumbersFromProcFiles) {
  EXPECT_EQ(FindKilobytes("MemTotal: 9 kB\nMemAvailable:   123 kB\n", "MemAvailable"), 123 * 1024);
  EXPECT_FALSE(FindKilobytes("MemAvailable:   many kB\n", "MemAvailable").has_value());
  EXPECT_FALSE(FindKilobytes("", "MemAvailable").has_value());
  EXPECT_EQ(FindNumber("inactive_anon 5\ninactive_file 17\n", "inactive_file"), 17);
  EXPECT_EQ(ParseLimit("max\n"), kUnlimited);
  EXPECT_EQ(ParseLimit("9223372036854771712\n"), kUnlimited);
  EXPECT_EQ(ParseLimit("18446744073709551615\n"), kUnlimited);
  EXPECT_EQ(ParseLimit("4096\n"), 4096);
  EXPECT_FALSE(ParseLimit("").has_value());
  EXPECT_FALSE(ParseLimit("-5").has_value());
}

TEST(MemoryLimits, FindsTheGroupInBothVersions) {
  const MemoryGroup first = FindMemoryGroup("5:cpu,cpuacct:/a\n4:memory:/b/c\n0::/d\n");
  EXPECT_EQ(first.version, 1);
  EXPECT_EQ(first.path, "/b/c");
  const MemoryGroup second = FindMemoryGroup("0::/user.slice/x:y\n");
  EXPECT_EQ(second.version, 2);
  EXPECT_EQ(second.path, "/user.slice/x:y");
  EXPECT_EQ(FindMemoryGroup("").version, 0);
}

TEST(MemoryLimits, TheGroupsAboveCountToo) {
  const TempSegmentDir root;
  Write(root.File("a/b/memory.max"), "max");
  Write(root.File("a/b/memory.current"), "10");
  Write(root.File("a/memory.max"), "1000");
  Write(root.File("a/memory.current"), "700");
  Write(root.File("a/memory.stat"), "anon 1\ninactive_file 50\n");
  const std::vector<MemoryLimit> limits = FindGroupLimits(root.path(), {2, "/a/b"});
  ASSERT_EQ(limits.size(), 2u);
  EXPECT_EQ(limits[0].free_bytes, kUnlimited);
  EXPECT_EQ(limits[1].free_bytes, 350);
  EXPECT_EQ(limits[1].what, "memory control group /a");
}

TEST(MemoryLimits, AContainerSeesItsGroupAsTheRoot) {
  const TempSegmentDir root;
  Write(root.File("memory/memory.limit_in_bytes"), "1000");
  Write(root.File("memory/memory.usage_in_bytes"), "1200");
  const std::vector<MemoryLimit> limits = FindGroupLimits(root.path(), {1, "/docker/abc"});
  ASSERT_EQ(limits.size(), 1u);
  EXPECT_EQ(limits[0].free_bytes, 0);
}

TEST(MemoryLimits, NamesTheFileSystem) {
  const TempSegmentDir dir;
  const Fd fd(open(dir.path().c_str(), O_RDONLY | O_DIRECTORY));
  EXPECT_TRUE(IsTmpfs(fd.get()));
  const std::vector<MemoryLimit> limits = FindMemoryLimits(fd.get(), dir.path());
  ASSERT_FALSE(limits.empty());
  EXPECT_NE(limits[0].what.find(dir.path()), std::string::npos);
  EXPECT_GT(limits[0].free_bytes, 0);
}

}  // namespace
}  // namespace headroom::kvstore
