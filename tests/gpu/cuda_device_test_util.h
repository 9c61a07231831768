// What tests of the CUDA device have in common.
#ifndef HEADROOM_TESTS_GPU_CUDA_DEVICE_TEST_UTIL_H_
#define HEADROOM_TESTS_GPU_CUDA_DEVICE_TEST_UTIL_H_

#include <atomic>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "tests/gpu/gpu_test_util.h"

namespace headroom {

inline std::vector<float> Ramp(int64_t count, float first) {
  std::vector<float> values(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) values[i] = first + static_cast<float>(i);
  return values;
}

inline CopyArgs Plain(void* dst, const void* src, int64_t bytes) {
  CopyArgs copy;
  copy.dst = dst;
  copy.src = src;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = bytes;
  return copy;
}

// Registered memory of a test.
class Registered : public HostMemory {
 public:
  Registered(Device& device, int64_t bytes) : HostMemory(bytes), device_(device) {
    EXPECT_OK(device.RegisterHost(data(), bytes));
  }
  ~Registered() { EXPECT_OK(device_.UnregisterHost(data())); }

 private:
  Device& device_;
};

// A mailbox of one slot, and the step's status in another cache line.
class OneSlot : public Registered {
 public:
  explicit OneSlot(Device& device) : Registered(device, 16384) {}
  MailboxHeader& header() { return *reinterpret_cast<MailboxHeader*>(data()); }
  MailboxSlot& slot() { return *reinterpret_cast<MailboxSlot*>(data() + 4096); }
  std::atomic<uint32_t>& status() {
    return *reinterpret_cast<std::atomic<uint32_t>*>(data() + 8192);
  }
  float* queries() { return reinterpret_cast<float*>(data() + 12288); }
  // The answer to step 5, layer 3.
  void Answer(uint64_t count, uint32_t code = 0) {
    slot().answer.generation = 9;
    slot().answer.step = 5;
    slot().answer.layer = 3;
    slot().answer.code = code;
    slot().answered.store(count, std::memory_order_release);
  }
  kernels::AwaitPartialsArgs Await(uint64_t count, absl::Duration deadline) {
    kernels::AwaitPartialsArgs args;
    args.mailbox = &header();
    args.slot = &slot();
    args.count = count;
    args.generation = 9;
    args.step = 5;
    args.layer = 3;
    args.deadline_us = absl::ToInt64Microseconds(deadline);
    args.status = &status();
    return args;
  }
};

class CudaDeviceTest : public GpuTest {
 protected:
  StreamId other() {
    static const StreamId stream = device_.CreateStream("copy").value();
    return stream;
  }
  EventId NewEvent() { return device_.CreateEvent().value(); }
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_GPU_CUDA_DEVICE_TEST_UTIL_H_
