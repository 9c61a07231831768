#include "services/worker/model/read_ahead.h"

#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "common/status.h"

namespace headroom {
namespace {

// Read and hashed by turns: so many bytes are still in the second cache.
constexpr int64_t kTurnBytes = 256 << 10;

}  // namespace

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
    absl::StatusOr<PieceBytes> piece =
        Read(pieces_[index], buffers_ + index % num_buffers_ * buffer_bytes_);
    MutexLock lock(&mutex_);
    slots_[index % num_buffers_] = {true, std::move(piece)};
    changed_.SignalAll();
  }
}

absl::StatusOr<PieceBytes> ReadAhead::Read(const TensorPiece& piece, uint8_t* buffer) const {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> hash(XXH3_createState(),
                                                                      &XXH3_freeState);
  XXH3_128bits_reset(hash.get());
  for (int64_t done = 0; done < piece.size_bytes; done += kTurnBytes) {
    const int64_t count = std::min(kTurnBytes, piece.size_bytes - done);
    HEADROOM_RETURN_IF_ERROR(
        reader_.Read(*piece.tensor, piece.offset_bytes + done, count, buffer + done));
    XXH3_128bits_update(hash.get(), buffer + done, static_cast<size_t>(count));
  }
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(hash.get()));
  PieceBytes bytes{buffer};
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), bytes.digest.begin());
  return bytes;
}

absl::StatusOr<PieceBytes> ReadAhead::Next() {
  MutexLock lock(&mutex_);
  const int64_t index = taken_++;
  if (index >= static_cast<int64_t>(pieces_.size())) {
    return absl::InternalError("more pieces are taken than there are");
  }
  changed_.SignalAll();
  Slot& slot = slots_[index % num_buffers_];
  while (!slot.filled) changed_.Wait(&mutex_);
  slot.filled = false;
  return std::move(slot.piece);
}

}  // namespace headroom
