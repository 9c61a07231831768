#include "services/headroom/private_serve.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>

#include <cerrno>
#include <cstdint>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "common/fd.h"
#include "common/status.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/health_client.h"

namespace headroom::cli {
namespace {

// The weights of a large model from a slow disk.
constexpr absl::Duration kStartTimeout = absl::Minutes(30);
constexpr absl::Duration kStopTimeout = absl::Seconds(20);

// Calls `ended` once if the descriptor becomes readable in its life.
class EndWatch {
 public:
  EndWatch(int fd, std::function<void()> ended)
      : stop_(eventfd(0, EFD_CLOEXEC)), thread_([this, fd, ended = std::move(ended)] {
          pollfd fds[] = {{fd, POLLIN, 0}, {stop_.get(), POLLIN, 0}};
          while (poll(fds, 2, -1) < 0 && errno == EINTR) {
          }
          if (fds[0].revents != 0) ended();
        }) {}
  ~EndWatch() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(stop_.get(), &one, sizeof(one));
    thread_.join();
  }

 private:
  Fd stop_;
  std::thread thread_;
};

absl::Status ErrorOf(const ExitStatus& ended, absl::string_view when) {
  const std::string what = absl::StrCat("the private serve ", ended.ToString(), when);
  return !ended.by_signal && ended.code == kExitUsage ? absl::FailedPreconditionError(what)
                                                      : absl::UnavailableError(what);
}

}  // namespace

absl::StatusOr<std::unique_ptr<PrivateServe>> PrivateServe::Start(std::vector<std::string> args,
                                                                  CallCanceller* canceller) {
  HEADROOM_ASSIGN_OR_RETURN(PrivateDir dir, PrivateDir::Make(RuntimeDir()));
  std::unique_ptr<PrivateServe> serve(new PrivateServe(std::move(dir)));
  args.insert(args.begin(), "serve");
  args.push_back(absl::StrCat("--listen=", serve->address()));
  // SIGTERM and not SIGKILL: it has processes and folders of its own to put away.
  HEADROOM_ASSIGN_OR_RETURN(serve->process_, ChildProcess::Start(args, SIGTERM));
  HEADROOM_RETURN_IF_ERROR(serve->WaitUntilReady(canceller));
  return serve;
}

absl::Status PrivateServe::WaitUntilReady(CallCanceller* canceller) {
  CallCanceller wait;
  const CallCanceller::Scope scope(canceller, [&wait] { wait.Cancel(); });
  absl::Status status;
  {
    const EndWatch watch(process_->fd(), [&wait] { wait.Cancel(); });
    status = WaitUntilServing({address()}, kStartTimeout, &wait);
  }
  if (status.ok()) return status;
  if (const std::optional<ExitStatus> ended = process_->Poll()) {
    return ErrorOf(*ended, " before it was ready");
  }
  return Annotate(status, "waiting for the private serve");
}

PrivateServe::~PrivateServe() { Stop().IgnoreError(); }

absl::Status PrivateServe::Stop() {
  if (!process_.has_value()) return absl::OkStatus();
  process_->Signal(SIGTERM);
  std::optional<ExitStatus> ended = process_->WaitFor(kStopTimeout);
  if (!ended.has_value()) {
    process_->Signal(SIGTERM);  // a second one makes it kill what hangs
    ended = process_->WaitFor(absl::Seconds(1));
  }
  if (!ended.has_value()) return absl::UnavailableError("the private serve does not stop");
  return !ended->by_signal && ended->code == kExitOk ? absl::OkStatus() : ErrorOf(*ended, "");
}

}  // namespace headroom::cli
