#include "services/worker/model/read_ahead.h"

#include <utility>

namespace headroom {

ReadAhead::ReadAhead(const SafetensorsReader& reader, const std::vector<TensorPiece>& pieces,
                     uint8_t* buffers, int64_t buffer_bytes, int64_t num_buffers, int threads)
    : reader_(reader),
      pieces_(pieces),
      buffers_(buffers),
      buffer_bytes_(buffer_bytes),
      num_buffers_(num_buffers),
      slots_(static_cast<size_t>(num_buffers)) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Loop(); });
}

ReadAhead::~ReadAhead() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    changed_.SignalAll();
  }
  for (std::thread& thread : threads_) thread.join();
}

void ReadAhead::Loop() {
  const auto all = static_cast<int64_t>(pieces_.size());
  for (;;) {
    int64_t index;
    {
      MutexLock lock(&mutex_);
      // The buffer of the piece that was taken last is in use.
      while (!stop_ && begun_ < all && begun_ >= taken_ - 1 + num_buffers_) changed_.Wait(&mutex_);
      if (stop_ || begun_ == all) return;
      index = begun_++;
    }
    const TensorPiece& piece = pieces_[index];
    absl::Status status = reader_.Read(*piece.tensor, piece.offset_bytes, piece.size_bytes,
                                       buffers_ + index % num_buffers_ * buffer_bytes_);
    MutexLock lock(&mutex_);
    slots_[index % num_buffers_] = {true, std::move(status)};
    changed_.SignalAll();
  }
}

absl::StatusOr<const uint8_t*> ReadAhead::Next() {
  MutexLock lock(&mutex_);
  const int64_t index = taken_++;
  if (index >= static_cast<int64_t>(pieces_.size())) {
    return absl::InternalError("more pieces are taken than there are");
  }
  changed_.SignalAll();
  Slot& slot = slots_[index % num_buffers_];
  while (!slot.filled) changed_.Wait(&mutex_);
  slot.filled = false;
  if (!slot.status.ok()) return std::move(slot.status);
  return buffers_ + index % num_buffers_ * buffer_bytes_;
}

}  // namespace headroom
