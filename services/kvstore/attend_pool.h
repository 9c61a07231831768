// Attends to keys where they lie: the store's end of a mailbox (common/mailbox_format.h). The worker's
// end is services/worker/in_place_lane.h.
//
// Threads. One thread looks at the slots and serves one post at a time with a team: the post's work is
// cut by (KV head, unit of keys), so that no member idles, and its bits depend on no thread
// (kernels/attention.h). Between the layers of a step it spins for a bounded time; between steps it
// sleeps. Public methods are thread-safe.
#ifndef HEADROOM_SERVICES_KVSTORE_ATTEND_POOL_H_
#define HEADROOM_SERVICES_KVSTORE_ATTEND_POOL_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "common/mutex.h"
#include "common/segment/mailbox.h"
#include "kernels/cpu/team.h"
#include "kernels/cpu/tile_attention.h"
#include "services/kvstore/post_reader.h"

namespace headroom::kvstore {

class AttendPool {
 public:
  struct Counters {
    uint64_t posts = 0;          // answered with partials
    uint64_t refused = 0;        // answered with a code
    uint64_t late_partials = 0;  // done when the worker had given up: nobody reads them
    uint64_t bytes = 0;          // of keys and values that were read
    uint64_t busy_ns = 0;
  };

  // How it waits for a post.
  struct Patience {
    // How long to look without sleeping after the latest post. Whoever can wake the pool need not be
    // looked for; a GPU's next post comes within a layer's time.
    absl::Duration spin_if_woken = absl::Microseconds(20);
    absl::Duration spin = absl::Milliseconds(20);
    // And for so long the team's other members, if a GPU posts: a layer's time between two posts. What
    // a layer cost beside its bytes was 0.10 ms without it and 0.04 with it, on two hosts of 16 processors.
    // Beside a CPU device they would take its processors.
    absl::Duration members = absl::Milliseconds(3);
    // For so long after the latest post, one of who wakes nobody is found within a nap.
    absl::Duration naps = absl::Seconds(1);
    absl::Duration nap = absl::Microseconds(50);
    // Bells end a sleep: this bounds what a lost one could cost.
    absl::Duration sleep = absl::Milliseconds(500);
  };

  // `data` is the segment's, alive as long as the pool; bytes below `ready_bytes()` may be read.
  // `threads` >= 1, each pinned to a processor of its own where there are as many. `tiles` is what it
  // attends with for a GPU; null: the kernels for a CPU device.
  AttendPool(const uint8_t* data, std::function<int64_t()> ready_bytes, int threads,
             const Patience& patience,
             const kernels::cpu::TileAttention* tiles = kernels::cpu::BestTileAttention());
  AttendPool(const uint8_t* data, std::function<int64_t()> ready_bytes, int threads)
      : AttendPool(data, std::move(ready_bytes), threads, Patience()) {}
  ~AttendPool();

  int threads() const { return team_.size(); }
  Counters counters() const;

  // Serves this mailbox from now on, in place of the one before; it says so in the mailbox.
  void Attach(std::shared_ptr<Mailbox> mailbox);

 private:
  void Loop();
  // The mailbox to serve; null: none yet.
  Mailbox* Current();
  // Answers the slot's post, if there is one that is not answered.
  bool ServeSlot(Mailbox& mailbox, uint32_t slot);
  // What reader_ has read.
  void Attend(bool for_cpu_device);
  void Answer(Mailbox& mailbox, uint32_t slot, uint64_t count, const absl::Status& status,
              int64_t begun_ns);
  // Until there may be a post.
  void Idle(Mailbox& mailbox);
  bool AnyPost(const Mailbox& mailbox) const;

  const Patience patience_;
  const kernels::cpu::TileAttention* const tiles_;
  std::atomic<bool> stop_{false};

  mutable Mutex mutex_;
  CondVar attached_;
  std::shared_ptr<Mailbox> next_ ABSL_GUARDED_BY(mutex_);
  Mailbox* waits_on_ ABSL_GUARDED_BY(mutex_) = nullptr;  // what Attach() wakes
  Counters counters_ ABSL_GUARDED_BY(mutex_);

  // Of the serving thread.
  std::shared_ptr<Mailbox> mailbox_;
  std::vector<uint64_t> served_;  // by slot: the count of the latest post
  uint32_t wake_ = 0;             // the mailbox's, as seen last
  int64_t last_active_ns_ = 0;    // the latest post or wake
  PostReader reader_;
  kernels::CpuTeam team_;
  std::thread thread_;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_ATTEND_POOL_H_
