#include "services/kvstore/attend_pool.h"

#include <pthread.h>

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/device/touch_ranges.h"
#include "common/futex.h"
#include "common/steady_time.h"
#include "common/trace.h"
#include "kernels/cpu/tile_attention.h"

namespace headroom::kvstore {
namespace {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

AttendPool::AttendPool(const uint8_t* data, std::function<int64_t()> ready_bytes, int threads,
                       const Patience& patience, const kernels::cpu::TileAttention* tiles)
    : patience_(patience),
      tiles_(tiles),
      reader_(data, std::move(ready_bytes)),
      team_(threads) {
  thread_ = std::thread([this] { Loop(); });
}

AttendPool::~AttendPool() {
  stop_.store(true);
  {
    MutexLock lock(&mutex_);
    attached_.SignalAll();
    if (waits_on_ != nullptr) WakeStore(waits_on_->header());
  }
  thread_.join();
}

AttendPool::Counters AttendPool::counters() const {
  MutexLock lock(&mutex_);
  return counters_;
}

void AttendPool::Attach(std::shared_ptr<Mailbox> mailbox) {
  // From now on posts are kept until the thread comes to them.
  mailbox->header().attached.store(mailbox->shape().generation);
  MutexLock lock(&mutex_);
  next_ = std::move(mailbox);
  attached_.SignalAll();
  if (waits_on_ != nullptr) WakeStore(waits_on_->header());
}

// ---------------------------------------------------------------- the loop

void AttendPool::Loop() {
  pthread_setname_np(pthread_self(), "attend");
  team_.Pin(kernels::CpuTeam::PinFrom::kLast);  // what comes first is left to others
  while (!stop_.load(std::memory_order_relaxed)) {
    Mailbox* const mailbox = Current();
    if (mailbox == nullptr) continue;
    bool served = false;
    for (uint32_t slot = 0; slot < mailbox->shape().num_slots; ++slot) {
      served = ServeSlot(*mailbox, slot) || served;
    }
    if (served) {
      last_active_ns_ = SteadyNs();
    } else {
      Idle(*mailbox);
    }
  }
}

Mailbox* AttendPool::Current() {
  MutexLock lock(&mutex_);
  if (next_ != nullptr) {
    mailbox_ = std::move(next_);
    served_.clear();
    if (!mailbox_->shape().poster_wakes) {
      team_.set_patience(absl::ToChronoNanoseconds(patience_.members));
    }
    for (uint32_t slot = 0; slot < mailbox_->shape().num_slots; ++slot) {
      served_.push_back(mailbox_->slot(slot).answered.load());  // it may have been attached before
    }
  } else if (mailbox_ == nullptr && !stop_.load()) {
    attached_.WaitFor(&mutex_, absl::Seconds(1));
  }
  waits_on_ = mailbox_.get();
  return mailbox_.get();
}

bool AttendPool::AnyPost(const Mailbox& mailbox) const {
  for (uint32_t slot = 0; slot < mailbox.shape().num_slots; ++slot) {
    if (mailbox.slot(slot).posted.load() != served_[slot]) return true;
  }
  return false;
}

void AttendPool::Idle(Mailbox& mailbox) {
  MailboxHeader& header = mailbox.header();
  const bool woken = mailbox.shape().poster_wakes;
  const uint32_t wake = header.wake.load();
  // A step begins: its first post may be some time off.
  if (wake != wake_) last_active_ns_ = SteadyNs();
  wake_ = wake;
  const absl::Duration quiet = absl::Nanoseconds(SteadyNs() - last_active_ns_);
  if (quiet < (woken ? patience_.spin_if_woken : patience_.spin)) {
    for (int i = 0; i < 64; ++i) Pause();
    return;
  }
  // It says that it sleeps before it looks again; who posts looks after posting.
  header.store_sleeps.store(1);
  bool more = AnyPost(mailbox) || stop_.load();
  if (!more) {
    MutexLock lock(&mutex_);
    more = next_ != nullptr;
  }
  const bool naps = !woken && quiet <= patience_.naps;
  if (!more) SharedFutexWait(header.wake, wake, naps ? patience_.nap : patience_.sleep);
  header.store_sleeps.store(0);
}

// ---------------------------------------------------------------- one post

bool AttendPool::ServeSlot(Mailbox& mailbox, uint32_t slot) {
  MailboxSlot& at = mailbox.slot(slot);
  const uint64_t count = at.posted.load(std::memory_order_acquire);
  if (count == served_[slot]) return false;
  served_[slot] = count;
  const int64_t begun_ns = SteadyNs();
  const TraceScope trace("attend in place", "layer", at.post.layer);
  const absl::Status status = reader_.Read(mailbox, slot);
  if (status.ok()) {
    TouchRanges(reader_.args());
    Attend(mailbox.shape().poster_wakes);
  }
  Answer(mailbox, slot, count, status, begun_ns);
  return true;
}

// A CPU device computes in float32, and gets the bits that it would compute itself. A GPU multiplies
// bfloat16: for it the fast kernels round no more than it does.
void AttendPool::Attend(bool for_cpu_device) {
  if (for_cpu_device || tiles_ == nullptr) {
    kernels::cpu::Attend(reader_.args(), team_);
  } else {
    tiles_->attend(reader_.args(), team_);
  }
}

void AttendPool::Answer(Mailbox& mailbox, uint32_t slot, uint64_t count,
                        const absl::Status& status, int64_t begun_ns) {
  const MailboxPost& post = reader_.post();
  const auto busy_ns = static_cast<uint64_t>(SteadyNs() - begun_ns);
  const bool late = mailbox.header().retired.load(std::memory_order_acquire) != 0;
  {
    MutexLock lock(&mutex_);
    ++(late ? counters_.late_partials : status.ok() ? counters_.posts : counters_.refused);
    if (status.ok()) {
      counters_.bytes += static_cast<uint64_t>(reader_.bytes());
      counters_.busy_ns += busy_ns;
    }
  }
  if (late) return;
  MailboxAnswer answer = {};
  answer.generation = mailbox.shape().generation;
  answer.step = post.step;
  answer.attempt = post.attempt;
  answer.layer = post.layer;
  answer.code = static_cast<uint32_t>(status.code());
  MailboxSlot& at = mailbox.slot(slot);
  at.answer = answer;
  if (status.ok()) {
    auto* const totals = reinterpret_cast<MailboxTotals*>(mailbox.table(slot, post.table));
    totals->bytes += static_cast<uint64_t>(reader_.bytes());
    totals->busy_ns += busy_ns;
    ++totals->posts;
  }
  RingAnswered(at, count);
}

}  // namespace headroom::kvstore
