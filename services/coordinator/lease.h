// How many extents a sequence holds ahead of need. Pure numbers.
//
// A lease is asked for over RPC, so it must be there before a step seals into it: as long as the
// next kLeaseAheadTokens positions fit, a store that is gone for seconds stops no step.
#ifndef HEADROOM_SERVICES_COORDINATOR_LEASE_H_
#define HEADROOM_SERVICES_COORDINATOR_LEASE_H_

#include <cstdint>

#include "common/kv_layout.h"

namespace headroom::coordinator {

inline constexpr int64_t kLeaseAheadTokens = 256;

// The capacity that a sequence has in the end if it now has `have_tokens` and its keys go up to
// `final_tokens`: what admission reserves. A multiple of 64, at least `have_tokens`.
// `extra_runs`, if given, receives how many runs that adds.
int64_t ReservedTokens(const KvGeometry& geometry, int64_t have_tokens, int64_t final_tokens,
                       int64_t* extra_runs = nullptr);

// The capacity of the next run to ask for, or 0 if none is needed yet: positions up to `next_pos` +
// kLeaseAheadTokens, but not beyond `final_tokens`, must have a place. Never more than is left of
// `reserved_tokens`, so that a sequence takes no more than it was admitted with.
int64_t NextLeaseTokens(const KvGeometry& geometry, int64_t have_tokens, int64_t next_pos,
                        int64_t final_tokens, int64_t reserved_tokens);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_LEASE_H_
