// The device's ends of a mailbox (common/mailbox_format.h): queries go out, answers are awaited.
#ifndef HEADROOM_KERNELS_MAILBOX_H_
#define HEADROOM_KERNELS_MAILBOX_H_

#include <atomic>
#include <cstdint>

#include "common/mailbox_format.h"
#include "kernels/types.h"

namespace headroom::kernels {

// Copies queries to the slot, writes `post`, then raises the slot's posted count to `count`. Does
// nothing to a mailbox that is retired: a late store may still be reading.
struct PostQueriesArgs {
  const float* q = nullptr;  // arena; row r at q + r * q_stride
  int64_t q_stride = 0;
  int64_t rows = 0;
  int64_t row_floats = 0;    // num_q_heads * head_dim
  float* queries = nullptr;  // of the slot, as the following registered host memory
  MailboxHeader* mailbox = nullptr;
  MailboxSlot* slot = nullptr;
  MailboxPost post = {};
  uint64_t count = 0;
};

// Waits until the slot's answered count has come to `count` and takes the answer if it bears
// {generation, step, attempt, layer} and code 0. Else, and when `deadline_us` have passed since the
// operation began to wait, it gives up: `*status` and the mailbox's `retired` are set, so that the
// step fails, later waits on the mailbox return at once, and the store answers no more.
struct AwaitPartialsArgs {
  MailboxHeader* mailbox = nullptr;  // registered host memory, as slot and status
  MailboxSlot* slot = nullptr;
  uint64_t count = 0;
  uint64_t generation = 0;
  uint64_t step = 0;
  uint32_t attempt = 0;
  uint32_t layer = 0;
  int64_t deadline_us = 0;
  std::atomic<uint32_t>* status = nullptr;  // an AwaitResult, of the step; the first that is set stays
};

enum AwaitResult : uint32_t {
  kAwaitOk = 0,
  kAwaitExpired = 1,   // nothing came in time
  kAwaitRetired = 2,   // another wait on this mailbox had given up
  kAwaitMismatch = 3,  // the answer is to another question
  kAwaitRefused = 4,   // the store could not do it
};

// Of an answer that has come.
inline AwaitResult JudgeAnswer(const AwaitPartialsArgs& a, const MailboxAnswer& answer) {
  if (answer.generation != a.generation || answer.step != a.step || answer.attempt != a.attempt ||
      answer.layer != a.layer) {
    return kAwaitMismatch;
  }
  return answer.code == 0 ? kAwaitOk : kAwaitRefused;
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_MAILBOX_H_
