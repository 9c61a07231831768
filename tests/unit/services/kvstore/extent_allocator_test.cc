#include "services/kvstore/extent_allocator.h"

#include <gtest/gtest.h>

#include <bit>
#include <map>
#include <random>
#include <vector>

#include "common/segment_format.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

namespace headroom::kvstore {
namespace {

// A bit for each unit of each range: what an allocator may hand out, in the plainest form.
class BitmapModel {
 public:
  BitmapModel(int64_t unit_bytes, int max_order) : unit_(unit_bytes), max_order_(max_order) {}

  void AddRange(int64_t begin, int64_t bytes) {
    ranges_[begin] = std::vector<bool>(static_cast<size_t>(bytes / unit_));
  }
  // Whether the range is aligned, within one added range, and free.
  bool IsFree(int64_t offset, int order) const {
    const int64_t units = int64_t{1} << order;
    auto at = ranges_.upper_bound(offset);
    if (at == ranges_.begin()) return false;
    --at;
    if ((offset - at->first) % (unit_ * units) != 0) return false;
    const int64_t first = (offset - at->first) / unit_;
    if (first + units > static_cast<int64_t>(at->second.size())) return false;
    for (int64_t unit = first; unit < first + units; ++unit) {
      if (at->second[static_cast<size_t>(unit)]) return false;
    }
    return true;
  }
  bool AnyFree(int order) const {
    for (const auto& [begin, units] : ranges_) {
      for (int64_t unit = 0; unit < static_cast<int64_t>(units.size()); unit += int64_t{1} << order) {
        if (IsFree(begin + unit * unit_, order)) return true;
      }
    }
    return false;
  }
  void Mark(int64_t offset, int order, bool used) {
    auto at = --ranges_.upper_bound(offset);
    const int64_t first = (offset - at->first) / unit_;
    for (int64_t unit = first; unit < first + (int64_t{1} << order); ++unit) {
      at->second[static_cast<size_t>(unit)] = used;
    }
  }

