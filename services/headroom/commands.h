// The subcommands: each reads its flags and calls what does the work.
#ifndef HEADROOM_SERVICES_HEADROOM_COMMANDS_H_
#define HEADROOM_SERVICES_HEADROOM_COMMANDS_H_

#include <optional>
#include <string>
#include <vector>

#include "services/headroom/flags.h"

namespace headroom::cli {

// `args` without program and subcommand. Returns the exit code.
struct Command {
  const char* name;
  const char* about;
  int (*run)(const std::vector<std::string>& args);
};

int ServeCommand(const std::vector<std::string>& args);
int CoordinatorCommand(const std::vector<std::string>& args);
int WorkerCommand(const std::vector<std::string>& args);
int KvStoreCommand(const std::vector<std::string>& args);
int GenerateCommand(const std::vector<std::string>& args);
int BenchCommand(const std::vector<std::string>& args);
int PlanCommand(const std::vector<std::string>& args);
int StatusCommand(const std::vector<std::string>& args);
int HealthCommand(const std::vector<std::string>& args);

// All of them, in the order of the help.
const std::vector<Command>& Commands();

// `args` with the subcommand in front.
int RunCommand(const std::vector<std::string>& args);

// Reads the flags of `command`; if that is the end (--help, or an error, which is printed), the
// exit code.
std::optional<int> ParseOrExit(const char* command, const std::vector<std::string>& args,
                               Flags& flags);
// Prints that a flag must be set.
int MissingFlag(const char* command, const char* flag);

}  // namespace headroom::cli

#endif  // HEADROOM_SERVICES_HEADROOM_COMMANDS_H_
