#include "common/device/device_factory.h"

#include <unistd.h>

#include <string>

#include "gtest/gtest.h"

namespace headroom {
namespace {

bool HasDriver() { return access("/dev/nvidiactl", F_OK) == 0; }

DeviceOptions Small(const std::string& kind) {
  DeviceOptions options;
  options.kind = kind;
  options.memory_bytes = 1 << 20;
  return options;
}

TEST(DeviceFactory, AutoIsTheCpuWhereThereIsNoDriver) {
  EXPECT_EQ(ChooseDevice("cpu"), "cpu");
  EXPECT_EQ(ChooseDevice("cuda"), "cuda");
  if (HasDriver()) GTEST_SKIP() << "this host has a GPU";
  EXPECT_EQ(ChooseDevice("auto"), "cpu");
  const auto device = CreateDevice(Small("auto"));
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ((*device)->name(), "cpu");
  EXPECT_EQ((*device)->arena_use().capacity_bytes, 1 << 20);
}

// The same binary runs without a GPU and says so when one is asked for.
TEST(DeviceFactory, CudaIsUnavailableWhereThereIsNoDriver) {
  if (HasDriver()) GTEST_SKIP() << "this host has a GPU";
  const auto device = CreateDevice(Small("cuda"));
  EXPECT_EQ(device.status().code(), absl::StatusCode::kUnavailable) << device.status();
  EXPECT_EQ(device.status().message().find("--device cuda: "), 0u) << device.status();
  EXPECT_EQ(CheckDevice("cuda"), device.status());
  EXPECT_TRUE(CheckDevice("auto").ok());
}

TEST(DeviceFactory, NamesTheWrongOption) {
  const auto message = [](const DeviceOptions& options) {
    const absl::Status status = CreateDevice(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_EQ(message(Small("gpu")), "--device 'gpu', expected auto, cpu or cuda");
  DeviceOptions options = Small("cpu");
  options.memory_bytes = 0;
  EXPECT_EQ(message(options), "device memory must be positive, not 0 bytes");
  options = Small("cpu");
  options.compute_threads = 0;
  EXPECT_EQ(message(options), "compute threads must be at least 1, not 0");
}

}  // namespace
}  // namespace headroom
