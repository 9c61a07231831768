// What the coordinator refuses and why: one constructor an error, so that code, reason and advice
// are the same wherever it comes up.
#ifndef HEADROOM_SERVICES_COORDINATOR_ERRORS_H_
#define HEADROOM_SERVICES_COORDINATOR_ERRORS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace headroom::coordinator {

absl::Status IdInUseError(absl::string_view request_id);
absl::Status QueueFullError(int64_t max_queue);
absl::Status TokenizerBusyError(int64_t calls, int64_t text_bytes);
absl::Status DrainingError();
// `why`: what could not be reached, if known.
absl::Status NotReadyError(absl::string_view why);
absl::Status PeerLostError(absl::Duration away, absl::string_view why);
absl::Status NeverFitsError(absl::string_view why);
// The store gave no extents.
absl::Status LeaseFailedError(const absl::Status& from_store);
// The store refused what it was asked for: this program's mistake.
absl::Status StoreRefusedError(const absl::Status& from_store);
absl::Status InPlaceNotServedError(int32_t attend_threads);
absl::Status SessionBusyError(absl::string_view session_id);
absl::Status SessionUnknownError(absl::string_view session_id);
absl::Status SlowClientError(absl::Duration waited);
absl::Status DeadlinePassedError();
absl::Status ClientGoneError();
absl::Status StoppingError();
// Whether the store belongs to another coordinator, or to an earlier call of this one.
bool IsOvertaken(const absl::Status& from_store);
// Whether what failed may work later: a peer that cannot be reached, or says so itself.
bool MayPassAway(const absl::Status& status);
// A step failed again and again.
absl::Status StepFailedError(const absl::Status& step);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_ERRORS_H_
