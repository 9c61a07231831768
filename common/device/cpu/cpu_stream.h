// A stream of the CPU device: a thread that runs a bounded queue of operations in order.
//
// One thread pushes at a time (Device's rule); the stream's own thread pops. Neither allocates.
#ifndef HEADROOM_COMMON_DEVICE_CPU_CPU_STREAM_H_
#define HEADROOM_COMMON_DEVICE_CPU_CPU_STREAM_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "common/device/device.h"
#include "kernels/cpu/team.h"

namespace headroom {

// One operation by value: what to run and its arguments.
struct CpuOp {
  static constexpr size_t kStorageBytes = 232;

  using Run = void (*)(const void* args, kernels::CpuTeam& team, OpAccount* account);

  Run run = nullptr;
  const char* name = nullptr;    // a literal, for the trace; null: not traced
  OpAccount* account = nullptr;  // may be null
  alignas(8) std::byte storage[kStorageBytes];
};

// Runs it and adds its time to its account.
void RunOp(const CpuOp& op, kernels::CpuTeam& team);

class CpuStream {
 public:
  // Work enqueued ahead; Push() blocks beyond.
  static constexpr uint32_t kCapacity = 512;

  CpuStream(std::string name, int threads, std::optional<uint64_t> delay_seed);
  // Runs what is enqueued, then ends.
  ~CpuStream();

  // DEADLINE_EXCEEDED if the queue stays full for too long: the stream hangs.
  absl::Status Push(const CpuOp& op);

  const std::string& name() const { return name_; }

 private:
  void Loop();
  // Until the queue is half empty.
  absl::Status AwaitRoom(uint32_t at);
  // Until more than `at` operations have been pushed, or for a while.
  void Sleep(uint32_t at);

  const std::string name_;
  const std::optional<uint64_t> delay_seed_;
  // An operation's place in the ring. Its turn, the number of operations pushed with it, is what the
  // stream acquires: that of the count of all of them would order it after whatever the pusher had
  // seen by its latest push, and so hide a missing event.
  struct Cell {
    CpuOp op;
    std::atomic<uint32_t> turn{0};
  };
  const std::unique_ptr<Cell[]> cells_;
  // The pusher's view of popped_, renewed only when the queue looks full: a push does not touch the
  // line that the stream's thread writes. (And it is no acquire, which would hide a missing event.)
  uint32_t popped_seen_ = 0;
  std::atomic<uint32_t> pushed_{0};  // futex words; difference = operations waiting
  std::atomic<uint32_t> popped_{0};
  // Who sleeps says so here, so that nobody else pays for a system call: the stream while its queue
  // is empty, a pusher that found the queue full until popped_ has come to wake_at_. (One that is
  // woken for every operation takes the core from the kernels 250 times a step.) Each side first
  // exchanges its own word, on x86 a full barrier, and then looks at the other's. The looks are
  // relaxed: an acquire would hide a missing event.
  std::atomic<bool> asleep_{false};
  std::atomic<uint32_t> wake_at_{0};
  std::atomic<bool> stop_{false};
  kernels::CpuTeam team_;
  std::thread thread_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_DEVICE_CPU_CPU_STREAM_H_
