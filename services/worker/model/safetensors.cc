#include "services/worker/model/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/checked_math.h"
#include "common/json.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int64_t kMaxIndexBytes = 64 << 20;
constexpr std::string_view kNotInFileNames("/\0", 2);

// Bytes of one element; 0 for a type that the format does not know.
int64_t DtypeBytes(absl::string_view dtype) {
  if (dtype == "F64" || dtype == "I64" || dtype == "U64") return 8;
  if (dtype == "F32" || dtype == "I32" || dtype == "U32") return 4;
  if (dtype == "F16" || dtype == "BF16" || dtype == "I16" || dtype == "U16") return 2;
  if (dtype == "BOOL" || dtype == "U8" || dtype == "I8" || dtype == "F8_E4M3" ||
      dtype == "F8_E5M2") {
    return 1;
  }
  return 0;
}

absl::Status ReadFully(int fd, const std::string& path, int64_t offset, int64_t bytes, void* out) {
  auto* to = static_cast<char*>(out);
  while (bytes > 0) {
    const auto most = static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30));
    const ssize_t got = pread(fd, to, most, offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) {
      return absl::DataLossError(
          absl::StrCat(path, ": reading at byte ", offset, ": ", std::strerror(errno)));
    }
    if (got == 0) {
      return absl::DataLossError(absl::StrCat(path, ": ends at byte ", offset, ", ", bytes,
                                              " bytes are missing"));
    }
    to += got;
    offset += got;
    bytes -= got;
  }
  return absl::OkStatus();
}

absl::StatusOr<TensorInfo> ParseTensor(const Json& json, const std::string& where,
                                       int64_t data_bytes) {
  const JsonReader reader(json, where);
  TensorInfo info;
  HEADROOM_ASSIGN_OR_RETURN(info.dtype, reader.String("dtype"));
  const int64_t element_bytes = DtypeBytes(info.dtype);
  if (element_bytes == 0) return reader.Wrong("dtype", "a type of the format");
  const Json* shape = json.Find("shape");
  if (shape == nullptr || !shape->is_array()) return reader.Wrong("shape", "a list of sizes");
  std::optional<int64_t> bytes = element_bytes;
  for (const Json& size : shape->as_array()) {
    if (!size.is_int() || size.as_int() < 0) return reader.Wrong("shape", "sizes of at least 0");
    info.shape.push_back(size.as_int());
    if (bytes.has_value()) bytes = CheckedMul(*bytes, size.as_int());
  }
  if (!bytes.has_value()) return reader.Wrong("shape", "a product within 64 bits");
  const Json* offsets = json.Find("data_offsets");
  if (offsets == nullptr || !offsets->is_array() || offsets->as_array().size() != 2 ||
      !offsets->as_array()[0].is_int() || !offsets->as_array()[1].is_int()) {
    return reader.Wrong("data_offsets", "two integers");
  }
  const int64_t begin = offsets->as_array()[0].as_int();
  const int64_t end = offsets->as_array()[1].as_int();
  if (begin < 0 || end < begin || end > data_bytes) {
    return reader.Wrong("data_offsets",
                        absl::StrCat("0 <= begin <= end <= ", data_bytes, ", the file's data"));
  }
  if (end - begin != *bytes) {
    return reader.Wrong("data_offsets",
                        absl::StrCat(*bytes, " bytes, as dtype and shape make"));
  }
  info.offset_bytes = begin;
  info.size_bytes = end - begin;
  return info;
}

