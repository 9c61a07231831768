#include "common/json.h"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr int kMaxDepth = 64;
constexpr size_t kMaxQuotedBytes = 80;  // of a wrong value, in an error

// The text's bytes, counting for errors how many the parser has taken.
class CountingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  CountingIterator(const char* at, int64_t* taken) : at_(at), taken_(taken) {}
  reference operator*() const { return *at_; }
  CountingIterator& operator++() {
    ++at_;
    ++*taken_;
    return *this;
  }
  CountingIterator operator++(int) {
    const CountingIterator before = *this;
    ++*this;
    return before;
  }
  bool operator==(const CountingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const CountingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  int64_t* taken_;
};

// Builds the tree from the parser's events, so that depth and duplicates are checked while reading
// and not after a hostile document has been expanded. With MemberRules each member of the outermost
// object is handed on when it is whole and not kept.
class TreeBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  // `taken`: how many bytes have been read, while reading.
  explicit TreeBuilder(const int64_t* taken, const Json::MemberRules* rules = nullptr)
      : taken_(taken), rules_(rules) {}

  bool null() override { return Add(Json()); }
  bool boolean(bool value) override { return Add(Json(value)); }
  bool number_integer(number_integer_t value) override {
    // Of integers only the negative come here, and "-0": no integer is that.
    return Add(value == 0 ? Json(-0.0) : Json(int64_t{value}));
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (value > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
      return Fail("an integer beyond 64 bits");
    }
    return Add(Json(static_cast<int64_t>(value)));
  }
  bool number_float(number_float_t value, const string_t& text) override {
    // The parser turns integers that it cannot hold into these.
    if (text.find_first_of(".eE") == string_t::npos) return Fail("an integer beyond 64 bits");
    return Add(Json(value));
  }
  bool string(string_t& value) override { return Add(Json(std::move(value))); }
  bool binary(binary_t&) override { return Fail("binary data"); }
  bool start_object(std::size_t) override {
    if (rules_ != nullptr && frames_.empty()) whole_is_object_ = true;
    return Open(Frame{.is_object = true});
  }
  bool end_object() override { return Close(); }
  bool start_array(std::size_t) override { return Open(Frame{.is_object = false}); }
  bool end_array() override { return Close(); }
  bool key(string_t& name) override {
    if (!frames_.back().names.insert(name).second) {
      return Fail(absl::StrCat("member '", BriefText(name), "' twice in one object"));
    }
    frames_.back().key = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::json::exception&) override {
    if (error_.empty()) error_ = absl::StrCat("not valid JSON at byte ", position);
    return false;
  }

  // Why reading has stopped.
  absl::Status status() const {
    return refused_.ok() ? absl::InvalidArgumentError(error_) : refused_;
  }
  Json Take() { return std::move(root_); }
  bool whole_is_object() const { return whole_is_object_; }

 private:
  struct Frame {
    bool is_object = false;
    Json::Array array = {};
    Json::Object object = {};
    std::set<std::string> names = {};
    std::string key = {};
  };

  bool Fail(absl::string_view what) {
    error_ = absl::StrCat(what, " at byte ", *taken_);
    return false;
  }
  bool Open(Frame frame) {
    if (static_cast<int>(frames_.size()) >= kMaxDepth) {
      return Fail(absl::StrCat("nested deeper than ", kMaxDepth));
    }
    frames_.push_back(std::move(frame));
    return true;
  }
  bool Close() {
    Frame frame = std::move(frames_.back());
    frames_.pop_back();
    return Add(frame.is_object ? Json(std::move(frame.object)) : Json(std::move(frame.array)));
  }
  bool Add(Json value) {
    if (rules_ != nullptr && !frames_.empty()) {
      if (++values_ > rules_->max_values) {
        return Fail(absl::StrCat("member '", BriefText(frames_.front().key), "' has more than ",
                                 rules_->max_values, " values"));
      }
      if (frames_.size() == 1 && frames_.back().is_object) {
        values_ = 0;
        refused_ = rules_->take(frames_.back().key, value);
        return refused_.ok();
      }
    }
    if (frames_.empty()) {
      root_ = std::move(value);
    } else if (frames_.back().is_object) {
      frames_.back().object.emplace_back(std::move(frames_.back().key), std::move(value));
    } else {
      frames_.back().array.push_back(std::move(value));
    }
    return true;
  }

  const int64_t* const taken_;
  const Json::MemberRules* const rules_;
  int64_t values_ = 0;  // of the member that is being read
  bool whole_is_object_ = false;
  absl::Status refused_;
  std::vector<Frame> frames_;
  Json root_;
  std::string error_;
};

std::string Shorten(std::string text) {
  if (text.size() <= kMaxQuotedBytes) return text;
  size_t end = kMaxQuotedBytes;  // where a character begins
  while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80) --end;
  return text.substr(0, end) + "...";
}

nlohmann::ordered_json ToLibrary(const Json& json) {
  if (json.is_null()) return nullptr;
  if (json.is_bool()) return json.as_bool();
  if (json.is_int()) return json.as_int();
  if (json.is_number()) return json.as_number();
  if (json.is_string()) return json.as_string();
  if (json.is_array()) {
    auto array = nlohmann::ordered_json::array();
    for (const Json& element : json.as_array()) array.push_back(ToLibrary(element));
    return array;
  }
  auto object = nlohmann::ordered_json::object();
  for (const auto& [name, value] : json.as_object()) object[name] = ToLibrary(value);
  return object;
}

