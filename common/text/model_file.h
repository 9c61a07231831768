// Reading the text files of a model folder, which may come from anywhere.
#ifndef HEADROOM_COMMON_TEXT_MODEL_FILE_H_
#define HEADROOM_COMMON_TEXT_MODEL_FILE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"

namespace headroom {

// The whole file. Errors name it. NOT_FOUND: there is none; INVALID_ARGUMENT: it is no regular file
// (reading a pipe could wait forever), has more than `max_bytes`, or cannot be read.
absl::StatusOr<std::string> ReadModelFile(const std::string& path, int64_t max_bytes);

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_MODEL_FILE_H_
