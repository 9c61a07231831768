// Hands out runs of equal granules of one range of device memory: tails and resident copies.
//
// Pure bookkeeping over a bitmap made at start, so that allocating in the step loop costs no malloc.
// Next-fit over 64-granule words: a pool of 64 GiB in 32 KiB granules is 32,768 words, scanned in
// about 10 us at worst. Not thread-safe.
#ifndef HEADROOM_SERVICES_WORKER_KV_POOL_H_
#define HEADROOM_SERVICES_WORKER_KV_POOL_H_

#include <cstdint>
#include <vector>

namespace headroom {

class KvPool {
 public:
  // REQUIRES: granule_bytes > 0. What `bytes` holds beyond whole granules is not used.
  KvPool(uint8_t* base, int64_t bytes, int64_t granule_bytes);

  // A range of at least `bytes`, or nullptr if no free run is long enough.
  uint8_t* Allocate(int64_t bytes);
  // REQUIRES: `data` came from Allocate(bytes).
  void Free(uint8_t* data, int64_t bytes);

  int64_t capacity_bytes() const { return granules_ * granule_bytes_; }
  int64_t used_bytes() const { return used_ * granule_bytes_; }
  int64_t free_bytes() const { return capacity_bytes() - used_bytes(); }
  int64_t high_water_bytes() const { return high_water_ * granule_bytes_; }

 private:
  int64_t GranulesFor(int64_t bytes) const {
    return bytes / granule_bytes_ + (bytes % granule_bytes_ > 0 ? 1 : 0);
  }
  // First free run of `count` granules that begins in [begin, end), or -1.
  int64_t Find(int64_t begin, int64_t end, int64_t count) const;
  bool Used(int64_t granule) const { return words_[granule / 64] >> (granule % 64) & 1; }
  void Mark(int64_t begin, int64_t count, bool used);

  uint8_t* const base_;
  const int64_t granule_bytes_;
  const int64_t granules_;
  std::vector<uint64_t> words_;  // bit set: used
  int64_t next_ = 0;
  int64_t used_ = 0;
  int64_t high_water_ = 0;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_KV_POOL_H_
