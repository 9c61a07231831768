// What the fuzz targets share. Each is one file with LLVMFuzzerTestOneInput(): given any bytes, it
// must return, and what was accepted must be what the reader's header promises.
#ifndef HEADROOM_TESTS_FUZZ_FUZZ_H_
#define HEADROOM_TESTS_FUZZ_FUZZ_H_

#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <string>

#include "absl/strings/string_view.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace headroom::fuzz {

// Not an assertion: these stay in every build.
inline void Require(bool holds, absl::string_view what) {
  if (holds) return;
  std::fprintf(stderr, "does not hold: %.*s\n", static_cast<int>(what.size()), what.data());
  std::abort();
}

// The input, taken piece by piece; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  size_t left() const { return size_; }
  size_t TakeBytes(void* out, size_t bytes) {
    const size_t taken = std::min(bytes, size_);
    std::memset(out, 0, bytes);
    if (taken > 0) std::memcpy(out, data_, taken);
    data_ += taken;
    size_ -= taken;
    return taken;
  }
  template <typename T>
  T Take() {
    T value;
    TakeBytes(&value, sizeof(value));
    return value;
  }
  std::string Rest() {
    std::string rest(reinterpret_cast<const char*>(data_), size_);
    data_ += size_;
    size_ = 0;
    return rest;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

// A folder on tmpfs as long as the process runs.
class Folder {
 public:
  Folder() {
    std::string name = "/dev/shm/headroom-fuzz-XXXXXX";
    Require(mkdtemp(name.data()) != nullptr, "a folder in /dev/shm can be made");
    path_ = name;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }
  void Write(const std::string& name, absl::string_view text) const {
    std::FILE* const file = std::fopen((path_ + "/" + name).c_str(), "wb");
    Require(file != nullptr, "a file can be made");
    // Not from nullptr, which an empty text may be.
    Require(text.empty() || std::fwrite(text.data(), 1, text.size(), file) == text.size(),
            "and written");
    std::fclose(file);
  }

 private:
  std::string path_;
};

}  // namespace headroom::fuzz

#endif  // HEADROOM_TESTS_FUZZ_FUZZ_H_
