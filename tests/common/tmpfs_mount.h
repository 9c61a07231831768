// A small tmpfs of a test's own: full, too small or read-only file systems as they are.
#ifndef HEADROOM_TESTS_COMMON_TMPFS_MOUNT_H_
#define HEADROOM_TESTS_COMMON_TMPFS_MOUNT_H_

#include <sched.h>
#include <sys/mount.h>

#include <string>

namespace headroom {

// Mounted over an existing folder, in a mount namespace of the calling thread and of the processes that
// it starts: nothing outside sees it, and whatever becomes of the test, nothing of it stays.
class TmpfsMount {
 public:
  // `options` are tmpfs's ("size=4m"); `flags` are mount's (MS_RDONLY).
  TmpfsMount(const std::string& folder, const std::string& options, unsigned long flags = 0)
      : folder_(folder),
        mounted_(unshare(CLONE_NEWNS) == 0 &&
                 mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) == 0 &&
                 mount("none", folder.c_str(), "tmpfs", flags, options.c_str()) == 0) {}
  ~TmpfsMount() {
    if (mounted_) umount2(folder_.c_str(), MNT_DETACH);
  }
  TmpfsMount(const TmpfsMount&) = delete;
  TmpfsMount& operator=(const TmpfsMount&) = delete;

  // False where this user may mount nothing: then the test is to be skipped.
  bool mounted() const { return mounted_; }

 private:
  const std::string folder_;
  const bool mounted_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_TMPFS_MOUNT_H_
