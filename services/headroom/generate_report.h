// What `headroom generate` prints of an answer. Pure functions.
#ifndef HEADROOM_SERVICES_HEADROOM_GENERATE_REPORT_H_
#define HEADROOM_SERVICES_HEADROOM_GENERATE_REPORT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "common/json.h"
#include "headroom/v1/inference.pb.h"

namespace headroom::cli {

// When each token of an answer came, by the answer's index: since the call began.
using TokenTimes = std::map<int32_t, std::vector<absl::Duration>>;

// The contract of --json. Lanes are those of the decode steps, or of the prefill where there was no
// decode step; shares are of bytes. kv_heads are rounded to a millionth. A log-probability is
// written so that reading it as a double and rounding it to a float gives the same bits. What is
// about the prompt stands before the answers where there are several.
// token_ms are `times`, to the microsecond.
Json GenerateAsJson(const v1::GenerateOnceResponse& response, const TokenTimes& times,
                    bool prompt_logprobs, bool logprobs);

// The table of --explain; ends with a newline.
std::string ExplainAsText(const v1::Finished& finished);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_GENERATE_REPORT_H_