// Tensors must tile [0, data_bytes): an overlap or a hole means that the header lies.
absl::Status CheckTiling(std::vector<std::pair<const std::string*, const TensorInfo*>> tensors,
                         const std::string& path, int64_t data_begin, int64_t data_bytes) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->offset_bytes, a.second->size_bytes) <
           std::pair(b.second->offset_bytes, b.second->size_bytes);
  });
  int64_t next = 0;
  for (const auto& [name, info] : tensors) {
    const int64_t begin = info->offset_bytes - data_begin;
    if (begin != next) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor '", *name, "': data begins at ", begin, ", expected ", next,
                       begin < next ? " (overlap)" : " (hole)"));
    }
    next = begin + info->size_bytes;
  }
  if (next != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": tensors end at data byte ", next, ", the file has ", data_bytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::Open(
    const std::string& model_dir) {
  auto reader = std::unique_ptr<SafetensorsReader>(new SafetensorsReader);
  const std::string single = model_dir + "/model.safetensors";
  const std::string index = model_dir + "/model.safetensors.index.json";
  if (access(single.c_str(), F_OK) == 0) {
    HEADROOM_RETURN_IF_ERROR(reader->OpenFile(single));
  } else if (access(index.c_str(), F_OK) == 0) {
    HEADROOM_RETURN_IF_ERROR(reader->OpenShards(model_dir, index));
  } else {
    return absl::NotFoundError(absl::StrCat(
        model_dir, ": neither model.safetensors nor model.safetensors.index.json is there"));
  }
  return reader;
}

absl::Status SafetensorsReader::OpenShards(const std::string& model_dir,
                                           const std::string& index_path) {
  HEADROOM_ASSIGN_OR_RETURN(const Json index, Json::ParseFile(index_path, kMaxIndexBytes));
  const Json* map = index.Find("weight_map");
  if (map == nullptr || !map->is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(index_path, ": 'weight_map' must be an object"));
  }
  if (map->as_object().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(index_path, ": 'weight_map' names no tensor"));
  }
  std::set<std::string> shards;
  for (const auto& [tensor, file] : map->as_object()) {
    if (!file.is_string() || file.as_string().empty() || file.as_string()[0] == '.' ||
        file.as_string().find_first_of(kNotInFileNames) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": tensor '", tensor, "' is in ", file.Dump(),
                       ", expected the name of a file in the same folder"));
    }
    shards.insert(file.as_string());
  }
  for (const std::string& shard : shards) {
    HEADROOM_RETURN_IF_ERROR(OpenFile(model_dir + "/" + shard));
  }
  for (const auto& [tensor, file] : map->as_object()) {
    const auto found = tensors_.find(tensor);
    const std::string path = model_dir + "/" + file.as_string();
    if (found == tensors_.end() || file_name(found->second) != path) {
      return absl::InvalidArgumentError(absl::StrCat(
          index_path, ": tensor '", tensor, "' is not in ", file.as_string(), " as it says"));
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsReader::OpenFile(const std::string& path) {
  // Not blocking: a named pipe of that name is to be refused below, not waited for.
  Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat stat {};
  if (!fd.valid() || fstat(fd.get(), &stat) != 0) {
    return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  if (!S_ISREG(stat.st_mode)) return absl::InvalidArgumentError(path + ": not a regular file");
  const int64_t size = stat.st_size;
  uint8_t length_bytes[8];
  if (size < 8) {
    return absl::DataLossError(
        absl::StrCat(path, ": ", size, " bytes, a header length takes 8"));
  }
  HEADROOM_RETURN_IF_ERROR(ReadFully(fd.get(), path, 0, 8, length_bytes));
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | length_bytes[i];
  if (length > static_cast<uint64_t>(kMaxHeaderBytes)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": a header of ", length,
                                                   " bytes, at most ", kMaxHeaderBytes));
  }
  if (!RangeFits(8, static_cast<int64_t>(length), size)) {
    return absl::DataLossError(
        absl::StrCat(path, ": a header of ", length, " bytes in a file of ", size));
  }
  std::string header(length, '\0');
  HEADROOM_RETURN_IF_ERROR(
      ReadFully(fd.get(), path, 8, static_cast<int64_t>(length), header.data()));
  files_.push_back({path, std::move(fd), size});
  return AddHeader(static_cast<int32_t>(files_.size()) - 1, header,
                   8 + static_cast<int64_t>(length));
}

absl::Status SafetensorsReader::AddHeader(int32_t file, const std::string& header,
                                          int64_t data_begin) {
  const std::string& path = files_[file].path;
  const int64_t data_bytes = files_[file].size_bytes - data_begin;
  absl::StatusOr<Json> json = Json::Parse(header, kMaxHeaderBytes);
  if (!json.ok()) return Annotate(json.status(), path + ": header");
  if (!json->is_object()) return absl::InvalidArgumentError(path + ": header: expected an object");
  std::vector<std::pair<const std::string*, const TensorInfo*>> added;
  for (const auto& [name, value] : json->as_object()) {
    if (name == "__metadata__") continue;
    HEADROOM_ASSIGN_OR_RETURN(
        TensorInfo info,
        ParseTensor(value, absl::StrCat(path, ": tensor '", name, "'"), data_bytes));
    info.file = file;
    info.offset_bytes += data_begin;
    const auto [at, is_new] = tensors_.emplace(name, std::move(info));
    if (!is_new) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor '", name, "' is also in ", file_name(at->second)));
    }
    added.emplace_back(&at->first, &at->second);
  }
  return CheckTiling(std::move(added), path, data_begin, data_bytes);
}

absl::StatusOr<const TensorInfo*> SafetensorsReader::Expect(
    absl::string_view name, absl::string_view dtype, const std::vector<int64_t>& shape) const {
  const auto found = tensors_.find(std::string(name));
  if (found == tensors_.end()) {
    return absl::NotFoundError(
        absl::StrCat(files_[0].path, files_.size() > 1 ? " and its shards" : "", ": tensor '", name,
                     "' is missing, expected ", dtype, " [", absl::StrJoin(shape, ", "), "]"));
  }
  const TensorInfo& info = found->second;
  if (info.dtype != dtype || info.shape != shape) {
    return absl::InvalidArgumentError(
        absl::StrCat(file_name(info), ": tensor '", name, "' is ", info.dtype, " [",
                     absl::StrJoin(info.shape, ", "), "], expected ", dtype, " [",
                     absl::StrJoin(shape, ", "), "]"));
  }
  return &info;
}

absl::Status SafetensorsReader::Read(const TensorInfo& tensor, int64_t offset, int64_t bytes,
                                     void* out) const {
  if (!RangeFits(offset, bytes, tensor.size_bytes)) {
    return absl::InternalError("a read past the end of a tensor");
  }
  return ReadFully(files_[tensor.file].fd.get(), file_name(tensor), tensor.offset_bytes + offset,
                   bytes, out);
}

}  // namespace headroom
