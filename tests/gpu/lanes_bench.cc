// What the host's threads get of its memory alone and while a GPU copies at full speed:
//   lanes_bench [GiB]
// Plain reads and attention in place, by number of threads; rates in GB/s.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cpu/team.h"
#include "tests/bench/in_place_bench.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/gpu/require.h"

namespace headroom {
namespace {

using kernels::InPlaceBench;
using kernels::InPlaceKernel;

constexpr int64_t kPiece = int64_t{16} << 20;
constexpr int64_t kCopied = int64_t{2} << 30;

// Copies to the device, over and over.
class Copier {
 public:
  explicit Copier(Device& device) : device_(device), host_(kCopied) {
    std::fill_n(host_.data(), kCopied, 1);
    Require(device_.RegisterHost(host_.data(), kCopied));
    to_ = device_.Allocate(kPiece, "copies").value();
    stream_ = device_.CreateStream("copies").value();
    for (EventId& event : events_) event = device_.CreateEvent().value();
  }
  ~Copier() { Require(device_.UnregisterHost(host_.data())); }

  template <typename Fn>
  double While(Fn&& fn) {
    stop_ = false;
    bytes_ = 0;
    std::thread thread([this] { Run(); });
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    const int64_t before = bytes_;
    const auto begin = std::chrono::steady_clock::now();
    fn();
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const int64_t copied = bytes_ - before;
    stop_ = true;
    thread.join();
    return static_cast<double>(copied) / seconds / 1e9;
  }

 private:
  void Run() {
    for (int64_t i = 0; !stop_; ++i) {
      if (i >= 8) {
        Require(device_.Synchronize(events_[i % 8], absl::Minutes(1)));
        bytes_ += kPiece;
      }
      CopyArgs copy;
      copy.dst = to_;
      copy.src = host_.data() + i * kPiece % kCopied;
      copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = kPiece;
      Require(device_.Copy(stream_, copy));
      Require(device_.Record(stream_, events_[i % 8]));
    }
    const EventId last = events_[0];
    Require(device_.Record(stream_, last));
    Require(device_.Synchronize(last, absl::Minutes(1)));
  }

  Device& device_;
  HostMemory host_;
  uint8_t* to_ = nullptr;
  StreamId stream_;
  EventId events_[8];
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> bytes_{0};
};

void Main(int64_t bytes) {
  DeviceOptions options;
  options.kind = "cuda";
  options.memory_bytes = int64_t{1} << 30;
  const std::unique_ptr<Device> device = CreateDevice(options).value();
  Copier copier(*device);
  const int processors = kernels::CpuTeam::NumProcessors();
  kernels::CpuTeam all(processors);
  const InPlaceBench bench(all, bytes);
  const double alone = copier.While([] { std::this_thread::sleep_for(std::chrono::seconds(1)); });
  std::printf("%s, %d processors, %.1f GB of keys; copies alone %.1f\n",
              std::string(device->name()).c_str(), processors, bench.bytes() / 1e9, alone);
  const auto print = [&](const char* name, int threads, auto&& measure) {
    const InPlaceBench::Rate quiet = measure();
    InPlaceBench::Rate rate;
    const double copied = copier.While([&] { rate = measure(); });
    std::printf("%2d threads, %-18s %6.1f alone (best %6.1f); %6.1f beside copies at %5.1f: %6.1f\n",
                threads, name, quiet.mean, quiet.best, rate.mean, copied, rate.mean + copied);
    std::fflush(stdout);
  };
  for (const int threads : {processors, processors - 1, processors - 2, processors - 4,
                            processors / 2}) {
    kernels::CpuTeam team(threads);
    // The caller is a member and stays where it is put: it is another thread each time.
    std::thread([&] {
      team.Pin(kernels::CpuTeam::PinFrom::kLast);
      print("reads", threads, [&] { return bench.Reads(team); });
      for (const InPlaceKernel& kernel : kernels::InPlaceKernels()) {
        char name[32];
        std::snprintf(name, sizeof(name), "%s, 4 queries", kernel.name);
        print(name, threads, [&] { return bench.Attend(team, 1, kernel); });
      }
      if (threads != processors) return;
      for (const int rows : {4, 8, 32}) {
        char name[32];
        const InPlaceKernel kernel = kernels::InPlaceKernels().back();
        std::snprintf(name, sizeof(name), "%s, %d queries", kernel.name, 4 * rows);
        print(name, threads, [&] { return bench.Attend(team, rows, kernel); });
      }
    }).join();
  }
}

}  // namespace
}  // namespace headroom

int main(int argc, char** argv) {
  headroom::Main(static_cast<int64_t>(argc > 1 ? std::atoi(argv[1]) : 8) << 30);
}
