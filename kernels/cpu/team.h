// A fixed team of threads that runs one kernel at a time: the calling thread is member 0.
//
// Run() costs no allocation. Members spin and yield for a bounded time between kernels, then sleep on a
// futex, so that an idle device uses no CPU. One caller at a time; kernels must not call Run() themselves.
#ifndef HEADROOM_KERNELS_CPU_TEAM_H_
#define HEADROOM_KERNELS_CPU_TEAM_H_

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace headroom::kernels {

class CpuTeam {
 public:
  // A team of `size` >= 1 threads, the caller of Run() included.
  explicit CpuTeam(int size);
  ~CpuTeam();
  CpuTeam(const CpuTeam&) = delete;
  CpuTeam& operator=(const CpuTeam&) = delete;

  int size() const { return size_; }
  // How long members yield for the next kernel before they sleep: 50 us unless set. Thread-safe.
  void set_patience(std::chrono::nanoseconds patience) {
    patience_ns_.store(patience.count(), std::memory_order_relaxed);
  }
  // That the process may use; at least 1.
  static int NumProcessors();

  // Binds member i to the i-th of the processors that the process may use, counted from the first or
  // from the last one; a member for which there is none stays free. As Run() otherwise, and once: the
  // caller too may use no other from then on, nor may threads that it starts.
  enum class PinFrom { kFirst, kLast };
  void Pin(PinFrom from);

  // Calls fn(member) once on every member, member in [0, size()); returns when all have returned.
  template <typename Fn>
  void Run(Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    RunErased([](void* f, int member) { (*static_cast<F*>(f))(member); }, &fn);
  }

  // Calls fn(index) for every index in [0, count); members take indices as they get free, and one
  // that gets no processor in the meantime is not waited for. Use only where the result of an index
  // does not depend on who computes it.
  template <typename Fn>
  void ForEach(int64_t count, Fn&& fn) {
    if (count <= 0) return;
    if (size_ == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) fn(i);
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    auto take = [&] {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i);
    };
    using Take = decltype(take);
    OfferErased([](void* f, int) { (*static_cast<Take*>(f))(); }, &take);
  }

 private:
  void RunErased(void (*fn)(void*, int), void* context);
  // Calls fn on the caller and on whoever comes before that has returned.
  void OfferErased(void (*fn)(void*, int), void* context);
  void Announce(uint32_t kind);
  // Returns the word's value as soon as it is not `old`.
  uint32_t AwaitChange(const std::atomic<uint32_t>& word, uint32_t old) const;
  void MemberLoop(int member);
  void Join(int member);

  // Lowest bit of an epoch: the kind of its run.
  static constexpr uint32_t kRun = 0;
  static constexpr uint32_t kOffer = 1;
  // Bit of gate_.
  static constexpr uint32_t kOpen = uint32_t{1} << 31;

  const int size_;
  // Each on a cache line of its own: one is polled while others change.
  alignas(64) std::atomic<uint32_t> epoch_{0};    // grows by two to start a run
  alignas(64) std::atomic<uint32_t> running_{0};  // members other than 0 still in the run
  // Of an offer: kOpen while members may join, and how many are inside. fn_ and context_ stay as they
  // are while it is open or somebody is inside.
  alignas(64) std::atomic<uint32_t> gate_{0};
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> patience_ns_{50'000};
  void (*fn_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> members_;
};

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_CPU_TEAM_H_
