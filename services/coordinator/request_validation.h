// Checks a GenerateRequest and fills in its defaults. Every field has its range; what is wrong is
// reported all at once, each by the field's name.
#ifndef HEADROOM_SERVICES_COORDINATOR_REQUEST_VALIDATION_H_
#define HEADROOM_SERVICES_COORDINATOR_REQUEST_VALIDATION_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "headroom/v1/inference.pb.h"
#include "services/coordinator/request.h"
#include "services/coordinator/served_model.h"

namespace headroom::coordinator {

inline constexpr int kMaxTopLogprobs = 20;
// Each answer takes a place in the queue and holds a copy of the prompt's ids: 4 MB of a million.
inline constexpr int kMaxAnswers = 16;
inline constexpr int kMaxLogitBias = 1024;
inline constexpr int kMaxStopStrings = 16;
inline constexpr size_t kMaxStopStringBytes = 256;
inline constexpr int kMaxStopTokenIds = 64;
inline constexpr size_t kMaxRequestIdBytes = 128;
inline constexpr size_t kMaxCacheSaltBytes = 128;
inline constexpr int kMaxChatMessages = 4096;

// Limits that the worker and the server's flags set.
struct RequestLimits {
  int64_t vocab_size = 0;
  int64_t max_context_tokens = 0;
  int64_t max_chunk_tokens = 0;
};

// Everything but the prompt. INVALID_ARGUMENT with field violations; NOT_FOUND: another model is named. Leaves id,
// arrival and deadline to the caller. An unset seed is drawn.
absl::StatusOr<std::unique_ptr<Request>> ValidateRequest(const v1::GenerateRequest& proto,
                                                         const ServedModel& model,
                                                         const RequestLimits& limits);
// The prompt, and max_tokens, which depends on it: takes a second a MB of text. INVALID_ARGUMENT likewise;
// FAILED_PRECONDITION: a chat, and the model has no template.
absl::Status TakePrompt(const v1::GenerateRequest& proto, const ServedModel& model,
                        const RequestLimits& limits, Request& request);
// Of the prompt, as far as it is text.
int64_t TextBytes(const v1::GenerateRequest& proto);
int64_t TextBytes(const v1::ChatMessages& chat);

// Also what Tokenize answers. `field` is named in errors. With `limits` a text that cannot fit them is
// INVALID_ARGUMENT without being tokenized.
absl::StatusOr<std::vector<int32_t>> EncodeText(const ServedModel& model, absl::string_view text,
                                                absl::string_view field,
                                                const RequestLimits* limits = nullptr);
absl::StatusOr<std::vector<int32_t>> EncodeChat(const ServedModel& model,
                                                const v1::ChatMessages& chat,
                                                absl::string_view field,
                                                const RequestLimits* limits = nullptr);

// More bytes than any request has, as GenerateRequest, that could fit `limits`: ids and texts that are as
// long as the context, and 1 MiB for all else.
int64_t MostRequestBytes(const ServedModel& model, const RequestLimits& limits);

// The metadata x-request-id: 1 to 128 visible ASCII characters.
absl::Status CheckRequestId(absl::string_view id);
absl::Status CheckSessionId(absl::string_view id);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_REQUEST_VALIDATION_H_
