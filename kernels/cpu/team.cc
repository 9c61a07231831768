#include "kernels/cpu/team.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <climits>
#include <cstdio>

namespace headroom::kernels {
namespace {

// About 50 us of spinning covers the gaps between the kernels of a step; after that a member sleeps.
constexpr int kSpins = 2000;

static_assert(sizeof(std::atomic<uint32_t>) == sizeof(uint32_t));

void FutexWait(std::atomic<uint32_t>& word, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT_PRIVATE, value, nullptr,
          nullptr, 0);
}

void FutexWake(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr,
          nullptr, 0);
}

// Returns when `word` differs from `value`.
void AwaitChange(std::atomic<uint32_t>& word, uint32_t value) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (word.load(std::memory_order_acquire) != value) return;
    _mm_pause();
  }
  while (word.load(std::memory_order_acquire) == value) FutexWait(word, value);
}

}  // namespace

CpuTeam::CpuTeam(int size) : size_(size < 1 ? 1 : size) {
  for (int member = 1; member < size_; ++member) {
    members_.emplace_back([this, member] { MemberLoop(member); });
  }
}

CpuTeam::~CpuTeam() {
  stop_.store(true, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  FutexWake(epoch_);
  for (std::thread& member : members_) member.join();
}

void CpuTeam::RunErased(void (*fn)(void*, int), void* context) {
  if (size_ == 1) return fn(context, 0);
  fn_ = fn;
  context_ = context;
  running_.store(static_cast<uint32_t>(size_ - 1), std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  FutexWake(epoch_);
  fn(context, 0);
  for (uint32_t left; (left = running_.load(std::memory_order_acquire)) != 0;) {
    AwaitChange(running_, left);
  }
}

void CpuTeam::MemberLoop(int member) {
  char name[16];
  std::snprintf(name, sizeof(name), "team-%d", member);
  pthread_setname_np(pthread_self(), name);
  for (uint32_t seen = 0;;) {
    AwaitChange(epoch_, seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (stop_.load(std::memory_order_relaxed)) return;
    fn_(context_, member);
    if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) FutexWake(running_);
  }
}

}  // namespace headroom::kernels
