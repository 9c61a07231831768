#include "services/kvstore/memory_limits.h"

#include <linux/magic.h>
#include <sys/statvfs.h>
#include <sys/vfs.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace headroom::kvstore {
namespace {

// "No limit" is written as the largest number of pages; nothing real is near an exabyte.
constexpr int64_t kHugeLimit = int64_t{1} << 60;

std::optional<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
}

// The rest of the line that begins with `name` and `separator`.
std::optional<int64_t> NumberOnLine(absl::string_view text, absl::string_view name,
                                    absl::string_view unit) {
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    if (!absl::StartsWith(line, name)) continue;
    line.remove_prefix(name.size());
    if (!absl::EndsWith(line, unit)) continue;
    line.remove_suffix(unit.size());
    int64_t number;
    if (absl::SimpleAtoi(absl::StripAsciiWhitespace(line), &number)) return number;
  }
  return std::nullopt;
}

// What one group has left. Page cache that nobody uses goes when memory is needed.
std::optional<int64_t> FreeInGroup(const std::string& dir, int version) {
  const bool second = version == 2;
  const auto limit_text =
      ReadFile(absl::StrCat(dir, second ? "/memory.max" : "/memory.limit_in_bytes"));
  const auto used_text =
      ReadFile(absl::StrCat(dir, second ? "/memory.current" : "/memory.usage_in_bytes"));
  if (!limit_text.has_value() || !used_text.has_value()) return std::nullopt;
  const std::optional<int64_t> limit = ParseLimit(*limit_text);
  const std::optional<int64_t> used = ParseLimit(*used_text);
  if (!limit.has_value() || !used.has_value()) return std::nullopt;
  if (*limit == kUnlimited) return kUnlimited;
  const std::string stat = ReadFile(absl::StrCat(dir, "/memory.stat")).value_or("");
  const int64_t cache = FindNumber(stat, second ? "inactive_file" : "total_inactive_file").value_or(0);
  return std::clamp<int64_t>(*limit - *used + cache, 0, *limit);
}

}  // namespace

std::optional<int64_t> FindKilobytes(absl::string_view text, absl::string_view name) {
  const std::optional<int64_t> number = NumberOnLine(text, absl::StrCat(name, ":"), "kB");
  if (!number.has_value() || *number > kHugeLimit / 1024) return std::nullopt;
  return *number * 1024;
}

std::optional<int64_t> FindNumber(absl::string_view text, absl::string_view name) {
  return NumberOnLine(text, absl::StrCat(name, " "), "");
}

std::optional<int64_t> ParseLimit(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  if (text == "max") return kUnlimited;
  uint64_t number;
  if (!absl::SimpleAtoi(text, &number)) return std::nullopt;
  return number >= static_cast<uint64_t>(kHugeLimit) ? kUnlimited : static_cast<int64_t>(number);
}

MemoryGroup FindMemoryGroup(absl::string_view proc_self_cgroup) {
  MemoryGroup group;
  for (const absl::string_view line : absl::StrSplit(proc_self_cgroup, '\n')) {
    // "4:memory:/path" (version 1, which wins where both are mounted) or "0::/path" (version 2).
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end()) {
      return {1, parts[2]};
    }
    if (parts[0] == "0" && parts[1].empty()) group = {2, parts[2]};
  }
  return group;
}

std::vector<MemoryLimit> FindGroupLimits(const std::string& root, const MemoryGroup& group) {
  std::vector<MemoryLimit> limits;
  if (group.version == 0) return limits;
  const std::string base = group.version == 1 ? absl::StrCat(root, "/memory") : root;
  // ".." in the path is a group outside of this namespace.
  std::string path = absl::StrContains(group.path, "..") ? "" : group.path;
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    if (const auto free = FreeInGroup(absl::StrCat(base, path), group.version)) {
      limits.push_back({absl::StrCat("memory control group ", path.empty() ? "/" : path), *free});
    }
    if (path.empty()) return limits;
    path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}

bool IsTmpfs(int dir_fd) {
  struct statfs stats = {};
  if (fstatfs(dir_fd, &stats) != 0) return false;
  const auto type = static_cast<uint64_t>(stats.f_type);
  return type == TMPFS_MAGIC || type == HUGETLBFS_MAGIC || type == RAMFS_MAGIC;
}

std::vector<MemoryLimit> FindMemoryLimits(int dir_fd, const std::string& dir) {
  std::vector<MemoryLimit> limits;
  struct statvfs stats = {};
  // A tmpfs that was mounted without a limit has no blocks.
  if (fstatvfs(dir_fd, &stats) == 0 && stats.f_blocks > 0) {
    limits.push_back({absl::StrCat("the file system of ", dir),
                      static_cast<int64_t>(stats.f_bavail) * static_cast<int64_t>(stats.f_frsize)});
  }
  if (!IsTmpfs(dir_fd)) return limits;
  if (const auto available =
          FindKilobytes(ReadFile("/proc/meminfo").value_or(""), "MemAvailable")) {
    limits.push_back({"this machine's memory", *available});
  }
  const MemoryGroup group = FindMemoryGroup(ReadFile("/proc/self/cgroup").value_or(""));
  for (MemoryLimit& limit : FindGroupLimits("/sys/fs/cgroup", group)) {
    limits.push_back(std::move(limit));
  }
  return limits;
}

}  // namespace headroom::kvstore
