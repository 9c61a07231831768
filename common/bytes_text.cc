#include "common/bytes_text.h"

#include <cmath>
#include <cstdlib>
#include <limits>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/checked_math.h"

namespace headroom {
namespace {

struct Unit {
  absl::string_view name;
  int64_t bytes;
};
constexpr int64_t kKilo = 1000;
constexpr int64_t kKibi = 1024;
constexpr Unit kUnits[] = {
    {"", 1},
    {"B", 1},
    {"KB", kKilo},
    {"MB", kKilo * kKilo},
    {"GB", kKilo * kKilo * kKilo},
    {"TB", kKilo * kKilo * kKilo * kKilo},
    {"KiB", kKibi},
    {"MiB", kKibi* kKibi},
    {"GiB", kKibi* kKibi* kKibi},
    {"TiB", kKibi* kKibi* kKibi* kKibi},
};

// Digits at the front of `text`, taken from it. Nothing if they are beyond int64.
std::optional<int64_t> TakeDigits(absl::string_view& text) {
  std::optional<int64_t> value = 0;
  while (!text.empty() && absl::ascii_isdigit(static_cast<unsigned char>(text[0]))) {
    if (value.has_value()) value = CheckedMul(*value, 10);
    if (value.has_value()) value = CheckedAdd(*value, text[0] - '0');
    text.remove_prefix(1);
  }
  return value;
}

absl::Status NoSize(absl::string_view text) {
  return absl::InvalidArgumentError(
      absl::StrCat("'", text,
                   "' is no size: expected a number with B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or "
                   "nothing after it, such as 340MiB or 1.5GiB"));
}

}  // namespace

absl::StatusOr<int64_t> ParseBytes(absl::string_view text) {
  const auto beyond = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is beyond ", std::numeric_limits<int64_t>::max(), " bytes"));
  };
  absl::string_view rest = absl::StripAsciiWhitespace(text);
  if (rest.empty() || !absl::ascii_isdigit(static_cast<unsigned char>(rest[0]))) {
    return NoSize(text);
  }
  const std::optional<int64_t> whole = TakeDigits(rest);
  if (!whole.has_value()) return beyond();
  // Twelve digits are enough to name every byte of a TiB.
  absl::string_view fraction_digits;
  if (absl::StartsWith(rest, ".")) {
    rest.remove_prefix(1);
    const absl::string_view begin = rest;
    TakeDigits(rest);
    fraction_digits = begin.substr(0, begin.size() - rest.size());
    if (fraction_digits.empty()) return NoSize(text);
    fraction_digits = fraction_digits.substr(0, 12);
  }
  int64_t fraction = 0, scale = 1;
  for (const char digit : fraction_digits) {
    fraction = 10 * fraction + (digit - '0');
    scale *= 10;
  }
  rest = absl::StripLeadingAsciiWhitespace(rest);
  for (const Unit& unit : kUnits) {
    if (!absl::EqualsIgnoreCase(rest, unit.name)) continue;
    const std::optional<int64_t> bytes = CheckedMul(*whole, unit.bytes);
    if (!bytes.has_value()) return beyond();
    // Below 10^12 x 2^40: more than 64 bits, less than 128.
    const auto part = static_cast<int64_t>(static_cast<__int128>(fraction) * unit.bytes / scale);
    const std::optional<int64_t> sum = CheckedAdd(*bytes, part);
    if (!sum.has_value()) return beyond();
    return *sum;
  }
  return NoSize(text);
}

std::string FormatBytes(int64_t bytes) {
  static constexpr const char* kNames[] = {"KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  if (std::abs(value) < kKibi) return absl::StrCat(bytes, " bytes");
  int unit = -1;
  do {
    value /= kKibi;
    ++unit;
  } while (std::abs(value) >= kKibi && unit < 3);
  return absl::StrFormat("%.1f %s", value, kNames[unit]);
}

}  // namespace headroom
