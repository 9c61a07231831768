// What a trace file (common/trace.h) holds, for the tests of those who write one.
#ifndef HEADROOM_TESTS_COMMON_TRACE_FILE_H_
#define HEADROOM_TESTS_COMMON_TRACE_FILE_H_

#include <cmath>
#include <cstdint>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "common/json.h"
#include "gtest/gtest.h"

namespace headroom {

struct TracedSlice {
  std::string name;
  int64_t pid = 0;
  int64_t tid = 0;
  int64_t begin_ns = 0;
  int64_t end_ns = 0;
  int64_t arg = -1;  // -1: none of the name that was asked for
};

struct TraceFile {
  std::map<int64_t, std::string> processes;  // by pid
  std::map<std::pair<int64_t, int64_t>, std::string> rows;  // by pid and tid
  std::vector<TracedSlice> slices;

  std::vector<TracedSlice> OfRow(const std::string& name) const {
    std::vector<TracedSlice> found;
    for (const TracedSlice& slice : slices) {
      const auto row = rows.find({slice.pid, slice.tid});
      if (row != rows.end() && row->second == name) found.push_back(slice);
    }
    return found;
  }
};

inline int64_t TracedNs(const Json& us) { return std::llround(us.as_number() * 1e3); }

// Line by line, as the file is written: an array without an end.
inline TraceFile ReadTraceFile(const std::string& path, const char* arg) {
  TraceFile trace;
  std::ifstream file(path);
  std::string line;
  EXPECT_TRUE(std::getline(file, line) && line == "[") << line;
  while (std::getline(file, line)) {
    EXPECT_TRUE(!line.empty() && line.back() == ',') << line;
    if (line.empty()) continue;
    line.pop_back();
    const absl::StatusOr<Json> event = Json::Parse(line, 10'000);
    EXPECT_TRUE(event.ok()) << event.status() << ": " << line;
    if (!event.ok()) continue;
    const int64_t pid = event->Find("pid")->as_int();
    const std::string& name = event->Find("name")->as_string();
    const std::string& kind = event->Find("ph")->as_string();
    if (kind == "M") {
      const std::string& value = event->Find("args")->Find("name")->as_string();
      if (name == "process_name") {
        trace.processes[pid] = value;
      } else {
        const bool first =
            trace.rows.try_emplace({pid, event->Find("tid")->as_int()}, value).second;
        EXPECT_TRUE(first) << "named twice: " << line;
      }
      continue;
    }
    TracedSlice slice{name, pid, event->Find("tid")->as_int(), TracedNs(*event->Find("ts")), 0, -1};
    slice.end_ns = slice.begin_ns + (kind == "X" ? TracedNs(*event->Find("dur")) : 0);
    if (const Json* args = event->Find("args"); args != nullptr && args->Find(arg) != nullptr) {
      slice.arg = args->Find(arg)->as_int();
    }
    trace.slices.push_back(slice);
  }
  return trace;
}

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_TRACE_FILE_H_
