// Reads and hashes pieces of tensors some ahead of whoever takes them in order: 16 GB in the page cache of an
// H200's host came in 6.1 s where one thread read, hashed and copied in turn, in 1.8 to 4.6 where it hashed
// what others had read, and come in 0.6 to 0.8.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_READ_AHEAD_H_
#define HEADROOM_SERVICES_WORKER_MODEL_READ_AHEAD_H_

#include <array>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "common/mutex.h"
#include "services/worker/model/safetensors.h"

namespace headroom {

struct TensorPiece {
  const TensorInfo* tensor = nullptr;
  int64_t offset_bytes = 0;  // in the tensor's data
  int64_t size_bytes = 0;    // at most what the buffers were made for
};

// A piece that has been read.
struct PieceBytes {
  const uint8_t* data = nullptr;
  std::array<uint8_t, 16> digest = {};  // XXH3-128
};

// Thread rule: Next() is called by one thread.
class ReadAhead {
 public:
  // Reads `count` pieces, of which piece(i) is the i-th; both are asked by threads of its own, `threads` >=
  // 1 of them. `buffers` is cut into parts of `buffer_bytes`, at least two, which it fills by turns. All
  // outlive it.
  ReadAhead(const SafetensorsReader& reader, const std::vector<TensorPiece>& pieces, uint8_t* buffers,
            int64_t buffer_bytes, int64_t num_buffers, int threads);
  ~ReadAhead();  // also when pieces are left: waits for reads that have begun

  // The next piece's bytes, until the call after. Errors of SafetensorsReader::Read().
  absl::StatusOr<PieceBytes> Next();

 private:
  struct Slot {
    bool filled = false;
    absl::StatusOr<PieceBytes> piece;
  };

  void Loop();
  absl::StatusOr<PieceBytes> Read(const TensorPiece& piece, uint8_t* buffer) const;

  const SafetensorsReader& reader_;
  const std::vector<TensorPiece>& pieces_;
  uint8_t* const buffers_;
  const int64_t buffer_bytes_;
  const int64_t num_buffers_;

  Mutex mutex_;
  CondVar changed_;
  std::vector<Slot> slots_ ABSL_GUARDED_BY(mutex_);  // by turns
  int64_t begun_ ABSL_GUARDED_BY(mutex_) = 0;        // pieces that a thread reads or has read
  int64_t taken_ ABSL_GUARDED_BY(mutex_) = 0;        // by Next(); the last of them is still in use
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;

  std::vector<std::thread> threads_;  // last: they use the above
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_READ_AHEAD_H_
