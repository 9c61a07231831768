// Whether a request may start now, later or never. Pure numbers.
#ifndef HEADROOM_SERVICES_COORDINATOR_ADMISSION_H_
#define HEADROOM_SERVICES_COORDINATOR_ADMISSION_H_

#include <cstdint>
#include <string>

#include "common/kv_layout.h"
#include "services/coordinator/lease.h"

namespace headroom::coordinator {

// What the machine has.
struct Capacity {
  ExtentRules extents;
  int64_t host_bytes = 0;
  int64_t max_extents = 0;
  int64_t kv_pool_bytes = 0;            // of the device
  int64_t tail_bytes_per_sequence = 0;  // of that
  int64_t draw_state_bytes = 0;         // of that, for each sequence with a history
  int64_t max_sequences = 0;
};

// What is promised to running requests and held by idle sessions.
struct Commitments {
  int64_t running_bytes = 0;  // of host memory, reserved for running sequences
  int64_t idle_bytes = 0;     // ... that idle sessions hold
  int64_t running_runs = 0;
  int64_t idle_runs = 0;
  int64_t running_sequences = 0;
  int64_t running_histories = 0;  // sequences whose draws have one
};

// What a request would add.
struct Demand {
  int64_t final_tokens = 0;  // positions whose keys it will have at most
  int64_t kept_tokens = 0;   // capacity that its session has already, counted in no commitment
  int64_t kept_runs = 0;
  bool has_history = false;
};

struct Verdict {
  enum Kind { kAdmit, kWait, kNever };
  Kind kind = kAdmit;
  int64_t reserved_tokens = 0;  // kAdmit
  int64_t reserved_bytes = 0;   // of host memory
  int64_t reserved_runs = 0;
  std::string reason;  // kWait, kNever: which limit, with the numbers
};

// What sequences take of the device's pool beside resident copies.
inline int64_t PoolBytes(const Capacity& capacity, int64_t sequences, int64_t histories) {
  return sequences * capacity.tail_bytes_per_sequence + histories * capacity.draw_state_bytes;
}

// kNever: it would not fit even if nothing else ran. (What idle sessions hold counts as gone: only
// their owners give it back.)
Verdict Admit(const Capacity& capacity, const Commitments& commitments, const Demand& demand);

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_ADMISSION_H_
