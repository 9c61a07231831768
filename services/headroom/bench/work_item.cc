#include "services/headroom/bench/work_item.h"

#include <random>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "common/status.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

using Kind = WorkItem::Kind;

struct NamedSet {
  absl::string_view name;
  std::vector<WorkItem> items;
};

// Predictions against measurements, at the --gpu-memory that is given.
constexpr absl::string_view kPlanSet = "plan";

const std::vector<NamedSet>& Sets() {
  static const auto& sets = *new std::vector<NamedSet>{
      {"default",
       {{Kind::kPrefill, 2048, Lane::kResident, 1},
        {Kind::kDecode, 1024, Lane::kResident, 1},
        {Kind::kDecode, 7168, Lane::kFetched, 1},
        {Kind::kDecode, 7168, Lane::kInPlace, 1},
        {Kind::kPrefill, 7168, Lane::kFetched, 1}}},
      {"prefill",
       {{Kind::kPrefill, 512, Lane::kResident, 1},
        {Kind::kPrefill, 2048, Lane::kResident, 1},
        {Kind::kPrefill, 2048, Lane::kFetched, 1},
        {Kind::kPrefill, 7168, Lane::kFetched, 1}}},
      {"decode",
       {{Kind::kDecode, 1024, Lane::kResident, 1},
        {Kind::kDecode, 1024, Lane::kResident, 4},
        {Kind::kDecode, 1024, Lane::kResident, 16},
        {Kind::kDecode, 7168, Lane::kResident, 1},
        {Kind::kDecode, 7168, Lane::kFetched, 1},
        {Kind::kDecode, 7168, Lane::kInPlace, 1}}},
      // For a GPU: Llama-3-8B's geometry in four minutes.
      {"quick",
       {{Kind::kDecode, 1024, Lane::kResident, 1},
        {Kind::kDecode, 131072, Lane::kResident, 1},
        {Kind::kDecode, 4096, Lane::kResident, 16},
        {Kind::kPrefill, 32768, Lane::kResident, 1}}},
      {"128k",
       {{Kind::kDecode, 131072, Lane::kResident, 1},
        {Kind::kDecode, 131072, Lane::kFetched, 1},
        {Kind::kPrefill, 131072, Lane::kFetched, 1},
        {Kind::kBeside, 131072, Lane::kFetched, 1}}},
      {"million",
       {{Kind::kPrefill, 1000000, Lane::kFetched, 1, /*planned=*/false, /*once=*/true},
        {Kind::kDecode, 1000000, Lane::kFetched, 1, /*planned=*/false, /*once=*/true},
        {Kind::kDecode, 1000000, Lane::kFetched, 1, /*planned=*/true, /*once=*/true}}},
  };
  return sets;
}

absl::StatusOr<int64_t> Number(absl::string_view item, absl::string_view what,
                               absl::string_view text, int64_t low, int64_t high) {
  int64_t value;
  if (!absl::SimpleAtoi(text, &value) || value < low || value > high) {
    return absl::InvalidArgumentError(absl::StrCat("work item '", item, "': ", what, " '", text,
                                                   "', expected ", low, " to ", high));
  }
  return value;
}

}  // namespace

absl::string_view LaneName(Lane lane) {
  return coordinator::LaneName(static_cast<coordinator::Lane>(lane));
}

std::string WhereName(const WorkItem& item) {
  if (!item.planned) return std::string(LaneName(item.lane));
  if (item.placement.automatic) return "auto";
  std::vector<std::string> shares;
  for (int lane = 0; lane < coordinator::kNumLanes; ++lane) {
    if (item.placement.shares[lane] == 0) continue;
    shares.push_back(absl::StrCat(LaneName(static_cast<Lane>(lane)), "=",
                                  item.placement.shares[lane]));
  }
  return absl::StrJoin(shares, ",");
}

std::string WorkItem::ToString() const {
  const std::string where = WhereName(*this);
  if (kind == Kind::kPrefill) return absl::StrCat("prefill:", context_tokens, ":", where);
  if (kind == Kind::kBeside) return absl::StrCat("beside:", context_tokens, ":", where);
  if (kind == Kind::kQuestion) return absl::StrCat("question:", context_tokens, ":", where);
  return absl::StrCat("decode:", context_tokens, ":", where, ":", batch);
}

absl::StatusOr<WorkItem> ParseWorkItem(absl::string_view text) {
  const std::vector<absl::string_view> parts = absl::StrSplit(text, ':');
  const auto wrong = [&](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("work item '", text, "': ", what));
  };
  WorkItem item;
  if (parts[0] == "prefill") {
    item.kind = Kind::kPrefill;
  } else if (parts[0] == "beside") {
    item.kind = Kind::kBeside;
  } else if (parts[0] == "question") {
    item.kind = Kind::kQuestion;
  } else if (parts[0] != "decode") {
    return wrong("expected prefill:CONTEXT[:LANE], beside:CONTEXT[:LANE], "
                 "decode:CONTEXT[:LANE][:BATCH] or question:CONTEXT[:LANE]");
  }
  if (parts.size() < 2) return wrong("no context length");
  HEADROOM_ASSIGN_OR_RETURN(item.context_tokens,
                            Number(text, "context", parts[1], 1, kMaxBenchContextTokens));
  if (parts.size() > 2) {
    if (parts[2] == LaneName(Lane::kFetched)) {
      item.lane = Lane::kFetched;
    } else if (parts[2] == LaneName(Lane::kInPlace)) {
      item.lane = Lane::kInPlace;
    } else if (parts[2] == "auto") {
      item.planned = true;
    } else if (absl::StrContains(parts[2], '=')) {
      item.planned = true;
      absl::StatusOr<coordinator::PlacementSpec> placement = coordinator::ParsePlacement(parts[2]);
      if (!placement.ok()) return wrong(placement.status().message());
      item.placement = *std::move(placement);
    } else if (parts[2] != LaneName(Lane::kResident)) {
      return wrong(absl::StrCat("lane '", parts[2], "', expected resident, fetched, in-place, auto or "
                                "shares such as resident=0.5,fetched=0.5"));
    }
    if (item.prefills() && item.planned) return wrong("no prefill is planned");
    if (item.prefills() && item.lane == Lane::kInPlace) {
      return wrong("a prefill has too many rows to be attended to in place");
    }
  }
  if (parts.size() > 3) {
    if (item.kind != Kind::kDecode) return wrong("only a decode has a batch");
    HEADROOM_ASSIGN_OR_RETURN(const int64_t batch,
                              Number(text, "batch", parts[3], 1, kMaxDecodeRows));
    item.batch = static_cast<int32_t>(batch);
  }
  if (parts.size() > 4) return wrong(absl::StrCat("'", parts[4], "' is one part too many"));
  return item;
}

absl::StatusOr<std::vector<WorkItem>> WorkItemsOf(absl::string_view set, uint64_t seed) {
  if (set == kPlanSet) {
    std::mt19937_64 random(seed);
    std::vector<WorkItem> items;
    for (const int64_t context : {int64_t{1024}, int64_t{7168},
                                  std::uniform_int_distribution<int64_t>(512, 8000)(random)}) {
      items.push_back({Kind::kDecode, context, Lane::kResident, 1, /*planned=*/true});
    }
    return items;
  }
  for (const NamedSet& named : Sets()) {
    if (named.name == set) return named.items;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--set '", set, "', expected one of ",
      absl::StrJoin(Sets(), ", ", [](std::string* out, const NamedSet& named) {
        absl::StrAppend(out, named.name);
      }),
      ", ", kPlanSet));
}

}  // namespace headroom
