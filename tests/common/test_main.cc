// main() of a program that holds the tests of several files. Started under the name of one test (a link to
// the program, see headroom_test() in CMakeLists.txt) it runs those of its files, else all.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <set>
#include <string>

// Name of a test, name of its file; two null pointers end it. CMake writes it.
extern const char* headroom_test_files[][2];

namespace headroom {
namespace {

bool HoldsTestsOf(const testing::TestSuite& suite, const std::set<std::string>& files) {
  for (int i = 0; i < suite.total_test_count(); ++i) {
    if (files.contains(std::filesystem::path(suite.GetTestInfo(i)->file()).filename())) return true;
  }
  return false;
}

// Adds the suites of other files to those that --gtest_filter leaves out. False: no suite is of these.
bool LeaveOutOtherFiles(const std::set<std::string>& files) {
  std::string& filter = testing::GTEST_FLAG(filter);
  char separator = filter.find('-') == std::string::npos ? '-' : ':';
  const testing::UnitTest& program = *testing::UnitTest::GetInstance();
  bool some = false;
  for (int i = 0; i < program.total_test_suite_count(); ++i) {
    const testing::TestSuite& suite = *program.GetTestSuite(i);
    if (HoldsTestsOf(suite, files)) {
      some = true;
      continue;
    }
    filter += separator + std::string(suite.name()) + ".*";
    separator = ':';
  }
  return some;
}

}  // namespace
}  // namespace headroom

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::filesystem::path name = std::filesystem::path(argv[0]).filename();
  std::set<std::string> files;
  for (const auto* test = headroom_test_files; (*test)[0] != nullptr; ++test) {
    if (name == (*test)[0]) files.insert((*test)[1]);
  }
  if (!files.empty() && !headroom::LeaveOutOtherFiles(files)) {
    std::fprintf(stderr, "%s: no test in its files\n", name.c_str());
    return 1;
  }
  return RUN_ALL_TESTS();
}