 private:
  const int64_t unit_;
  const int max_order_;
  std::map<int64_t, std::vector<bool>> ranges_;
};

struct Shape {
  int64_t unit_bytes;
  int max_order;
  int64_t second_range_bytes;
};

class AllocatorProperty : public testing::TestWithParam<Shape> {};

// SmolLM2 (3 heads x 64: 48 KiB units), 5 heads x 128, Llama-3-8B, one head, and pieces that hold only
// a few blocks of the largest order.
INSTANTIATE_TEST_SUITE_P(Geometries, AllocatorProperty,
                         testing::Values(Shape{48 << 10, 8, 300 << 20},
                                         Shape{160 << 10, 6, 100'000'000},
                                         Shape{256 << 10, 6, 512 << 20},
                                         Shape{32 << 10, 9, 1 << 20},
                                         Shape{70 << 20, 3, 700 << 20}));

TEST_P(AllocatorProperty, AgreesWithABitmapOverRandomOperations) {
  const auto [unit, max_order, second_bytes] = GetParam();
  std::mt19937_64 random(TestSeed());
  ExtentAllocator allocator(unit, max_order);
  BitmapModel model(unit, max_order);
  for (const auto& [begin, bytes] : {std::pair<int64_t, int64_t>{0, kRegistrationBytes},
                                     {kRegistrationBytes, second_bytes}}) {
    allocator.AddRange(begin, bytes);
    model.AddRange(begin, bytes);
  }
  const int64_t capacity = allocator.capacity_bytes();
  ASSERT_EQ(capacity, kRegistrationBytes / unit * unit + second_bytes / unit * unit);
  std::vector<std::pair<int64_t, int>> held;
  int64_t held_bytes = 0;
  for (int step = 0; step < 20'000; ++step) {
    const int order = static_cast<int>(random() % static_cast<uint64_t>(max_order + 1));
    const int64_t bytes = unit << order;
    // Waves of filling and emptying.
    if ((step / 3000) % 2 == 0 ? random() % 4 != 0 : random() % 4 == 0) {
      const bool reserve = random() % 8 == 0;
      std::optional<int64_t> offset;
      if (reserve) {
        const int64_t wanted = static_cast<int64_t>(random() % static_cast<uint64_t>(
                                   kRegistrationBytes + second_bytes)) / unit * unit;
        const bool free = model.IsFree(wanted, order);
        ASSERT_EQ(allocator.Reserve(wanted, bytes), free) << wanted << " order " << order;
        if (free) offset = wanted;
      } else {
        offset = allocator.Allocate(bytes);
        if (offset.has_value()) {
          ASSERT_TRUE(model.IsFree(*offset, order));
        } else {
          ASSERT_FALSE(model.AnyFree(order)) << "order " << order << " was refused";
        }
      }
      if (!offset.has_value()) continue;
      ASSERT_EQ(*offset / kRegistrationBytes, (*offset + bytes - 1) / kRegistrationBytes);
      model.Mark(*offset, order, true);
      held.emplace_back(*offset, order);
      held_bytes += bytes;
    } else if (!held.empty()) {
      std::swap(held[random() % held.size()], held.back());
      const auto [offset, held_order] = held.back();
      held.pop_back();
      allocator.Free(offset, unit << held_order);
      model.Mark(offset, held_order, false);
      held_bytes -= unit << held_order;
    }
    ASSERT_EQ(allocator.used_bytes(), held_bytes);
    if (step % 500 == 0) {
      ASSERT_EQ(allocator.CheckInvariants(), "");
    }
  }
  for (const auto& [offset, order] : held) allocator.Free(offset, unit << order);
  EXPECT_EQ(allocator.CheckInvariants(), "");
  EXPECT_EQ(allocator.free_bytes(), capacity);
}

TEST(ExtentAllocator, MergesBackToWhatItWas) {
  constexpr int64_t kUnit = 48 << 10;
  constexpr int kMaxOrder = 8;  // 12 MiB
  const auto count_largest = [](ExtentAllocator& allocator) {
    std::vector<int64_t> taken;
    while (const auto offset = allocator.Allocate(kUnit << kMaxOrder)) taken.push_back(*offset);
    for (const int64_t offset : taken) allocator.Free(offset, kUnit << kMaxOrder);
    return taken.size();
  };
  ExtentAllocator allocator(kUnit, kMaxOrder);
  allocator.AddRange(0, kRegistrationBytes);
  const size_t before = count_largest(allocator);
  EXPECT_EQ(before, kRegistrationBytes / (kUnit << kMaxOrder));
  std::mt19937_64 random(TestSeed());
  std::vector<std::pair<int64_t, int64_t>> held;
  for (int order = 0; order <= kMaxOrder; ++order) {
    for (int i = 0; i < 30; ++i) {
      if (const auto offset = allocator.Allocate(kUnit << order)) {
        held.emplace_back(*offset, kUnit << order);
      }
    }
  }
  std::shuffle(held.begin(), held.end(), random);
  for (const auto& [offset, bytes] : held) allocator.Free(offset, bytes);
  EXPECT_EQ(count_largest(allocator), before);
}

TEST(ExtentAllocator, FillsARangeThatIsNoMultipleOfTheLargestBlock) {
  constexpr int64_t kUnit = 48 << 10;
  ExtentAllocator allocator(kUnit, 8);
  allocator.AddRange(0, 100 * kUnit + 17);
  EXPECT_EQ(allocator.capacity_bytes(), 100 * kUnit);
  int units = 0;
  while (allocator.Allocate(kUnit)) ++units;
  EXPECT_EQ(units, 100);
}

TEST(ExtentAllocator, KeepsLargeBlocksWholeForLargeExtents) {
  constexpr int64_t kUnit = 64 << 10;
  ExtentAllocator allocator(kUnit, 8);  // 16 MiB
  allocator.AddRange(0, 64 << 20);
  // Small extents of three sequences fill one large block, not one each.
  for (int i = 0; i < 256; ++i) ASSERT_TRUE(allocator.Allocate(kUnit).has_value());
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(allocator.Allocate(kUnit << 8).has_value());
}

TEST(ExtentAllocator, RefusesSizesThatNoExtentHas) {
  ExtentAllocator allocator(48 << 10, 2);
  allocator.AddRange(0, 1 << 20);
  for (const int64_t bytes : {int64_t{0}, int64_t{-1}, int64_t{1}, int64_t{3 * 48} << 10,
                              int64_t{8 * 48} << 10, INT64_MAX}) {
    EXPECT_FALSE(allocator.Allocate(bytes).has_value()) << bytes;
    EXPECT_FALSE(allocator.Reserve(0, bytes)) << bytes;
  }
  EXPECT_FALSE(allocator.Reserve(-(48 << 10), 48 << 10));
  EXPECT_FALSE(allocator.Reserve(INT64_MAX, 48 << 10));
  EXPECT_FALSE(allocator.Reserve(1, 48 << 10));
  EXPECT_EQ(allocator.used_bytes(), 0);
}

}  // namespace
}  // namespace headroom::kvstore
