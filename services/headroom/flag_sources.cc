#include "services/headroom/flag_sources.h"

#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/errors.h"
#include "common/status.h"

namespace headroom::cli {
namespace {

// Of a value in an error.
constexpr size_t kMostValueBytes = 80;

bool IsNameChar(char c) { return absl::ascii_isalnum(c) || c == '-'; }

// Whether `message` names the flag, and not one whose name only begins or ends like it.
bool Names(absl::string_view message, absl::string_view flag) {
  for (size_t at = message.find(flag); at != absl::string_view::npos; at = message.find(flag, at + 1)) {
    const size_t end = at + flag.size();
    if ((at == 0 || !IsNameChar(message[at - 1])) &&
        (end == message.size() || !IsNameChar(message[end]))) {
      return true;
    }
  }
  return false;
}

}  // namespace

void FlagSources::AddVariable(const std::string& name, absl::string_view variable,
                              absl::string_view value) {
  source_of_.try_emplace(name, absl::StrCat("is ", variable, "=", Cut(value, kMostValueBytes),
                                            " of the environment"));
}

void FlagSources::AddFile(const std::string& name, absl::string_view path, absl::string_view text) {
  source_of_.try_emplace(name, absl::StrCat("is at ", LineOf(name, path, text)));
}

absl::Status FlagSources::Explain(const absl::Status& error) const {
  std::vector<std::string> sources;
  for (const auto& [name, source] : source_of_) {
    const std::string flag = absl::StrCat("--", name);
    if (Names(error.message(), flag)) sources.push_back(absl::StrCat(flag, " ", source));
  }
  if (sources.empty()) return error;
  return WithMessage(error,
                     absl::StrCat(error.message(), " (", absl::StrJoin(sources, "; "), ")"));
}

std::string LineOf(absl::string_view name, absl::string_view path, absl::string_view text) {
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripLeadingAsciiWhitespace(line);
    if (!absl::ConsumePrefix(&line, name)) continue;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line.front() == '=') return absl::StrCat(path, ":", number);
  }
  return std::string(path);
}

}  // namespace headroom::cli
