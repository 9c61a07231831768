#include "services/coordinator/lease.h"

#include <algorithm>
#include <limits>

#include "common/checked_math.h"
#include "common/extent_limit.h"

namespace headroom::coordinator {
namespace {

// The capacity of the run after `have_tokens`. Where there are windows it hangs on `have_tokens` alone once
// LeadTokens() are there, not on how far steps have come when it is asked for.
int64_t RunTokens(const ExtentRules& rules, int64_t have_tokens, int64_t need_tokens) {
  if (rules.HasWindows()) need_tokens = std::min(need_tokens, rules.LeadTokens());
  return std::min(NextExtentTokens(rules.geometry, have_tokens, need_tokens),
                  MaxExtentTokens(rules.geometry, rules.windows));
}

}  // namespace

bool ExtentRules::HasWindows() const {
  return std::any_of(windows.begin(), windows.end(), [](int64_t window) { return window > 0; });
}

int64_t ReservedTokens(const ExtentRules& rules, int64_t have_tokens, int64_t final_tokens,
                       int64_t* extra_runs) {
  // Only whole blocks are sealed: the last, unfinished one stays in the tail.
  const int64_t sealed_in_the_end = FloorToBlock(final_tokens);
  int64_t runs = 0;
  while (have_tokens < sealed_in_the_end) {
    have_tokens += RunTokens(rules, have_tokens, sealed_in_the_end - have_tokens);
    ++runs;
  }
  if (extra_runs != nullptr) *extra_runs = runs;
  return have_tokens;
}

int64_t LeaseFrom(const ExtentRules& rules, int64_t known_tokens, int64_t committed_tokens) {
  if (!rules.HasWindows()) return known_tokens;
  return std::min(known_tokens, committed_tokens + rules.LeadTokens() - kLeaseAheadTokens);
}

int64_t NextLeaseTokens(const ExtentRules& rules, int64_t have_tokens, int64_t next_pos,
                        int64_t final_tokens, int64_t reserved_tokens) {
  const int64_t target = FloorToBlock(std::min(final_tokens, next_pos + kLeaseAheadTokens));
  if (have_tokens >= target) return 0;
  int64_t tokens = RunTokens(rules, have_tokens, target - have_tokens);
  while (tokens > kBlockTokens && tokens > reserved_tokens - have_tokens) tokens /= 2;
  return tokens;
}

int64_t MostHostBytes(const ExtentRules& rules, int64_t capacity_tokens) {
  int64_t tokens = 0;  // of one layer each
  for (int32_t layer = 0; layer < rules.geometry.num_layers; ++layer) {
    int64_t most = capacity_tokens;
    if (const int64_t window = WindowOf(rules.windows, layer); window > 0 && window < most) {
      // Kept is from the block on that the last sealed block's first row sees. Of three extents one is cut by
      // that position, one by the lead; and the short ones that a sequence begins with leave, one beside the
      // other, gaps in which none of full length fits.
      most = std::min(most, CeilToBlock(window) + 2 * kBlockTokens + rules.LeadTokens() +
                                3 * MaxExtentTokens(rules.geometry, rules.windows));
    }
    tokens += most;
  }
  return CheckedMul(tokens, rules.geometry.BytesPerTokenPerLayer())
      .value_or(std::numeric_limits<int64_t>::max());
}

}  // namespace headroom::coordinator
