#include "common/grpc_server.h"

#include <gtest/gtest.h>

namespace headroom {
namespace {

TEST(GrpcReason, IsTheSystemsErrorBehindAllThatIsAroundIt) {
  EXPECT_EQ(GrpcReason(R"(UNKNOWN:No address added out of total 1 resolved for '[::1]:7410' {file:"a.cc", )"
                       R"(children:[UNKNOWN:Unable to configure socket {fd:9, children:[UNKNOWN:Address )"
                       R"(already in use {syscall:"bind", os_error:"Address already in use", errno:98}]}]})"),
            "Address already in use");
}

TEST(GrpcReason, IsTheMessageWhereTheSystemSaidNothing) {
  EXPECT_EQ(GrpcReason(R"(UNKNOWN:Name or service not known {file:"error_utils.cc", grpc_status:2})"),
            "Name or service not known");
  EXPECT_EQ(GrpcReason("no"), "no");
  EXPECT_EQ(GrpcReason(""), "");
}

}  // namespace
}  // namespace headroom
