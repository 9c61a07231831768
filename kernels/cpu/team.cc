#include "kernels/cpu/team.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <cstdio>

namespace headroom::kernels {
namespace {

// A member first spins for about 2 us, which covers most gaps between the kernels of a step, then
// yields until its patience ends, then sleeps. It yields because the scheduler may have put two members on
// one core: a spinner that does not yield keeps the other from running (100 us a kernel measured).
constexpr int kSpins = 64;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The processors that the process may use, in order.
std::vector<int> UsableProcessors() {
  std::vector<int> processors;
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return processors;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &allowed)) processors.push_back(cpu);
  }
  return processors;
}

}  // namespace

CpuTeam::CpuTeam(int size) : size_(size < 1 ? 1 : size) {
  for (int member = 1; member < size_; ++member) {
    members_.emplace_back([this, member] { MemberLoop(member); });
  }
}

CpuTeam::~CpuTeam() {
  stop_.store(true, std::memory_order_relaxed);
  Announce(kRun);
  for (std::thread& member : members_) member.join();
}

int CpuTeam::NumProcessors() {
  return std::max(1, static_cast<int>(UsableProcessors().size()));
}

void CpuTeam::Pin(PinFrom from) {
  std::vector<int> processors = UsableProcessors();
  if (from == PinFrom::kLast) std::reverse(processors.begin(), processors.end());
  Run([&processors](int member) {
    if (member >= static_cast<int>(processors.size())) return;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(processors[member], &one);
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
  });
}

uint32_t CpuTeam::AwaitChange(const std::atomic<uint32_t>& word, uint32_t old) const {
  using Clock = std::chrono::steady_clock;
  for (int i = 0; i < kSpins; ++i) {
    const uint32_t now = word.load(std::memory_order_acquire);
    if (now != old) return now;
    Pause();
  }
  const auto patience =
      std::chrono::nanoseconds(patience_ns_.load(std::memory_order_relaxed));
  for (const auto begin = Clock::now(); Clock::now() - begin < patience;) {
    const uint32_t now = word.load(std::memory_order_acquire);
    if (now != old) return now;
    sched_yield();
  }
  word.wait(old, std::memory_order_acquire);
  return word.load(std::memory_order_acquire);
}

void CpuTeam::Announce(uint32_t kind) {
  epoch_.store(((epoch_.load(std::memory_order_relaxed) & ~1u) + 2) | kind);
  epoch_.notify_all();
}

void CpuTeam::RunErased(void (*fn)(void*, int), void* context) {
  if (size_ == 1) return fn(context, 0);
  fn_ = fn;
  context_ = context;
  running_.store(static_cast<uint32_t>(size_ - 1), std::memory_order_relaxed);
  Announce(kRun);
  fn(context, 0);
  uint32_t left = running_.load(std::memory_order_acquire);
  while (left != 0) left = AwaitChange(running_, left);
}

// Whoever has not come when the caller is done is not needed: on a core that it shares with the
// caller or with a copy, waiting for it took two switches of 6 us a kernel.
void CpuTeam::OfferErased(void (*fn)(void*, int), void* context) {
  fn_ = fn;
  context_ = context;
  gate_.store(kOpen, std::memory_order_release);
  Announce(kOffer);
  fn(context, 0);
  uint32_t inside = gate_.fetch_and(~kOpen, std::memory_order_acq_rel) & ~kOpen;
  while (inside != 0) inside = AwaitChange(gate_, inside);
}

void CpuTeam::Join(int member) {
  uint32_t gate = gate_.load(std::memory_order_relaxed);
  while ((gate & kOpen) != 0) {
    if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acquire,
                                     std::memory_order_relaxed)) {
      continue;
    }
    fn_(context_, member);
    if (gate_.fetch_sub(1, std::memory_order_acq_rel) == 1) gate_.notify_one();
    return;
  }
}

void CpuTeam::MemberLoop(int member) {
  char name[16];
  std::snprintf(name, sizeof(name), "team-%d", member);
  pthread_setname_np(pthread_self(), name);
  for (uint32_t seen = 0;;) {
    seen = AwaitChange(epoch_, seen);
    if (stop_.load(std::memory_order_relaxed)) return;
    if ((seen & 1) == kOffer) {
      Join(member);
      continue;
    }
    fn_(context_, member);
    if (running_.fetch_sub(1) == 1) running_.notify_one();
  }
}

}  // namespace headroom::kernels
