// Where a server listens and how it is spoken to.
#ifndef HEADROOM_SERVICES_HEADROOM_ENDPOINT_H_
#define HEADROOM_SERVICES_HEADROOM_ENDPOINT_H_

#include <string>

#include "common/security_options.h"

namespace headroom::cli {

struct Endpoint {
  std::string address;  // HOST:PORT or unix:PATH
  ClientSecurityOptions security = {};
};

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_ENDPOINT_H_
