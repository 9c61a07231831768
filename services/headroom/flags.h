// Flags of one subcommand: from the command line, the environment and a file.
//
// A value on the command line (--gpu-memory 340MiB) wins over the environment
// (HEADROOM_GPU_MEMORY=340MiB), that over the file of --config (gpu-memory = 340MiB), that over the
// default. (CLI11 is behind it, included only in flags.cc.) For one thread.
#ifndef HEADROOM_SERVICES_HEADROOM_FLAGS_H_
#define HEADROOM_SERVICES_HEADROOM_FLAGS_H_

#include <concepts>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "services/headroom/flag_sources.h"

namespace headroom::cli {

// What Parse() found.
enum class Parsed { kRun, kHelp };

class Flags {
 public:
  // `command` as it is typed: "headroom worker". `about` opens the help, `notes` close it.
  Flags(std::string command, std::string about, std::string notes = "");
  ~Flags();

  // Flags that are added from here on stand under this heading in the help; without a heading in
  // none.
  void Group(std::string heading);

  // Each flag sets `*value` if it is given; what `*value` is before is the default and shown as
  // such. `name` is without dashes, `metavar` what stands for the value in the help. Pointers must
  // outlive Parse().
  void Text(const std::string& name, const std::string& metavar, std::string* value,
            const std::string& what);
  void Text(const std::string& name, const std::string& metavar, std::optional<std::string>* value,
            const std::string& what);
  // May be given several times; in a file an array.
  void TextList(const std::string& name, const std::string& metavar,
                std::vector<std::string>* values, const std::string& what);
  void Choice(const std::string& name, const std::vector<std::string>& choices, std::string* value,
              const std::string& what);
  void Switch(const std::string& name, bool* value, const std::string& what);
  // `zero`: what 0 stands for, shown as the default in its place if it is one.
  template <std::integral Int>
  void Integer(const std::string& name, Int* value, int64_t low, int64_t high,
               const std::string& what, const std::string& zero = "");
  template <std::integral Int>
  void Integer(const std::string& name, std::optional<Int>* value, int64_t low, int64_t high,
               const std::string& what);
  void Seed(const std::string& name, std::optional<uint64_t>* value, const std::string& what);
  // Finite numbers.
  void Number(const std::string& name, std::optional<float>* value, const std::string& what);
  // "340MiB"; see common/bytes_text.h.
  void Bytes(const std::string& name, int64_t* value, const std::string& what,
             const std::string& zero = "");
  // "30s", "1m30s", "500ms"; a plain number is seconds. Not negative.
  void Duration(const std::string& name, absl::Duration* value, const std::string& what);

  // "HOST:PORT" or "unix:PATH"; an empty text is none.
  void Address(const std::string& name, std::string* value, const std::string& what);

  using Take = std::function<absl::Status(const std::string& value)>;
  // A flag that `take` understands. Its error is shown after the flag's name.
  void Add(const std::string& name, const std::string& metavar, const std::string& default_text,
           const std::string& what, Take take);

  // `args` without program and subcommand. INVALID_ARGUMENT names flag, variable or file and what
  // was expected; for an unknown name the nearest known one.
  // May be called once.
  absl::StatusOr<Parsed> Parse(const std::vector<std::string>& args);
  // After Parse(): for errors that are found later.
  const FlagSources& sources() const;
  // After Parse().
  std::string Help() const;

  // The variable of a flag: "gpu-memory" is HEADROOM_GPU_MEMORY.
  static std::string VariableOf(absl::string_view name);

 private:
  struct Impl;

  void AddInteger(const std::string& name, int64_t low, int64_t high,
                  const std::string& default_text, const std::string& what,
                  std::function<void(int64_t)> set);

  const std::unique_ptr<Impl> impl_;
};

template <std::integral Int>
void Flags::Integer(const std::string& name, Int* value, int64_t low, int64_t high,
                    const std::string& what, const std::string& zero) {
  AddInteger(name, low, high, *value <= 0 && !zero.empty() ? zero : std::to_string(*value), what,
             [value](int64_t number) { *value = static_cast<Int>(number); });
}

template <std::integral Int>
void Flags::Integer(const std::string& name, std::optional<Int>* value, int64_t low, int64_t high,
                    const std::string& what) {
  AddInteger(name, low, high, "", what,
             [value](int64_t number) { *value = static_cast<Int>(number); });
}

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_FLAGS_H_
