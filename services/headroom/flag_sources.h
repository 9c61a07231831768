// Where the values of flags came from.
#ifndef HEADROOM_SERVICES_HEADROOM_FLAG_SOURCES_H_
#define HEADROOM_SERVICES_HEADROOM_FLAG_SOURCES_H_

#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace headroom::cli {

// Of those that did not come from the command line. An error names a flag, wherever it is found; who has
// set a variable, or written a line of a file, is to hear of these.
class FlagSources {
 public:
  // `name` without dashes; of two sources the first holds.
  void AddVariable(const std::string& name, absl::string_view variable, absl::string_view value);
  // `text` is what the file holds.
  void AddFile(const std::string& name, absl::string_view path, absl::string_view text);

  // The error, with the source of each flag that its message names: "--threads: 'many', expected a
  // number (--threads is HEADROOM_THREADS=many of the environment)", "(--threads is at serve.conf:3)".
  absl::Status Explain(const absl::Status& error) const;

 private:
  std::map<std::string, std::string> source_of_;  // by name: how the sentence ends
};

// "serve.conf:3": the first line of the file that sets this flag; the path alone where there is none.
std::string LineOf(absl::string_view name, absl::string_view path, absl::string_view text);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_FLAG_SOURCES_H_
