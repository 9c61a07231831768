#include "services/coordinator/heartbeat.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"

namespace headroom::coordinator {
namespace {

constexpr absl::Duration kInterval = absl::Milliseconds(300);

}  // namespace

Heartbeat::Heartbeat(Ping worker, Ping store, std::function<void(bool alive)> changed)
    : worker_(std::move(worker)),
      store_(std::move(store)),
      changed_(std::move(changed)),
      thread_([this] { Loop(); }) {}

Heartbeat::~Heartbeat() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    stopped_.SignalAll();
  }
  thread_.join();
}

void Heartbeat::Loop() {
  bool alive = false;
  for (;;) {
    absl::string_view silent = "worker";
    absl::Status status = worker_();
    if (status.ok()) {
      silent = "kvstore";
      status = store_();
    }
    if (status.ok() != alive) {
      alive = status.ok();
      if (!alive) LogWarning(absl::StrCat("the ", silent, " does not answer: ", status.message()));
      changed_(alive);
    }
    MutexLock lock(&mutex_);
    if (!stop_) stopped_.WaitFor(&mutex_, kInterval);
    if (stop_) return;
  }
}

}  // namespace headroom::coordinator
