// The subcommands that ask a server.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "services/headroom/admin_client.h"
#include "services/headroom/commands.h"
#include "services/headroom/endpoint.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/generate.h"
#include "services/headroom/health_client.h"
#include "services/headroom/service_flags.h"
#include "services/headroom/status_report.h"

namespace headroom::cli {
namespace {

void Print(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

}  // namespace

int GenerateCommand(const std::vector<std::string>& args) {
  GenerateCommandOptions options;
  Flags flags("headroom generate",
              "One answer. Its text goes to standard output as it comes.",
              "Exit codes: 1 if the call failed, 2 if the request was wrong. Ctrl-C cancels it.");
  flags.Group("Server (one of the first two)");
  flags.Address("server", &options.server.address, "A running server: HOST:PORT or unix:PATH.");
  flags.Text("model", "DIR", &options.model_dir,
             "A model's folder: starts a private serve for this call, and stops it. Not used with "
             "--server, and neither are the next four.");
  flags.Choice("device", {"auto", "cpu", "cuda"}, &options.device, "Of the private serve.");
  flags.Bytes("gpu-memory", &options.gpu_memory_bytes, "Of the private serve.",
              "see headroom serve --help");
  flags.Bytes("host-memory", &options.host_memory_bytes, "Of the private serve.",
              "see headroom serve --help");
  flags.Integer("threads", &options.threads, 0, 1024, "Of the private serve.",
                "as many as may run");
  flags.Duration("timeout", &options.timeout, "The answer must have ended by then.");
  AddClientSecurityFlags(flags, &options.server.security);
  AddGenerateFlags(flags, &options.generate);
  AddLogFlags(flags, &options.log);
  if (const auto code = ParseOrExit("generate", args, flags)) return *code;
  return RunGenerate(options, flags.sources());
}

int StatusCommand(const std::vector<std::string>& args) {
  Endpoint server;
  bool json = false;
  absl::Duration timeout = absl::Seconds(5);
  Flags flags("headroom status", "What a server is doing: processes, memory, requests, lanes.");
  flags.Group("Server");
  flags.Address("server", &server.address, "The coordinator's --admin; serve writes it into its log.");
  flags.Duration("timeout", &timeout, "How long to wait for the answer.");
  AddClientSecurityFlags(flags, &server.security);
  flags.Group("Output");
  flags.Switch("json", &json, "One JSON object in place of the text.");
  if (const auto code = ParseOrExit("status", args, flags)) return *code;
  if (server.address.empty()) return MissingFlag("status", "server");
  const absl::StatusOr<v1::GetStatusResponse> status = GetStatus(server, timeout);
  if (!status.ok()) {
    PrintError("status", flags.sources().Explain(status.status()));
    return ExitCodeOfCall(status.status());
  }
  Print(json ? StatusAsJson(*status).Dump(2) + "\n" : StatusAsText(*status));
  return kExitOk;
}

int HealthCommand(const std::vector<std::string>& args) {
  Endpoint server;
  std::string service;
  absl::Duration timeout = absl::Seconds(5);
  Flags flags("headroom health",
              "Whether a server is ready: exit code 0 only if it says SERVING. Works for "
              "coordinator, worker and kvstore.");
  flags.Group("Server");
  flags.Address("server", &server.address, "HOST:PORT or unix:PATH.");
  flags.Text("service", "NAME", &service,
             "One service, such as headroom.v1.InferenceService. Default: the whole server.");
  flags.Duration("timeout", &timeout, "How long to wait for the answer.");
  AddClientSecurityFlags(flags, &server.security);
  if (const auto code = ParseOrExit("health", args, flags)) return *code;
  if (server.address.empty()) return MissingFlag("health", "server");
  const absl::StatusOr<Health> health = CheckHealth(server, service, timeout);
  if (!health.ok()) {
    PrintError("health", flags.sources().Explain(health.status()));
    return absl::IsInvalidArgument(health.status()) ? kExitUsage : kExitFailed;
  }
  Print(absl::StrCat(HealthName(*health), "\n"));
  return *health == Health::kServing ? kExitOk : kExitFailed;
}

}  // namespace headroom::cli
