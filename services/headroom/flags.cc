#include "services/headroom/flags.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "common/bytes_text.h"
#include "services/headroom/nearest_name.h"

namespace headroom::cli {
namespace {

constexpr size_t kNameColumns = 34;
constexpr size_t kTextColumns = 66;
// Array elements of one flag, and times that it may be given.
constexpr int kMostListValues = 1024;

std::string Wrap(absl::string_view text) {
  std::string wrapped;
  size_t column = 0;
  for (const absl::string_view word : absl::StrSplit(text, ' ', absl::SkipEmpty())) {
    if (column > 0 && column + 1 + word.size() > kTextColumns) {
      wrapped += '\n';
      column = 0;
    } else if (column > 0) {
      wrapped += ' ';
      ++column;
    }
    absl::StrAppend(&wrapped, word);
    column += word.size();
  }
  return wrapped;
}

// Name, what stands for the value, and a text that stays within its column.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_option_opts(const CLI::Option* option) const override {
    return option->get_option_text().empty() ? "" : " " + option->get_option_text();
  }
  std::string make_option_desc(const CLI::Option* option) const override {
    return Wrap(option->get_description());
  }
};

const char* NonEmptyVariable(absl::string_view flag) {
  const char* const value = std::getenv(Flags::VariableOf(flag).c_str());
  return value != nullptr && *value != '\0' ? value : nullptr;
}

// gRPC would take what has no port for one of 443, and of a port its lower 16 bits.
bool IsAddress(absl::string_view text) {
  if (text.empty() || absl::StartsWith(text, "unix:") || absl::StartsWith(text, "unix-abstract:")) return true;
  for (const absl::string_view scheme : {"dns:///", "dns:", "ipv4:", "ipv6:"}) {
    if (absl::ConsumePrefix(&text, scheme)) break;
  }
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos || colon == 0) return false;
  const absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  const bool bracketed = host.front() == '[' && host.back() == ']' && host.size() > 2;
  if (host.find_first_of(":[]") != absl::string_view::npos && !bracketed) return false;
  int number = -1;
  return port.size() <= 5 && std::all_of(port.begin(), port.end(), absl::ascii_isdigit) &&
         absl::SimpleAtoi(port, &number) && number <= 65535;
}

}  // namespace

// ---------------------------------------------------------------- the file

namespace {

// Reads `name = value` lines; refuses names that are no flag, and leaves out what the environment
// says.
class CheckedConfig : public CLI::ConfigTOML {
 public:
  using Found = std::function<void(const std::string& name, const std::string& path,
                                   const std::string& text)>;
  // `found` is told of each flag that is kept, and of the file: its path and what it holds.
  CheckedConfig(std::vector<std::string> names, std::vector<std::string> list_names,
                const CLI::Option* config, Found found)
      : names_(std::move(names)),
        list_names_(std::move(list_names)),
        config_(config),
        found_(std::move(found)) {}

  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    const auto path = config_->as<std::string>();
    const std::string text(std::istreambuf_iterator<char>(input), {});
    std::istringstream lines(text);
    std::vector<CLI::ConfigItem> kept;
    for (CLI::ConfigItem& item : CLI::ConfigTOML::from_config(lines)) {
      try {
        Check(item);
      } catch (const CLI::ConfigError& error) {
        throw CLI::ConfigError(absl::StrCat(LineOf(item.name, path, text), ": ", error.what()));
      }
      if (NonEmptyVariable(item.name) != nullptr) continue;
      found_(item.name, path, text);
      kept.push_back(std::move(item));
    }
    return kept;
  }

 private:
  void Check(const CLI::ConfigItem& item) const {
    if (!item.parents.empty()) {
      throw CLI::ConfigError(absl::StrCat("there is a section [", item.parents.front(),
                                          "]: flags stand outside of sections"));
    }
    const std::string& name = item.name;
    if (std::find(names_.begin(), names_.end(), name) == names_.end()) {
      throw CLI::ConfigError(absl::StrCat("'", name, "' is no flag; the nearest is '",
                                          NearestName(name, names_), "'"));
    }
    const bool is_list =
        std::find(list_names_.begin(), list_names_.end(), name) != list_names_.end();
    if (!is_list && item.inputs.size() != 1) {
      throw CLI::ConfigError(absl::StrCat("'", name, "' has ", item.inputs.size(),
                                          " values, expected one: a value with commas or spaces "
                                          "stands in quotes"));
    }
    for (const std::string& input : item.inputs) {
      if (input.empty() || (input.front() != '"' && input.front() != '\'')) continue;
      throw CLI::ConfigError(absl::StrCat("the quotes of '", name,
                                          "' do not match (a # begins a comment, in quotes too)"));
    }
  }

  const std::vector<std::string> names_;
  const std::vector<std::string> list_names_;
  const CLI::Option* const config_;
  const Found found_;
};

