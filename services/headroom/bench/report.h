// The bench's figures as a table and as JSON lines.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_REPORT_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_REPORT_H_

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/json.h"
#include "services/headroom/bench/costs.h"
#include "services/headroom/bench/engine.h"
#include "services/headroom/bench/work_item.h"

namespace headroom {

// What was measured where.
struct BenchSetup {
  std::string model;
  std::string device;
  bool gpu = false;
  int32_t threads = 0;
  int64_t chunk_tokens = 0;
  DeviceBudget budget;
  Ceilings known;              // of this card; 0 where nothing is
  double prepare_seconds = 0;  // until the first item: weights, keys, pinning
};

// All about one work item.
struct BenchResult {
  WorkItem item;
  Ceilings ceilings;        // measured
  Ceilings floor_ceilings;  // what the floor is reckoned with
  Costs costs;
  double floor_seconds = 0;
  std::vector<Measurement> measurements;
  // Device memory: what the arena gave out, of the KV pool what this item filled, and on a GPU all
  // that was in use beside the arena (contexts, code, libraries, from before this process too).
  int64_t peak_bytes = 0;
  int64_t beside_arena_bytes = 0;  // of that

  // Of the measurement of median length: lanes and waits belong to one and the same run.
  const Measurement& median() const;
  Spread seconds() const;
  // Of what was predicted before each measurement, and of how far each was off, as a part of what was measured:
  // positive if it took less. 0 where nothing was predicted.
  double predicted_seconds() const;
  double prediction_off() const;
  double tokens() const;  // that one measurement's seconds yield
  bool cut_off() const;   // a prefill that --stop-after ended
};

Json ToJson(const BenchSetup& setup);
Json ToJson(const BenchResult& result);

// Lines of text on stdout, and JSON objects, one a line, into a file.
class BenchReport {
 public:
  // With an empty path there is no file. Errors name it.
  static absl::StatusOr<BenchReport> Open(const std::string& json_path);
  BenchReport(BenchReport&& other) noexcept;
  BenchReport& operator=(BenchReport&&) = delete;
  ~BenchReport();

  // Where a planned item's keys will be attended, and how long a step will take: before it runs.
  static void PrintPlan(const WorkItem& item, double step_seconds,
                        const double (&lane_bytes)[kNumLanes]);

  absl::Status Begin(const BenchSetup& setup);
  // A chunk of a prefill: a JSON line, and now and then one of text.
  absl::Status AddChunk(const WorkItem& item, int64_t tokens, double seconds);
  absl::Status Add(const BenchResult& result);

 private:
  BenchReport() = default;
  absl::Status WriteJson(const Json& object);

  std::string json_path_;
  std::FILE* json_ = nullptr;
  double said_at_ = 0;  // seconds of the prefill of which something was last said
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_REPORT_H_
