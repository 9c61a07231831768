#include "services/coordinator/placement/placement.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/status.h"

namespace headroom::coordinator {
namespace {

// Shares are typed by people: 0.333 three times is meant to be all.
constexpr double kShareSlack = 1e-6;

// The lanes of one head from its oldest positions to its newest, and where each ends.
using HeadRule = std::vector<std::pair<Lane, int64_t>>;

void AppendRanges(const HeadRule& rule, int32_t begin, int32_t end, std::vector<LaneRange>& out) {
  if (begin >= end) return;
  int64_t first_pos = 0;
  for (const auto& [lane, end_pos] : rule) {
    if (end_pos <= first_pos) continue;
    out.push_back({lane, begin, end, first_pos, end_pos});
    first_pos = end_pos;
  }
}

// Neighbouring heads under the same rule become one set of ranges.
std::vector<LaneRange> ToRanges(const std::vector<HeadRule>& heads) {
  std::vector<LaneRange> ranges;
  for (size_t begin = 0, end; begin < heads.size(); begin = end) {
    end = begin + 1;
    while (end < heads.size() && heads[end] == heads[begin]) ++end;
    AppendRanges(heads[begin], static_cast<int32_t>(begin), static_cast<int32_t>(end), ranges);
  }
  return ranges;
}

const SequenceShape* Longest(const std::vector<SequenceShape>& sequences) {
  const SequenceShape* longest = nullptr;
  for (const SequenceShape& sequence : sequences) {
    if (longest == nullptr || sequence.tokens > longest->tokens) longest = &sequence;
  }
  return longest;
}

// The border nearest to `share` of the sequence's tokens from `begin` on: 0, where a run begins, or kNoEnd
// for the end. Of two that are as near, the lower.
int64_t NearestBorder(const SequenceShape* sequence, double share, int64_t begin = 0) {
  if (sequence == nullptr) return share < 0.5 ? 0 : kNoEnd;
  const double distance_to_end = share * static_cast<double>(sequence->tokens - begin);
  const double wanted = static_cast<double>(begin) + distance_to_end;
  int64_t nearest = 0;
  double distance = distance_to_end;
  for (const RunShape& run : sequence->runs) {
    if (run.first_pos >= sequence->tokens) break;
    const double away = std::abs(static_cast<double>(run.first_pos) - wanted);
    if (away >= distance) continue;
    nearest = run.first_pos;
    distance = away;
  }
  return static_cast<double>(sequence->tokens) - wanted < distance ? kNoEnd : nearest;
}

// Bytes of one head of one layer that runs from `cut` on take, over all sequences.
int64_t HeadBytesFrom(const KvGeometry& geometry, const std::vector<SequenceShape>& sequences,
                      int64_t cut) {
  int64_t tokens = 0;
  for (const SequenceShape& sequence : sequences) {
    for (const RunShape& run : sequence.runs) {
      if (run.first_pos >= cut) tokens += run.capacity_tokens;
    }
  }
  return tokens * geometry.BytesPerTokenPerHead();
}

// The sequences with the runs that are read in a layer.
std::vector<SequenceShape> SeenIn(const std::vector<SequenceShape>& sequences,
                                  const LayerWindows& windows, int32_t layer) {
  std::vector<SequenceShape> seen = sequences;
  for (SequenceShape& sequence : seen) {
    const int64_t first_key = FirstKey(windows, layer, sequence.tokens);
    std::erase_if(sequence.runs, [first_key](const RunShape& run) {
      return run.first_pos + run.capacity_tokens <= first_key;
    });
  }
  return seen;
}

// What one layer can hold, in rising order of bytes: level k has k / borders whole heads resident
// and of the next one the runs from its (k % borders)-th newest border on.
class LayerLevels {
 public:
  LayerLevels(const KvGeometry& geometry, const std::vector<SequenceShape>& sequences)
      : num_kv_heads_(geometry.num_kv_heads) {
    std::set<int64_t> borders;
    for (const SequenceShape& sequence : sequences) {
      for (const RunShape& run : sequence.runs) borders.insert(run.first_pos);
    }
    cuts_.push_back(kNoEnd);
    cuts_.insert(cuts_.end(), borders.rbegin(), borders.rend());
    for (const int64_t cut : cuts_) bytes_.push_back(HeadBytesFrom(geometry, sequences, cut));
  }

  int64_t count() const { return num_kv_heads_ * per_head() + 1; }
  int64_t Bytes(int64_t level) const {
    if (per_head() == 0) return 0;
    return level / per_head() * bytes_.back() + bytes_[level % per_head()];
  }
  std::vector<HeadRule> Heads(int64_t level) const {
    const int64_t whole = per_head() == 0 ? 0 : level / per_head();
    std::vector<HeadRule> heads(num_kv_heads_, HeadRule{{Lane::kFetched, kNoEnd}});
    std::fill(heads.begin(), heads.begin() + whole, HeadRule{{Lane::kResident, kNoEnd}});
    if (whole < num_kv_heads_ && per_head() > 0 && level % per_head() > 0) {
      heads[whole] = {{Lane::kFetched, cuts_[level % per_head()]}, {Lane::kResident, kNoEnd}};
    }
    return heads;
  }

