// What `headroom status` prints. Pure functions.
#ifndef HEADROOM_SERVICES_HEADROOM_STATUS_REPORT_H_
#define HEADROOM_SERVICES_HEADROOM_STATUS_REPORT_H_

#include <string>

#include "common/json.h"
#include "headroom/v1/admin.pb.h"

namespace headroom::cli {

// Every number of the message; names are the proto's. Of the plan only its version.
Json StatusAsJson(const v1::GetStatusResponse& status);
// For people; ends with a newline.
std::string StatusAsText(const v1::GetStatusResponse& status);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_STATUS_REPORT_H_
