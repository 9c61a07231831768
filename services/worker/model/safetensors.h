// Reads weights in the safetensors format: an 8-byte little-endian header length, a JSON header,
// then the tensors' bytes. One file, or shards named by model.safetensors.index.json.
//
// Files are not trusted: the header is capped and read tensor by tensor, every offset and product is
// checked before it is used, ranges may neither overlap nor leave holes, and shards lie in the model's
// folder, links followed. What is a well-formed file is what the format's own library takes for one,
// less what the format's text forbids or no writer writes (safetensors_oracle_test.cc names each such
// rule); which tensors a model has, and of which type, is Expect's.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_SAFETENSORS_H_
#define HEADROOM_SERVICES_WORKER_MODEL_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "common/fd.h"
#include "common/json.h"

namespace headroom {

struct TensorInfo {
  std::string dtype;  // "BF16", "F32", ...
  std::vector<int64_t> shape;
  int32_t file = 0;          // index into the files
  int64_t offset_bytes = 0;  // in that file
  int64_t size_bytes = 0;
};

// Thread rule: const after Open; Read may be called from any thread.
class SafetensorsReader {
 public:
  // Opens `model_dir`/model.safetensors or the shards of its index and checks all headers. Errors
  // (NOT_FOUND, DATA_LOSS, INVALID_ARGUMENT) name file and tensor, and what was expected.
  static absl::StatusOr<std::unique_ptr<SafetensorsReader>> Open(const std::string& model_dir);

  const std::map<std::string, TensorInfo, std::less<>>& tensors() const { return tensors_; }

  // The tensor; NOT_FOUND, or INVALID_ARGUMENT if dtype or shape differ from what is expected.
  absl::StatusOr<const TensorInfo*> Expect(absl::string_view name, absl::string_view dtype,
                                           const std::vector<int64_t>& shape) const;

  // Reads [offset, offset + bytes) of the tensor's data. DATA_LOSS if the file ends before.
  absl::Status Read(const TensorInfo& tensor, int64_t offset, int64_t bytes, void* out) const;

  const std::string& file_name(const TensorInfo& tensor) const { return files_[tensor.file].path; }

 private:
  struct File {
    std::string path;
    Fd fd;
    int64_t size_bytes = 0;
  };

  // Tensors of one file, as they stand in tensors_.
  using Added = std::vector<std::pair<const std::string*, const TensorInfo*>>;

  absl::Status ReadHeader(const std::string& path, Fd fd);
  absl::Status AddTensor(int32_t file, const std::string& name, const Json& value,
                         int64_t data_begin, Added& added);
  absl::Status AddHeader(int32_t file, const std::string& header, int64_t data_begin);
  absl::Status OpenShards(const std::string& model_dir, const std::string& index_path);

  std::vector<File> files_;
  std::map<std::string, TensorInfo, std::less<>> tensors_;
};

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_SAFETENSORS_H_
