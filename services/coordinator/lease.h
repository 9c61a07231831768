// How many extents a sequence holds: ahead of need, and behind windows until the store has them back. Pure
// numbers.
//
// A lease is asked for over RPC, so it must be there before a step seals into it: as long as the
// next kLeaseAheadTokens positions fit, a store that is gone for seconds stops no step.
#ifndef HEADROOM_SERVICES_COORDINATOR_LEASE_H_
#define HEADROOM_SERVICES_COORDINATOR_LEASE_H_

#include <cstdint>

#include "common/kv_layout.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

inline constexpr int64_t kLeaseAheadTokens = 256;

// What the extents of a model's sequences go by. Where no layer has a window a prompt's extents are leased
// at once. Where one has, they are leased as the prompt is computed, so that those of such layers that have
// come to lie behind the window make room for those to come.
struct ExtentRules {
  KvGeometry geometry;
  LayerWindows windows = {};
  int64_t max_chunk_tokens = 0;

  bool HasWindows() const;
  // REQUIRES: HasWindows(). Positions beyond those that the store knows to be sealed that have extents at
  // most, but for what rounding up to the last extent adds: two chunks in flight, a third that
  // is about to be sent, and what a decode step's lease is ahead and its commit behind.
  int64_t LeadTokens() const { return CeilToBlock(3 * max_chunk_tokens + 2 * kLeaseAheadTokens); }
};

// The capacity that a sequence has in the end if it now has `have_tokens` and its keys go up to
// `final_tokens`: what admission reserves. A multiple of 64, at least `have_tokens`.
// `extra_runs`, if given, receives how many runs that adds.
int64_t ReservedTokens(const ExtentRules& rules, int64_t have_tokens, int64_t final_tokens,
                       int64_t* extra_runs = nullptr);

// The position that leases must reach beyond: `known_tokens`, but where there are windows no farther ahead of
// what the store knows to be sealed than LeadTokens() allows.
int64_t LeaseFrom(const ExtentRules& rules, int64_t known_tokens, int64_t committed_tokens);

// The capacity of the next run to ask for, or 0 if none is needed yet: positions up to `next_pos` +
// kLeaseAheadTokens, but not beyond `final_tokens`, must have a place. Never more than is left of
// `reserved_tokens`, so that a sequence takes no more than it was admitted with.
int64_t NextLeaseTokens(const ExtentRules& rules, int64_t have_tokens, int64_t next_pos,
                        int64_t final_tokens, int64_t reserved_tokens);

// Host memory that a sequence which comes to have `capacity_tokens` takes at any time at most: all of them
// in layers without a window; in the others the window, LeadTokens(), and what lies in extents that are
// needed in part. The largest number if it does not fit 64 bits.
int64_t MostHostBytes(const ExtentRules& rules, int64_t capacity_tokens);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_LEASE_H_
