#include "common/device/cuda/host_registrations.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <iterator>

#include "common/checked_math.h"
#include "common/device/cuda/cuda_status.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom {

HostRegistrations::~HostRegistrations() {
  MutexLock lock(&mutex_);
  for (const Piece& piece : pieces_) static_cast<void>(cudaHostUnregister(piece.data));
}

absl::Status HostRegistrations::Add(uint8_t* data, int64_t bytes) {
  if (data == nullptr || bytes <= 0) {
    return absl::InvalidArgumentError(absl::StrCat("a host range of ", bytes, " bytes"));
  }
  {
    MutexLock lock(&mutex_);
    for (const Range& range : ranges_) {
      if (data < range.data + range.bytes && range.data < data + bytes) {
        return absl::AlreadyExistsError("host range registered twice");
      }
    }
    ranges_.push_back({data, bytes});
  }
  absl::Status status;
  std::vector<Piece> added;
  for (int64_t at = 0; at < bytes && status.ok(); at += kRegistrationBytes) {
    const Piece piece = {data + at, std::min(kRegistrationBytes, bytes - at), data};
    status = HEADROOM_CUDA_STATUS(
        cudaHostRegister(piece.data, static_cast<size_t>(piece.bytes),
                         cudaHostRegisterPortable | cudaHostRegisterMapped));
    if (status.ok()) added.push_back(piece);
  }
  if (!status.ok()) {
    for (const Piece& piece : added) static_cast<void>(cudaHostUnregister(piece.data));
  }
  MutexLock lock(&mutex_);
  if (status.ok()) {
    pieces_.insert(pieces_.end(), added.begin(), added.end());
    return absl::OkStatus();
  }
  EraseRange(data);
  return Annotate(status, absl::StrCat("registering ", bytes, " bytes of host memory"));
}

absl::Status HostRegistrations::Remove(const uint8_t* data) {
  std::vector<Piece> removed;
  {
    MutexLock lock(&mutex_);
    const auto is_part = [&](const Piece& piece) { return piece.range == data; };
    std::copy_if(pieces_.begin(), pieces_.end(), std::back_inserter(removed), is_part);
    pieces_.erase(std::remove_if(pieces_.begin(), pieces_.end(), is_part), pieces_.end());
  }
  if (removed.empty()) return absl::NotFoundError("host range is not registered");
  absl::Status status;
  for (const Piece& piece : removed) {
    const absl::Status one = HEADROOM_CUDA_STATUS(cudaHostUnregister(piece.data));
    if (status.ok()) status = one;
  }
  MutexLock lock(&mutex_);
  EraseRange(data);
  return status;
}

void HostRegistrations::EraseRange(const uint8_t* data) {
  ranges_.erase(std::find_if(ranges_.begin(), ranges_.end(),
                             [&](const Range& range) { return range.data == data; }));
}

bool HostRegistrations::Contain(const void* data, int64_t bytes) const {
  MutexLock lock(&mutex_);
  return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
    return RangeFits(static_cast<const uint8_t*>(data) - piece.data, bytes, piece.bytes);
  });
}

}  // namespace headroom
