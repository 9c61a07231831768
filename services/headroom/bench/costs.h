// What prefill and decode have to move and to compute, and the least time that takes. Pure numbers.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_

#include <cstdint>
#include <vector>

#include "services/worker/model/model_config.h"

namespace headroom {

// What the machine can do, each the best of several measurements.
struct Ceilings {
  double gemm_flops = 0;       // FLOP/s of the linear layers' kernel at wide shapes
  double read_bytes = 0;       // bytes/s that all threads read
  double copy_bytes = 0;       // bytes/s of the copy stream, mapped memory to arena

  friend bool operator==(const Ceilings&, const Ceilings&) = default;
};

// A floor uses the larger where a ceiling was measured twice, so that a weak probe flatters nobody.
Ceilings Larger(const Ceilings& a, const Ceilings& b);

// Of one prefill, or of one decode step.
struct Costs {
  double linear_flops = 0;
  double attention_flops = 0;
  double weight_bytes = 0;  // read
  double kv_bytes = 0;      // read by attention
  double copied_bytes = 0;  // by the copy stream
};

// `context_tokens` from an empty cache, in one chunk or many; logits of the last token only.
Costs PrefillCosts(const ModelConfig& config, int64_t context_tokens);
// One step of `batch` sequences at `context_tokens` (the mean over the measurement) each.
Costs DecodeCosts(const ModelConfig& config, double context_tokens, int64_t batch);

// Linear and attention FLOPs, both at the GEMM's rate.
double PrefillFloorSeconds(const Costs& costs, const Ceilings& ceilings);
// (Weights + keys and values) at the read rate, or the linear FLOPs where a large batch makes them
// longer; plus what is copied at the copy rate.
double DecodeFloorSeconds(const Costs& costs, const Ceilings& ceilings);

// Of several measurements of one thing. REQUIRES: not empty.
struct Spread {
  double median = 0;
  double least = 0;
  double most = 0;
};
Spread SpreadOf(std::vector<double> values);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_
