// Log lines of a process, to standard error: text for people or JSON for machines.
//
// (spdlog is behind it, included only in log.cc. That the process has one log is the one exception
// to 'no globals': every line goes to the same file descriptor anyway.)
#ifndef HEADROOM_COMMON_LOG_H_
#define HEADROOM_COMMON_LOG_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headroom {

enum class LogLevel { kDebug, kInfo, kWarning, kError };

// "debug", "info", "warning", "error". INVALID_ARGUMENT.
absl::StatusOr<LogLevel> ParseLogLevel(absl::string_view text);
// The same names.
const char* LogLevelName(LogLevel level);

struct LogOptions {
  LogLevel level = LogLevel::kInfo;
  bool json = false;
  std::string process = {};  // "coordinator", "worker", ...: on each line if set
  std::string trace_path = {};  // where common/trace.h writes; empty: nowhere
};

// Before the first line; without it the defaults hold. Not thread-safe against Log().
void ConfigureLog(const LogOptions& options);

// Thread-safe. `request_id` names the request that the line is about, if there is one.
void Log(LogLevel level, absl::string_view message, absl::string_view request_id = {});

inline void LogDebug(absl::string_view message, absl::string_view request_id = {}) {
  Log(LogLevel::kDebug, message, request_id);
}
inline void LogInfo(absl::string_view message, absl::string_view request_id = {}) {
  Log(LogLevel::kInfo, message, request_id);
}
inline void LogWarning(absl::string_view message, absl::string_view request_id = {}) {
  Log(LogLevel::kWarning, message, request_id);
}
inline void LogError(absl::string_view message, absl::string_view request_id = {}) {
  Log(LogLevel::kError, message, request_id);
}

// One line, without its newline, as JSON: what ConfigureLog({.json = true}) writes.
std::string LogLineAsJson(absl::string_view time, LogLevel level, absl::string_view process,
                          absl::string_view message, absl::string_view request_id);

}  // namespace headroom

#endif  // HEADROOM_COMMON_LOG_H_
