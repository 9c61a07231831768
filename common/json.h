// A JSON document as a plain tree. Reading is strict and capped: input may come from a model folder
// or a client. (The parser behind it is nlohmann/json, included only in json.cc.)
#ifndef HEADROOM_COMMON_JSON_H_
#define HEADROOM_COMMON_JSON_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace headroom {

class Json {
 public:
  using Array = std::vector<Json>;
  using Member = std::pair<std::string, Json>;
  using Object = std::vector<Member>;  // in the order of the text

  Json() = default;
  Json(std::nullptr_t) {}
  Json(bool value) : value_(value) {}
  Json(int value) : value_(int64_t{value}) {}
  Json(int64_t value) : value_(value) {}
  Json(double value) : value_(value) {}
  Json(const char* value) : value_(std::string(value)) {}
  Json(std::string value) : value_(std::move(value)) {}
  Json(Array value) : value_(std::move(value)) {}
  Json(Object value) : value_(std::move(value)) {}

  // INVALID_ARGUMENT with the byte offset: not JSON, not UTF-8, a byte order mark, a member named
  // twice, nested deeper than 64, text longer than `max_bytes`, an integer beyond int64. "-0" is the
  // float that it is elsewhere.
  static absl::StatusOr<Json> Parse(absl::string_view text, int64_t max_bytes);
  // The same rules, member by member: of a text that is one object, `take` gets each member as soon as
  // it has been read, and nothing is kept but the names. So memory does not grow with the text: a
  // tree of [[],[],...] takes 20 times its bytes. What `take` returns ends the reading; a member of
  // more than `max_values` values, its own included, does too, INVALID_ARGUMENT.
  struct MemberRules {
    int64_t max_values;
    std::function<absl::Status(const std::string& name, const Json& value)> take;
  };
  static absl::Status ParseMembers(absl::string_view text, int64_t max_bytes,
                                   const MemberRules& rules);
  // Parse() of a file; errors name it. NOT_FOUND if it is not there, PERMISSION_DENIED if it cannot
  // be opened, INVALID_ARGUMENT if it is no regular file.
  static absl::StatusOr<Json> ParseFile(const std::string& path, int64_t max_bytes);

  bool is_null() const { return std::holds_alternative<std::monostate>(value_); }
  bool is_bool() const { return std::holds_alternative<bool>(value_); }
  bool is_int() const { return std::holds_alternative<int64_t>(value_); }
  bool is_number() const { return is_int() || std::holds_alternative<double>(value_); }
  bool is_string() const { return std::holds_alternative<std::string>(value_); }
  bool is_array() const { return std::holds_alternative<Array>(value_); }
  bool is_object() const { return std::holds_alternative<Object>(value_); }

  // REQUIRES: the matching is_...().
  bool as_bool() const { return std::get<bool>(value_); }
  int64_t as_int() const { return std::get<int64_t>(value_); }
  double as_number() const {
    return is_int() ? static_cast<double>(as_int()) : std::get<double>(value_);
  }
  const std::string& as_string() const { return std::get<std::string>(value_); }
  const Array& as_array() const { return std::get<Array>(value_); }
  const Object& as_object() const { return std::get<Object>(value_); }

  // The member, or nullptr if this is no object, has no such member, or the member is null.
  const Json* Find(absl::string_view name) const;

  // indent < 0: one line. A float that is not finite is written as null.
  std::string Dump(int indent = -1) const;

 private:
  std::variant<std::monostate, bool, int64_t, double, std::string, Array, Object> value_;
};

// Text from outside as an error shows it: on one line, escaped as in JSON, 80 bytes at most. Brief
// of a value has a text's quotes, BriefText has none.
std::string Brief(const Json& value);
std::string BriefText(absl::string_view text);

// Typed access to the members of an object, collecting nothing: the first wrong one is the error,
// INVALID_ARGUMENT naming `where`, the member, what was found and what was expected.
class JsonReader {
 public:
  JsonReader(const Json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // A required integer in [low, high].
  absl::StatusOr<int64_t> Int(absl::string_view name, int64_t low, int64_t high) const;
  absl::StatusOr<int64_t> IntOr(absl::string_view name, int64_t otherwise, int64_t low,
                                int64_t high) const;
  // A number in [low, high]; NaN cannot occur in JSON.
  absl::StatusOr<double> Number(absl::string_view name, double low, double high) const;
  absl::StatusOr<double> NumberOr(absl::string_view name, double otherwise, double low,
                                  double high) const;
  absl::StatusOr<std::string> String(absl::string_view name) const;
  absl::StatusOr<std::string> StringOr(absl::string_view name, std::string otherwise) const;
  absl::StatusOr<bool> BoolOr(absl::string_view name, bool otherwise) const;

  const std::string& where() const { return where_; }
  const Json& object() const { return object_; }
  absl::Status Wrong(absl::string_view name, absl::string_view expected) const;

 private:
  const Json& object_;
  const std::string where_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_JSON_H_
