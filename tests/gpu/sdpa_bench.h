// How fast cuDNN's plans are that attention of many rows is made of.
#ifndef HEADROOM_TESTS_GPU_SDPA_BENCH_H_
#define HEADROOM_TESTS_GPU_SDPA_BENCH_H_

#include <cstdint>

#include "kernels/wide_shape.h"

namespace headroom {

// Builds each plan of `shape` and prints what cuDNN chose, its workspace, how long building took
// and how fast it runs, or why there is none. `scratch` is device memory as Attend would get it;
// contents are finite.
void BenchSdpa(const kernels::WideShape& shape, uint8_t* scratch);

}  // namespace headroom

#endif  // HEADROOM_TESTS_GPU_SDPA_BENCH_H_
