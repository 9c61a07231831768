#include "services/worker/model/safetensors.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/checked_math.h"
#include "common/json.h"
#include "common/status.h"

namespace headroom {
namespace {

// The format allows 100 MB, some of which take a second to read. A tensor takes some 120 bytes; the
// largest of the families that are served, Llama 3.1 405B, has 1,138, and all of them have one index.
constexpr int64_t kMaxHeaderBytes = 4 << 20;
constexpr int64_t kMaxIndexBytes = 1 << 20;
// Of one tensor or of the metadata: dtype, a shape, two offsets; what trainers leave as metadata.
constexpr int64_t kMaxEntryValues = 4096;
constexpr std::string_view kNotInFileNames("/\0", 2);

struct Dtype {
  absl::string_view name;
  uint64_t bits;  // of one element
};
constexpr Dtype kDtypes[] = {
    {"F4", 4},      {"F6_E2M3", 6},     {"F6_E3M2", 6},     {"BOOL", 8},    {"U8", 8},
    {"I8", 8},      {"F8_E5M2", 8},     {"F8_E4M3", 8},     {"F8_E8M0", 8}, {"F8_E5M2FNUZ", 8},
    {"I16", 16},    {"F8_E4M3FNUZ", 8}, {"U16", 16},        {"F16", 16},    {"BF16", 16},
    {"I32", 32},    {"U32", 32},        {"F32", 32},        {"C64", 64},    {"F64", 64},
    {"I64", 64},    {"U64", 64},
};

std::optional<uint64_t> BitsOf(absl::string_view dtype) {
  const auto* const found =
      std::find_if(std::begin(kDtypes), std::end(kDtypes),
                   [&](const Dtype& known) { return known.name == dtype; });
  if (found == std::end(kDtypes)) return std::nullopt;
  return found->bits;
}

absl::StatusOr<Fd> OpenRegular(const std::string& path) {
  // Not blocking: a named pipe of that name is to be refused, not waited for.
  Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat stat {};
  if (!fd.valid() || fstat(fd.get(), &stat) != 0) {
    return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  if (!S_ISREG(stat.st_mode)) return absl::InvalidArgumentError(path + ": not a regular file");
  return fd;
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
  if (!json.is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(
        where, " is ", Brief(json), ", expected an object of dtype, shape and data_offsets"));
  }
  const JsonReader reader(json, where);
  TensorInfo info;
  HEADROOM_ASSIGN_OR_RETURN(info.dtype, reader.String("dtype"));
  const std::optional<uint64_t> element_bits = BitsOf(info.dtype);
  if (!element_bits.has_value()) return reader.Wrong("dtype", "a type of the format");
  const Json* shape = json.Find("shape");
  if (shape == nullptr || !shape->is_array()) return reader.Wrong("shape", "a list of sizes");
  // Multiplied from left to right as the format's own library does, so that [0, 2^62, 4] has no bytes
  // and [2^62, 4, 0] overflows in both.
  std::optional<uint64_t> bits = 1;
  for (const Json& size : shape->as_array()) {
    if (!size.is_int() || size.as_int() < 0) return reader.Wrong("shape", "sizes of at least 0");
    info.shape.push_back(size.as_int());
    if (bits.has_value()) bits = CheckedMul(*bits, static_cast<uint64_t>(size.as_int()));
  }
  if (bits.has_value()) bits = CheckedMul(*bits, *element_bits);
  if (!bits.has_value()) return reader.Wrong("shape", "a product within 64 bits");
  if (*bits % 8 != 0) {
    return reader.Wrong("shape", absl::StrCat("whole bytes, not ", *bits, " bits of ", info.dtype));
  }
  const auto bytes = static_cast<int64_t>(*bits / 8);
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
  if (end - begin != bytes) {
    return reader.Wrong("data_offsets",
                        absl::StrCat(bytes, " bytes, as dtype and shape make"));
  }
  info.offset_bytes = begin;
  info.size_bytes = end - begin;
  return info;
}

// A text for each name, as the format says; nothing here reads them.
absl::Status CheckMetadata(const Json& metadata, const std::string& path) {
  if (metadata.is_null()) return absl::OkStatus();
  if (!metadata.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": '__metadata__' is ", Brief(metadata), ", expected an object"));
  }
  for (const auto& [name, value] : metadata.as_object()) {
    if (!value.is_string()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": '__metadata__': '", BriefText(name),
                                                     "' is ", Brief(value), ", expected a string"));
    }
  }
  return absl::OkStatus();
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
          absl::StrCat(path, ": tensor '", BriefText(*name), "': data begins at ", begin,
                       ", expected ", next, begin < next ? " (overlap)" : " (hole)"));
    }
    next = begin + info->size_bytes;
  }
  if (next != data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": tensors end at data byte ", next, ", the file has ", data_bytes));
  }
  return absl::OkStatus();
}

