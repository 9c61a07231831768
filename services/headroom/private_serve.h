// A `serve` of this process alone, for one call.
#ifndef HEADROOM_SERVICES_HEADROOM_PRIVATE_SERVE_H_
#define HEADROOM_SERVICES_HEADROOM_PRIVATE_SERVE_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "services/headroom/call_canceller.h"
#include "services/headroom/child_process.h"
#include "services/headroom/private_dir.h"

namespace headroom::cli {

// Made and destroyed by the main thread, which the process must outlive: it dies with it.
class PrivateServe {
 public:
  // `args` are flags of serve without --listen. Waits until it serves. Errors as Stop(); CANCELLED.
  static absl::StatusOr<std::unique_ptr<PrivateServe>> Start(std::vector<std::string> args,
                                                             CallCanceller* canceller);
  ~PrivateServe();

  // Stops it, and kills it if that takes too long. FAILED_PRECONDITION if it ended, now or before,
  // because of what it was told, UNAVAILABLE if for another reason: its log says why.
  absl::Status Stop();

  std::string address() const { return "unix:" + dir_.path() + "/headroom.sock"; }

 private:
  explicit PrivateServe(PrivateDir dir) : dir_(std::move(dir)) {}
  absl::Status WaitUntilReady(CallCanceller* canceller);

  PrivateDir dir_;
  std::optional<ChildProcess> process_;
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_PRIVATE_SERVE_H_
