// Turns a post in a mailbox into arguments of Attend(). Everything in the mailbox is hostile: it is read
// once, checked, and used from the copy, because the worker could change it at any time.
#ifndef HEADROOM_SERVICES_KVSTORE_POST_READER_H_
#define HEADROOM_SERVICES_KVSTORE_POST_READER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "common/segment/mailbox.h"
#include "kernels/attention.h"

namespace headroom::kvstore {

// Not thread-safe. Keeps its buffers from post to post.
class PostReader {
 public:
  // `data` is the segment's; bytes below `ready_bytes()` may be read.
  PostReader(const uint8_t* data, std::function<int64_t()> ready_bytes);

  // INVALID_ARGUMENT names what is wrong with the slot's post; UNIMPLEMENTED what no kernel does.
  absl::Status Read(const Mailbox& mailbox, uint32_t slot);

  // ---- Of the post that was read last. The tag is there even where it was refused.
  const MailboxPost& post() const { return post_; }
  const kernels::AttendArgs& args() const { return args_; }  // states go to the slot's partials
  int64_t bytes() const { return bytes_; }                   // of keys and values

 private:
  absl::Status ReadItems(const Mailbox& mailbox, const uint8_t* table);
  absl::Status AddItem(const MailboxItem& from, const MailboxShape& shape);
  absl::Status AddSpan(const MailboxSpan& from, const MailboxItem& item, const KvGeometry& geometry,
                       int64_t ready_bytes);

  const uint8_t* const data_;
  const std::function<int64_t()> ready_bytes_;
  const std::unique_ptr<float[]> scratch_;
  MailboxPost post_ = {};
  kernels::AttendArgs args_;
  int64_t bytes_ = 0;
  std::vector<kernels::AttendItem> items_;
  std::vector<kernels::KvSpan> spans_;
  std::vector<bool> taken_;  // [row][kv_head]: an item of the post writes it
};

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_POST_READER_H_
