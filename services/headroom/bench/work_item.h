// What `headroom bench` is asked to measure, as text and as numbers.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_WORK_ITEM_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_WORK_ITEM_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/coordinator/placement/placement.h"
#include "services/worker/step.h"

namespace headroom {

inline constexpr int64_t kMaxBenchContextTokens = int64_t{1} << 24;
inline constexpr int64_t kQuestionTokens = 30;
inline constexpr int64_t kBesideContextTokens = 4096;

struct WorkItem {
  // kQuestion: kQuestionTokens at once behind a context, and the first token of the answer.
  // kBeside: another sequence's tokens, behind kBesideContextTokens, while the context is prefilled.
  enum class Kind { kPrefill, kDecode, kQuestion, kBeside };

  Kind kind = Kind::kDecode;
  int64_t context_tokens = 0;
  Lane lane = Lane::kResident;  // of every head
  int32_t batch = 1;            // sequences of a decode step
  bool planned = false;         // not in `lane`, but as `placement` says
  // Measured once and, a decode, over few steps, whatever is asked for: what takes minutes.
  bool once = false;
  coordinator::PlacementSpec placement = {};  // of a planned item: the planner's choice, or shares

  bool prefills() const { return kind == Kind::kPrefill || kind == Kind::kBeside; }
  // The text that ParseWorkItem() takes, which says nothing of `once`.
  std::string ToString() const;
  friend bool operator==(const WorkItem&, const WorkItem&) = default;
};

absl::string_view LaneName(Lane lane);
std::string WhereName(const WorkItem& item);  // the item's LANE

// prefill:CONTEXT[:LANE], beside:CONTEXT[:LANE], decode:CONTEXT[:LANE][:BATCH] or
// question:CONTEXT[:LANE]; the last two also with `auto` as LANE, or shares as --placement has them
// (resident=0.5,fetched=0.5): planned.
// INVALID_ARGUMENT names the part that is wrong.
absl::StatusOr<WorkItem> ParseWorkItem(absl::string_view text);

// The items of a named set; those of `plan` hold a context drawn by `seed`. INVALID_ARGUMENT lists the
// names there are.
absl::StatusOr<std::vector<WorkItem>> WorkItemsOf(absl::string_view set, uint64_t seed);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_WORK_ITEM_H_
