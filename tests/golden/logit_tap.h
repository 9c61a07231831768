// A device that passes everything on to another, and keeps a copy of all logits that are sampled
// from: the goldens are compared with what the sampler saw, not with what it said of it.
#ifndef HEADROOM_TESTS_GOLDEN_LOGIT_TAP_H_
#define HEADROOM_TESTS_GOLDEN_LOGIT_TAP_H_

#include <cstdint>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/device/device.h"
#include "common/status.h"
#include "tests/common/forwarding_device.h"

namespace headroom {

// Thread rule: rows(), row() and Clear() only while no step is in flight; else as Device.
class LogitTap : public ForwardingDevice {
 public:
  // Keeps up to `max_rows` rows of `vocab` logits.
  LogitTap(std::unique_ptr<Device> device, int64_t max_rows, int64_t vocab)
      : ForwardingDevice(std::move(device)), vocab_(vocab), logits_(max_rows * vocab) {
    registered_ = RegisterHost(logits_.data(), Bytes(max_rows));
  }

  int64_t rows() const { return rows_; }
  // Row by row in the order of sampling: of a prompt that runs alone and scores all of its tokens,
  // row i is position i.
  std::span<const float> row(int64_t i) const {
    return std::span<const float>(logits_).subspan(i * vocab_, vocab_);
  }
  void Clear() { rows_ = 0; }

  absl::Status Sample(StreamId s, const kernels::SampleArgs& a) override {
    HEADROOM_RETURN_IF_ERROR(registered_);
    if (a.vocab != vocab_ ||
        (rows_ + a.rows.count) * vocab_ > static_cast<int64_t>(logits_.size())) {
      return absl::InternalError(absl::StrCat("no room for the logits of ", a.rows.count, " rows"));
    }
    CopyArgs copy;
    copy.dst = logits_.data() + rows_ * vocab_;
    copy.src = a.logits;
    copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = Bytes(a.rows.count);
    rows_ += a.rows.count;
    HEADROOM_RETURN_IF_ERROR(Copy(s, copy, nullptr));
    return ForwardingDevice::Sample(s, a);
  }

 private:
  int64_t Bytes(int64_t rows) const { return rows * vocab_ * static_cast<int64_t>(sizeof(float)); }

  const int64_t vocab_;
  std::vector<float> logits_;
  int64_t rows_ = 0;
  absl::Status registered_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_GOLDEN_LOGIT_TAP_H_
