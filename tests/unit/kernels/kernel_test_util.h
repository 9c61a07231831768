// What the kernels' tests share: every instruction set of this processor, random data, bit compares.
#ifndef HEADROOM_TESTS_UNIT_KERNELS_KERNEL_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_KERNELS_KERNEL_TEST_UTIL_H_

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/types.h"

namespace headroom::kernels {

inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The kernels that this processor runs, the plain C++ ones first.
inline std::vector<const cpu::KernelTable*> AllKernels() {
  std::vector<const cpu::KernelTable*> tables = {&cpu::kPortableKernels};
  if (cpu::HasAvx2()) tables.push_back(&cpu::kAvx2Kernels);
  if (cpu::HasAvx512()) tables.push_back(&cpu::kAvx512Kernels);
  return tables;
}
// The fastest of them.
inline const cpu::KernelTable& BestKernels() { return *AllKernels().back(); }
// The same, and each again with the attention of processors that read ahead (attend_streamed) as `attend`.
inline std::vector<const cpu::KernelTable*> AllAttention() {
  static const std::vector<cpu::KernelTable> streamed = [] {
    std::vector<cpu::KernelTable> tables;
    for (const cpu::KernelTable* table : AllKernels()) {
      tables.push_back(*table);
      tables.back().attend = table->attend_streamed;
    }
    return tables;
  }();
  std::vector<const cpu::KernelTable*> all = AllKernels();
  for (const cpu::KernelTable& table : streamed) all.push_back(&table);
  return all;
}

// A table whose device copy is `values` itself; the host copy is null, so that a kernel that reads it
// crashes.
template <typename T>
Table<T> DeviceTable(const std::vector<T>& values) {
  Table<T> table;
  table.device = values.data();
  table.count = static_cast<int32_t>(values.size());
  return table;
}

class Random {
 public:
  explicit Random(uint32_t seed) : engine_(seed) {}
  float Normal() { return normal_(engine_); }
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  std::vector<float> Floats(int64_t count, float scale = 1) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * Normal();
    return values;
  }
  std::vector<BFloat16> Bf16(int64_t count, float scale = 1) {
    std::vector<BFloat16> values(count);
    for (BFloat16& value : values) value = ToBFloat16(scale * Normal());
    return values;
  }

 private:
  std::mt19937 engine_;
  std::normal_distribution<float> normal_;
};

// Equal to the bit (so that NaN equals itself and -0 differs from 0); names the first difference.
inline ::testing::AssertionResult SameBits(const std::vector<float>& a,
                                           const std::vector<float>& b) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << a.size() << " values against " << b.size();
  }
  if (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0) {
    return ::testing::AssertionSuccess();
  }
  size_t i = 0;
  while (std::memcmp(&a[i], &b[i], sizeof(float)) == 0) ++i;
  return ::testing::AssertionFailure() << "value " << i << ": " << a[i] << " against " << b[i];
}

// |a - b| <= tolerance everywhere; NaN is near nothing.
inline ::testing::AssertionResult Near(const std::vector<float>& a, const std::vector<float>& b,
                                       float tolerance) {
  if (a.size() != b.size()) {
    return ::testing::AssertionFailure() << a.size() << " values against " << b.size();
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::abs(a[i] - b[i]) <= tolerance)) {
      return ::testing::AssertionFailure()
             << "value " << i << ": " << a[i] << " against " << b[i] << ", tolerance " << tolerance;
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace headroom::kernels

#endif  // HEADROOM_TESTS_UNIT_KERNELS_KERNEL_TEST_UTIL_H_
