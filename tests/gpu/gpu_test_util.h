// What the GPU tests share: one device for all tests of a program, and memory of it that is taken
// back after each test.
#ifndef HEADROOM_TESTS_GPU_GPU_TEST_UTIL_H_
#define HEADROOM_TESTS_GPU_GPU_TEST_UTIL_H_

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common/device/device_factory.h"
#include "gtest/gtest.h"
#include "kernels/types.h"

namespace headroom {

#define ASSERT_OK(expr)                                             \
  do {                                                              \
    const absl::Status headroom_status_ = (expr);                   \
    ASSERT_TRUE(headroom_status_.ok()) << headroom_status_;         \
  } while (false)
#define EXPECT_OK(expr)                                             \
  do {                                                              \
    const absl::Status headroom_status_ = (expr);                   \
    EXPECT_TRUE(headroom_status_.ok()) << headroom_status_;         \
  } while (false)

// Zeroed memory that begins at a page; registered by whom it concerns.
class HostMemory {
 public:
  explicit HostMemory(int64_t bytes)
      : bytes_(bytes),
        data_(static_cast<uint8_t*>(mmap(nullptr, static_cast<size_t>(bytes),
                                         PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1,
                                         0))) {}
  ~HostMemory() { munmap(data_, static_cast<size_t>(bytes_)); }
  HostMemory(const HostMemory&) = delete;
  HostMemory& operator=(const HostMemory&) = delete;

  uint8_t* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  const int64_t bytes_;
  uint8_t* const data_;
};

// The program's device. A host without a GPU fails the tests: nobody runs them there for nothing.
class Gpu {
 public:
  static constexpr int64_t kArenaBytes = int64_t{768} << 20;
  static constexpr int64_t kLibrariesBytes = int64_t{64} << 20;  // for what the device takes itself
  static constexpr int64_t kStagingBytes = int64_t{64} << 20;
  static constexpr absl::Duration kPatience = absl::Seconds(60);

  static Gpu& Get() {
    static Gpu gpu;
    return gpu;
  }

  Device& device() { return *device_; }
  StreamId stream() const { return stream_; }

  // Memory until the next Reset(), poisoned: what nobody writes shows as NaN.
  uint8_t* Take(int64_t bytes) {
    const int64_t aligned = (bytes + 255) / 256 * 256;
    Require(used_ + aligned <= kArenaBytes, "the test takes too much device memory");
    uint8_t* const data = memory_ + used_;
    used_ += aligned;
    const std::vector<uint8_t> poison(static_cast<size_t>(bytes), 0xff);
    Require(device_->Upload(data, poison.data(), bytes));
    return data;
  }
  template <typename T>
  T* Take(int64_t count) {
    return reinterpret_cast<T*>(Take(count * static_cast<int64_t>(sizeof(T))));
  }
  template <typename T>
  T* Put(const std::vector<T>& values) {
    if (values.empty()) return nullptr;
    const auto bytes = static_cast<int64_t>(values.size() * sizeof(T));
    uint8_t* const data = Take(bytes);
    Require(device_->Upload(data, values.data(), bytes));
    return reinterpret_cast<T*>(data);
  }
  // A table whose host copy is `values`, which must outlive its use.
  template <typename T>
  kernels::Table<T> PutTable(const std::vector<T>& values) {
    return {Put(values), values.data(), static_cast<int32_t>(values.size())};
  }
  template <typename T>
  std::vector<T> Fetch(const T* data, int64_t count) {
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    Require(bytes <= kStagingBytes, "the test fetches too much at once");
    CopyArgs copy;
    copy.dst = staging_.data();
    copy.src = data;
    copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = bytes;
    Require(device_->Copy(stream_, copy));
    Await();
    std::vector<T> values(static_cast<size_t>(count));
    if (bytes > 0) std::memcpy(static_cast<void*>(values.data()), staging_.data(), bytes);
    return values;
  }
  // Memory for activations, poisoned, and what they come to.
  kernels::Activations TakeActivations(int64_t count, kernels::ElementType type) {
    return {Take(count * kernels::ElementBytes(type)), type};
  }
  std::vector<float> FetchActivations(const kernels::Activations& from, int64_t count) {
    if (from.type == kernels::ElementType::kFloat32) return Fetch(from.floats(), count);
    std::vector<float> values;
    for (const kernels::BFloat16 value : Fetch(from.bfloats(), count)) {
      values.push_back(kernels::ToFloat(value));
    }
    return values;
  }
  // Until everything on stream() has run.
  void Await() {
    Require(device_->Record(stream_, event_));
    Require(device_->Synchronize(event_, kPatience));
    Require(device_->status());
  }
  void Reset() { used_ = 0; }

 private:
  Gpu() : staging_(kStagingBytes) {
    DeviceOptions options;
    options.kind = "cuda";
    options.memory_bytes = kArenaBytes + kLibrariesBytes;
    auto device = CreateDevice(options);
    Require(device.status());
    device_ = *std::move(device);
    stream_ = device_->CreateStream("compute").value();
    event_ = device_->CreateEvent().value();
    memory_ = device_->Allocate(kArenaBytes, "tests").value();
    Require(device_->RegisterHost(staging_.data(), staging_.bytes()));
  }

  static void Require(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
  }
  static void Require(const absl::Status& status) {
    Require(status.ok(), status.ToString().c_str());
  }

  HostMemory staging_;
  std::unique_ptr<Device> device_;
  StreamId stream_;
  EventId event_;
  uint8_t* memory_ = nullptr;
  int64_t used_ = 0;
};

class GpuTest : public ::testing::Test {
 protected:
  ~GpuTest() override { gpu_.Reset(); }

  // What the last launch wrote. Also fails if it failed.
  template <typename T>
  std::vector<T> After(const absl::Status& launched, const T* data, int64_t count) {
    EXPECT_OK(launched);
    return gpu_.Fetch(data, count);
  }

  Gpu& gpu_ = Gpu::Get();
  Device& device_ = gpu_.device();
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_GPU_GPU_TEST_UTIL_H_
