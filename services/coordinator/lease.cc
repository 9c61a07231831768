#include "services/coordinator/lease.h"

#include <algorithm>

namespace headroom::coordinator {

int64_t ReservedTokens(const KvGeometry& geometry, int64_t have_tokens, int64_t final_tokens,
                       int64_t* extra_runs) {
  // Only whole blocks are sealed: the last, unfinished one stays in the tail.
  const int64_t sealed_in_the_end = FloorToBlock(final_tokens);
  int64_t runs = 0;
  while (have_tokens < sealed_in_the_end) {
    have_tokens += NextExtentTokens(geometry, have_tokens, sealed_in_the_end - have_tokens);
    ++runs;
  }
  if (extra_runs != nullptr) *extra_runs = runs;
  return have_tokens;
}

int64_t NextLeaseTokens(const KvGeometry& geometry, int64_t have_tokens, int64_t next_pos,
                        int64_t final_tokens, int64_t reserved_tokens) {
  const int64_t target = FloorToBlock(std::min(final_tokens, next_pos + kLeaseAheadTokens));
  if (have_tokens >= target) return 0;
  int64_t tokens = NextExtentTokens(geometry, have_tokens, target - have_tokens);
  while (tokens > kBlockTokens && tokens > reserved_tokens - have_tokens) tokens /= 2;
  return tokens;
}

}  // namespace headroom::coordinator
