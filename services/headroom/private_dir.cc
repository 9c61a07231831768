#include "services/headroom/private_dir.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace headroom::cli {
namespace {

constexpr char kPrefix[] = "headroom-private-";
constexpr size_t kSuffixSize = 6;  // mkdtemp's
// Leaves 47 bytes for "/headroom-private-XXXXXX/" and a socket's name.
constexpr size_t kLongestRuntimeDir = 60;
// A folder can be swept away between its making and its locking.
constexpr int kAttempts = 8;

// The open folder, if its lock could be had and it is still the one of that name.
Fd LockDir(const std::string& path) {
  Fd fd(open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC));
  struct stat opened = {}, named = {};
  if (fd.valid() && flock(fd.get(), LOCK_EX | LOCK_NB) == 0 && fstat(fd.get(), &opened) == 0 &&
      stat(path.c_str(), &named) == 0 && opened.st_dev == named.st_dev &&
      opened.st_ino == named.st_ino && opened.st_uid == geteuid()) {
    return fd;
  }
  return Fd();
}

void RemoveAll(const std::string& path) {
  std::error_code ignored;
  std::filesystem::remove_all(path, ignored);
}

// Removes what killed processes have left in `parent`.
void Sweep(const std::string& parent) {
  std::error_code error;
  for (std::filesystem::directory_iterator at(parent, error), end; !error && at != end;
       at.increment(error)) {
    const std::string name = at->path().filename();
    if (!absl::StartsWith(name, kPrefix) || name.size() != sizeof(kPrefix) - 1 + kSuffixSize) {
      continue;
    }
    if (LockDir(at->path()).valid()) RemoveAll(at->path());
  }
}

}  // namespace

absl::StatusOr<PrivateDir> PrivateDir::Make(const std::string& parent) {
  Sweep(parent);
  for (int attempt = 0; attempt < kAttempts; ++attempt) {
    std::string path = absl::StrCat(parent, "/", kPrefix, std::string(kSuffixSize, 'X'));
    if (mkdtemp(path.data()) == nullptr) {
      return absl::ErrnoToStatus(errno, absl::StrCat("making a folder in ", parent));
    }
    if (Fd lock = LockDir(path); lock.valid()) return PrivateDir(std::move(path), std::move(lock));
  }
  return absl::UnavailableError(absl::StrCat("a new folder in ", parent, " cannot be locked"));
}

PrivateDir::PrivateDir(PrivateDir&& other) noexcept
    : path_(std::exchange(other.path_, "")), lock_(std::move(other.lock_)) {}

PrivateDir& PrivateDir::operator=(PrivateDir&& other) noexcept {
  if (this != &other) {
    Remove();
    path_ = std::exchange(other.path_, "");
    lock_ = std::move(other.lock_);
  }
  return *this;
}

void PrivateDir::Remove() {
  if (!path_.empty()) RemoveAll(path_);
  path_.clear();
}

std::string RuntimeDir() {
  const char* const dir = std::getenv("XDG_RUNTIME_DIR");
  if (dir != nullptr && dir[0] == '/' && std::string(dir).size() <= kLongestRuntimeDir &&
      access(dir, W_OK | X_OK) == 0) {
    return dir;
  }
  return "/tmp";
}

}  // namespace headroom::cli
