// What is registered of a segment may be named while the rest is being registered, which takes a GPU's
// driver some 0.3 s a piece.
#include "services/worker/registered_segment.h"

#include <gtest/gtest.h>

#include <chrono>
#include <future>
#include <memory>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/device/cpu/cpu_device.h"
#include "common/mutex.h"
#include "common/segment/mapped_segment.h"
#include "common/segment_format.h"
#include "tests/common/forwarding_device.h"
#include "tests/common/handmade_segment.h"

namespace headroom {
namespace {

// A driver that takes as long as it is told to over every piece but the first.
class SlowDriver : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;

  absl::Status RegisterHost(void* data, int64_t bytes) override {
    {
      MutexLock lock(&mutex_);
      ++calls_;
      changed_.SignalAll();
      while (calls_ > 1 && held_) changed_.WaitFor(&mutex_, absl::Seconds(1));
    }
    return ForwardingDevice::RegisterHost(data, bytes);
  }

  bool AwaitSecondCall() {
    const absl::Time deadline = absl::Now() + absl::Seconds(10);
    MutexLock lock(&mutex_);
    while (calls_ < 2 && absl::Now() < deadline) changed_.WaitFor(&mutex_, absl::Seconds(1));
    return calls_ >= 2;
  }
  void LetGo() {
    MutexLock lock(&mutex_);
    held_ = false;
    changed_.SignalAll();
  }

 private:
  Mutex mutex_;
  CondVar changed_;
  int calls_ ABSL_GUARDED_BY(mutex_) = 0;
  bool held_ ABSL_GUARDED_BY(mutex_) = true;
};

constexpr int64_t kDataBytes = kRegistrationBytes + (1 << 20);  // two pieces, without memory
constexpr uint64_t kGeneration = 7;

TEST(RegisteredSegmentTest, WhatIsRegisteredIsNamedWhileTheNextPieceIsRegistered) {
  const HandmadeSegment files(kDataBytes, /*ready_bytes=*/kDataBytes, kGeneration);
  CpuDeviceOptions options;
  options.arena_bytes = 1 << 20;
  absl::StatusOr<std::unique_ptr<Device>> cpu = CreateCpuDevice(options);
  ASSERT_TRUE(cpu.ok()) << cpu.status();
  SlowDriver device(*std::move(cpu));
  absl::StatusOr<std::unique_ptr<MappedSegment>> mapped =
      MappedSegment::Open(files.dir(), HandmadeSegment::Binding(), kGeneration);
  ASSERT_TRUE(mapped.ok()) << mapped.status();
  absl::StatusOr<std::unique_ptr<RegisteredSegment>> segment =
      RegisteredSegment::Create(device, *std::move(mapped));
  ASSERT_TRUE(segment.ok()) << segment.status();
  EXPECT_TRUE(device.AwaitSecondCall());

  // A step that names the first piece's bytes, and one that names none.
  std::future<absl::Status> named = std::async(std::launch::async, [&] {
    const absl::Status none = (*segment)->Require(0);
    return none.ok() ? (*segment)->Require(kRegistrationBytes) : none;
  });
  EXPECT_EQ(named.wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_EQ((*segment)->registered_bytes(), kRegistrationBytes);

  device.LetGo();
  EXPECT_TRUE(named.get().ok());
  EXPECT_TRUE((*segment)->Require(kDataBytes).ok());
  EXPECT_EQ((*segment)->registered_bytes(), kDataBytes);
  EXPECT_TRUE(absl::IsFailedPrecondition((*segment)->Require(kDataBytes + 1)));
}

}  // namespace
}  // namespace headroom
