#include "services/coordinator/unparsable_service.h"

#include <grpc/byte_buffer_reader.h>

#include <algorithm>
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
// That are looked at. Megabytes of fields of two bytes would take longer than parsing them.
constexpr int kMaxFields = 100'000;

// The first text that is not UTF-8, in the order of the bytes.
std::optional<FieldViolation> FirstWrongText(const Descriptor& type, absl::string_view bytes,
                                             const std::string& prefix, int depth, int& fields_left) {
  std::map<int, int> seen;  // of repeated fields
  for (wire::Reader reader(bytes); reader.Next() && --fields_left > 0;) {
    const FieldDescriptor* const field = type.FindFieldByNumber(reader.field());
    if (field == nullptr) continue;
    std::string name = prefix + field->name();
    if (field->is_repeated()) absl::StrAppend(&name, "[", seen[reader.field()]++, "]");
    if (field->type() == FieldDescriptor::TYPE_STRING) {
      const absl::Status utf8 = CheckUtf8(reader.bytes(), "text");
      if (!utf8.ok()) return FieldViolation{name, std::string(utf8.message())};
    } else if (field->type() == FieldDescriptor::TYPE_MESSAGE && depth < kMaxDepth) {
      auto wrong = FirstWrongText(*field->message_type(), reader.bytes(), name + ".", depth + 1,
                                  fields_left);
      if (wrong.has_value()) return wrong;
    }
  }
  return std::nullopt;
}

}  // namespace

absl::Status WhyUnparsable(const Descriptor& type, absl::string_view bytes,
                           absl::string_view omitted) {
  int fields_left = kMaxFields;
  std::optional<FieldViolation> wrong = FirstWrongText(type, bytes, "", 0, fields_left);
  if (!wrong.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the message's ", bytes.size(), " bytes are no ", type.full_name()));
  }
  wrong->field = std::string(absl::StripPrefix(wrong->field, omitted));
  return BadRequestError({*std::move(wrong)});
}

absl::Status WhyTooLong(const Descriptor& type, absl::string_view bytes, absl::string_view omitted,
                        int64_t most) {
  const Descriptor* at = &type;
  absl::string_view rest = bytes;
  std::string name;
  int fields_left = kMaxFields;
  for (int depth = 0; depth < kMaxDepth; ++depth) {
    std::map<int, size_t> sizes;  // of all that a field has
    std::map<int, absl::string_view> last;
    for (wire::Reader reader(rest); reader.Next() && --fields_left > 0;) {
      sizes[reader.field()] += reader.bytes().size();
      last[reader.field()] = reader.bytes();
    }
    const auto largest = std::max_element(sizes.begin(), sizes.end(),
                                          [](auto& a, auto& b) { return a.second < b.second; });
    const FieldDescriptor* const field =
        largest == sizes.end() ? nullptr : at->FindFieldByNumber(largest->first);
    if (field == nullptr) break;
    absl::StrAppend(&name, name.empty() ? "" : ".", field->name());
    if (field->is_repeated() || field->type() != FieldDescriptor::TYPE_MESSAGE) break;
    at = field->message_type();
    rest = last[largest->first];
  }
  return BadRequestError({{std::string(absl::StripPrefix(name, omitted)),
                           absl::StrCat("the request has ", bytes.size(), " bytes; one that the context "
                                        "limit lets through has at most ", most)}});
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

grpc_byte_buffer* MessageBytes::Emptied(grpc_byte_buffer* message) {
  if (message != nullptr) grpc_byte_buffer_destroy(message);
  return grpc_raw_byte_buffer_create(nullptr, 0);
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
