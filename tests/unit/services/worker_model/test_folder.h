// A temporary folder for a model's files, removed in the end.
#ifndef HEADROOM_TESTS_UNIT_SERVICES_WORKER_MODEL_TEST_FOLDER_H_
#define HEADROOM_TESTS_UNIT_SERVICES_WORKER_MODEL_TEST_FOLDER_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

namespace headroom {

class TestFolder {
 public:
  TestFolder() : path_(testing::TempDir() + "headroom-model-XXXXXX") {
    EXPECT_NE(mkdtemp(path_.data()), nullptr);
  }
  ~TestFolder() { std::filesystem::remove_all(path_); }
  TestFolder(const TestFolder&) = delete;
  TestFolder& operator=(const TestFolder&) = delete;

  const std::string& path() const { return path_; }

  void Write(const std::string& name, const std::string& content) const {
    // A new file: closing one that was cut to nothing waits for the disk (ext4), 2 ms each.
    std::filesystem::remove(path_ + "/" + name);
    std::ofstream file(path_ + "/" + name, std::ios::binary);
    file << content;
    EXPECT_TRUE(file.flush()) << name;
  }
  std::string Read(const std::string& name) const {
    std::ifstream file(path_ + "/" + name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

 private:
  std::string path_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_SERVICES_WORKER_MODEL_TEST_FOLDER_H_
