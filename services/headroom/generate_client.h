// Calls InferenceService.Generate.
#ifndef HEADROOM_SERVICES_HEADROOM_GENERATE_CLIENT_H_
#define HEADROOM_SERVICES_HEADROOM_GENERATE_CLIENT_H_

#include <functional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "headroom/v1/inference.pb.h"
#include "services/headroom/call_canceller.h"
#include "services/headroom/endpoint.h"

namespace headroom::cli {

class GenerateClient {
 public:
  explicit GenerateClient(Endpoint endpoint) : endpoint_(std::move(endpoint)) {}

  // Blocks until all answers have ended; `on_delta` gets each delta as it comes, of any of them.
  // Returns the same as GenerateOnce would. Errors are the server's with their details; one about a
  // message's size names the flag that sets it.
  absl::StatusOr<v1::GenerateOnceResponse> Generate(
      const v1::GenerateRequest& request, absl::Duration timeout, CallCanceller* canceller,
      const std::function<void(const v1::Delta&)>& on_delta);

 private:
  const Endpoint endpoint_;
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_GENERATE_CLIENT_H_
