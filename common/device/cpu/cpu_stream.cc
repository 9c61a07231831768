#include "common/device/cpu/cpu_stream.h"

#include <pthread.h>

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/futex.h"
#include "common/status.h"
#include "common/steady_time.h"
#include "common/trace.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace headroom {
namespace {

// Some 30 us: between two operations of a step the queue is rarely empty for longer, and an idle
// device must not burn a core.
constexpr int kSpins = 1000;
constexpr absl::Duration kFullTimeout = absl::Minutes(10);
constexpr uint64_t kMaxDelayUs = 5000;

void Pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
uint64_t NextRandom(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

}  // namespace

void RunOp(const CpuOp& op, kernels::CpuTeam& team) {
  const bool traced = op.name != nullptr && TraceOn();
  if (op.account == nullptr && !traced) return op.run(op.storage, team, nullptr);
  const int64_t begin_ns = SteadyNs();
  op.run(op.storage, team, op.account);
  const int64_t end_ns = SteadyNs();
  if (op.account != nullptr) {
    op.account->busy_ns.fetch_add(end_ns - begin_ns, std::memory_order_relaxed);
  }
  if (traced) TraceSlice(op.name, begin_ns, end_ns);
}

CpuStream::CpuStream(std::string name, int threads, std::optional<uint64_t> delay_seed)
    : name_(std::move(name)),
      delay_seed_(delay_seed),
      cells_(new Cell[kCapacity]),
      team_(threads),
      thread_([this] { Loop(); }) {}

CpuStream::~CpuStream() {
  stop_.store(true, std::memory_order_release);
  pushed_.fetch_add(0, std::memory_order_release);
  FutexWakeAll(pushed_);
  thread_.join();
}

absl::Status CpuStream::Push(const CpuOp& op) {
  const uint32_t at = pushed_.load(std::memory_order_relaxed);
  if (at - popped_seen_ == kCapacity) popped_seen_ = popped_.load(std::memory_order_acquire);
  if (at - popped_seen_ == kCapacity) HEADROOM_RETURN_IF_ERROR(AwaitRoom(at));
  Cell& cell = cells_[at % kCapacity];
  cell.op = op;
  cell.turn.store(at + 1, std::memory_order_release);
  pushed_.exchange(at + 1, std::memory_order_acq_rel);
  if (asleep_.load(std::memory_order_relaxed)) FutexWakeAll(pushed_);
  return absl::OkStatus();
}

absl::Status CpuStream::AwaitRoom(uint32_t at) {
  const absl::Time deadline = absl::Now() + kFullTimeout;
  const uint32_t target = at - kCapacity / 2;
  wake_at_.exchange(target, std::memory_order_acq_rel);
  for (;;) {
    popped_seen_ = popped_.load(std::memory_order_acquire);
    if (static_cast<int32_t>(popped_seen_ - target) >= 0) return absl::OkStatus();
    if (absl::Now() > deadline) {
      return absl::DeadlineExceededError(absl::StrCat("stream ", name_, " has made no progress"));
    }
    FutexWait(popped_, popped_seen_, absl::Seconds(1));
  }
}

void CpuStream::Sleep(uint32_t at) {
  asleep_.exchange(true, std::memory_order_acq_rel);
  if (pushed_.load(std::memory_order_relaxed) == at) {
    FutexWait(pushed_, at, absl::Milliseconds(500));
  }
  asleep_.store(false, std::memory_order_relaxed);
}

void CpuStream::Loop() {
  pthread_setname_np(pthread_self(), name_.substr(0, 15).c_str());
  // Of a team that takes the whole machine two members on one processor leave another idle, and Linux may
  // leave them there. Unbound, a step of SmolLM2 on 2 cores once took 26 ms for 15, three measurements in
  // a row; bound, it has not been seen again.
  if (team_.size() > 1 && team_.size() == kernels::CpuTeam::NumProcessors()) {
    team_.Pin(kernels::CpuTeam::PinFrom::kFirst);
  }
  uint64_t random = delay_seed_.value_or(0);
  for (uint32_t at = 0;; ++at) {
    Cell& cell = cells_[at % kCapacity];
    for (int spin = 0;; ++spin) {
      const bool stop = stop_.load(std::memory_order_acquire);  // first: what was pushed is run
      if (cell.turn.load(std::memory_order_acquire) == at + 1) break;
      if (stop) return;
      if (spin < kSpins) {
        Pause();
      } else {
        Sleep(at);
      }
    }
    if (delay_seed_.has_value()) {
      std::this_thread::sleep_for(
          std::chrono::microseconds(NextRandom(random) % (kMaxDelayUs + 1)));
    }
    RunOp(cell.op, team_);
    popped_.exchange(at + 1, std::memory_order_acq_rel);
    if (wake_at_.load(std::memory_order_relaxed) == at + 1) FutexWakeAll(popped_);
  }
}

}  // namespace headroom
