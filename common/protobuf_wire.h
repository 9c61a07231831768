// The protobuf wire format of flat messages: enough for google.rpc's error details, whose .proto
// files the distribution does not ship.
#ifndef HEADROOM_COMMON_PROTOBUF_WIRE_H_
#define HEADROOM_COMMON_PROTOBUF_WIRE_H_

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace headroom::wire {

enum Type { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

inline void PutVarint(uint64_t value, std::string& out) {
  for (; value >= 0x80; value >>= 7) out.push_back(static_cast<char>(value | 0x80));
  out.push_back(static_cast<char>(value));
}
inline void PutInt(int field, int64_t value, std::string& out) {
  PutVarint(static_cast<uint64_t>(field) << 3 | kVarint, out);
  PutVarint(static_cast<uint64_t>(value), out);
}
// Strings, bytes and messages.
inline void PutBytes(int field, absl::string_view value, std::string& out) {
  PutVarint(static_cast<uint64_t>(field) << 3 | kBytes, out);
  PutVarint(value.size(), out);
  out.append(value.data(), value.size());
}

// Walks over the fields of a message. Next() is false at its end and where it is damaged.
class Reader {
 public:
  explicit Reader(absl::string_view message) : rest_(message) {}

  bool Next() {
    uint64_t tag;
    if (rest_.empty() || !TakeVarint(tag)) return false;
    field_ = static_cast<int>(tag >> 3);
    integer_ = 0;
    bytes_ = {};
    uint64_t size = 0;
    switch (tag & 7) {
      case kVarint: {
        uint64_t value;
        if (!TakeVarint(value)) return false;
        integer_ = static_cast<int64_t>(value);
        return true;
      }
      case kFixed64:
        size = 8;
        break;
      case kFixed32:
        size = 4;
        break;
      case kBytes:
        if (!TakeVarint(size)) return false;
        break;
      default:
        return false;
    }
    if (size > rest_.size()) return false;
    bytes_ = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return true;
  }
  int field() const { return field_; }
  int64_t integer() const { return integer_; }
  absl::string_view bytes() const { return bytes_; }

 private:
  bool TakeVarint(uint64_t& value) {
    value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (rest_.empty()) return false;
      const auto byte = static_cast<uint8_t>(rest_[0]);
      rest_.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  absl::string_view rest_;
  int field_ = 0;
  int64_t integer_ = 0;
  absl::string_view bytes_;
};

}  // namespace headroom::wire

#endif  // HEADROOM_COMMON_PROTOBUF_WIRE_H_
