#include "services/headroom/exit_code.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>

namespace headroom::cli {
namespace {

struct Speaks {
  ~Speaks() { std::fputs(" and destroyed", stderr); }
};

TEST(EndProcessDeathTest, WritesWhatStdoutHoldsAndDestroysNothing) {
#if defined(__SANITIZE_ADDRESS__)
  GTEST_SKIP() << "AddressSanitizer looks for leaks at exit";
#endif
  EXPECT_EXIT(
      {
        static const Speaks global;
        std::fflush(stdout);
        dup2(STDERR_FILENO, STDOUT_FILENO);
        std::setvbuf(stdout, nullptr, _IOFBF, 4096);
        std::fputs("written", stdout);
        EndProcess(3);
      },
      testing::ExitedWithCode(3), "^written$");
}

}  // namespace
}  // namespace headroom::cli
