// What cards are known to do, so that a weak measurement flatters nobody. Pure numbers.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_KNOWN_CEILINGS_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_KNOWN_CEILINGS_H_

#include "absl/strings/string_view.h"
#include "services/headroom/bench/costs.h"

namespace headroom {

// A known rate counts at this share: cards and hosts of one name differ by some percent.
inline constexpr double kKnownShare = 0.95;

// Of the card with this name (Device::name()), as measured by probes apart from this program; 0 where
// nothing is known.
Ceilings KnownCeilings(absl::string_view device_name);

// What floors are reckoned with: the larger of what was measured and kKnownShare of what is known.
Ceilings FloorCeilings(const Ceilings& measured, const Ceilings& known);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_KNOWN_CEILINGS_H_