bool IsGiven(const std::vector<std::string>& args, const std::string& name) {
  const std::string flag = absl::StrCat("--", name);
  return std::any_of(args.begin(), args.end(), [&](absl::string_view arg) {
    return absl::ConsumePrefix(&arg, flag) && (arg.empty() || arg.front() == '=');
  });
}

}  // namespace

// ---------------------------------------------------------------- adding

struct Flags::Impl {
  Impl(std::string command_line, const std::string& about)
      : command(std::move(command_line)), app(about, command) {}

  CLI::Option* Register(CLI::Option* option, const std::string& name, const std::string& metavar,
                        const std::string& default_text) {
    names.push_back(name);
    option->envname(VariableOf(name));
    option->option_text(metavar);
    option->group(group);
    if (!default_text.empty()) {
      option->description(absl::StrCat(option->get_description(), " Default: ", default_text, "."));
    }
    return option;
  }

  // Throws what CLI11 reports as this flag's error.
  static void Check(const std::string& name, const absl::Status& status) {
    if (status.ok()) return;
    throw CLI::ValidationError("--" + name, std::string(status.message()));
  }

  const std::string command;
  CLI::App app;
  std::string group;  // "": not shown
  std::vector<std::string> names;
  std::vector<std::string> list_names;
  FlagSources sources;
};

Flags::Flags(std::string command, std::string about, std::string notes)
    : impl_(std::make_unique<Impl>(std::move(command), about)) {
  CLI::App& app = impl_->app;
  app.formatter(std::make_shared<HelpFormatter>());
  app.get_formatter()->column_width(kNameColumns);
  app.set_help_flag();  // it comes last, in Parse()
  app.allow_extras();
  absl::StrAppend(&notes, notes.empty() ? "" : "\n\n",
                  "Each flag --some-flag is also the variable HEADROOM_SOME_FLAG, and a line\n"
                  "'some-flag = value' of the file that --config names. The command line wins\n"
                  "over the variable, the variable over the file.");
  app.footer(notes);
}

Flags::~Flags() = default;

void Flags::Group(std::string heading) { impl_->group = std::move(heading); }

std::string Flags::VariableOf(absl::string_view name) {
  std::string variable = absl::StrCat("HEADROOM_", absl::AsciiStrToUpper(name));
  for (char& c : variable) {
    if (c == '-') c = '_';
  }
  return variable;
}

void Flags::Add(const std::string& name, const std::string& metavar,
                const std::string& default_text, const std::string& what, Take take) {
  CLI::Option* const option = impl_->app.add_option(
      "--" + name,
      CLI::callback_t([name, take = std::move(take)](const CLI::results_t& results) {
        Impl::Check(name, take(results.back()));
        return true;
      }),
      what);
  option->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  impl_->Register(option, name, metavar, default_text);
}

void Flags::TextList(const std::string& name, const std::string& metavar,
                     std::vector<std::string>* values, const std::string& what) {
  CLI::Option* const option =
      impl_->app.add_option("--" + name, CLI::callback_t([values](const CLI::results_t& results) {
                              *values = results;
                              return true;
                            }),
                            what);
  option->expected(1, kMostListValues)->allow_extra_args(false);
  option->multi_option_policy(CLI::MultiOptionPolicy::TakeAll);
  impl_->list_names.push_back(name);
  impl_->Register(option, name, metavar, "");
}

void Flags::Switch(const std::string& name, bool* value, const std::string& what) {
  CLI::Option* const option = impl_->app.add_flag_function(
      "--" + name, [value](std::int64_t count) { *value = count > 0; }, what);
  impl_->Register(option, name, "", "");
}

void Flags::Text(const std::string& name, const std::string& metavar, std::string* value,
                 const std::string& what) {
  Add(name, metavar, *value, what, [value](const std::string& text) {
    *value = text;
    return absl::OkStatus();
  });
}

void Flags::Text(const std::string& name, const std::string& metavar,
                 std::optional<std::string>* value, const std::string& what) {
  Add(name, metavar, "", what, [value](const std::string& text) {
    *value = text;
    return absl::OkStatus();
  });
}

void Flags::Address(const std::string& name, std::string* value, const std::string& what) {
  Add(name, "ADDR", *value, what, [value](const std::string& text) {
    if (!IsAddress(text)) {
      return absl::InvalidArgumentError(absl::StrCat(
          "'", text, "', expected HOST:PORT with a port of 0 to 65535 ([HOST]:PORT of IPv6), or unix:PATH"));
    }
    *value = text;
    return absl::OkStatus();
  });
}

void Flags::Choice(const std::string& name, const std::vector<std::string>& choices,
                   std::string* value, const std::string& what) {
  Add(name, absl::StrJoin(choices, "|"), *value, what, [value, choices](const std::string& text) {
    if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
      return absl::InvalidArgumentError(absl::StrCat("'", text, "', expected ",
                                                     absl::StrJoin(choices, ", "),
                                                     "; the nearest is '",
                                                     NearestName(text, choices), "'"));
    }
    *value = text;
    return absl::OkStatus();
  });
}

