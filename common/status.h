// Small helpers that Debian's abseil lacks.
#ifndef HEADROOM_COMMON_STATUS_H_
#define HEADROOM_COMMON_STATUS_H_

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

// Returns from the enclosing function if `expr` (an absl::Status) is not OK.
#define HEADROOM_RETURN_IF_ERROR(expr)                             \
  do {                                                             \
    if (absl::Status headroom_status_ = (expr); !headroom_status_.ok()) \
      return headroom_status_;                                     \
  } while (false)

// Assigns the value of `expr` (an absl::StatusOr) to `lhs`, or returns its error.
#define HEADROOM_ASSIGN_OR_RETURN(lhs, expr) \
  HEADROOM_ASSIGN_OR_RETURN_IMPL_(HEADROOM_CONCAT_(headroom_statusor_, __LINE__), lhs, expr)
#define HEADROOM_CONCAT_INNER_(a, b) a##b
#define HEADROOM_CONCAT_(a, b) HEADROOM_CONCAT_INNER_(a, b)
#define HEADROOM_ASSIGN_OR_RETURN_IMPL_(statusor, lhs, expr) \
  auto statusor = (expr);                                    \
  if (!statusor.ok()) return std::move(statusor).status();   \
  lhs = *std::move(statusor)

namespace headroom {

// The same code and payloads with another message; OK stays as it is.
inline absl::Status WithMessage(const absl::Status& status, absl::string_view message) {
  if (status.ok()) return status;
  absl::Status changed(status.code(), message);
  status.ForEachPayload([&](absl::string_view url, const absl::Cord& payload) {
    changed.SetPayload(url, payload);
  });
  return changed;
}

// The same with `context` put in front of the message.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  return WithMessage(status, absl::StrCat(context, ": ", status.message()));
}

}  // namespace headroom

#endif  // HEADROOM_COMMON_STATUS_H_
