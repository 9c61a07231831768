// A folder of this process alone, that goes with it.
#ifndef HEADROOM_SERVICES_HEADROOM_PRIVATE_DIR_H_
#define HEADROOM_SERVICES_HEADROOM_PRIVATE_DIR_H_

#include <string>

#include "absl/status/statusor.h"
#include "common/fd.h"

namespace headroom::cli {

// Move-only; removes the folder with all that is in it when it is destroyed.
//
// A process that is killed leaves its folder behind, in shared memory perhaps gigabytes of it. So a
// folder is locked while its owner lives, and Make() first removes those of the same user beside
// the new one that are not.
class PrivateDir {
 public:
  // `parent`/headroom-private-XXXXXX, mode 0700. Errors name the folder.
  static absl::StatusOr<PrivateDir> Make(const std::string& parent);
  ~PrivateDir() { Remove(); }
  PrivateDir(PrivateDir&& other) noexcept;
  PrivateDir& operator=(PrivateDir&& other) noexcept;

  const std::string& path() const { return path_; }

 private:
  PrivateDir(std::string path, Fd lock) : path_(std::move(path)), lock_(std::move(lock)) {}
  void Remove();

  std::string path_;  // empty: moved from
  Fd lock_;
};

// Where folders of sockets go: $XDG_RUNTIME_DIR if it is there and short enough for the names of
// sockets (a socket's path has at most 107 bytes), else /tmp.
std::string RuntimeDir();

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_PRIVATE_DIR_H_