// Whether the open file lies in the model's folder, wherever its name there leads. In the cache of
// huggingface_hub a model is models--NAME/snapshots/REVISION, all links to models--NAME/blobs: that
// counts as the folder too. Looked up by descriptor, so that what was checked is what is read.
absl::Status CheckLiesIn(int fd, const std::string& model_dir) {
  namespace fs = std::filesystem;
  std::error_code error;
  const fs::path file = fs::read_symlink(absl::StrCat("/proc/self/fd/", fd), error);
  const fs::path folder = error ? fs::path() : fs::canonical(model_dir, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat("where it lies: ", error.message()));
  const auto lies_in = [&file](const fs::path& outer) {
    return std::mismatch(outer.begin(), outer.end(), file.begin(), file.end()).first == outer.end();
  };
  if (lies_in(folder)) return absl::OkStatus();
  const fs::path snapshots = folder.parent_path();
  if (snapshots.filename() == "snapshots" && lies_in(snapshots.parent_path() / "blobs")) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("is a link to ", file.string(), ", expected a file in the same folder"));
}

}  // namespace

absl::StatusOr<std::unique_ptr<SafetensorsReader>> SafetensorsReader::Open(
    const std::string& model_dir) {
  auto reader = std::unique_ptr<SafetensorsReader>(new SafetensorsReader);
  const std::string single = model_dir + "/model.safetensors";
  const std::string index = model_dir + "/model.safetensors.index.json";
  if (access(single.c_str(), F_OK) == 0) {
    HEADROOM_ASSIGN_OR_RETURN(Fd fd, OpenRegular(single));
    HEADROOM_RETURN_IF_ERROR(reader->ReadHeader(single, std::move(fd)));
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
  std::map<std::string, std::string> shards;  // and a tensor of each
  for (const auto& [tensor, file] : map->as_object()) {
    if (!file.is_string() || file.as_string().empty() || file.as_string()[0] == '.' ||
        file.as_string().find_first_of(kNotInFileNames) != std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(index_path, ": tensor '", BriefText(tensor), "' is in ", Brief(file),
                       ", expected the name of a file in the same folder"));
    }
    shards.emplace(file.as_string(), tensor);
  }
  for (const auto& [shard, tensor] : shards) {
    const std::string where =
        absl::StrCat(index_path, ": tensor '", BriefText(tensor), "' is in '", BriefText(shard), "'");
    absl::StatusOr<Fd> fd = OpenRegular(model_dir + "/" + shard);
    if (!fd.ok()) return Annotate(fd.status(), where);
    if (const absl::Status status = CheckLiesIn(fd->get(), model_dir); !status.ok()) {
      return Annotate(status, where);
    }
    HEADROOM_RETURN_IF_ERROR(ReadHeader(model_dir + "/" + shard, *std::move(fd)));
  }
  for (const auto& [tensor, file] : map->as_object()) {
    const auto found = tensors_.find(tensor);
    const std::string path = model_dir + "/" + file.as_string();
    if (found == tensors_.end() || file_name(found->second) != path) {
      return absl::InvalidArgumentError(absl::StrCat(
          index_path, ": tensor '", BriefText(tensor), "' is not in ", BriefText(file.as_string()),
          " as it says"));
    }
  }
  return absl::OkStatus();
}

absl::Status SafetensorsReader::ReadHeader(const std::string& path, Fd fd) {
  struct stat stat {};
  if (fstat(fd.get(), &stat) != 0) {
    return absl::DataLossError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
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

absl::Status SafetensorsReader::AddTensor(int32_t file, const std::string& name, const Json& value,
                                          int64_t data_begin, Added& added) {
  const std::string& path = files_[file].path;
  HEADROOM_ASSIGN_OR_RETURN(
      TensorInfo info,
      ParseTensor(value, absl::StrCat(path, ": tensor '", BriefText(name), "'"),
                  files_[file].size_bytes - data_begin));
  info.file = file;
  info.offset_bytes += data_begin;
  const auto [at, is_new] = tensors_.emplace(name, std::move(info));
  if (!is_new) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": tensor '", BriefText(name),
                                                   "' is also in ", file_name(at->second)));
  }
  added.emplace_back(&at->first, &at->second);
  return absl::OkStatus();
}

absl::Status SafetensorsReader::AddHeader(int32_t file, const std::string& header,
                                          int64_t data_begin) {
  const std::string& path = files_[file].path;
  const int64_t data_bytes = files_[file].size_bytes - data_begin;
  Added added;
  // The first wrong tensor is said when all has been read: a name that stands twice may stand behind it,
  // right the second time.
  absl::Status wrong;
  const auto take = [&](const std::string& name, const Json& value) {
    if (wrong.ok()) {
      wrong = name == "__metadata__" ? CheckMetadata(value, path)
                                     : AddTensor(file, name, value, data_begin, added);
    }
    return absl::OkStatus();
  };
  const absl::Status read = Json::ParseMembers(header, kMaxHeaderBytes, {kMaxEntryValues, take});
  if (!read.ok()) return Annotate(read, path + ": header");
  HEADROOM_RETURN_IF_ERROR(wrong);
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
                     BriefText(absl::StrJoin(info.shape, ", ")), "], expected ", dtype, " [",
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
