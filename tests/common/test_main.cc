// main() of a program that holds the tests of several files. Started under the name of one of them (a
// link to the program, see headroom_test() in CMakeLists.txt) it runs those of its file, else all.
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

// Name of a test, name of its file; two null pointers end it. CMake writes it.
extern const char* headroom_test_files[][2];

namespace headroom {
namespace {

bool HoldsTestsOf(const testing::TestSuite& suite, const std::string& file) {
  for (int i = 0; i < suite.total_test_count(); ++i) {
    if (std::filesystem::path(suite.GetTestInfo(i)->file()).filename() == file) return true;
  }
  return false;
}

// Adds the suites of other files to those that --gtest_filter leaves out.
void LeaveOutOtherFiles(const std::string& file) {
  std::string& filter = testing::GTEST_FLAG(filter);
  char separator = filter.find('-') == std::string::npos ? '-' : ':';
  const testing::UnitTest& program = *testing::UnitTest::GetInstance();
  for (int i = 0; i < program.total_test_suite_count(); ++i) {
    const testing::TestSuite& suite = *program.GetTestSuite(i);
    if (HoldsTestsOf(suite, file)) continue;
    filter += separator + std::string(suite.name()) + ".*";
    separator = ':';
  }
}

}  // namespace
}  // namespace headroom

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  const std::filesystem::path name = std::filesystem::path(argv[0]).filename();
  for (const auto* test = headroom_test_files; (*test)[0] != nullptr; ++test) {
    if (name == (*test)[0]) headroom::LeaveOutOtherFiles((*test)[1]);
  }
  return RUN_ALL_TESTS();
}
