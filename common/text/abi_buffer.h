// Owns what a function of text_abi.h returns. Only common/text includes this.
#ifndef HEADROOM_COMMON_TEXT_ABI_BUFFER_H_
#define HEADROOM_COMMON_TEXT_ABI_BUFFER_H_

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/text/text_abi.h"

namespace headroom {

inline const uint8_t* AbiBytes(absl::string_view text) {
  return reinterpret_cast<const uint8_t*>(text.data());
}

class AbiBuffer {
 public:
  AbiBuffer() = default;
  ~AbiBuffer() { headroom_text_buffer_free(buffer_); }
  AbiBuffer(const AbiBuffer&) = delete;
  AbiBuffer& operator=(const AbiBuffer&) = delete;

  // For one call.
  HeadroomTextBuffer* out() { return &buffer_; }
  absl::string_view view() const {
    return {reinterpret_cast<const char*>(buffer_.data), buffer_.size};
  }

  // The call's result: OK, INVALID_ARGUMENT or, for a panic, INTERNAL.
  absl::Status ToStatus(int32_t code) const {
    if (code == kHeadroomTextOk) return absl::OkStatus();
    if (code == kHeadroomTextInvalid) return absl::InvalidArgumentError(view());
    return absl::InternalError(view());
  }

  // The same where the input is a file called `name`: a file that makes the library panic is a wrong
  // file, INVALID_ARGUMENT.
  absl::Status ToFileStatus(int32_t code, absl::string_view name) const {
    if (code == kHeadroomTextOk) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", view()));
  }

 private:
  HeadroomTextBuffer buffer_ = {nullptr, 0};
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_ABI_BUFFER_H_
