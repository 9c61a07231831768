// A fixed team of threads that runs one kernel at a time: the calling thread is member 0.
//
// Run() costs no allocation. Members spin and yield for a bounded time between kernels, then sleep on a
// futex, so that an idle device uses no CPU. One caller at a time; kernels must not call Run() themselves.
#ifndef HEADROOM_KERNELS_CPU_TEAM_H_
#define HEADROOM_KERNELS_CPU_TEAM_H_

#include <atomic>
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

  // Calls fn(member) once on every member, member in [0, size()); returns when all have returned.
  template <typename Fn>
  void Run(Fn&& fn) {
    using F = std::remove_reference_t<Fn>;
    RunErased([](void* f, int member) { (*static_cast<F*>(f))(member); }, &fn);
  }

  // Calls fn(index) for every index in [0, count); members take indices as they get free. Use only
  // where the result of an index does not depend on who computes it.
  template <typename Fn>
  void ForEach(int64_t count, Fn&& fn) {
    if (count <= 0) return;
    if (size_ == 1 || count == 1) {
      for (int64_t i = 0; i < count; ++i) fn(i);
      return;
    }
    next_.store(0, std::memory_order_relaxed);
    Run([&](int) {
      for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count;) fn(i);
    });
  }

 private:
  void RunErased(void (*fn)(void*, int), void* context);
  void MemberLoop(int member);

  const int size_;
  // Each on a cache line of its own: one is polled while others change.
  alignas(64) std::atomic<uint32_t> epoch_{0};    // grows by one to start a run
  alignas(64) std::atomic<uint32_t> running_{0};  // members other than 0 still in the run
  alignas(64) std::atomic<int64_t> next_{0};
  std::atomic<bool> stop_{false};
  void (*fn_)(void*, int) = nullptr;
  void* context_ = nullptr;
  std::vector<std::thread> members_;
};

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_CPU_TEAM_H_
