#include "common/log.h"

#include <memory>

#include <spdlog/logger.h>
#include <spdlog/sinks/stdout_sinks.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/json.h"

namespace headroom {
namespace {

struct ProcessLog {
  ProcessLog() : logger("headroom", std::make_shared<spdlog::sinks::stderr_sink_mt>()) {
    // Lines are made here, whole: spdlog adds only the newline.
    logger.set_pattern("%v");
    logger.flush_on(spdlog::level::trace);
  }

  LogOptions options;
  spdlog::logger logger;
};

ProcessLog& TheLog() {
  static ProcessLog* const log = new ProcessLog();  // lines may come until the process ends
  return *log;
}

std::string LineAsText(absl::string_view time, LogLevel level, absl::string_view process,
                       absl::string_view message, absl::string_view request_id) {
  std::string line = absl::StrCat(time, " ", LogLevelName(level), " ");
  if (!process.empty()) absl::StrAppend(&line, process, ": ");
  if (!request_id.empty()) absl::StrAppend(&line, "[", request_id, "] ");
  // A message that holds what a client or a file said must not forge a second line.
  for (const char c : message) line.push_back(c == '\n' || c == '\r' ? ' ' : c);
  return line;
}

}  // namespace

const char* LogLevelName(LogLevel level) {
  switch (level) {
    case LogLevel::kDebug:
      return "debug";
    case LogLevel::kInfo:
      return "info";
    case LogLevel::kWarning:
      return "warning";
    case LogLevel::kError:
      return "error";
  }
  return "unknown";
}

absl::StatusOr<LogLevel> ParseLogLevel(absl::string_view text) {
  for (const LogLevel level :
       {LogLevel::kDebug, LogLevel::kInfo, LogLevel::kWarning, LogLevel::kError}) {
    if (text == LogLevelName(level)) return level;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("log level '", text, "', expected debug, info, warning or error"));
}

void ConfigureLog(const LogOptions& options) { TheLog().options = options; }

std::string LogLineAsJson(absl::string_view time, LogLevel level, absl::string_view process,
                          absl::string_view message, absl::string_view request_id) {
  Json::Object line;
  line.emplace_back("time", Json(std::string(time)));
  line.emplace_back("level", Json(LogLevelName(level)));
  if (!process.empty()) line.emplace_back("process", Json(std::string(process)));
  if (!request_id.empty()) line.emplace_back("request_id", Json(std::string(request_id)));
  line.emplace_back("message", Json(std::string(message)));
  return Json(std::move(line)).Dump();
}

void Log(LogLevel level, absl::string_view message, absl::string_view request_id) {
  ProcessLog& log = TheLog();
  if (level < log.options.level) return;
  const std::string time =
      absl::FormatTime("%Y-%m-%dT%H:%M:%E3SZ", absl::Now(), absl::UTCTimeZone());
  const std::string line =
      log.options.json ? LogLineAsJson(time, level, log.options.process, message, request_id)
                       : LineAsText(time, level, log.options.process, message, request_id);
  log.logger.log(spdlog::level::info, spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace headroom
