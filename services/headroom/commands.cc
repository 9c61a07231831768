#include "services/headroom/commands.h"

#include <cstdio>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "services/coordinator/inference_service.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/nearest_name.h"

namespace headroom::cli {
namespace {

std::string Overview() {
  std::string text =
      "Serves a language model whose KV cache is larger than the GPU.\n"
      "Usage: headroom SUBCOMMAND [OPTIONS]\n\n";
  for (const Command& command : Commands()) {
    absl::StrAppendFormat(&text, "  %-12s %s\n", command.name, command.about);
  }
  absl::StrAppend(&text,
                  "\nheadroom SUBCOMMAND --help shows its options. Exit codes: 0 fine, 1 failed at "
                  "run time,\n2 wrong usage, configuration or input files, 3 the worker's device is lost.\n");
  return text;
}

void Print(const std::string& text, std::FILE* file) {
  std::fwrite(text.data(), 1, text.size(), file);
}

}  // namespace

const std::vector<Command>& Commands() {
  static const std::vector<Command>* const commands = new std::vector<Command>{
      {"serve", "coordinator, worker and kvstore on this host, supervised", ServeCommand},
      {"generate", "one answer, from a server or from a model's folder", GenerateCommand},
      {"plan", "what a context would take, before anything runs", PlanCommand},
      {"bench", "speed of prefill and decode beside what the machine can do", BenchCommand},
      {"status", "what a server is doing", StatusCommand},
      {"health", "whether a server is ready", HealthCommand},
      {"coordinator", "the public API, sessions, batching, placement", CoordinatorCommand},
      {"worker", "weights and device memory; runs the steps", WorkerCommand},
      {"kvstore", "keys and values in host memory", KvStoreCommand},
  };
  return *commands;
}

int RunCommand(const std::vector<std::string>& args) {
  if (args.empty()) {
    Print(Overview(), stderr);
    return kExitUsage;
  }
  const std::string& name = args[0];
  if (name == "-h" || name == "--help" || name == "help") {
    Print(Overview(), stdout);
    return kExitOk;
  }
  if (name == "--version" || name == "version") {
    Print(absl::StrCat("headroom ", coordinator::kVersion, "\n"), stdout);
    return kExitOk;
  }
  std::vector<std::string> names;
  for (const Command& command : Commands()) {
    if (name == command.name) return command.run({args.begin() + 1, args.end()});
    names.push_back(command.name);
  }
  Print(absl::StrCat("headroom: there is no subcommand '", name, "'; the nearest is '",
                     NearestName(name, names), "' (headroom --help lists them)\n"),
        stderr);
  return kExitUsage;
}

std::optional<int> ParseOrExit(const char* command, const std::vector<std::string>& args,
                               Flags& flags) {
  const absl::StatusOr<Parsed> parsed = flags.Parse(args);
  if (!parsed.ok()) {
    Print(absl::StrCat("headroom ", command, ": ", parsed.status().message(), "\n"), stderr);
    return kExitUsage;
  }
  if (*parsed == Parsed::kRun) return std::nullopt;
  Print(flags.Help(), stdout);
  return kExitOk;
}

int MissingFlag(const char* command, const char* flag) {
  Print(absl::StrCat("headroom ", command, ": --", flag, " must be set (headroom ", command,
                     " --help)\n"),
        stderr);
  return kExitUsage;
}

}  // namespace headroom::cli
