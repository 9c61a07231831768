// The GPU's probe on the CPU device, which has the same operations; and what cards are known for.
#include "services/headroom/bench/gpu_ceilings.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "common/device/card_probe.h"
#include "common/device/cpu/cpu_device.h"
#include "services/headroom/bench/geometries.h"
#include "services/headroom/bench/host_memory.h"
#include "services/headroom/bench/known_ceilings.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

GpuProbeShape SmallShape() {
  GpuProbeShape shape;
  shape.gemm_m = 33;
  shape.gemm_n = 70;
  shape.gemm_k = 64;
  shape.attend = {64, 4, 2, 64};
  shape.attend_keys = {64, 192};
  shape.least_bytes = 1 << 20;
  shape.copy_bytes = 64 << 20;
  return shape;
}

// Host memory that a device may name.
class HostMemory {
 public:
  HostMemory(Device& device, int64_t bytes)
      : device_(device), region_(*MapSharedMemory(bytes, "gpu-ceilings-test")) {
    std::memset(region_.data(), 1, static_cast<size_t>(bytes));
    EXPECT_EQ(device.RegisterHost(region_.data(), bytes), absl::OkStatus());
  }
  ~HostMemory() { device_.UnregisterHost(region_.data()).IgnoreError(); }
  uint8_t* data() const { return region_.data(); }

 private:
  Device& device_;
  const MappedRegion region_;
};

std::unique_ptr<Device> DeviceOf(int64_t bytes) {
  CpuDeviceOptions options;
  options.arena_bytes = bytes;
  return *CreateCpuDevice(options);
}

TEST(GpuCeilingProbe, MeasuresEveryCeilingInTheMemoryThatItSaysItTakes) {
  const GpuProbeShape shape = SmallShape();
  const std::unique_ptr<Device> device = DeviceOf(GpuCeilingProbe::ArenaBytes(shape));
  const HostMemory host(*device, GpuCeilingProbe::HostBytes(shape));
  uint8_t* read = nullptr;
  int64_t read_bytes = 0;
  const auto probe = GpuCeilingProbe::Create(
      *device, shape, host.data(), 2, [&](uint8_t* data, int64_t bytes) -> absl::StatusOr<double> {
        read = data;
        read_bytes = bytes;
        return 1e15;
      });
  ASSERT_TRUE(probe.ok()) << probe.status();
  for (int i = 0; i < 2; ++i) {
    const absl::StatusOr<Ceilings> ceilings = (*probe)->Measure();
    ASSERT_TRUE(ceilings.ok()) << ceilings.status();
    for (const CeilingField& field : kCeilingFields) {
      EXPECT_GT((*ceilings).*field.value, 0) << field.name;
    }
    EXPECT_EQ(ceilings->read_bytes, 1e15);  // more than what a copy counts
  }
  EXPECT_NE(read, nullptr);
  EXPECT_EQ(read_bytes, GpuCeilingProbe::ArenaBytes(shape));
  EXPECT_EQ(read_bytes % 32768, 0);
}

TEST(GpuCeilingProbe, TakesNoMoreThanTheHelpSays) {
  for (const std::string& geometry : GeometryNames()) {
    GpuProbeShape shape;
    shape.attend = WideShapeOf(*GeometryOf(geometry), shape.attend.max_rows);
    EXPECT_LE(GpuCeilingProbe::ArenaBytes(shape), int64_t{7} << 28) << geometry;  // 1.75 GiB
  }
}

TEST(GpuCeilingProbe, SaysWhenItsMemoryIsNotThere) {
  const std::unique_ptr<Device> device = DeviceOf(1 << 20);
  EXPECT_EQ(GpuCeilingProbe::Create(*device, SmallShape(), nullptr, 1, &CardReadRate).status().code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(KnownCeilings, AreThoseOfTheCard) {
  EXPECT_EQ(KnownCeilings("NVIDIA H100 80GB HBM3").read_bytes, 3.07e12);
  EXPECT_EQ(KnownCeilings("NVIDIA H200").read_bytes, 4.53e12);
  EXPECT_EQ(KnownCeilings("NVIDIA H200").gemm_flops, 700e12);
  // Another card of that name, with another memory.
  EXPECT_EQ(KnownCeilings("NVIDIA H100 PCIe"), Ceilings());
  EXPECT_EQ(KnownCeilings("cpu"), Ceilings());
}

TEST(FloorCeilings, AreTheLargerOfWhatWasMeasuredAndNineteenTwentiethsOfWhatIsKnown) {
  Ceilings measured, known;
  measured.gemm_flops = 100;
  known.gemm_flops = 200;  // a weak measurement
  measured.read_bytes = 97;
  known.read_bytes = 100;  // within what cards differ by
  measured.copy_bytes = 50;
  known.attention_flops = 300;  // not measured
  const Ceilings floor = FloorCeilings(measured, known);
  EXPECT_DOUBLE_EQ(floor.gemm_flops, 190);
  EXPECT_DOUBLE_EQ(floor.read_bytes, 97);
  EXPECT_DOUBLE_EQ(floor.copy_bytes, 50);
  EXPECT_DOUBLE_EQ(floor.attention_flops, 285);
  EXPECT_EQ(FloorCeilings(measured, Ceilings()), measured);
}

}  // namespace
}  // namespace headroom
