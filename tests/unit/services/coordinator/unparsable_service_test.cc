#include "services/coordinator/unparsable_service.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "common/errors.h"
#include "headroom/v1/inference.pb.h"

namespace headroom::coordinator {
namespace {

absl::Status Why(const std::string& bytes, absl::string_view omitted = "") {
  return WhyUnparsable(*v1::GenerateOnceRequest::descriptor(), bytes, omitted);
}
std::string FieldOf(const absl::Status& status) {
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  const std::vector<FieldViolation> violations = FieldViolationsOf(status);
  return violations.size() == 1 ? violations[0].field : "";
}
// What C++ clients send, whatever their texts hold.
std::string Bytes(const v1::GenerateRequest& request) {
  v1::GenerateOnceRequest once;
  *once.mutable_request() = request;
  return once.SerializeAsString();
}

TEST(WhyUnparsable, NamesTheFirstTextThatIsNotUtf8) {
  v1::GenerateRequest request;
  request.set_session_id("fine");
  request.mutable_stopping()->add_stop_strings("\u00e9");
  request.mutable_stopping()->add_stop_strings("a\xc3");
  EXPECT_FALSE(v1::GenerateOnceRequest().ParseFromString(Bytes(request)));
  absl::Status why = Why(Bytes(request), "request.");
  EXPECT_EQ(FieldOf(why), "stopping.stop_strings[1]");
  EXPECT_EQ(FieldViolationsOf(why)[0].description, "text is not UTF-8 at byte 1");
  EXPECT_EQ(FieldOf(Why(Bytes(request))), "request.stopping.stop_strings[1]");
  request.mutable_stopping()->clear_stop_strings();
  for (int i = 0; i < 3; ++i) request.mutable_chat()->add_messages()->set_role("user");
  request.mutable_chat()->mutable_messages(1)->set_content("\xed\xa0\x80");
  EXPECT_EQ(FieldOf(Why(Bytes(request), "request.")), "chat.messages[1].content");
}

TEST(WhyUnparsable, BytesThatAreNoMessageAreSaidToBeNone) {
  for (const std::string bytes : {"\xff\xff\xff\xff", "\x0a", "\x0a\x7f" "a", "\x0b"}) {
    const absl::Status why = Why(bytes);
    EXPECT_EQ(FieldOf(why), "");
    EXPECT_TRUE(absl::StrContains(why.message(), "are no headroom.v1.GenerateOnceRequest")) << why;
  }
}

TEST(WhyTooLong, NamesTheFieldThatHasMostOfIt) {
  const auto field = [](const v1::GenerateRequest& request) {
    return FieldOf(WhyTooLong(*v1::GenerateOnceRequest::descriptor(), Bytes(request), "request.", 100));
  };
  v1::GenerateRequest request;
  request.set_prompt(std::string(1000, 'a'));
  EXPECT_EQ(field(request), "prompt");
  request.mutable_stopping()->add_stop_strings(std::string(2000, 'a'));
  EXPECT_EQ(field(request), "stopping.stop_strings");
  request.mutable_token_ids()->mutable_ids()->Resize(5000, 9);
  EXPECT_EQ(field(request), "token_ids.ids");
  for (int i = 0; i < 100; ++i) request.mutable_chat()->add_messages()->set_content(std::string(99, 'a'));
  EXPECT_EQ(field(request), "chat.messages");
  const absl::Status why =
      WhyTooLong(*v1::GenerateRequest::descriptor(), request.SerializeAsString(), "", 100);
  EXPECT_EQ(FieldOf(why), "chat.messages");
  EXPECT_TRUE(absl::StrContains(why.message(), "at most 100")) << why;
  for (const std::string bytes : {"", "\xff\xff\xff\xff", "\x0a\x7f" "a", "\x08\x01"}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        WhyTooLong(*v1::GenerateRequest::descriptor(), bytes, "", 0)));
  }
}

// A walk that went on over all of them would take longer than parsing.
TEST(WhyUnparsable, OfVeryManyFieldsSomeAreLookedAt) {
  std::string bytes;
  for (int i = 0; i < 200'000; ++i) bytes += std::string("\x12\x00", 2);  // empty texts
  bytes += std::string("\x12\x01\xff", 3);
  EXPECT_EQ(FieldOf(WhyUnparsable(*v1::GenerateRequest::descriptor(), bytes, "")), "");
}

TEST(WhyUnparsable, AnyBytesAreReadWithinTheirEnds) {
  v1::GenerateRequest request;
  request.set_prompt("a prompt");
  request.mutable_chat()->add_messages()->set_content("a message");
  (*request.mutable_sampling()->mutable_logit_bias())[7] = 1;
  const std::string good = Bytes(request);
  std::mt19937_64 random(1);
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = good.substr(0, 1 + random() % good.size());
    for (int left = 1 + static_cast<int>(random() % 3); left > 0; --left) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    EXPECT_TRUE(absl::IsInvalidArgument(Why(bytes)));
  }
  // Messages in messages, deeper than any that there is.
  std::string deep = "\xff";
  for (int i = 0; i < 100; ++i) deep = "\x0a" + std::string(1, static_cast<char>(deep.size())) + deep;
  EXPECT_TRUE(absl::IsInvalidArgument(Why(deep)));
}

// A client that goes before it has sent its message.
TEST(MessageBytes, MayBeOfNoMessage) {
  EXPECT_EQ(MessageBytes(nullptr).Text(), "");
  grpc_byte_buffer* const empty = grpc_raw_byte_buffer_create(nullptr, 0);
  EXPECT_EQ(MessageBytes(empty).Text(), "");
  grpc_byte_buffer_destroy(empty);
}

TEST(UnparsableRequests, AreTakenOnce) {
  UnparsableRequests requests;
  const int a = 0, b = 0;
  requests.Put(&a, absl::InvalidArgumentError("a"));
  EXPECT_FALSE(requests.Take(&b).has_value());
  EXPECT_EQ(requests.Take(&a), absl::InvalidArgumentError("a"));
  EXPECT_FALSE(requests.Take(&a).has_value());
}

}  // namespace
}  // namespace headroom::coordinator
