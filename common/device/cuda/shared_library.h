// A library that is opened at run time: this binary runs where it is not installed.
#ifndef HEADROOM_COMMON_DEVICE_CUDA_SHARED_LIBRARY_H_
#define HEADROOM_COMMON_DEVICE_CUDA_SHARED_LIBRARY_H_

#include <dlfcn.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace headroom {

class SharedLibrary {
 public:
  // The first of `names` that can be opened; UNAVAILABLE says why the last could not.
  static absl::StatusOr<SharedLibrary> Open(std::initializer_list<const char*> names) {
    for (const char* const name : names) {
      if (void* const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return SharedLibrary(handle);
    }
    const char* const why = dlerror();
    return absl::UnavailableError(why != nullptr ? why : "no name");
  }

  SharedLibrary() = default;
  SharedLibrary(SharedLibrary&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  SharedLibrary& operator=(SharedLibrary&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~SharedLibrary() {
    if (handle_ != nullptr) dlclose(handle_);
  }

  void* handle() const { return handle_; }
  // `*function` becomes the function `name`. UNAVAILABLE if there is none.
  template <typename Function>
  absl::Status Find(const char* name, Function** function) const {
    *function = reinterpret_cast<Function*>(dlsym(handle_, name));
    if (*function != nullptr) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("it has no ", name));
  }

 private:
  explicit SharedLibrary(void* handle) : handle_(handle) {}

  void* handle_ = nullptr;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CUDA_SHARED_LIBRARY_H_
