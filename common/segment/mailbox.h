// A mailbox (common/mailbox_format.h) as a process has it mapped.
#ifndef HEADROOM_COMMON_SEGMENT_MAILBOX_H_
#define HEADROOM_COMMON_SEGMENT_MAILBOX_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/kv_layout.h"
#include "common/mailbox_format.h"
#include "common/segment/mapped_region.h"

namespace headroom {

struct MailboxShape {
  uint64_t generation = 0;
  uint64_t incarnation = 0;
  KvGeometry geometry;
  int32_t num_q_heads = 0;
  uint32_t num_slots = 0;
  uint32_t tables_per_slot = 0;
  uint32_t max_rows = 0;
  int64_t table_bytes = 0;
  bool poster_wakes = true;

  // Floats of one row's queries and partials.
  int64_t query_floats() const { return int64_t{num_q_heads} * geometry.head_dim; }
  int64_t partial_floats() const;
  int64_t slot_bytes() const;
  int64_t file_bytes() const;
};

class Mailbox {
 public:
  // Makes file `name` (MailboxFile()) in folder `dir`, mode 0600, backed by memory, and unlinks every
  // other mailbox there: each worker has one. RESOURCE_EXHAUSTED if the folder is full.
  static absl::StatusOr<std::unique_ptr<Mailbox>> Create(const std::string& dir,
                                                         const std::string& name,
                                                         const MailboxShape& shape);
  // One that only this process has, for both ends. RESOURCE_EXHAUSTED.
  static absl::StatusOr<std::unique_ptr<Mailbox>> CreateUnnamed(const MailboxShape& shape);
  // Maps one that a worker has made. INVALID_ARGUMENT: `name` is no mailbox's name. NOT_FOUND.
  // DATA_LOSS: the header contradicts itself or the file. FAILED_PRECONDITION: it is of another
  // format, generation or geometry.
  static absl::StatusOr<std::unique_ptr<Mailbox>> Open(const std::string& dir,
                                                       const std::string& name,
                                                       const KvGeometry& geometry,
                                                       uint64_t generation);

  // As the header had it when it was checked; what the file says now does not matter.
  const MailboxShape& shape() const { return shape_; }

  uint8_t* data() const { return region_.data(); }
  int64_t bytes() const { return region_.bytes(); }
  MailboxHeader& header() const { return *reinterpret_cast<MailboxHeader*>(region_.data()); }
  // REQUIRES: indices are within the shape.
  MailboxSlot& slot(uint32_t index) const;
  uint8_t* table(uint32_t slot, uint32_t table) const;
  float* queries(uint32_t slot) const;   // [max_rows][num_q_heads][head_dim]
  float* partials(uint32_t slot) const;  // [max_rows][num_q_heads][AttentionStateFloats()]

 private:
  Mailbox() = default;
  static absl::StatusOr<std::unique_ptr<Mailbox>> CreateIn(int fd, const std::string& name,
                                                           const MailboxShape& shape);

  MailboxShape shape_;
  MappedRegion region_;
};

// ---- The doorbells, for who is not a GPU. Both sides say that they sleep before they look again, and
// ring before they look who sleeps; sequentially consistent, so that one of the two is seen. Only the
// sleeper clears its flag: a bell that comes late would take it from the next one.

// Tells the store that there is, or soon will be, something to look for.
void WakeStore(MailboxHeader& header);
// Counts a post or an answer and wakes the other side if it sleeps.
void RingPosted(MailboxHeader& header, MailboxSlot& slot, uint64_t count);
void RingAnswered(MailboxSlot& slot, uint64_t count);
// Waits until `count` answers have come: spins for some 20 us, then sleeps. False once `timeout` has
// passed or the mailbox is retired. A mailbox that is retired rings for nobody: who sleeps looks again
// after `longest_sleep`.
bool AwaitAnswered(MailboxHeader& header, MailboxSlot& slot, uint64_t count, absl::Duration timeout,
                   absl::Duration longest_sleep = absl::Milliseconds(20));

}  // namespace headroom

#endif  // HEADROOM_COMMON_SEGMENT_MAILBOX_H_
