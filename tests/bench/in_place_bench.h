// Decode attention over shared memory far larger than any cache, in Llama-3-8B's shape, and the reads
// that the same threads make there.
#ifndef HEADROOM_TESTS_BENCH_IN_PLACE_BENCH_H_
#define HEADROOM_TESTS_BENCH_IN_PLACE_BENCH_H_

#include <cstdint>
#include <vector>

#include "common/segment/mapped_region.h"
#include "kernels/attention.h"
#include "kernels/cpu/team.h"

namespace headroom::kernels {

struct InPlaceKernel {
  const char* name;
  void (*attend)(const AttendArgs&, CpuTeam&);
};
// Those that this processor has: for float32 products and for bfloat16.
std::vector<InPlaceKernel> InPlaceKernels();

class InPlaceBench {
 public:
  static constexpr int32_t kHeads = 8, kGroup = 4, kDim = 128, kExtent = 4096;
  struct Rate {  // GB/s, of the best run and of all of them
    double best = 0, mean = 0;
  };

  // `bytes` of keys, written by `team`, mapped as a store's are.
  InPlaceBench(CpuTeam& team, int64_t bytes);

  int64_t bytes() const { return bytes_; }
  Rate Reads(CpuTeam& team) const;
  // `rows` rows behind all the keys, kGroup queries a KV head each.
  Rate Attend(CpuTeam& team, int32_t rows, const InPlaceKernel& kernel) const;

 private:
  int64_t bytes_;
  MappedRegion region_;
  uint8_t* data_;
};

}  // namespace headroom::kernels

#endif  // HEADROOM_TESTS_BENCH_IN_PLACE_BENCH_H_
