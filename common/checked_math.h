// Arithmetic on sizes that come from outside.
#ifndef HEADROOM_COMMON_CHECKED_MATH_H_
#define HEADROOM_COMMON_CHECKED_MATH_H_

#include <cstdint>
#include <optional>

namespace headroom {

// a * b, a + b, or nothing if it overflows.
inline std::optional<int64_t> CheckedMul(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_mul_overflow(a, b, &result)) return std::nullopt;
  return result;
}
inline std::optional<uint64_t> CheckedMul(uint64_t a, uint64_t b) {
  uint64_t result;
  if (__builtin_mul_overflow(a, b, &result)) return std::nullopt;
  return result;
}
inline std::optional<int64_t> CheckedAdd(int64_t a, int64_t b) {
  int64_t result;
  if (__builtin_add_overflow(a, b, &result)) return std::nullopt;
  return result;
}

// Whether [offset, offset + bytes) lies within [0, limit), without overflow.
inline bool RangeFits(int64_t offset, int64_t bytes, int64_t limit) {
  return offset >= 0 && bytes >= 0 && offset <= limit && bytes <= limit - offset;
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_CHECKED_MATH_H_
