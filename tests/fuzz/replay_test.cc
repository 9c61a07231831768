// Inputs worth keeping, and seeded changes of them, in every build: libFuzzer itself is clang's and
// runs by hand (docs/testing.md).
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "tests/fuzz/fuzz.h"

namespace headroom::fuzz {
namespace {

constexpr int kMutations = 10000;
constexpr uint64_t kSeed = 1;

std::vector<std::string> Corpus() {
  std::vector<std::filesystem::path> paths;
  const char* const folder = std::getenv("HEADROOM_FUZZ_CORPUS");
  if (folder == nullptr) return {};
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    paths.push_back(entry.path());
  }
  std::sort(paths.begin(), paths.end());
  std::vector<std::string> corpus;
  for (const std::filesystem::path& path : paths) {
    std::ifstream file(path, std::ios::binary);
    corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  return corpus;
}

void Try(const std::string& input) {
  // Of the size that it has, so that AddressSanitizer sees a read beyond it.
  const std::vector<uint8_t> bytes(input.begin(), input.end());
  EXPECT_EQ(LLVMFuzzerTestOneInput(bytes.data(), bytes.size()), 0);
}

TEST(Fuzz, WhatWasKeptIsNoTrouble) {
  const std::vector<std::string> corpus = Corpus();
  EXPECT_GE(corpus.size(), 3u) << "HEADROOM_FUZZ_CORPUS names the folder";
  for (const std::string& input : corpus) Try(input);
  Try("");
}

TEST(Fuzz, NeitherAreChangesOfIt) {
  const std::vector<std::string> corpus = Corpus();
  ASSERT_FALSE(corpus.empty());
  std::mt19937_64 random(kSeed);
  for (int i = 0; i < kMutations; ++i) {
    std::string input = corpus[random() % corpus.size()];
    for (uint64_t changes = 1 + random() % 4; changes > 0 && !input.empty(); --changes) {
      const size_t at = random() % input.size();
      switch (random() % 4) {
        case 0: input[at] = static_cast<char>(random()); break;
        case 1: input[at] = static_cast<char>(input[at] ^ (1 << random() % 8)); break;
        case 2: input.erase(at, 1 + random() % 8); break;
        case 3: input.insert(at, input.substr(random() % input.size(), random() % 16)); break;
      }
    }
    Try(input);
  }
}

}  // namespace
}  // namespace headroom::fuzz
