#include <sys/prctl.h>

#include <string>
#include <vector>

#include "services/headroom/commands.h"
#include "services/headroom/exit_code.h"

int main(int argc, char** argv) {
  // serve starts /proc/self/exe; process lists should show what it is.
  prctl(PR_SET_NAME, "headroom");
  headroom::cli::EndProcess(
      headroom::cli::RunCommand(std::vector<std::string>(argv + 1, argv + argc)));
}
