#include "common/errors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "common/grpc_status.h"

namespace headroom {
namespace {

TEST(Errors, CarryReasonDelayAndFields) {
  const absl::Status status = WithRetryAfter(
      WithReason(absl::ResourceExhaustedError("full"), "QUEUE_FULL"), absl::Milliseconds(1500));
  EXPECT_EQ(ReasonOf(status), "QUEUE_FULL");
  EXPECT_EQ(RetryAfterOf(status), absl::Milliseconds(1500));
  EXPECT_EQ(ReasonOf(absl::InternalError("none")), "");
  EXPECT_FALSE(RetryAfterOf(absl::InternalError("none")).has_value());
  const absl::Status bad = BadRequestError({{"a.b", "is 3"}, {"c", "is not set"}});
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(bad.message(), "a.b: is 3; c: is not set");
  ASSERT_EQ(FieldViolationsOf(bad).size(), 2u);
  EXPECT_EQ(FieldViolationsOf(bad)[1].field, "c");
  EXPECT_EQ(FieldViolationsOf(bad)[1].description, "is not set");
  EXPECT_TRUE(BadRequestError({}).ok());
}

// All that a client is told must fit into the 8 KiB of metadata that it takes, in base64 too.
TEST(Errors, OfManyViolationsTheFirstAreNamed) {
  std::vector<FieldViolation> many;
  for (int i = 0; i < 4096; ++i) many.push_back({absl::StrCat("a[", i, "]"), std::string(i, 'x')});
  const grpc::Status sent = ToGrpcStatus(BadRequestError(many));
  EXPECT_LT(3 * sent.error_message().size() + sent.error_details().size() * 4 / 3, 8000u);
  const std::vector<FieldViolation> named = FieldViolationsOf(FromGrpcStatus(sent));
  ASSERT_GT(named.size(), 10u);
  EXPECT_EQ(named[10].description, std::string(10, 'x'));
  EXPECT_EQ(named.back().description, std::string(named.size() - 1, 'x'));
  EXPECT_EQ(BadRequestError({{"a", ""}, {"b", ""}}).message(), "a: ; b: ");
  many.resize(100);
  EXPECT_THAT(std::string(BadRequestError(many).message()),
              testing::EndsWith(absl::StrCat("; and ", 100 - named.size(), " more")));
}

TEST(Errors, AViolationThatIsLongIsCut) {
  const absl::Status bad = BadRequestError({{"a", std::string(8'000'000, 'x')}});
  ASSERT_EQ(FieldViolationsOf(bad).size(), 1u);
  EXPECT_EQ(FieldViolationsOf(bad)[0].description, std::string(300, 'x') + "...");
}

TEST(Errors, TheirBytesAreThoseOfGoogleRpc) {
  // ErrorInfo{1: "R", 2: "headroom"}; RetryInfo{1: Duration{1: 2, 2: 500000000}}.
  const absl::Status status =
      WithRetryAfter(WithReason(absl::InternalError("x"), "R"), absl::Milliseconds(2500));
  EXPECT_EQ(std::string(*status.GetPayload(kErrorInfoUrl)), "\n\x01R\x12\x08headroom");
  EXPECT_EQ(std::string(*status.GetPayload(kRetryInfoUrl)),
            std::string("\n\x08\x08\x02\x10\x80\xca\xb5\xee\x01", 10));
}

TEST(Errors, DamagedDetailsAreNoDetails) {
  for (const char* bytes : {"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
                            "\x0a\x05"
                            "ab",
                            "\xff", "\x0b", "\x0d\x01"}) {
    absl::Status status = absl::InternalError("x");
    for (const char* url : {kErrorInfoUrl, kBadRequestUrl, kRetryInfoUrl}) {
      status.SetPayload(url, absl::Cord(bytes));
    }
    EXPECT_EQ(ReasonOf(status), "");
    EXPECT_TRUE(FieldViolationsOf(status).empty());
    EXPECT_FALSE(RetryAfterOf(status).has_value());
  }
}

TEST(GrpcStatus, ThereAndBackKeepsCodeMessageAndDetails) {
  const absl::Status status =
      WithRetryAfter(WithReason(absl::UnavailableError("not yet"), "NOT_READY"), absl::Seconds(1));
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(back, status);
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(FromGrpcStatus(grpc::Status::OK).ok());
}

TEST(GrpcStatus, EveryErrorHasAReason) {
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(absl::NotFoundError("nothing")));
  EXPECT_EQ(ReasonOf(back), "NOT_FOUND");
}

TEST(GrpcStatus, LongMessagesAreCutBetweenCharacters) {
  std::string message;
  while (message.size() < 5000) message += "\xc3\xa4";
  const grpc::Status status = ToGrpcStatus(absl::InternalError(message));
  EXPECT_LE(status.error_message().size(), 1003u);
  EXPECT_EQ(status.error_message().size() % 2, 1u) << "whole characters and three dots";
}

TEST(GrpcStatus, DetailsThatAreNoneAreLeftOut) {
  const absl::Status status =
      FromGrpcStatus(grpc::Status(grpc::StatusCode::INTERNAL, "x", "\x1a\x7f garbage"));
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(ReasonOf(status), "");
}

}  // namespace
}  // namespace headroom
