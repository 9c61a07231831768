#include "services/kvstore/segment.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/bytes_text.h"
#include "common/errors.h"
#include "common/segment/mapped_segment.h"
#include "common/status.h"
#include "services/kvstore/memory_limits.h"

namespace headroom::kvstore {
namespace {

constexpr int64_t kMinDataBytes = int64_t{1} << 20;
constexpr int64_t kMaxDataBytes = int64_t{1} << 46;
constexpr int64_t kMaxExtents = int64_t{1} << 26;
// Memory is got in steps of this size: tens of milliseconds between looks at `stop`.
constexpr int64_t kPrefaultStepBytes = int64_t{64} << 20;

absl::Status Errno(absl::string_view what) { return absl::ErrnoToStatus(errno, what); }

std::array<uint8_t, 16> BootId() {
  // "xxxxxxxx-xxxx-...": any 16 bytes that depend on all of it do; the first 16 digits are random.
  std::array<uint8_t, 16> id = {};
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string text;
  file >> text;
  std::memcpy(id.data(), text.data(), std::min(id.size(), text.size()));
  return id;
}

// Memory that a file of the folder holds now.
int64_t BytesHeld(int dir_fd, const char* name) {
  struct stat stat = {};
  if (fstatat(dir_fd, name, &stat, AT_SYMLINK_NOFOLLOW) != 0) return 0;
  return static_cast<int64_t>(stat.st_blocks) * 512;
}

absl::StatusOr<Fd> MakeFile(int dir_fd, const char* name, int64_t bytes) {
  if (unlinkat(dir_fd, name, 0) != 0 && errno != ENOENT) {
    return Errno(absl::StrCat("removing the old file ", name));
  }
  Fd fd(openat(dir_fd, name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return Errno(absl::StrCat("making the file ", name));
  if (ftruncate(fd.get(), bytes) != 0) {
    return Errno(absl::StrCat("giving the file ", name, " ", bytes, " bytes"));
  }
  return fd;
}

// Backs a range with memory, through the mapping where the system can (Linux 5.14), so that huge pages
// are used if they were granted, else through the file. Both report a full file system or memory as an
// error, where a plain write would end in SIGBUS.
absl::Status BackWithMemory(const MappedRegion& region, int fd, int64_t begin, int64_t bytes) {
  region.MakeHugePages(begin, bytes);
  int error = 0;
  do {
    error = madvise(region.data() + begin, static_cast<size_t>(bytes), MADV_POPULATE_WRITE) == 0
                ? 0
                : errno;
  } while (error == EINTR || error == EAGAIN);
  if (error == EINVAL) {
    do {
      error = fallocate(fd, 0, begin, bytes) == 0 ? 0 : errno;
    } while (error == EINTR);
  }
  if (error == 0) return absl::OkStatus();
  if (error == EFAULT) error = ENOSPC;  // how madvise says that a touch would have been SIGBUS
  return WithReason(
      absl::ResourceExhaustedError(absl::StrCat(
          "memory for bytes ", begin, " to ", begin + bytes, " of the segment could not be had (",
          std::strerror(error), "): lower --host-memory, or enlarge the file system of --segment-dir")),
      "HOST_MEMORY");
}

}  // namespace

// ---------------------------------------------------------------- opening

absl::Status CheckSegmentOptions(const SegmentOptions& options) {
  if (options.dir.empty()) return absl::InvalidArgumentError("--segment-dir is empty");
  if (options.data_bytes < kMinDataBytes || options.data_bytes > kMaxDataBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("--host-memory is ", FormatBytes(options.data_bytes), ", expected ",
                     FormatBytes(kMinDataBytes), " to ", FormatBytes(kMaxDataBytes)));
  }
  if (options.max_extents < 1 || options.max_extents > kMaxExtents) {
    return absl::InvalidArgumentError(absl::StrCat("--max-extents is ", options.max_extents,
                                                   ", expected 1 to ", kMaxExtents));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Segment>> Segment::Open(const SegmentOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckSegmentOptions(options));
  std::unique_ptr<Segment> segment(new Segment());
  HEADROOM_RETURN_IF_ERROR(segment->OpenFolder(options.dir));
  segment->why_new_ = segment->TryTakeOver(options);
  HEADROOM_RETURN_IF_ERROR(segment->CheckMemory(options));
  if (!segment->why_new_.empty()) {
    if (const absl::Status status = segment->MakeFiles(options); !status.ok()) {
      return Annotate(status, absl::StrCat("in the folder --segment-dir ", segment->dir_));
    }
  }
  HEADROOM_RETURN_IF_ERROR(segment->BeginGeneration(options.generation));
  return segment;
}

absl::Status Segment::OpenFolder(const std::string& dir) {
  std::error_code error;
  dir_ = std::filesystem::absolute(dir, error).lexically_normal().string();
  if (error) return absl::InvalidArgumentError(absl::StrCat("--segment-dir ", dir));
  while (dir_.size() > 1 && dir_.back() == '/') dir_.pop_back();
  if (mkdir(dir_.c_str(), 0700) != 0 && errno != EEXIST) {
    return Errno(absl::StrCat("making the folder --segment-dir ", dir_));
  }
  dir_fd_ = Fd(open(dir_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!dir_fd_.valid()) return Errno(absl::StrCat("opening the folder --segment-dir ", dir_));
  // On the folder and not on a file in it: files are replaced, and a lock on one that has been
  // unlinked keeps nobody out.
  if (flock(dir_fd_.get(), LOCK_EX | LOCK_NB) == 0) return absl::OkStatus();
  if (errno != EWOULDBLOCK) return Errno(absl::StrCat("locking the folder --segment-dir ", dir_));
  return WithReason(absl::AlreadyExistsError(absl::StrCat(
                        "another kvstore holds the lock of the folder ", dir_,
                        ": stop it, or give this one another --segment-dir")),
                    "SEGMENT_IN_USE");
}

std::string Segment::TryTakeOver(const SegmentOptions& options) {
  const auto open_file = [this](const char* name, struct stat& stat) {
    Fd fd(openat(dir_fd_.get(), name, O_RDWR | O_CLOEXEC | O_NOFOLLOW));
    // A file of another user could change under us.
    const bool usable = fd.valid() && fstat(fd.get(), &stat) == 0 && S_ISREG(stat.st_mode) &&
                        stat.st_uid == geteuid();
    return usable ? std::move(fd) : Fd();
  };
  struct stat index_stat = {}, data_stat = {};
  index_fd_ = open_file(kIndexFile, index_stat);
  data_fd_ = open_file(kDataFile, data_stat);
  if (!index_fd_.valid() || !data_fd_.valid()) return "there is no segment in the folder";
  if (index_stat.st_size != IndexBytes(options.max_extents) ||
      data_stat.st_size != options.data_bytes) {
    return absl::StrCat("the old segment has ", data_stat.st_size, " bytes of data and ",
                        index_stat.st_size, " of index, not what the options ask for");
  }
  if (index_stat.st_blocks * 512 < index_stat.st_size) return "the old index has holes";
  if (absl::Status status = MapFiles(options); !status.ok()) return std::string(status.message());
  const absl::Status status = CheckIndexHeader(header(), index_stat.st_size);
  if (!status.ok()) return std::string(status.message());
  if (header().max_extents != static_cast<uint64_t>(options.max_extents) ||
      header().data_bytes != static_cast<uint64_t>(options.data_bytes) ||
      header().data_inode != data_stat.st_ino) {
    return "the old data file is not the one that the index belongs to";
  }
  if (header().boot_id != BootId()) return "the machine has been started since";
  // What claims to be ready must be there: tmpfs counts the memory that a file holds.
  const uint64_t held = static_cast<uint64_t>(data_stat.st_blocks) * 512;
  const uint64_t ready = LoadAcquire(header().ready_bytes);
  if (ready > static_cast<uint64_t>(options.data_bytes) || ready > held) {
    return absl::StrCat("the old segment holds ", held, " bytes of memory and claims ", ready);
  }
  fchmod(index_fd_.get(), 0600);
  fchmod(data_fd_.get(), 0600);
  return "";
}

absl::Status Segment::CheckMemory(const SegmentOptions& options) const {
  const int64_t needed = options.data_bytes + IndexBytes(options.max_extents);
  // What the old files hold is either kept or given back.
  const int64_t held =
      BytesHeld(dir_fd_.get(), kDataFile) + BytesHeld(dir_fd_.get(), kIndexFile);
  for (const MemoryLimit& limit : FindMemoryLimits(dir_fd_.get(), dir_)) {
    if (limit.free_bytes == kUnlimited || limit.free_bytes + held >= needed) continue;
    return WithReason(
        absl::ResourceExhaustedError(absl::StrCat(
            "--host-memory asks for ", needed, " bytes, index included, but ", limit.what,
            " has only ", limit.free_bytes + held,
            " left: lower --host-memory, enlarge that, or use another --segment-dir")),
        "HOST_MEMORY");
  }
  return absl::OkStatus();
}

absl::Status Segment::MakeFiles(const SegmentOptions& options) {
  index_.Reset();
  data_.Reset();
  // The index last: without it, or with a header that is not whole, the folder holds no segment.
  if (unlinkat(dir_fd_.get(), kIndexFile, 0) != 0 && errno != ENOENT) {
    return Errno(absl::StrCat("removing the old file ", kIndexFile));
  }
  HEADROOM_ASSIGN_OR_RETURN(data_fd_, MakeFile(dir_fd_.get(), kDataFile, options.data_bytes));
  HEADROOM_ASSIGN_OR_RETURN(
      index_fd_, MakeFile(dir_fd_.get(), kIndexFile, IndexBytes(options.max_extents)));
  HEADROOM_RETURN_IF_ERROR(MapFiles(options));
  HEADROOM_RETURN_IF_ERROR(BackWithMemory(index_, index_fd_.get(), 0, index_.bytes()));
  struct stat stat = {};
  if (fstat(data_fd_.get(), &stat) != 0) return Errno("fstat of the data file");
  IndexHeader fresh = {};
  fresh.magic = kIndexMagic;
  fresh.format_version = kSegmentFormatVersion;
  fresh.header_bytes = sizeof(IndexHeader);
  fresh.descriptor_bytes = sizeof(ExtentDescriptor);
  fresh.max_extents = static_cast<uint32_t>(options.max_extents);
  fresh.data_bytes = static_cast<uint64_t>(options.data_bytes);
  fresh.data_inode = stat.st_ino;
  fresh.boot_id = BootId();
  WriteFixedHeader(fresh);
  return absl::OkStatus();
}

absl::Status Segment::MapFiles(const SegmentOptions& options) {
  HEADROOM_ASSIGN_OR_RETURN(
      index_, MappedRegion::Map(index_fd_.get(), IndexBytes(options.max_extents),
                                MappedRegion::Access::kReadWrite, false, kIndexFile));
  HEADROOM_ASSIGN_OR_RETURN(
      data_, MappedRegion::Map(data_fd_.get(), options.data_bytes,
                               MappedRegion::Access::kReadWrite, true, kDataFile));
  return absl::OkStatus();
}

// Generations rise on the same files, and, being microseconds since 1970 (below 2^53, so that any JSON
// reader keeps them whole), over new files too.
absl::Status Segment::BeginGeneration(uint64_t asked) {
  const uint64_t before = LoadAcquire(header().generation);
  const auto now = static_cast<uint64_t>(absl::ToUnixMicros(absl::Now()));
  // A number that no clock gave is not counted on from.
  constexpr uint64_t kLargest = uint64_t{1} << 53;
  generation_ = asked != 0 ? asked : std::max(now, before < kLargest ? before + 1 : 0);
  StoreRelease(header().generation, generation_);
  return absl::OkStatus();
}

// ---------------------------------------------------------------- the header

void Segment::WriteFixedHeader(const IndexHeader& fixed) {
  constexpr size_t kBytes = offsetof(IndexHeader, checksum);
  // Readers copy the header and check the copy's sum, so a mixture of old and new is seen as damage,
  // whatever order the bytes arrive in.
  StoreRelease(header().checksum, 0);
  std::memcpy(static_cast<void*>(&header()), &fixed, kBytes);
  StoreRelease(header().checksum, ChecksumOf(fixed));
}

std::optional<SegmentBinding> Segment::binding() const {
  if (header().encoding == kUnbound) return std::nullopt;
  return BindingOf(header());
}

void Segment::Bind(const SegmentBinding& binding) {
  IndexHeader fixed = header();
  fixed.encoding = kEncodingBFloat16;
  fixed.num_layers = binding.geometry.num_layers;
  fixed.num_kv_heads = binding.geometry.num_kv_heads;
  fixed.head_dim = binding.geometry.head_dim;
  fixed.first_layer = binding.first_layer;
  fixed.first_kv_head = binding.first_kv_head;
  fixed.fingerprint = binding.fingerprint;
  WriteFixedHeader(fixed);
}

std::span<ExtentDescriptor> Segment::descriptors() const {
  return {reinterpret_cast<ExtentDescriptor*>(index_.data() + sizeof(IndexHeader)),
          (static_cast<size_t>(index_.bytes()) - sizeof(IndexHeader)) / sizeof(ExtentDescriptor)};
}

// ---------------------------------------------------------------- memory

int64_t Segment::ready_bytes() const {
  return static_cast<int64_t>(LoadAcquire(header().ready_bytes));
}

absl::Status Segment::Prefault(int64_t end, const std::atomic<bool>& stop) {
  end = std::min(end, data_.bytes());
  for (int64_t begin = ready_bytes(); begin < end && !stop.load();) {
    const int64_t bytes = std::min(kPrefaultStepBytes, end - begin);
    HEADROOM_RETURN_IF_ERROR(BackWithMemory(data_, data_fd_.get(), begin, bytes));
    begin += bytes;
    StoreRelease(header().ready_bytes, static_cast<uint64_t>(begin));
  }
  return absl::OkStatus();
}

int64_t Segment::CountHugePageBytes() const {
  std::ifstream smaps("/proc/self/smaps");
  const auto begin = reinterpret_cast<uintptr_t>(data_.data());
  const uintptr_t end = begin + static_cast<uintptr_t>(data_.bytes());
  bool ours = false;
  int64_t bytes = 0;
  for (std::string line; std::getline(smaps, line);) {
    unsigned long from, to;  // "7f..-7f.. rw-s ..." begins a mapping, "Name:  12 kB" tells of it
    if (std::sscanf(line.c_str(), "%lx-%lx ", &from, &to) == 2) {
      ours = from < end && to > begin;
    } else if (ours) {
      for (const char* const name : {"ShmemPmdMapped", "FilePmdMapped"}) {
        bytes += FindKilobytes(line, name).value_or(0);
      }
    }
  }
  return bytes;
}

}  // namespace headroom::kvstore
