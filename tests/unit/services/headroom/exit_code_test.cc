#include "services/headroom/exit_code.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>

namespace headroom::cli {
namespace {

struct Speaks {
  ~Speaks() { std::fputs(" and destroyed", stderr); }
};

TEST(EndProcessDeathTest, WritesWhatStreamsHoldAndDestroysNothing) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer looks for leaks at exit";
#endif
  EXPECT_EXIT(
      {
        static const Speaks global;
        std::FILE* const buffered = fdopen(dup(STDERR_FILENO), "w");
        std::fputs("written", buffered);
        EndProcess(3);
      },
      testing::ExitedWithCode(3), "^written$");
}

}  // namespace
}  // namespace headroom::cli
