#include "services/worker/kv_pool.h"

#include <algorithm>
#include <bit>

namespace headroom {

KvPool::KvPool(uint8_t* base, int64_t bytes, int64_t granule_bytes)
    : base_(base),
      granule_bytes_(granule_bytes),
      granules_(bytes / granule_bytes),
      words_((granules_ + 63) / 64, 0) {}

int64_t KvPool::Find(int64_t begin, int64_t end, int64_t count) const {
  int64_t run = 0;
  for (int64_t granule = begin; granule < granules_;) {
    if (run == 0 && granule >= end) return -1;
    if (granule % 64 == 0 && words_[granule / 64] == ~uint64_t{0}) {
      run = 0;
      granule += 64;
      continue;
    }
    run = Used(granule) ? 0 : run + 1;
    ++granule;
    if (run == count) return granule - count;
  }
  return -1;
}

void KvPool::Mark(int64_t begin, int64_t count, bool used) {
  for (int64_t granule = begin; granule < begin + count;) {
    const int64_t bit = granule % 64;
    const int64_t bits = std::min<int64_t>(64 - bit, begin + count - granule);
    const uint64_t mask = (bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1) << bit;
    words_[granule / 64] = used ? words_[granule / 64] | mask : words_[granule / 64] & ~mask;
    granule += bits;
  }
}

uint8_t* KvPool::Allocate(int64_t bytes) {
  const int64_t count = GranulesFor(bytes);
  if (count <= 0 || count > granules_ - used_) return nullptr;
  int64_t at = Find(next_, granules_, count);
  if (at < 0) at = Find(0, next_, count);
  if (at < 0) return nullptr;
  Mark(at, count, true);
  next_ = at + count == granules_ ? 0 : at + count;
  used_ += count;
  high_water_ = std::max(high_water_, used_);
  return base_ + at * granule_bytes_;
}

void KvPool::Free(uint8_t* data, int64_t bytes) {
  const int64_t count = GranulesFor(bytes);
  Mark((data - base_) / granule_bytes_, count, false);
  used_ -= count;
}

}  // namespace headroom