// Hands a text's events to the builder.
absl::Status Read(absl::string_view text, int64_t max_bytes, int64_t& taken, TreeBuilder& builder) {
  if (static_cast<int64_t>(text.size()) > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(text.size(), " bytes of JSON, at most ", max_bytes, " are read"));
  }
  // The parser skips a byte order mark, which JSON has none of, and takes a zero byte for the text's
  // end.
  if (text.substr(0, 3) == "\xEF\xBB\xBF") {
    return absl::InvalidArgumentError("not valid JSON at byte 1: a byte order mark");
  }
  if (const size_t zero = text.find('\0'); zero != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat("not valid JSON at byte ", zero + 1));
  }
  const bool whole = nlohmann::json::sax_parse(CountingIterator(text.data(), &taken),
                                               CountingIterator(text.data() + text.size(), &taken),
                                               &builder);
  return whole ? absl::OkStatus() : builder.status();
}

}  // namespace

absl::StatusOr<Json> Json::Parse(absl::string_view text, int64_t max_bytes) {
  int64_t taken = 0;
  TreeBuilder builder(&taken);
  HEADROOM_RETURN_IF_ERROR(Read(text, max_bytes, taken, builder));
  return builder.Take();
}

absl::Status Json::ParseMembers(absl::string_view text, int64_t max_bytes,
                                const MemberRules& rules) {
  int64_t taken = 0;
  TreeBuilder builder(&taken, &rules);
  HEADROOM_RETURN_IF_ERROR(Read(text, max_bytes, taken, builder));
  if (builder.whole_is_object()) return absl::OkStatus();
  return absl::InvalidArgumentError("expected an object");
}

absl::StatusOr<Json> Json::ParseFile(const std::string& path, int64_t max_bytes) {
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (std::filesystem::exists(status) && !std::filesystem::is_regular_file(status)) {
    // Reading a pipe could wait forever.
    return absl::InvalidArgumentError(absl::StrCat(path, ": is no regular file"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file && std::filesystem::exists(status)) {  // one that may be left out must not be passed over
    return absl::PermissionDeniedError(absl::StrCat(path, ": cannot be opened"));
  }
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::string text;
  char buffer[1 << 16];
  while (file.read(buffer, sizeof(buffer)) || file.gcount() > 0) {
    text.append(buffer, static_cast<size_t>(file.gcount()));
    if (static_cast<int64_t>(text.size()) > max_bytes) break;
  }
  absl::StatusOr<Json> json = Parse(text, max_bytes);
  if (!json.ok()) return Annotate(json.status(), path);
  return json;
}

const Json* Json::Find(absl::string_view name) const {
  if (!is_object()) return nullptr;
  for (const auto& [member, value] : as_object()) {
    if (member == name) return value.is_null() ? nullptr : &value;
  }
  return nullptr;
}

std::string Json::Dump(int indent) const {
  return ToLibrary(*this).dump(indent, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string Brief(const Json& value) { return Shorten(value.Dump()); }

std::string BriefText(absl::string_view text) {
  // What would be cut off need not be escaped first.
  const std::string quoted = Json(std::string(text.substr(0, kMaxQuotedBytes + 1))).Dump();
  return Shorten(quoted.substr(1, quoted.size() - 2));
}

absl::Status JsonReader::Wrong(absl::string_view name, absl::string_view expected) const {
  const Json* found = object_.Find(name);
  return absl::InvalidArgumentError(absl::StrCat(where_, ": '", BriefText(name), "' is ",
                                                 found == nullptr ? "nothing" : Brief(*found),
                                                 ", expected ", expected));
}

absl::StatusOr<int64_t> JsonReader::Int(absl::string_view name, int64_t low, int64_t high) const {
  const Json* found = object_.Find(name);
  if (found == nullptr || !found->is_int() || found->as_int() < low || found->as_int() > high) {
    return Wrong(name, absl::StrCat("an integer from ", low, " to ", high));
  }
  return found->as_int();
}

absl::StatusOr<int64_t> JsonReader::IntOr(absl::string_view name, int64_t otherwise, int64_t low,
                                          int64_t high) const {
  if (object_.Find(name) == nullptr) return otherwise;
  return Int(name, low, high);
}

absl::StatusOr<double> JsonReader::Number(absl::string_view name, double low, double high) const {
  const Json* found = object_.Find(name);
  if (found == nullptr || !found->is_number() || !(found->as_number() >= low) ||
      !(found->as_number() <= high)) {
    return Wrong(name, absl::StrFormat("a number from %g to %g", low, high));
  }
  return found->as_number();
}

absl::StatusOr<double> JsonReader::NumberOr(absl::string_view name, double otherwise, double low,
                                            double high) const {
  if (object_.Find(name) == nullptr) return otherwise;
  return Number(name, low, high);
}

absl::StatusOr<std::string> JsonReader::String(absl::string_view name) const {
  const Json* found = object_.Find(name);
  if (found == nullptr || !found->is_string()) return Wrong(name, "a string");
  return found->as_string();
}

absl::StatusOr<std::string> JsonReader::StringOr(absl::string_view name,
                                                 std::string otherwise) const {
  if (object_.Find(name) == nullptr) return otherwise;
  return String(name);
}

absl::StatusOr<bool> JsonReader::BoolOr(absl::string_view name, bool otherwise) const {
  const Json* found = object_.Find(name);
  if (found == nullptr) return otherwise;
  if (!found->is_bool()) return Wrong(name, "true or false");
  return found->as_bool();
}

}  // namespace headroom
