#include "kernels/cpu/team.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstdio>

namespace headroom::kernels {
namespace {

// A member first spins for about 2 us, which covers most gaps between the kernels of a step, then
// yields for about 50 us more, then sleeps. It yields because the scheduler may have put two members on
// one core: a spinner that does not yield keeps the other from running (100 us a kernel measured).
constexpr int kSpins = 64;
constexpr int kYields = 150;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

}  // namespace

// The two sides must see each other: the sleeper counts itself, then looks at the value; the waker
// changes the value, then looks at the count. All four are sequentially consistent.
uint32_t CpuTeam::Word::AwaitChange(uint32_t old) {
  static_assert(sizeof(value_) == sizeof(uint32_t));
  for (int i = 0; i < kSpins + kYields; ++i) {
    const uint32_t now = value_.load(std::memory_order_acquire);
    if (now != old) return now;
    if (i < kSpins) {
      Pause();
    } else {
      sched_yield();
    }
  }
  sleepers_.fetch_add(1);
  uint32_t now;
  while ((now = value_.load()) == old) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), FUTEX_WAIT_PRIVATE, old, nullptr,
            nullptr, 0);
  }
  sleepers_.fetch_sub(1);
  return now;
}

uint32_t CpuTeam::Word::Add(uint32_t difference) {
  const uint32_t now = value_.fetch_add(difference) + difference;
  if (sleepers_.load() != 0) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value_), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
            nullptr, 0);
  }
  return now;
}

CpuTeam::CpuTeam(int size) : size_(size < 1 ? 1 : size) {
  for (int member = 1; member < size_; ++member) {
    members_.emplace_back([this, member] { MemberLoop(member); });
  }
}

CpuTeam::~CpuTeam() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.Add(1);
  for (std::thread& member : members_) member.join();
}

void CpuTeam::RunErased(void (*fn)(void*, int), void* context) {
  if (size_ == 1) return fn(context, 0);
  fn_ = fn;
  context_ = context;
  running_.Add(static_cast<uint32_t>(size_ - 1));
  epoch_.Add(1);
  fn(context, 0);
  for (uint32_t left = static_cast<uint32_t>(size_ - 1); left != 0;) {
    const uint32_t now = running_.Get();
    left = now == left ? running_.AwaitChange(left) : now;
  }
}

void CpuTeam::MemberLoop(int member) {
  char name[16];
  std::snprintf(name, sizeof(name), "team-%d", member);
  pthread_setname_np(pthread_self(), name);
  for (uint32_t seen = 0;;) {
    seen = epoch_.AwaitChange(seen);
    if (stop_.load(std::memory_order_relaxed)) return;
    fn_(context_, member);
    running_.Add(static_cast<uint32_t>(-1));
  }
}

}  // namespace headroom::kernels
