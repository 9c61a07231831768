#include "services/headroom/generate.h"

#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/status.h"
#include "services/headroom/call_canceller.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/generate_client.h"
#include "services/headroom/generate_report.h"
#include "services/headroom/private_serve.h"
#include "services/headroom/process_signals.h"
#include "services/headroom/service_flags.h"

namespace headroom::cli {
namespace {

constexpr char kCommand[] = "generate";

void Write(absl::string_view text, std::FILE* file) {
  std::fwrite(text.data(), 1, text.size(), file);
  std::fflush(file);
}

absl::Status CheckServer(const GenerateCommandOptions& options) {
  if (options.server.address.empty() && options.model_dir.empty()) {
    return absl::InvalidArgumentError(
        "give --server (a running server) or --model (a private one for this call)");
  }
  if (!options.server.address.empty() && !options.log.trace_path.empty()) {
    return absl::InvalidArgumentError(
        "--trace is of the private server that --model starts; a running one has a --trace of its own");
  }
  return absl::OkStatus();
}

std::vector<std::string> PrivateServeArguments(const GenerateCommandOptions& options) {
  std::vector<std::string> args = {
      absl::StrCat("--model=", options.model_dir), absl::StrCat("--device=", options.device),
      absl::StrCat("--gpu-memory=", options.gpu_memory_bytes),
      absl::StrCat("--host-memory=", options.host_memory_bytes),
      absl::StrCat("--threads=", options.threads)};
  AppendLogArguments(options.log, &args);
  return args;
}

// Prints as it comes; then what else was asked for.
absl::Status GenerateAndPrint(const Endpoint& server, const v1::GenerateRequest& request,
                              const GenerateCommandOptions& options, CallCanceller* canceller) {
  const GenerateOptions& generate = options.generate;
  const bool several = request.n() > 1;
  TokenTimes times;
  const absl::Time begun = absl::Now();
  const auto on_delta = [&](const v1::Delta& delta) {
    if (!generate.json && !several && !delta.text().empty()) Write(delta.text(), stdout);
    times[delta.index()].insert(times[delta.index()].end(), static_cast<size_t>(delta.tokens_size()),
                                absl::Now() - begun);
  };
  HEADROOM_ASSIGN_OR_RETURN(
      const v1::GenerateOnceResponse response,
      GenerateClient(server).Generate(request, options.timeout, canceller, on_delta));
  if (generate.json) {
    const Json json = GenerateAsJson(response, times, generate.prompt_logprobs != 0,
                                     generate.logprobs.has_value());
    Write(json.Dump() + "\n", stdout);
  } else if (several) {
    for (int i = 0; i < response.answers_size(); ++i) {
      Write(absl::StrCat("--- answer ", i, "\n", response.answers(i).text(), "\n"), stdout);
    }
  } else if (isatty(STDOUT_FILENO)) {
    Write("\n", stdout);
  }
  if (generate.explain) {
    // Both may end up on one screen, and the answer has no newline at its end.
    const bool new_line = !generate.json && !isatty(STDOUT_FILENO);
    if (!several) {
      Write(absl::StrCat(new_line ? "\n" : "", ExplainAsText(response.finished())), stderr);
    }
    for (int i = 0; i < response.answers_size(); ++i) {
      Write(absl::StrCat("--- answer ", i, "\n", ExplainAsText(response.answers(i).finished())),
            stderr);
    }
  }
  if (std::ferror(stdout)) return absl::UnavailableError("standard output cannot be written");
  return absl::OkStatus();
}

absl::Status GenerateFromModel(const v1::GenerateRequest& request,
                               const GenerateCommandOptions& options, CallCanceller* canceller) {
  HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<PrivateServe> serve,
                            PrivateServe::Start(PrivateServeArguments(options), canceller));
  const absl::Status status = GenerateAndPrint({serve->address()}, request, options, canceller);
  const absl::Status stopped = serve->Stop();
  if (status.ok()) return stopped;
  // A connection that breaks does not say why.
  if (stopped.ok() || !absl::IsUnavailable(status)) return status;
  return absl::Status(stopped.code(), absl::StrCat(status.message(), "; ", stopped.message()));
}

}  // namespace

int RunGenerate(const GenerateCommandOptions& options, const FlagSources& sources) {
  absl::Status status = CheckServer(options);
  absl::StatusOr<v1::GenerateRequest> request = absl::InternalError("not built");
  if (status.ok()) {
    request = BuildRequest(options.generate);
    status = request.status();
  }
  if (!status.ok()) {
    PrintError(kCommand, sources.Explain(status));
    return kExitUsage;
  }
  absl::StatusOr<ProcessSignals> signals = ProcessSignals::Block({SIGINT, SIGTERM});
  if (!signals.ok()) {
    PrintError(kCommand, signals.status());
    return kExitFailed;
  }
  CallCanceller canceller;
  const SignalThread signal_thread(*std::move(signals), [&canceller](int signal) {
    if (canceller.cancelled()) std::_Exit(128 + signal);
    canceller.Cancel();
  });
  status = options.server.address.empty()
               ? GenerateFromModel(*request, options, &canceller)
               : GenerateAndPrint(options.server, *request, options, &canceller);
  if (status.ok()) return kExitOk;
  if (canceller.cancelled()) status = absl::CancelledError("a signal has cancelled the call");
  // What a server says of its flags is not of these.
  PrintError(kCommand, options.server.address.empty() ? sources.Explain(status) : status);
  return ExitCodeOfCall(status);
}

}  // namespace headroom::cli
