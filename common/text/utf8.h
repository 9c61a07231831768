// UTF-8: checking whole texts, and putting texts together from pieces that may end inside a character.
#ifndef HEADROOM_COMMON_TEXT_UTF8_H_
#define HEADROOM_COMMON_TEXT_UTF8_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace headroom {

inline constexpr char kReplacementCharacter[] = "\xEF\xBF\xBD";  // U+FFFD

// OK, or INVALID_ARGUMENT "<what> is not UTF-8 at byte <offset>", the offset being where the first
// wrong or incomplete character begins. Overlong forms, surrogates and code points beyond U+10FFFF
// are wrong (RFC 3629).
absl::Status CheckUtf8(absl::string_view text, absl::string_view what);

// Turns bytes that arrive piece by piece into text that is whole UTF-8 at every point. A sequence that
// can become no character is replaced by one U+FFFD per maximal part (the Unicode standard's practice,
// section 3.9, which Rust and Python follow), so the text does not depend on where the pieces end.
// For one thread.
class Utf8Assembler {
 public:
  // The characters that `bytes` complete. At most 3 bytes are held back.
  std::string Push(absl::string_view bytes);
  // One U+FFFD if bytes are held back, else nothing. The assembler can go on.
  std::string Finish();

 private:
  std::string held_;  // a proper prefix of a character
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_UTF8_H_