void Flags::AddInteger(const std::string& name, int64_t low, int64_t high,
                       const std::string& default_text, const std::string& what,
                       std::function<void(int64_t)> set) {
  Add(name, "N", default_text, what, [low, high, set = std::move(set)](const std::string& text) {
    int64_t number;
    if (!absl::SimpleAtoi(text, &number) || number < low || number > high) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", text, "', expected a whole number from ", low, " to ", high));
    }
    set(number);
    return absl::OkStatus();
  });
}

void Flags::Seed(const std::string& name, std::optional<uint64_t>* value, const std::string& what) {
  Add(name, "N", "", what, [value](const std::string& text) {
    uint64_t number;
    if (!absl::SimpleAtoi(text, &number)) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", text, "', expected a whole number from 0 to 2^64 - 1"));
    }
    *value = number;
    return absl::OkStatus();
  });
}

void Flags::Number(const std::string& name, std::optional<float>* value, const std::string& what) {
  Add(name, "X", "", what, [value](const std::string& text) {
    float number;
    if (!absl::SimpleAtof(text, &number) || !std::isfinite(number)) {
      return absl::InvalidArgumentError(absl::StrCat("'", text, "', expected a number"));
    }
    *value = number;
    return absl::OkStatus();
  });
}

void Flags::Bytes(const std::string& name, int64_t* value, const std::string& what,
                  const std::string& zero) {
  Add(name, "SIZE", *value == 0 ? zero : FormatBytes(*value), what,
      [value](const std::string& text) {
        const absl::StatusOr<int64_t> bytes = ParseBytes(text);
        if (bytes.ok()) *value = *bytes;
        return bytes.status();
      });
}

void Flags::Duration(const std::string& name, absl::Duration* value, const std::string& what) {
  const std::string default_text =
      *value == absl::InfiniteDuration() ? "none" : absl::FormatDuration(*value);
  Add(name, "TIME", default_text, what, [value](const std::string& text) {
    double seconds;
    absl::Duration duration;
    if (absl::SimpleAtod(text, &seconds) && std::isfinite(seconds)) {
      duration = absl::Seconds(seconds);
    } else if (!absl::ParseDuration(text, &duration)) {
      duration = -absl::InfiniteDuration();
    }
    if (duration < absl::ZeroDuration() || duration == absl::InfiniteDuration()) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", text, "', expected a time such as 30s, 1m30s, 500ms, or seconds"));
    }
    *value = duration;
    return absl::OkStatus();
  });
}

// ---------------------------------------------------------------- parsing

absl::StatusOr<Parsed> Flags::Parse(const std::vector<std::string>& args) {
  CLI::App& app = impl_->app;
  app.set_help_flag("-h,--help", "Shows this and ends.")->group("Other");
  const char* const config = NonEmptyVariable("config");
  CLI::Option* const option =
      app.set_config("--config", config != nullptr ? config : "",
                     "A file of flags: lines 'name = value', # begins a comment.",
                     config != nullptr);
  option->option_text("FILE");
  option->group("Other");
  app.config_formatter(std::make_shared<CheckedConfig>(
      impl_->names, impl_->list_names, option,
      [&](const std::string& name, const std::string& path, const std::string& text) {
        if (!IsGiven(args, name)) impl_->sources.AddFile(name, path, text);
      }));
  std::vector<std::string> known = {"--help"};
  std::vector<std::string> names = impl_->names;
  names.push_back("config");
  for (const std::string& name : names) {
    known.push_back("--" + name);
    const char* const value = NonEmptyVariable(name);
    if (value == nullptr || IsGiven(args, name)) continue;
    impl_->sources.AddVariable(name, VariableOf(name), value);
  }
  const auto error_of = [this](absl::string_view what) {
    return impl_->sources.Explain(absl::InvalidArgumentError(what));
  };
  try {
    app.parse(std::vector<std::string>(args.rbegin(), args.rend()));
  } catch (const CLI::CallForHelp&) {
    return Parsed::kHelp;
  } catch (const CLI::ConfigError& error) {
    return error_of(absl::StrCat("--config: ", error.what()));
  } catch (const CLI::FileError& error) {
    return error_of(absl::StrCat("--config: ", error.what()));
  } catch (const CLI::Error& error) {
    return error_of(error.what());
  }
  for (const std::string& extra : app.remaining()) {
    if (!absl::StartsWith(extra, "-") || extra == "-") {
      return absl::InvalidArgumentError(
          absl::StrCat("'", extra, "' belongs to no flag; see ", impl_->command, " --help"));
    }
    const std::string name = extra.substr(0, extra.find('='));
    return absl::InvalidArgumentError(absl::StrCat("there is no flag '", name,
                                                   "'; the nearest is '", NearestName(name, known),
                                                   "'"));
  }
  return Parsed::kRun;
}

const FlagSources& Flags::sources() const { return impl_->sources; }

std::string Flags::Help() const {
  return absl::StrReplaceAll(impl_->app.help(), {{"\n\n\n", "\n\n"}});
}

}  // namespace headroom::cli
