#include "services/headroom/service_flags.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/bytes_text.h"
#include "common/fd.h"
#include "common/segment_format.h"
#include "common/status.h"
#include "services/kvstore/memory_limits.h"

namespace headroom::cli {
namespace {

constexpr int64_t kMost32 = std::numeric_limits<int32_t>::max();
constexpr int64_t kMost64 = std::numeric_limits<int64_t>::max();

// A command line being written.
class Arguments {
 public:
  explicit Arguments(std::string subcommand) : args_{std::move(subcommand)} {}

  template <typename T>
  Arguments& Set(absl::string_view name, const T& value) {
    const std::string text = absl::StrCat(value);
    // An empty value is the default everywhere.
    if (!text.empty()) args_.push_back(absl::StrCat("--", name, "=", text));
    return *this;
  }
  Arguments& SetIf(absl::string_view name, bool value) {
    if (value) args_.push_back(absl::StrCat("--", name));
    return *this;
  }
  std::vector<std::string> Take(const LogOptions& log) {
    AppendLogArguments(log, &args_);
    return std::move(args_);
  }

 private:
  std::vector<std::string> args_;
};

}  // namespace

// ---------------------------------------------------------------- reading

void AddCheckFlag(Flags& flags, bool* check_config) {
  flags.Group("Check");
  flags.Switch("check-config", check_config,
               "Starts nothing: reads flags, variables, files and what they name, prints one line, "
               "and ends with 0, or with 2 if something is wrong.");
}

void AddLogFlags(Flags& flags, LogOptions* options) {
  flags.Group("Log lines (standard error)");
  flags.Add("log-level", "debug|info|warning|error", LogLevelName(options->level),
            "The least that is worth a line.", [options](const std::string& text) {
              const absl::StatusOr<LogLevel> level = ParseLogLevel(text);
              if (level.ok()) options->level = *level;
              return level.status();
            });
  flags.Switch("log-json", &options->json, "One JSON object a line.");
  flags.Text("trace", "FILE", &options->trace_path,
             "Appends what runs when to this file, for ui.perfetto.dev: streams, ring, mailbox, pool.");
}

void AddWorkerFlags(Flags& flags, WorkerOptions* options) {
  flags.Group("Device");
  flags.Choice("device", {"auto", "cpu", "cuda"}, &options->device,
               "What computes; auto takes cuda where /dev/nvidiactl is.");
  flags.Bytes("gpu-memory", &options->gpu_memory_bytes,
              "Device memory for everything: weights, resident keys and values, tails, staging "
              "ring, activations. What does not fit lies in host memory.",
              "what is free less 1 GiB on cuda, weights and 2 GiB on cpu");
  flags.Integer("threads", &options->compute_threads, 0, 1024,
                "Threads of the CPU device's computing.", "as many as may run");
  flags.Integer("max-chunk-tokens", &options->max_chunk_tokens, 1, kMost32,
                "Most new tokens of one sequence in one step, beside what the memory allows.");
  flags.Integer("max-context-tokens", &options->max_context_tokens, 0, kMost64,
                "Longest context that the worker lays tables out for.",
                "what the model was trained for");
  flags.Integer("max-sequences", &options->max_sequences, 1, kMost32,
                "Sequences that may be open side by side.");
  flags.Duration("in-place-deadline", &options->in_place_deadline,
                 "What the kvstore has for one layer's keys in place; then the step is run again "
                 "with those keys fetched.");
  flags.Group("");
  flags.Seed("delay-seed", &options->delay_seed,
             "For tests: delays each device operation by 0 to 5 ms, drawn from this seed.");
  flags.Text("fail-file", "FILE", &options->fail_file,
             "For tests: the CPU device is lost once there is this file.");
}

void AddStoreFlags(Flags& flags, kvstore::KvStoreOptions* options) {
  flags.Group("Host memory");
  flags.Text("segment-dir", "DIR", &options->segment_dir,
             "Folder of the segment's files, on a tmpfs; made if it is not there. Its keys and "
             "values outlive the process.");
  flags.Bytes("host-memory", &options->host_memory_bytes, "Bytes of keys and values.",
              "the size of the segment in --segment-dir, else a quarter of the memory that this "
              "process may use");
  flags.Integer("max-extents", &options->max_extents, 0, kMost32,
                "Entries of the index, 64 bytes each.", "one for each 64 KiB of --host-memory");
  flags.Integer("attend-threads", &options->attend_threads, 0, 1024,
                "Threads that attend to keys in place; 0: none are, and such plans are refused.",
                "one for each processor");
}

void AddCoordinatorFlags(Flags& flags, CoordinatorProcessOptions* options) {
  coordinator::CoordinatorOptions& server = options->server;
  flags.Group("Serving");
  flags.Address("listen", &server.listen_address,
             "Where clients connect: HOST:PORT or unix:PATH. A port of 0 picks one.");
  flags.Integer("max-queue", &server.max_queue, 1, kMost32, "Requests that may wait.");
  flags.Integer("max-sessions", &server.max_sessions, 1, kMost32, "Sessions that are kept.");
  flags.Integer("context-limit", &server.context_limit_tokens, 0, kMost64,
                "Most tokens of a sequence.", "what the model was trained for");
  flags.Bytes("max-message-bytes", &server.max_message_bytes,
              "Largest request; a million token ids take some 4 MB.");
  flags.Switch("allow-clean-segment", &server.allow_clean_segment,
               "Empties a segment that holds another model's keys, instead of refusing it.");
  flags.Switch("reflection", &server.reflection, "Answers gRPC server reflection (grpcurl).");
  flags.Duration("drain-timeout", &options->drain_timeout,
                 "After SIGTERM or SIGINT running requests have so long to finish; a second signal "
                 "ends them.");
}

void AddServerSecurityFlags(Flags& flags, ServerSecurityOptions* options) {
  flags.Group("Security of --listen and --admin (files are read again when they change)");
  flags.Text(options->tls.certificate.flag, "FILE", &options->tls.certificate.path,
             "PEM certificate with its chain: TLS.");
  flags.Text(options->tls.key.flag, "FILE", &options->tls.key.path, "Its key, unencrypted.");
  flags.Text(options->tls.ca.flag, "FILE", &options->tls.ca.path,
             "CA that must have signed the client's certificate.");
  flags.Text(options->tokens.flag, "FILE", &options->tokens.path,
             "Bearer tokens, one a line: a call must bring one, health checks excepted. Needs TLS.");
}

void AddPeerTlsFlags(Flags& flags, TlsFiles* files) {
  flags.Group("TLS between coordinator, worker and kvstore (all three files or none)");
  flags.Text(files->certificate.flag, "FILE", &files->certificate.path,
             "This process's PEM certificate with its chain, for the name that its peers dial.");
  flags.Text(files->key.flag, "FILE", &files->key.path, "Its key, unencrypted.");
  flags.Text(files->ca.flag, "FILE", &files->ca.path,
             "CA of the deployment: who shows no certificate of it is refused.");
}

void AddClientSecurityFlags(Flags& flags, ClientSecurityOptions* options) {
  flags.Group("Security of the connection");
  flags.Switch("tls", &options->tls, "TLS; the server's certificate must be of a CA of the system.");
  flags.Text(options->files.ca.flag, "FILE", &options->files.ca.path,
             "TLS; the server's certificate must be of this CA.");
  flags.Text(options->files.certificate.flag, "FILE", &options->files.certificate.path,
             "The client's own PEM certificate, where the server wants one.");
  flags.Text(options->files.key.flag, "FILE", &options->files.key.path, "Its key, unencrypted.");
  flags.Text("tls-server-name", "NAME", &options->server_name,
             "The name in the server's certificate, where it is not that of its address.");
  flags.Text(options->token.flag, "FILE", &options->token.path,
             "Sends the first token of the file. Needs TLS.");
}

// ---------------------------------------------------------------- writing

void AppendLogArguments(const LogOptions& log, std::vector<std::string>* args) {
  args->push_back(absl::StrCat("--log-level=", LogLevelName(log.level)));
  if (log.json) args->push_back("--log-json");
  if (!log.trace_path.empty()) args->push_back(absl::StrCat("--trace=", log.trace_path));
}

std::vector<std::string> WorkerArguments(const WorkerOptions& options, const LogOptions& log) {
  Arguments arguments("worker");
  arguments.Set("listen", options.listen_address)
      .Set("model", options.model_dir)
      .Set("device", options.device)
      .Set("gpu-memory", options.gpu_memory_bytes)
      .Set("threads", options.compute_threads)
      .Set("max-chunk-tokens", options.max_chunk_tokens)
      .Set("max-context-tokens", options.max_context_tokens)
      .Set("max-sequences", options.max_sequences)
      .Set("in-place-deadline", absl::FormatDuration(options.in_place_deadline));
  if (options.delay_seed.has_value()) arguments.Set("delay-seed", *options.delay_seed);
  if (!options.fail_file.empty()) arguments.Set("fail-file", options.fail_file);
  return arguments.Take(log);
}

std::vector<std::string> StoreArguments(const kvstore::KvStoreOptions& options,
                                        const LogOptions& log) {
  Arguments arguments("kvstore");
  arguments.Set("listen", options.listen_address)
      .Set("segment-dir", options.segment_dir)
      .Set("host-memory", options.host_memory_bytes)
      .Set("max-extents", options.max_extents);
  if (options.attend_threads != kvstore::KvStoreOptions::kAllProcessors) {
    arguments.Set("attend-threads", options.attend_threads);
  }
  return arguments.Take(log);
}

std::vector<std::string> CoordinatorArguments(const CoordinatorProcessOptions& options,
                                              const LogOptions& log) {
  const coordinator::CoordinatorOptions& server = options.server;
  Arguments arguments("coordinator");
  arguments.Set("listen", server.listen_address)
      .Set("model", server.model_dir)
      .Set("worker", server.worker_address)
      .Set("kvstore", server.store_address)
      .Set("admin", server.admin_address)
      .Set("max-queue", server.max_queue)
      .Set("max-sessions", server.max_sessions)
      .Set("context-limit", server.context_limit_tokens)
      .Set("max-message-bytes", server.max_message_bytes)
      .SetIf("allow-clean-segment", server.allow_clean_segment)
      .SetIf("reflection", server.reflection)
      .Set(server.security.tls.certificate.flag, server.security.tls.certificate.path)
      .Set(server.security.tls.key.flag, server.security.tls.key.path)
      .Set(server.security.tls.ca.flag, server.security.tls.ca.path)
      .Set(server.security.tokens.flag, server.security.tokens.path)
      .Set("drain-timeout", absl::FormatDuration(options.drain_timeout));
  return arguments.Take(log);
}

// ---------------------------------------------------------------- checks

namespace {

// What bounds files in `dir`, or where it would be made; the least of it.
kvstore::MemoryLimit LeastLimit(std::filesystem::path dir) {
  Fd fd;
  for (;; dir = dir.parent_path()) {
    fd = Fd(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    if (fd.valid() || dir == dir.parent_path()) break;
  }
  kvstore::MemoryLimit least{dir.string()};
  if (!fd.valid()) return least;
  for (kvstore::MemoryLimit& limit : kvstore::FindMemoryLimits(fd.get(), dir)) {
    if (limit.free_bytes < least.free_bytes) least = std::move(limit);
  }
  return least;
}

absl::StatusOr<std::filesystem::path> AbsoluteDir(const std::string& segment_dir) {
  std::error_code error;
  std::filesystem::path dir = std::filesystem::absolute(segment_dir, error).lexically_normal();
  if (error) return absl::InvalidArgumentError(absl::StrCat("--segment-dir ", segment_dir));
  return dir;
}

// Of the segment in the folder; 0: there is none.
int64_t SegmentBytes(const std::filesystem::path& dir) {
  struct stat data = {};
  const bool there = stat((dir / kDataFile).c_str(), &data) == 0 && S_ISREG(data.st_mode);
  return there ? data.st_size : 0;
}

}  // namespace

absl::StatusOr<int64_t> DefaultHostMemoryBytes(const std::string& segment_dir) {
  HEADROOM_ASSIGN_OR_RETURN(const std::filesystem::path dir, AbsoluteDir(segment_dir));
  if (const int64_t bytes = SegmentBytes(dir); bytes > 0) return bytes;
  const kvstore::MemoryLimit least = LeastLimit(dir);
  if (least.free_bytes == kvstore::kUnlimited) {
    return absl::ResourceExhaustedError(
        absl::StrCat("how much memory is free in ", least.what,
                     " cannot be found out: set --host-memory"));
  }
  constexpr int64_t kStep = int64_t{1} << 20;
  return std::max(kStep, least.free_bytes / 4 / kStep * kStep);
}

absl::Status CheckHostMemory(const std::string& segment_dir, int64_t bytes) {
  HEADROOM_ASSIGN_OR_RETURN(const std::filesystem::path dir, AbsoluteDir(segment_dir));
  std::error_code error;
  if (std::filesystem::exists(dir, error) && !std::filesystem::is_directory(dir, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--segment-dir ", segment_dir, " is not a folder"));
  }
  const kvstore::MemoryLimit least = LeastLimit(dir);
  if (bytes - SegmentBytes(dir) <= least.free_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("--host-memory asks for ", bytes, " bytes, but ", least.what, " has only ",
                   least.free_bytes, " left"));
}

absl::Status CheckListenAddress(const std::string& flag, const std::string& address) {
  absl::string_view path = address;
  if (!absl::ConsumePrefix(&path, "unix:")) return absl::OkStatus();
  absl::ConsumePrefix(&path, "//");  // unix:///absolute/path
  sockaddr_un name = {};
  name.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(name.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat(flag, " ", address, ": the path has ",
                                                   path.size(), " bytes, expected 1 to ",
                                                   sizeof(name.sun_path) - 1));
  }
  std::memcpy(name.sun_path, path.data(), path.size());
  const Fd socket_fd(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (socket_fd.valid() && (connect(socket_fd.get(), reinterpret_cast<const sockaddr*>(&name),
                                    sizeof(name)) == 0 ||
                            errno == EAGAIN)) {
    return absl::UnavailableError(
        absl::StrCat(flag, " ", address, ": another process listens there"));
  }
  const std::string parent = std::filesystem::path(std::string(path)).parent_path().string();
  const char* const folder = parent.empty() ? "." : parent.c_str();
  if (access(folder, W_OK | X_OK) == 0) return absl::OkStatus();
  return absl::ErrnoToStatus(errno, absl::StrCat(flag, " ", address, ": in the folder ", folder));
}

}  // namespace headroom::cli
