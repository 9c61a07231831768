// How much memory files of a folder may still take. Asked before any of it is touched: a tmpfs that is
// full answers the touch with SIGBUS, a full control group with the OOM killer.
#ifndef HEADROOM_SERVICES_KVSTORE_MEMORY_LIMITS_H_
#define HEADROOM_SERVICES_KVSTORE_MEMORY_LIMITS_H_

#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace headroom::kvstore {

inline constexpr int64_t kUnlimited = std::numeric_limits<int64_t>::max();

// One thing that bounds memory, and what is left of it.
struct MemoryLimit {
  std::string what;  // in words: "the file system of /dev/shm", "memory control group /a"
  int64_t free_bytes = kUnlimited;
};

// The file system behind the open folder, the machine's memory if that file system is tmpfs, and each
// control group that this process is in. What cannot be read is left out.
std::vector<MemoryLimit> FindMemoryLimits(int dir_fd, const std::string& dir);

// Whether the folder's files live in memory.
bool IsTmpfs(int dir_fd);

// ---- The parts that read text, for tests.

// The number after `name`, times 1024: /proc/meminfo's "MemAvailable:   123 kB".
std::optional<int64_t> FindKilobytes(absl::string_view text, absl::string_view name);
// The number after `name` and a space: memory.stat's "inactive_file 123".
std::optional<int64_t> FindNumber(absl::string_view text, absl::string_view name);
// "max" and numbers of 2^60 and more mean that there is no limit.
std::optional<int64_t> ParseLimit(absl::string_view text);

// The memory controller's group in /proc/self/cgroup.
struct MemoryGroup {
  int version = 0;  // 1 or 2; 0: none
  std::string path;
};
MemoryGroup FindMemoryGroup(absl::string_view proc_self_cgroup);

// The limits of a group and of those above it, read below `root` (/sys/fs/cgroup). Inside a container
// the group's own path may not exist there, but the root is then the group itself.
std::vector<MemoryLimit> FindGroupLimits(const std::string& root, const MemoryGroup& group);

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_MEMORY_LIMITS_H_
