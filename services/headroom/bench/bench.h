// `headroom bench`: prefill and decode of a model in one process, beside what the machine can do.
//
// The ceilings (GEMM, attention, reads, copies) are measured in the same run, with the same threads,
// right before and right after each item; the larger of the two goes into the item's floor, or 0.95
// of what the card is known for where that is more. The executor is the worker's own; there is no
// gRPC, no tokenizer and no store: keys lie in a private mapping. Those of a decode item are
// generated, not prefilled.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/lane_costs.h"
#include "services/headroom/flag_sources.h"

namespace headroom {

struct BenchOptions {
  // One of the three: a model's folder, or a config.json or a geometry by name (geometries.h), whose
  // weights are drawn from `seed`.
  std::string model_dir;
  std::string random_weights;
  std::string geometry;
  std::string device = "cpu";  // "auto", "cpu" or "cuda", as the worker takes it
  // Threads of the CPU device, and those that read and attend in host memory; 0: as many as this
  // process may run on.
  int32_t threads = 0;
  // Device memory for everything but the ceilings' probe; 0: the weights and 2 GiB on the CPU
  // device, on a GPU what is free less 1 GiB and the probe.
  int64_t gpu_memory_bytes = 0;
  // What to measure, as ParseWorkItem() takes it. Empty: the items of `set`.
  std::vector<std::string> work;
  std::string set = "default";  // see work_item.h
  uint64_t seed = 0;            // draws what a set draws, and random weights
  // Measurements of each item, at least kMinBenchRepeats; of those of the set `million` one.
  int32_t repeat = 5;
  // Longest chunk of a prefill, beside what the memory allows; 0: 1,024 on the CPU device, 8,192 on
  // a GPU.
  int64_t chunk_tokens = 0;
  // Seconds after the start from which on no chunk of a prefill begins: what was prefilled until then is
  // what is reported. 0: never.
  int64_t stop_after_seconds = 0;
  // If set: one JSON object per line, flushed line by line; of a prefill one for each chunk, too.
  std::string json_path;
  std::string trace_path;
};

inline constexpr int32_t kMinBenchRepeats = 3;
inline constexpr int32_t kMaxBenchRepeats = 1000;
inline constexpr int64_t kMaxBenchStopAfterSeconds = 1000000;

// Prints to stdout, errors to stderr. Returns the exit status: 0; 1 if something failed; 2 for options or a model that
// are wrong, or do not fit.
int RunBench(const BenchOptions& options, const cli::FlagSources& sources = {});

// What decode steps of the model cost in each lane, with a store's pool in this process.
absl::StatusOr<LaneCosts> MeasureLaneCosts(const BenchOptions& options);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_BENCH_H_
