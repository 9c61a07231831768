#include "services/worker/model/read_ahead.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "tests/common/random_model.h"
#include "tests/unit/services/worker_model/test_folder.h"

namespace headroom {
namespace {

constexpr int64_t kBufferBytes = 3000;

class ReadAheadTest : public testing::Test {
 protected:
  void SetUp() override {
    RandomModelSpec spec;
    spec.vocab_size = 5000;
    const absl::Status written = WriteRandomModel(spec, folder_.path());
    ASSERT_TRUE(written.ok()) << written;
    auto reader = SafetensorsReader::Open(folder_.path());
    ASSERT_TRUE(reader.ok()) << reader.status();
    reader_ = *std::move(reader);
    int64_t length = 1;
    for (const auto& [name, tensor] : reader_->tensors()) {
      for (int64_t at = 0; at < tensor.size_bytes; at += length) {
        length = std::min({kBufferBytes, tensor.size_bytes - at, length % 2999 + 700});
        pieces_.push_back({&tensor, at, length});
      }
    }
    ASSERT_GT(pieces_.size(), 1000u);
  }
  bool Is(const PieceBytes& bytes, const TensorPiece& piece) {
    std::vector<uint8_t> expected(static_cast<size_t>(piece.size_bytes));
    const absl::Status read =
        reader_->Read(*piece.tensor, piece.offset_bytes, piece.size_bytes, expected.data());
    EXPECT_TRUE(read.ok()) << read;
    XXH128_canonical_t digest;
    XXH128_canonicalFromHash(&digest, XXH3_128bits(expected.data(), expected.size()));
    return std::memcmp(bytes.data, expected.data(), expected.size()) == 0 &&
           std::memcmp(bytes.digest.data(), digest.digest, bytes.digest.size()) == 0;
  }

  TestFolder folder_;
  std::unique_ptr<SafetensorsReader> reader_;
  std::vector<TensorPiece> pieces_;
};

TEST_F(ReadAheadTest, GivesEachPieceInItsTurnAndLeavesItAloneUntilTheNext) {
  for (const int threads : {1, 4}) {
    for (const int64_t num_buffers : {2, 3, 8}) {
      std::vector<uint8_t> buffers(static_cast<size_t>(num_buffers * kBufferBytes));
      ReadAhead ahead(*reader_, pieces_, buffers.data(), kBufferBytes, num_buffers, threads);
      for (size_t i = 0; i < pieces_.size(); ++i) {
        const auto bytes = ahead.Next();
        ASSERT_TRUE(bytes.ok()) << bytes.status();
        ASSERT_TRUE(Is(*bytes, pieces_[i])) << "piece " << i << ", " << threads << " threads";
      }
      EXPECT_EQ(ahead.Next().status().code(), absl::StatusCode::kInternal);
    }
  }
}

TEST_F(ReadAheadTest, HashesAPieceThatIsReadInTurns) {
  std::vector<TensorPiece> whole;
  int64_t longest = 0;
  for (const auto& [name, tensor] : reader_->tensors()) {
    whole.push_back({&tensor, 0, tensor.size_bytes});
    longest = std::max(longest, tensor.size_bytes);
  }
  ASSERT_GT(longest, 512 << 10);
  std::vector<uint8_t> buffers(static_cast<size_t>(2 * longest));
  ReadAhead ahead(*reader_, whole, buffers.data(), longest, 2, 2);
  for (const TensorPiece& piece : whole) {
    const auto bytes = ahead.Next();
    ASSERT_TRUE(bytes.ok()) << bytes.status();
    EXPECT_TRUE(Is(*bytes, piece)) << piece.size_bytes;
  }
}

TEST_F(ReadAheadTest, MayBeLeftAtAnyPiece) {
  std::vector<uint8_t> buffers(4 * kBufferBytes);
  for (const int taken : {0, 1, 5, 17}) {
    ReadAhead ahead(*reader_, pieces_, buffers.data(), kBufferBytes, 4, 3);
    for (int i = 0; i < taken; ++i) ASSERT_TRUE(ahead.Next().ok());
  }
}

TEST_F(ReadAheadTest, AFileThatEndsIsSaidWhereItEnds) {
  const std::string file = folder_.path() + "/model.safetensors";
  const auto last = std::max_element(
      pieces_.begin(), pieces_.end(), [](const TensorPiece& a, const TensorPiece& b) {
        return a.tensor->offset_bytes + a.offset_bytes < b.tensor->offset_bytes + b.offset_bytes;
      });
  std::filesystem::resize_file(file, std::filesystem::file_size(file) - 1);
  std::vector<uint8_t> buffers(4 * kBufferBytes);
  ReadAhead ahead(*reader_, pieces_, buffers.data(), kBufferBytes, 4, 2);
  for (auto piece = pieces_.begin(); piece != last; ++piece) ASSERT_TRUE(ahead.Next().ok());
  const absl::Status status = ahead.Next().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_NE(std::string(status.message()).find(file), std::string::npos) << status;
}

}  // namespace
}  // namespace headroom
