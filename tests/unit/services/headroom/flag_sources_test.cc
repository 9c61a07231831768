// Errors say where the value came from that they are about.
#include "services/headroom/flag_sources.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/errors.h"
#include "services/headroom/flags.h"
#include "tests/unit/services/headroom/flags_test_util.h"

namespace headroom::cli {
namespace {

struct Parsing {
  explicit Parsing(const std::vector<std::string>& args) {
    flags.Bytes("host-memory", &host_memory, "Memory.");
    flags.Text("host", "NAME", &host, "A name.");
    flags.Integer("threads", &threads, 0, 1024, "Threads.");
    status = flags.Parse(args).status();
  }
  // What becomes of an error that is found after Parse().
  std::string Explained(const std::string& message) const {
    return std::string(flags.sources().Explain(absl::InvalidArgumentError(message)).message());
  }

  int64_t host_memory = 0;
  std::string host;
  int32_t threads = 0;
  Flags flags{"headroom test", "Tests sources."};
  absl::Status status;
};

TEST(FlagSources, AValueOfTheEnvironmentIsNamedByItsVariable) {
  const Variable memory("HEADROOM_HOST_MEMORY", "1");
  EXPECT_EQ(Parsing({}).Explained("--host-memory is 1 bytes"),
            "--host-memory is 1 bytes (--host-memory is HEADROOM_HOST_MEMORY=1 of the environment)");
}

TEST(FlagSources, AValueOfTheFileIsNamedByItsLine) {
  EXPECT_EQ(LineOf("threads", "a.conf", "threads-of = 1\n\nthreads= 2"), "a.conf:3");
  EXPECT_EQ(LineOf("threads", "a.conf", "host = 1"), "a.conf");
  const ConfigFile sizes("# sizes\n\n  host-memory = 1\nthreads=2\n");
  const Parsing parsing({sizes.flag()});
  ASSERT_TRUE(parsing.status.ok()) << parsing.status;
  EXPECT_EQ(parsing.Explained("lower --host-memory, or --threads"),
            "lower --host-memory, or --threads (--host-memory is at " + sizes.path() +
                ":3; --threads is at " + sizes.path() + ":4)");
}

TEST(FlagSources, TheValueThatHoldsIsTheOneThatIsNamed) {
  const ConfigFile file("host-memory = 1\nthreads = 2\nhost = x\n");
  const Variable memory("HEADROOM_HOST_MEMORY", "3"), threads("HEADROOM_THREADS", "4");
  const Parsing parsing({file.flag(), "--threads=5"});
  EXPECT_EQ(parsing.Explained("--host-memory is wrong"),
            "--host-memory is wrong (--host-memory is HEADROOM_HOST_MEMORY=3 of the environment)");
  EXPECT_EQ(parsing.Explained("--threads is wrong"), "--threads is wrong");
  EXPECT_EQ(Parsing({"--threads", "5"}).Explained("--threads is wrong"), "--threads is wrong");
}

TEST(FlagSources, AFlagWhoseNameOnlyBeginsOrEndsLikeItIsAnother) {
  const Variable host("HEADROOM_HOST", "x");
  const Parsing parsing({});
  EXPECT_EQ(parsing.Explained("--host-memory is wrong"), "--host-memory is wrong");
  EXPECT_EQ(parsing.Explained("the option ---host"), "the option ---host");
  EXPECT_EQ(parsing.Explained("--host-memory, --host."),
            "--host-memory, --host. (--host is HEADROOM_HOST=x of the environment)");
}

TEST(FlagSources, WhatCannotBeParsedIsExplainedToo) {
  {
    const Variable threads("HEADROOM_THREADS", "many");
    EXPECT_EQ(Parsing({}).status.message(),
              "--threads: 'many', expected a whole number from 0 to 1024 (--threads is "
              "HEADROOM_THREADS=many of the environment)");
  }
  const ConfigFile file("threads = 9999\n");
  EXPECT_EQ(Parsing({file.flag()}).status.message(),
            "--threads: '9999', expected a whole number from 0 to 1024 (--threads is at " + file.path() +
                ":1)");
  const Variable config("HEADROOM_CONFIG", "/nonexistent");
  EXPECT_NE(Parsing({}).status.message().find("(--config is HEADROOM_CONFIG=/nonexistent of the environment)"),
            std::string::npos)
      << Parsing({}).status;
}

TEST(FlagSources, CodeAndDetailsStayAndALongValueIsCut) {
  FlagSources sources;
  sources.AddVariable("prompt", "HEADROOM_PROMPT", std::string(5000, 'a'));
  const absl::Status error = WithReason(absl::NotFoundError("--prompt"), "NOWHERE");
  const absl::Status explained = sources.Explain(error);
  EXPECT_TRUE(absl::IsNotFound(explained));
  EXPECT_EQ(ReasonOf(explained), "NOWHERE");
  EXPECT_LT(explained.message().size(), 200u);
  EXPECT_TRUE(sources.Explain(absl::OkStatus()).ok());
}

}  // namespace
}  // namespace headroom::cli
