#include "common/bytes_text.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

namespace headroom {
namespace {

TEST(BytesText, ReadsNumbersInEveryUnit) {
  const std::pair<const char*, int64_t> kCases[] = {
      {"0", 0},
      {"4096", 4096},
      {"4096B", 4096},
      {"64MB", 64'000'000},
      {"64 MB", 64'000'000},
      {" 340MiB ", int64_t{340} << 20},
      {"340mib", int64_t{340} << 20},
      {"1.5GiB", int64_t{3} << 29},
      {"0.25 KiB", 256},
      {"1.0001KB", 1000},
      {"2TiB", int64_t{2} << 40},
      {"3TB", 3'000'000'000'000},
      {"9223372036854775807", std::numeric_limits<int64_t>::max()},
      {"0.999999999999999999999999TiB", 1'099'511'627'774},
  };
  for (const auto& [text, bytes] : kCases) {
    SCOPED_TRACE(text);
    const absl::StatusOr<int64_t> parsed = ParseBytes(text);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(*parsed, bytes);
  }
}

TEST(BytesText, RefusesWhatIsNoSizeOrBeyondInt64) {
  for (const std::string text :
       {"", " ", "MiB", "-1", "+1", "1..5GiB", "1.GiB", ".5GiB", "12 parsecs", "1MiBs", "0x10",
        "1e9", "nan", "9223372036854775808", "9000000TiB", "99999999999999999999999999",
        "8388608TiB"}) {
    SCOPED_TRACE(text);
    const absl::StatusOr<int64_t> parsed = ParseBytes(text);
    ASSERT_TRUE(absl::IsInvalidArgument(parsed.status()));
    EXPECT_NE(std::string(parsed.status().message()).find("'" + text + "'"), std::string::npos)
        << parsed.status();
  }
}

TEST(BytesText, WritesTheLargestUnitThatFits) {
  EXPECT_EQ(FormatBytes(0), "0 bytes");
  EXPECT_EQ(FormatBytes(1023), "1023 bytes");
  EXPECT_EQ(FormatBytes(1024), "1.0 KiB");
  EXPECT_EQ(FormatBytes(int64_t{340} << 20), "340.0 MiB");
  EXPECT_EQ(FormatBytes(int64_t{3} << 29), "1.5 GiB");
  EXPECT_EQ(FormatBytes(int64_t{5000} << 40), "5000.0 TiB");
}

}  // namespace
}  // namespace headroom
