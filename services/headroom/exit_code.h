// How the program says that it failed.
#ifndef HEADROOM_SERVICES_HEADROOM_EXIT_CODE_H_
#define HEADROOM_SERVICES_HEADROOM_EXIT_CODE_H_

#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace headroom::cli {

inline constexpr int kExitOk = 0;
// Failed at run time: another try may work.
inline constexpr int kExitFailed = 1;
// Wrong usage, configuration or input files: another try will not work.
inline constexpr int kExitUsage = 2;

// The worker's device is lost: a worker that is started anew may get it back.
inline constexpr int kExitDeviceLost = 3;

// For a service that did not start: kExitFailed for an address that is taken, a device that is not
// there, a bug; else kExitUsage.
int ExitCodeOfStart(const absl::Status& status);
// For a call that a server refused: kExitUsage for INVALID_ARGUMENT and FAILED_PRECONDITION.
int ExitCodeOfCall(const absl::Status& status);

// One line: code, message, and the fields that are wrong where the message does not say so.
std::string DescribeError(const absl::Status& status);
// Prints "headroom COMMAND: " and DescribeError() to standard error.
void PrintError(absl::string_view command, const absl::Status& status);

// Ends the process: what stdout holds is written (stderr holds nothing), globals are left alone. gRPC's
// threads may live on after its last server and channel, those of a connection that is being tried, and would
// have globals destroyed under them: likely why a coordinator that had stopped was once aborted. (With
// AddressSanitizer as exit() does: it looks for leaks then.)
[[noreturn]] void EndProcess(int code);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_EXIT_CODE_H_
