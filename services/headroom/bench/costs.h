// What prefill and decode have to move and to compute, and the least time that takes. Pure numbers.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_

#include <cstdint>
#include <vector>

#include "services/worker/model/model_config.h"

namespace headroom {

// What the machine can do, each the best of several measurements; 0: not measured.
struct Ceilings {
  double gemm_flops = 0;       // FLOP/s of the linear layers' kernel at wide shapes
  double attention_flops = 0;  // FLOP/s of a prefill's attention; on the CPU the GEMM's
  double read_bytes = 0;       // bytes/s at which the device reads its memory
  double copy_bytes = 0;       // bytes/s of the copy stream, mapped memory to arena, large pieces
  double copy_256kib_bytes = 0;  // ... in pieces of that size (GPU)
  double copy_1mib_bytes = 0;
  double copy_4mib_bytes = 0;
  double copy_back_bytes = 0;  // bytes/s from the arena to mapped memory (GPU)
  double copy_both_bytes = 0;  // ... both ways at once, in sum
  double host_read_bytes = 0;  // bytes/s at which this process's threads read host memory
  double both_links_bytes = 0;  // bytes/s of these reads and of copies to the device at once, in sum (GPU)

  friend bool operator==(const Ceilings&, const Ceilings&) = default;
};

// Each of them by its name in JSON, where "_per_second" follows.
struct CeilingField {
  const char* name;
  double Ceilings::*value;
};
inline constexpr CeilingField kCeilingFields[] = {
    {"gemm_flops", &Ceilings::gemm_flops},
    {"attention_flops", &Ceilings::attention_flops},
    {"read_bytes", &Ceilings::read_bytes},
    {"copy_bytes", &Ceilings::copy_bytes},
    {"copy_256kib_bytes", &Ceilings::copy_256kib_bytes},
    {"copy_1mib_bytes", &Ceilings::copy_1mib_bytes},
    {"copy_4mib_bytes", &Ceilings::copy_4mib_bytes},
    {"copy_back_bytes", &Ceilings::copy_back_bytes},
    {"copy_both_bytes", &Ceilings::copy_both_bytes},
    {"host_read_bytes", &Ceilings::host_read_bytes},
    {"both_links_bytes", &Ceilings::both_links_bytes},
};

// A floor uses the larger where a ceiling was measured twice, so that a weak probe flatters nobody.
Ceilings Larger(const Ceilings& a, const Ceilings& b);

// Of one prefill, or of one decode step.
struct Costs {
  double linear_flops = 0;
  double attention_flops = 0;
  double weight_bytes = 0;  // read
  double kv_bytes = 0;      // read by attention
  double copied_bytes = 0;    // by the copy stream
  double in_place_bytes = 0;  // of kv_bytes, those that the host's threads read
};

// `context_tokens` from an empty cache, in one chunk or many; logits of the last token only.
Costs PrefillCosts(const ModelConfig& config, int64_t context_tokens);
// One step of `batch` sequences at `context_tokens` (the mean over the measurement) each.
Costs DecodeCosts(const ModelConfig& config, double context_tokens, int64_t batch);

// Linear FLOPs at the GEMM's rate plus attention FLOPs at attention's.
double PrefillFloorSeconds(const Costs& costs, const Ceilings& ceilings);
// (Weights + keys and values) at the read rate, or the linear FLOPs where a large batch makes them
// longer; plus what is copied at the copy rate: on the CPU device the same processors do it all.
double DecodeFloorSeconds(const Costs& costs, const Ceilings& ceilings);
// On a GPU three links run side by side, and the longest counts: device memory (weights, or their
// FLOPs where those take longer, and all keys that are attended there, fetched ones too), the copies,
// and the host's reads of keys in place. Copies and these reads come from one memory: together they
// take no less than it needs for both at once, where that was measured.
double GpuDecodeFloorSeconds(const Costs& costs, const Ceilings& ceilings);

// Of several measurements of one thing. REQUIRES: not empty.
struct Spread {
  double median = 0;
  double least = 0;
  double most = 0;
};
Spread SpreadOf(std::vector<double> values);

// What `percent` of a hundred do not exceed. REQUIRES: not empty, sorted.
double Percentile(const std::vector<double>& sorted, size_t percent);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_COSTS_H_
