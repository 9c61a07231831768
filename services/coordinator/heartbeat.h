// Whether worker and kvstore answer: what health says beside whether they are connected. A process that is
// stopped keeps its connections, and nothing but its silence tells.
#ifndef HEADROOM_SERVICES_COORDINATOR_HEARTBEAT_H_
#define HEADROOM_SERVICES_COORDINATOR_HEARTBEAT_H_

#include <functional>
#include <thread>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/mutex.h"

namespace headroom::coordinator {

// For a ping: health must tell within 2 s. A peer whose processors are all busy answers within some 10 ms.
inline constexpr absl::Duration kPingDeadline = absl::Milliseconds(1400);

class Heartbeat {
 public:
  using Ping = std::function<absl::Status()>;

  // Pings both again and again. `changed` gets false when one has not answered for some 1.7 s, true when
  // both do again (at first they do not); it runs on the heartbeat's thread, like the pings. A long step
  // delays no answer: it comes from another thread.
  Heartbeat(Ping worker, Ping store, std::function<void(bool alive)> changed);
  ~Heartbeat();

 private:
  void Loop();

  const Ping worker_;
  const Ping store_;
  const std::function<void(bool)> changed_;
  Mutex mutex_;
  CondVar stopped_;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_HEARTBEAT_H_
