#include "common/text/utf8.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace headroom {
namespace {

enum class Sequence { kWhole, kIncomplete, kWrong };

struct Scan {
  Sequence sequence;
  size_t size;  // of the character, or of the part that belongs together
};

// What the first bytes of `text` are. REQUIRES: text is not empty
Scan ScanFirst(absl::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {Sequence::kWhole, 1};
  if (first < 0xC2 || first > 0xF4) return {Sequence::kWrong, 1};
  const size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // The second byte's range excludes overlong forms, surrogates and what lies beyond U+10FFFF.
  uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  uint8_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < size; ++i) {
    if (i == text.size()) return {Sequence::kIncomplete, i};
    if (byte(i) < low || byte(i) > high) return {Sequence::kWrong, i};
    low = 0x80;
    high = 0xBF;
  }
  return {Sequence::kWhole, size};
}

// How many ASCII characters, in whole groups of eight, lie at `begin`: most texts are nothing else.
size_t AsciiRun(absl::string_view text, size_t begin) {
  size_t end = begin;
  for (uint64_t group; end + sizeof(group) <= text.size(); end += sizeof(group)) {
    std::memcpy(&group, text.data() + end, sizeof(group));
    if ((group & 0x8080808080808080u) != 0) break;
  }
  return end - begin;
}

}  // namespace

absl::Status CheckUtf8(absl::string_view text, absl::string_view what) {
  for (size_t i = 0; i < text.size();) {
    i += AsciiRun(text, i);
    if (i == text.size()) break;
    const Scan scan = ScanFirst(text.substr(i));
    if (scan.sequence != Sequence::kWhole) {
      return absl::InvalidArgumentError(absl::StrCat(what, " is not UTF-8 at byte ", i));
    }
    i += scan.size;
  }
  return absl::OkStatus();
}

std::string Utf8Assembler::Push(absl::string_view bytes) {
  held_.append(bytes.data(), bytes.size());
  const std::string all = std::exchange(held_, "");
  const absl::string_view rest = all;
  std::string text;
  text.reserve(all.size());
  for (size_t i = 0; i < all.size();) {
    const Scan scan = ScanFirst(rest.substr(i));
    if (scan.sequence == Sequence::kIncomplete) {
      held_ = all.substr(i);
      break;
    }
    if (scan.sequence == Sequence::kWhole) {
      text.append(all, i, scan.size);
    } else {
      text += kReplacementCharacter;
    }
    i += scan.size;
  }
  return text;
}

std::string Utf8Assembler::Finish() {
  return std::exchange(held_, "").empty() ? "" : kReplacementCharacter;
}

}  // namespace headroom
