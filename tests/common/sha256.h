// SHA-256 (FIPS 180-4), so that tests can prove that they run on the very weights and tokenizers that
// what they compare with was computed on, without a dependency.
#ifndef HEADROOM_TESTS_COMMON_SHA256_H_
#define HEADROOM_TESTS_COMMON_SHA256_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace headroom {

// 64 lower case hexadecimal digits.
std::string Sha256Of(std::string_view bytes);
// Errors: NOT_FOUND (cannot open), INTERNAL (cannot read).
absl::StatusOr<std::string> Sha256OfFile(const std::string& path);

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_SHA256_H_
