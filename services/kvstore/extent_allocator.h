// Hands out byte ranges of the data file. Pure bookkeeping, no I/O.
//
// Extents of a geometry are one unit (a 64-token block of one layer) times a power of two, so a buddy
// system over units wastes nothing inside a range, whatever the number of heads; the unit need not be
// a power of two. Blocks are aligned in units from the beginning of a piece of kRegistrationBytes, so
// none crosses into the next. The smallest block that is large enough is taken, lowest offset first,
// which keeps large ones whole. Allocating, reserving and freeing take O(orders x log blocks).
//
// Not thread-safe.
#ifndef HEADROOM_SERVICES_KVSTORE_EXTENT_ALLOCATOR_H_
#define HEADROOM_SERVICES_KVSTORE_EXTENT_ALLOCATOR_H_

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <vector>

namespace headroom::kvstore {

class ExtentAllocator {
 public:
  // Ranges are unit_bytes << order, order in [0, max_order]. REQUIRES: unit_bytes > 0, max_order >= 0,
  // unit_bytes << max_order <= kRegistrationBytes.
  ExtentAllocator(int64_t unit_bytes, int max_order);

  // Makes [begin, begin + bytes) available; what is beyond whole units is not used. REQUIRES: it lies
  // within one piece [n, n + 1) x kRegistrationBytes, at whose beginning it begins, and no range of
  // that piece was added before.
  void AddRange(int64_t begin, int64_t bytes);

  // The offset of a free range, or nothing if none is large enough. REQUIRES: IsSize(bytes).
  std::optional<int64_t> Allocate(int64_t bytes);
  // Takes this very range. False, and nothing happens, if it is no range that Allocate() could return
  // or is not wholly free.
  bool Reserve(int64_t offset, int64_t bytes);
  // REQUIRES: the range was allocated or reserved, as a whole.
  void Free(int64_t offset, int64_t bytes);

  // Whether Allocate() knows ranges of this size.
  bool IsSize(int64_t bytes) const { return OrderOf(bytes).has_value(); }

  int64_t capacity_bytes() const { return capacity_bytes_; }
  int64_t free_bytes() const { return free_bytes_; }
  int64_t used_bytes() const { return capacity_bytes_ - free_bytes_; }

  // What contradicts itself, empty if nothing does: free blocks that overlap, leave their range, are
  // misaligned, could be merged, or do not add up. For tests; O(blocks).
  std::string CheckInvariants() const;

 private:
  struct Range {
    int64_t begin = 0;
    int64_t units = 0;  // 0: none added
  };

  std::optional<int> OrderOf(int64_t bytes) const;
  const Range* RangeOf(int64_t offset) const;
  int64_t OrderBytes(int order) const { return unit_bytes_ << order; }
  // Splits the free block at `offset` down to `order`, keeping free what lies beside `keep`, and
  // returns the offset of what is left: the block of that order that contains `keep`.
  int64_t Split(int64_t offset, int order, int to_order, int64_t keep);
  // Makes a block free and merges it with its free buddies.
  void Release(int64_t offset, int order);

  const int64_t unit_bytes_;
  const int max_order_;
  std::vector<Range> ranges_;             // by piece of kRegistrationBytes
  std::vector<std::set<int64_t>> free_;   // by order: offsets of free blocks
  int64_t capacity_bytes_ = 0;
  int64_t free_bytes_ = 0;
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_EXTENT_ALLOCATOR_H_
