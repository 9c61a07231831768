#include "common/log.h"

#include <gtest/gtest.h>

#include <string>

#include "common/json.h"

namespace headroom {
namespace {

TEST(Log, LevelsHaveNames) {
  EXPECT_EQ(*ParseLogLevel("warning"), LogLevel::kWarning);
  EXPECT_EQ(ParseLogLevel("loud").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(Log, WritesOneLineWhateverTheMessage) {
  testing::internal::CaptureStderr();
  LogWarning("two\nlines", "my-request");
  LogDebug("below the level");
  const std::string line = testing::internal::GetCapturedStderr();
  EXPECT_NE(line.find(" warning [my-request] two lines\n"), std::string::npos) << line;
  EXPECT_EQ(line.find('\n'), line.size() - 1);
}

TEST(Log, JsonLinesAreJson) {
  const std::string line =
      LogLineAsJson("now", LogLevel::kError, "worker", "a \"quote\"\nand more \xff", "id");
  EXPECT_EQ(line.find('\n'), std::string::npos);
  const absl::StatusOr<Json> json = Json::Parse(line, 1000);
  ASSERT_TRUE(json.ok()) << json.status();
  EXPECT_EQ(json->Find("level")->as_string(), "error");
  EXPECT_EQ(json->Find("process")->as_string(), "worker");
  EXPECT_EQ(json->Find("request_id")->as_string(), "id");
}

}  // namespace
}  // namespace headroom