 private:
  int64_t per_head() const { return static_cast<int64_t>(cuts_.size()) - 1; }

  const int64_t num_kv_heads_;
  std::vector<int64_t> cuts_;   // kNoEnd, then borders from the newest to the oldest
  std::vector<int64_t> bytes_;  // of one head from that cut on
};

// Moves (1 - fetched_share) of what `heads` have fetched to the lane in place: the last heads first,
// and of the one that is cut the oldest positions.
void ShareFetched(double fetched_share, const SequenceShape* longest, int64_t first_key,
                  std::vector<HeadRule>& heads) {
  const int64_t end = longest == nullptr ? 0 : longest->tokens;
  const auto tokens = static_cast<double>(end - first_key);
  const auto fetched = [end, first_key](const HeadRule& rule) {
    return rule[0].first == Lane::kFetched
               ? static_cast<double>(std::max<int64_t>(0, std::min(rule[0].second, end) - first_key))
               : 0.0;
  };
  double left = 0;
  for (const HeadRule& rule : heads) left += (1 - fetched_share) * fetched(rule);
  for (auto rule = heads.rbegin(); rule != heads.rend() && left > 0; ++rule) {
    const double of_head = fetched(*rule);
    if (of_head <= 0) continue;
    const int64_t border = NearestBorder(longest, std::min(left, of_head) / tokens, first_key);
    left -= of_head;
    if (border == 0) continue;
    const int64_t end = (*rule)[0].second;
    rule->insert(rule->begin(), {Lane::kInPlace, std::min(border, end)});
  }
}

int64_t LayerResidentBytes(const KvGeometry& geometry, const Placement& placement,
                           const std::vector<SequenceShape>& sequences,
                           const LayerWindows& windows, int32_t layer) {
  const std::vector<SequenceShape> seen = SeenIn(sequences, windows, layer);
  int64_t bytes = 0;
  for (const LaneRange& range : placement.layers[layer]) {
    if (range.lane != Lane::kResident) continue;
    bytes += (range.kv_head_end - range.kv_head_begin) *
             (HeadBytesFrom(geometry, seen, range.first_pos) -
              HeadBytesFrom(geometry, seen, range.end_pos));
  }
  return bytes;
}

// PlaceByBudget() of the layers that have the window of the first of them.
void PlaceAlike(const KvGeometry& geometry, int64_t budget_bytes, double fetched_share,
                const std::vector<SequenceShape>& sequences, const LayerWindows& windows,
                const std::vector<int32_t>& layers, Placement& placement) {
  const std::vector<SequenceShape> seen = SeenIn(sequences, windows, layers[0]);
  const SequenceShape* const longest = Longest(seen);
  const int64_t first_key =
      longest == nullptr ? 0 : FirstKey(windows, layers[0], longest->tokens);
  const auto num_layers = static_cast<int64_t>(layers.size());
  const LayerLevels levels(geometry, seen);
  const int64_t per_layer = std::max<int64_t>(0, budget_bytes) / num_layers;
  int64_t level = 0;
  for (int64_t low = 0, high = levels.count() - 1; low <= high;) {
    const int64_t middle = low + (high - low) / 2;
    if (levels.Bytes(middle) <= per_layer) {
      level = middle;
      low = middle + 1;
    } else {
      high = middle - 1;
    }
  }
  // What dividing left over may lift some of the layers by one border.
  int64_t lifted = 0;
  if (level + 1 < levels.count()) {
    const int64_t left = budget_bytes - num_layers * levels.Bytes(level);
    lifted = std::max<int64_t>(0, left) / (levels.Bytes(level + 1) - levels.Bytes(level));
  }
  for (int64_t i = 0; i < num_layers; ++i) {
    std::vector<HeadRule> heads = levels.Heads(i < lifted ? level + 1 : level);
    ShareFetched(fetched_share, longest, first_key, heads);
    placement.layers[layers[i]] = ToRanges(heads);
  }
}

}  // namespace

int64_t FirstKey(const LayerWindows& windows, int32_t layer, int64_t tokens) {
  const int64_t window = WindowOf(windows, layer);
  return window == 0 || tokens < window ? 0 : FloorToBlock(tokens - window + 1);
}

const char* LaneName(Lane lane) {
  switch (lane) {
    case Lane::kResident:
      return "resident";
    case Lane::kFetched:
      return "fetched";
    case Lane::kInPlace:
      return "in-place";
  }
  return "unknown";
}

Lane Placement::LaneOf(int32_t layer, int32_t kv_head, int64_t extent_first_pos) const {
  for (const LaneRange& range : layers[layer]) {
    if (kv_head >= range.kv_head_begin && kv_head < range.kv_head_end &&
        extent_first_pos >= range.first_pos && extent_first_pos < range.end_pos) {
      return range.lane;
    }
  }
  return Lane::kFetched;
}

absl::Status CheckShares(const std::array<double, kNumLanes>& shares) {
  double sum = 0;
  for (int lane = 0; lane < kNumLanes; ++lane) {
    if (!(shares[lane] >= 0 && shares[lane] <= 1)) {
      return absl::InvalidArgumentError(absl::StrCat("the share of ",
                                                     LaneName(static_cast<Lane>(lane)), " is ",
                                                     shares[lane], ", expected 0 to 1"));
    }
    sum += shares[lane];
  }
  if (std::abs(sum - 1) > kShareSlack) {
    return absl::InvalidArgumentError(absl::StrCat("the shares sum to ", sum, ", expected 1"));
  }
  return absl::OkStatus();
}

absl::StatusOr<PlacementSpec> ParsePlacement(absl::string_view text) {
  PlacementSpec spec;
  if (text == "auto") return spec;
  spec.automatic = false;
  const auto lane_of = [](absl::string_view name) {
    for (int lane = 0; lane < kNumLanes; ++lane) {
      if (name == LaneName(static_cast<Lane>(lane))) return lane;
    }
    return -1;
  };
  if (const int lane = lane_of(text); lane >= 0) {
    spec.shares[lane] = 1;
    return spec;
  }
  std::array<bool, kNumLanes> seen = {};
  for (const absl::string_view part : absl::StrSplit(text, ',')) {
    const std::pair<absl::string_view, absl::string_view> entry =
        absl::StrSplit(part, absl::MaxSplits('=', 1));
    const int lane = lane_of(entry.first);
    if (lane < 0 || !absl::SimpleAtod(entry.second, &spec.shares[lane])) {
      return absl::InvalidArgumentError(
          absl::StrCat("placement '", text, "': '", part,
                       "' is not LANE=SHARE; expected auto, resident, fetched, in-place, or shares "
                       "such as resident=0.5,fetched=0.5"));
    }
    if (std::exchange(seen[lane], true)) {
      return absl::InvalidArgumentError(
          absl::StrCat("placement '", text, "' names ", entry.first, " twice"));
    }
  }
  if (absl::Status status = CheckShares(spec.shares); !status.ok()) {
    return Annotate(status, absl::StrCat("placement '", text, "'"));
  }
  return spec;
}

Placement PlaceByShares(const KvGeometry& geometry, const PlacementSpec& spec,
                        const std::vector<SequenceShape>& sequences) {
  const SequenceShape* const longest = Longest(sequences);
  const double num_heads = geometry.num_kv_heads;
  // The heads lie on a line [0, num_heads), cut into resident, fetched and in-place parts.
  const double resident_end = spec.share(Lane::kResident) * num_heads;
  const double fetched_end = resident_end + spec.share(Lane::kFetched) * num_heads;
  const auto part_of_head = [](int32_t head, double begin, double end) {
    const double part = std::min<double>(head + 1, end) - std::max<double>(head, begin);
    return part < kShareSlack ? 0.0 : part > 1 - kShareSlack ? 1.0 : part;
  };
  std::vector<HeadRule> heads;
  for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
    const double resident = part_of_head(head, 0, resident_end);
    const double fetched = part_of_head(head, resident_end, fetched_end);
    const double in_place = std::max(0.0, 1 - resident - fetched);
    const int64_t in_place_end = in_place < kShareSlack ? 0 : NearestBorder(longest, in_place);
    const int64_t local_begin =
        resident < kShareSlack ? kNoEnd : NearestBorder(longest, 1 - resident);
    HeadRule rule = {{Lane::kInPlace, fetched + resident < kShareSlack ? kNoEnd : in_place_end},
                     {Lane::kFetched, local_begin},
                     {Lane::kResident, kNoEnd}};
    // Without a fetched part the two others meet at one border.
    if (fetched < kShareSlack) rule[1].second = rule[0].second;
    heads.push_back(std::move(rule));
  }
  Placement placement;
  placement.layers.assign(geometry.num_layers, ToRanges(heads));
  return placement;
}

Placement PlaceByBudget(const KvGeometry& geometry, int64_t budget_bytes, double fetched_share,
                        const std::vector<SequenceShape>& sequences, const LayerWindows& windows) {
  // By window; those without one last.
  std::map<int64_t, std::vector<int32_t>> alike;
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    const int64_t window = WindowOf(windows, layer);
    alike[window == 0 ? kNoEnd : window].push_back(layer);
  }
  Placement placement;
  placement.layers.resize(geometry.num_layers);
  for (const auto& [window, layers] : alike) {
    PlaceAlike(geometry, budget_bytes, fetched_share, sequences, windows, layers, placement);
    for (const int32_t layer : layers) {
      budget_bytes -= LayerResidentBytes(geometry, placement, sequences, windows, layer);
    }
  }
  return placement;
}

int64_t ResidentBytes(const KvGeometry& geometry, const Placement& placement,
                      const std::vector<SequenceShape>& sequences, const LayerWindows& windows) {
  int64_t bytes = 0;
  for (int32_t layer = 0; layer < static_cast<int32_t>(placement.layers.size()); ++layer) {
    bytes += LayerResidentBytes(geometry, placement, sequences, windows, layer);
  }
  return bytes;
}

}  // namespace headroom::coordinator
