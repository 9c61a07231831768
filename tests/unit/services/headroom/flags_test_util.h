// Where flags' values come from besides the command line.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_HEADROOM_FLAGS_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_SERVICES_HEADROOM_FLAGS_TEST_UTIL_H_

#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <fstream>
#include <string>

namespace headroom::cli {

// The variable, for as long as it lives.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) {
    setenv(name, value.c_str(), 1);
  }
  ~Variable() { unsetenv(name_); }

 private:
  const char* const name_;
};

// A file of flags.
class ConfigFile {
 public:
  explicit ConfigFile(const std::string& text)
      : path_(::testing::TempDir() + "flags_test." + std::to_string(getpid()) + ".conf") {
    std::ofstream(path_) << text;
  }
  ~ConfigFile() { unlink(path_.c_str()); }
  std::string flag() const { return "--config=" + path_; }
  const std::string& path() const { return path_; }

 private:
  const std::string path_;
};

}  // namespace headroom::cli

#endif  // HEADROOM_TESTS_UNIT_SERVICES_HEADROOM_FLAGS_TEST_UTIL_H_
