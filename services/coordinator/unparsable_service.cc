#include "services/coordinator/unparsable_service.h"

#include <grpc/byte_buffer_reader.h>

#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/errors.h"
#include "common/protobuf_wire.h"
#include "common/text/utf8.h"

namespace headroom::coordinator {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

constexpr int kMaxDepth = 16;  // of messages in messages; a request has 4

// The first text that is not UTF-8, in the order of the bytes.
std::optional<FieldViolation> FirstWrongText(const Descriptor& type, absl::string_view bytes,
                                             const std::string& prefix, int depth) {
  std::map<int, int> seen;  // of repeated fields
  for (wire::Reader reader(bytes); reader.Next();) {
    const FieldDescriptor* const field = type.FindFieldByNumber(reader.field());
    if (field == nullptr) continue;
    std::string name = prefix + field->name();
    if (field->is_repeated()) absl::StrAppend(&name, "[", seen[reader.field()]++, "]");
    if (field->type() == FieldDescriptor::TYPE_STRING) {
      const absl::Status utf8 = CheckUtf8(reader.bytes(), "text");
      if (!utf8.ok()) return FieldViolation{name, std::string(utf8.message())};
    } else if (field->type() == FieldDescriptor::TYPE_MESSAGE && depth < kMaxDepth) {
      auto wrong = FirstWrongText(*field->message_type(), reader.bytes(), name + ".", depth + 1);
      if (wrong.has_value()) return wrong;
    }
  }
  return std::nullopt;
}

}  // namespace

absl::Status WhyUnparsable(const Descriptor& type, absl::string_view bytes,
                           absl::string_view omitted) {
  std::optional<FieldViolation> wrong = FirstWrongText(type, bytes, "", 0);
  if (!wrong.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the message's ", bytes.size(), " bytes are no ", type.full_name()));
  }
  wrong->field = std::string(absl::StripPrefix(wrong->field, omitted));
  return BadRequestError({*std::move(wrong)});
}

void UnparsableRequests::Put(const void* request, absl::Status why) {
  MutexLock lock(&mutex_);
  why_.insert_or_assign(request, std::move(why));
}

std::optional<absl::Status> UnparsableRequests::Take(const void* request) {
  MutexLock lock(&mutex_);
  const auto found = why_.find(request);
  if (found == why_.end()) return std::nullopt;
  absl::Status why = std::move(found->second);
  why_.erase(found);
  return why;
}

MessageBytes::~MessageBytes() {
  grpc_slice_unref(whole_);
  if (bytes_ != nullptr) grpc_byte_buffer_destroy(bytes_);
}

absl::string_view MessageBytes::Text() {
  grpc_byte_buffer_reader reader;
  if (bytes_ == nullptr || !grpc_byte_buffer_reader_init(&reader, bytes_)) return "";
  grpc_slice_unref(whole_);
  whole_ = grpc_byte_buffer_reader_readall(&reader);
  grpc_byte_buffer_reader_destroy(&reader);
  return absl::string_view(reinterpret_cast<const char*>(GRPC_SLICE_START_PTR(whole_)),
                           GRPC_SLICE_LENGTH(whole_));
}

}  // namespace headroom::coordinator
