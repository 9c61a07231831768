#include "services/kvstore/extent_allocator.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_cat.h"
#include "common/segment_format.h"

namespace headroom::kvstore {

ExtentAllocator::ExtentAllocator(int64_t unit_bytes, int max_order)
    : unit_bytes_(unit_bytes), max_order_(max_order), free_(max_order + 1) {}

std::optional<int> ExtentAllocator::OrderOf(int64_t bytes) const {
  for (int order = 0; order <= max_order_; ++order) {
    if (OrderBytes(order) == bytes) return order;
  }
  return std::nullopt;
}

const ExtentAllocator::Range* ExtentAllocator::RangeOf(int64_t offset) const {
  if (offset < 0) return nullptr;
  const auto piece = static_cast<size_t>(offset / kRegistrationBytes);
  if (piece >= ranges_.size() || ranges_[piece].units == 0) return nullptr;
  return &ranges_[piece];
}

void ExtentAllocator::AddRange(int64_t begin, int64_t bytes) {
  const auto piece = static_cast<size_t>(begin / kRegistrationBytes);
  if (piece >= ranges_.size()) ranges_.resize(piece + 1);
  Range& range = ranges_[piece];
  range = {begin, bytes / unit_bytes_};
  capacity_bytes_ += range.units * unit_bytes_;
  // Aligned blocks, largest first: after the whole ones of the largest order, one of each order that
  // the rest has a bit for.
  int64_t unit = 0;
  for (int order = max_order_; order >= 0; --order) {
    for (; range.units - unit >= int64_t{1} << order; unit += int64_t{1} << order) {
      free_[order].insert(free_[order].end(), begin + unit * unit_bytes_);
      free_bytes_ += OrderBytes(order);
    }
  }
}

std::optional<int64_t> ExtentAllocator::Allocate(int64_t bytes) {
  const std::optional<int> order = OrderOf(bytes);
  if (!order.has_value()) return std::nullopt;
  for (int from = *order; from <= max_order_; ++from) {
    if (free_[from].empty()) continue;
    const int64_t offset = *free_[from].begin();
    return Split(offset, from, *order, offset);
  }
  return std::nullopt;
}

bool ExtentAllocator::Reserve(int64_t offset, int64_t bytes) {
  const std::optional<int> order = OrderOf(bytes);
  const Range* const range = RangeOf(offset);
  if (!order.has_value() || range == nullptr) return false;
  if ((offset - range->begin) % OrderBytes(*order) != 0) return false;
  const int64_t unit = (offset - range->begin) / unit_bytes_;
  for (int from = *order; from <= max_order_; ++from) {
    const int64_t block = range->begin + (unit >> from << from) * unit_bytes_;
    if (free_[from].count(block) == 0) continue;
    Split(block, from, *order, offset);
    return true;
  }
  return false;
}

int64_t ExtentAllocator::Split(int64_t offset, int order, int to_order, int64_t keep) {
  free_[order].erase(offset);
  while (order > to_order) {
    --order;
    const int64_t upper = offset + OrderBytes(order);
    free_[order].insert(keep < upper ? upper : offset);
    if (keep >= upper) offset = upper;
  }
  free_bytes_ -= OrderBytes(to_order);
  return offset;
}

void ExtentAllocator::Free(int64_t offset, int64_t bytes) {
  if (const std::optional<int> order = OrderOf(bytes)) Release(offset, *order);
}

void ExtentAllocator::Release(int64_t offset, int order) {
  const Range* const range = RangeOf(offset);
  if (range == nullptr) return;
  free_bytes_ += OrderBytes(order);
  for (; order < max_order_; ++order) {
    const int64_t unit = (offset - range->begin) / unit_bytes_;
    const int64_t buddy = range->begin + (unit ^ int64_t{1} << order) * unit_bytes_;
    const auto at = free_[order].find(buddy);
    if (at == free_[order].end()) break;
    free_[order].erase(at);
    offset = std::min(offset, buddy);
  }
  free_[order].insert(offset);
}

std::string ExtentAllocator::CheckInvariants() const {
  std::map<int64_t, int> blocks;  // offset -> order
  int64_t sum = 0;
  for (int order = 0; order <= max_order_; ++order) {
    for (const int64_t offset : free_[order]) {
      const Range* const range = RangeOf(offset);
      if (range == nullptr) return absl::StrCat("a free block at ", offset, " outside any range");
      const int64_t rest = offset - range->begin;
      const int64_t unit = rest / unit_bytes_;
      if (rest % OrderBytes(order) != 0 || unit + (int64_t{1} << order) > range->units) {
        return absl::StrCat("a block of order ", order, " at ", offset, " of its range");
      }
      const int64_t buddy = range->begin + (unit ^ int64_t{1} << order) * unit_bytes_;
      if (order < max_order_ && free_[order].count(buddy) != 0) {
        return absl::StrCat("free buddies of order ", order, " at ", offset, " and ", buddy);
      }
      if (!blocks.emplace(offset, order).second) return absl::StrCat("two blocks at ", offset);
      sum += OrderBytes(order);
    }
  }
  int64_t end = 0;
  for (const auto& [offset, order] : blocks) {
    if (offset < end) return absl::StrCat("the block at ", offset, " overlaps the one before");
    end = offset + OrderBytes(order);
  }
  if (sum != free_bytes_) return absl::StrCat(sum, " bytes in blocks, ", free_bytes_, " counted");
  return "";
}

}  // namespace headroom::kvstore
