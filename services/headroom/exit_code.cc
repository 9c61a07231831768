#include "services/headroom/exit_code.h"

#include <cstdio>
#include <cstdlib>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/errors.h"

namespace headroom::cli {

int ExitCodeOfStart(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kAborted:
      return kExitFailed;
    default:
      return kExitUsage;
  }
}

int ExitCodeOfCall(const absl::Status& status) {
  if (status.ok()) return kExitOk;
  return absl::IsInvalidArgument(status) || absl::IsFailedPrecondition(status) ? kExitUsage
                                                                                : kExitFailed;
}

std::string DescribeError(const absl::Status& status) {
  std::string line =
      absl::StrCat(absl::StatusCodeToString(status.code()), ": ", status.message());
  for (const FieldViolation& violation : FieldViolationsOf(status)) {
    if (absl::StrContains(line, violation.field) &&
        absl::StrContains(line, violation.description)) {
      continue;
    }
    absl::StrAppend(&line, "; ", violation.field, ": ", violation.description);
  }
  for (char& c : line) {  // control characters: a line stays one, and says nothing to a terminal
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) c = ' ';
  }
  return line;
}

void PrintError(absl::string_view command, const absl::Status& status) {
  const std::string line = absl::StrCat("headroom ", command, ": ", DescribeError(status), "\n");
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void EndProcess(int code) {
#if defined(__SANITIZE_ADDRESS__)
  std::exit(code);
#else
  std::fflush(stdout);
  std::_Exit(code);
#endif
}

}  // namespace headroom::cli
