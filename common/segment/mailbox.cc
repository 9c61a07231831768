#include "common/segment/mailbox.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/fd.h"
#include "common/futex.h"
#include "common/segment_format.h"
#include "common/status.h"
#include "kernels/attention.h"

namespace headroom {
namespace {

// Bounds far above what is made, so that products stay far from overflow.
constexpr int32_t kMaxQHeads = 65536;
constexpr uint32_t kMaxSlots = 64;
constexpr uint32_t kMaxTables = 64;
constexpr uint32_t kMaxRows = 65536;
constexpr int64_t kMaxTableBytes = int64_t{1} << 32;
constexpr int64_t kAlign = 4096;

// Some 20 us.
constexpr int kSpins = 500;

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

int64_t Aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

uint64_t ChecksumOf(const MailboxHeader& header) {
  return XXH3_64bits(&header, offsetof(MailboxHeader, checksum));
}

// Where a slot's queries and partials begin.
int64_t QueriesOffset(const MailboxShape& shape) {
  return Aligned(static_cast<int64_t>(sizeof(MailboxSlot)) +
                 shape.tables_per_slot * shape.table_bytes);
}
int64_t PartialsOffset(const MailboxShape& shape) {
  return QueriesOffset(shape) + Aligned(shape.max_rows * shape.query_floats() *
                                        static_cast<int64_t>(sizeof(float)));
}

void WriteHeader(const MailboxShape& shape, MailboxHeader& header) {
  header.magic = kMailboxMagic;
  header.format_version = kMailboxFormatVersion;
  header.header_bytes = sizeof(MailboxHeader);
  header.generation = shape.generation;
  header.incarnation = shape.incarnation;
  header.num_layers = shape.geometry.num_layers;
  header.num_q_heads = shape.num_q_heads;
  header.num_kv_heads = shape.geometry.num_kv_heads;
  header.head_dim = shape.geometry.head_dim;
  header.num_slots = shape.num_slots;
  header.tables_per_slot = shape.tables_per_slot;
  header.max_rows = shape.max_rows;
  header.query_encoding = kQueriesFloat32;
  header.table_bytes = static_cast<uint64_t>(shape.table_bytes);
  header.slot_bytes = static_cast<uint64_t>(shape.slot_bytes());
  header.poster_wakes = shape.poster_wakes ? 1 : 0;
  header.checksum = ChecksumOf(header);
}

// The header is hostile input; it has been copied.
absl::StatusOr<MailboxShape> ShapeOf(const MailboxHeader& header, int64_t file_bytes) {
  if (header.magic != kMailboxMagic) {
    return absl::FailedPreconditionError("it is no Headroom mailbox");
  }
  if (header.format_version != kMailboxFormatVersion ||
      header.header_bytes != sizeof(MailboxHeader) || header.query_encoding != kQueriesFloat32) {
    return absl::FailedPreconditionError(
        absl::StrCat("it has format ", header.format_version, " and query encoding ",
                     header.query_encoding, "; expected ", kMailboxFormatVersion, " and ",
                     kQueriesFloat32));
  }
  if (header.checksum != ChecksumOf(header)) {
    return absl::DataLossError("its header's checksum is wrong");
  }
  MailboxShape shape;
  shape.generation = header.generation;
  shape.incarnation = header.incarnation;
  shape.geometry = {header.num_layers, header.num_kv_heads, header.head_dim};
  shape.num_q_heads = header.num_q_heads;
  shape.num_slots = header.num_slots;
  shape.tables_per_slot = header.tables_per_slot;
  shape.max_rows = header.max_rows;
  shape.table_bytes = static_cast<int64_t>(header.table_bytes);
  shape.poster_wakes = header.poster_wakes != 0;
  const bool sane =
      IsUsable(shape.geometry) && shape.num_q_heads >= 1 && shape.num_q_heads <= kMaxQHeads &&
      shape.num_q_heads % shape.geometry.num_kv_heads == 0 &&
      shape.num_q_heads / shape.geometry.num_kv_heads <= kernels::kMaxGqaGroup &&
      shape.num_slots >= 1 && shape.num_slots <= kMaxSlots && shape.tables_per_slot >= 1 &&
      shape.tables_per_slot <= kMaxTables && shape.max_rows >= 1 && shape.max_rows <= kMaxRows &&
      shape.table_bytes % 64 == 0 && shape.table_bytes >= 0 &&
      shape.table_bytes <= kMaxTableBytes &&
      shape.table_bytes >= static_cast<int64_t>(sizeof(MailboxTableHeader)) +
                               shape.geometry.num_layers *
                                   static_cast<int64_t>(sizeof(MailboxLayer)) &&
      static_cast<int64_t>(header.slot_bytes) == shape.slot_bytes() &&
      shape.file_bytes() == file_bytes;
  if (!sane) return absl::DataLossError("its header contradicts itself or the file's size");
  return shape;
}

bool IsMailboxName(const std::string& name) {
  return absl::StartsWith(name, kMailboxPrefix) && name.find('/') == std::string::npos;
}

void UnlinkMailboxes(const std::string& dir) {
  DIR* const folder = opendir(dir.c_str());
  if (folder == nullptr) return;
  std::vector<std::string> names;
  while (const dirent* const entry = readdir(folder)) {
    if (IsMailboxName(entry->d_name)) names.emplace_back(entry->d_name);
  }
  closedir(folder);
  for (const std::string& name : names) unlink(absl::StrCat(dir, "/", name).c_str());
}

// Its low half, for a futex: the lower address of a little-endian word.
std::atomic<uint32_t>& LowHalf(std::atomic<uint64_t>& word) {
  return *reinterpret_cast<std::atomic<uint32_t>*>(&word);
}

}  // namespace

int64_t MailboxShape::partial_floats() const {
  return int64_t{num_q_heads} * kernels::AttentionStateFloats(geometry.head_dim);
}
int64_t MailboxShape::slot_bytes() const {
  return PartialsOffset(*this) +
         Aligned(max_rows * partial_floats() * static_cast<int64_t>(sizeof(float)));
}
int64_t MailboxShape::file_bytes() const {
  return static_cast<int64_t>(sizeof(MailboxHeader)) + num_slots * slot_bytes();
}

absl::StatusOr<std::unique_ptr<Mailbox>> Mailbox::Create(const std::string& dir,
                                                         const std::string& name,
                                                         const MailboxShape& shape) {
  UnlinkMailboxes(dir);
  const std::string path = absl::StrCat(dir, "/", name);
  const Fd fd(open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, absl::StrCat("making ", path));
  absl::StatusOr<std::unique_ptr<Mailbox>> mailbox = CreateIn(fd.get(), path, shape);
  if (!mailbox.ok()) unlink(path.c_str());
  return mailbox;
}

absl::StatusOr<std::unique_ptr<Mailbox>> Mailbox::CreateUnnamed(const MailboxShape& shape) {
  const Fd fd(memfd_create("headroom-mailbox", MFD_CLOEXEC));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, "memfd_create");
  return CreateIn(fd.get(), "an unnamed mailbox", shape);
}

absl::StatusOr<std::unique_ptr<Mailbox>> Mailbox::CreateIn(int fd, const std::string& name,
                                                           const MailboxShape& shape) {
  // Backed by memory now: a page that cannot be had later would be a SIGBUS.
  if (const int error = posix_fallocate(fd, 0, shape.file_bytes()); error != 0) {
    return absl::ErrnoToStatus(
        error, absl::StrCat(name, ": a mailbox of ", shape.file_bytes(),
                            " bytes does not fit: lower the kvstore's --host-memory, or enlarge the "
                            "file system of its --segment-dir"));
  }
  std::unique_ptr<Mailbox> mailbox(new Mailbox());
  mailbox->shape_ = shape;
  HEADROOM_ASSIGN_OR_RETURN(mailbox->region_,
                            MappedRegion::Map(fd, shape.file_bytes(),
                                              MappedRegion::Access::kReadWrite, false, name));
  // The file's zeros are the initial value of every count and flag.
  WriteHeader(shape, mailbox->header());
  return mailbox;
}

absl::StatusOr<std::unique_ptr<Mailbox>> Mailbox::Open(const std::string& dir,
                                                       const std::string& name,
                                                       const KvGeometry& geometry,
                                                       uint64_t generation) {
  if (!IsMailboxName(name)) {
    return absl::InvalidArgumentError(absl::StrCat("'", name, "' is no mailbox's name"));
  }
  const std::string path = absl::StrCat(dir, "/", name);
  const Fd fd(open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW));
  if (!fd.valid()) return absl::ErrnoToStatus(errno, absl::StrCat("opening ", path));
  struct stat stat = {};
  if (fstat(fd.get(), &stat) != 0) return absl::ErrnoToStatus(errno, absl::StrCat("fstat ", path));
  if (stat.st_size < static_cast<off_t>(sizeof(MailboxHeader))) {
    return absl::DataLossError(absl::StrCat(path, " has only ", stat.st_size, " bytes"));
  }
  std::unique_ptr<Mailbox> mailbox(new Mailbox());
  HEADROOM_ASSIGN_OR_RETURN(mailbox->region_,
                            MappedRegion::Map(fd.get(), stat.st_size,
                                              MappedRegion::Access::kReadWrite, false, name));
  // A copy is judged, so that what was judged is what is used.
  alignas(MailboxHeader) unsigned char copy[sizeof(MailboxHeader)];
  std::memcpy(copy, mailbox->region_.data(), offsetof(MailboxHeader, attached));
  absl::StatusOr<MailboxShape> shape =
      ShapeOf(*reinterpret_cast<const MailboxHeader*>(copy), stat.st_size);
  if (!shape.ok()) return Annotate(shape.status(), path);
  if (!(shape->geometry == geometry) || shape->generation != generation) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " was made for generation ", shape->generation, " of a store of ",
                     shape->geometry.num_layers, " layers x ", shape->geometry.num_kv_heads,
                     " KV heads x ", shape->geometry.head_dim, "; this one is generation ",
                     generation, " of ", geometry.num_layers, " x ", geometry.num_kv_heads, " x ",
                     geometry.head_dim));
  }
  mailbox->shape_ = *shape;
  return mailbox;
}

MailboxSlot& Mailbox::slot(uint32_t index) const {
  return *reinterpret_cast<MailboxSlot*>(region_.data() + sizeof(MailboxHeader) +
                                         index * shape_.slot_bytes());
}
uint8_t* Mailbox::table(uint32_t slot_index, uint32_t table) const {
  return reinterpret_cast<uint8_t*>(&slot(slot_index)) + sizeof(MailboxSlot) +
         table * shape_.table_bytes;
}
float* Mailbox::queries(uint32_t slot_index) const {
  return reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(&slot(slot_index)) +
                                  QueriesOffset(shape_));
}
float* Mailbox::partials(uint32_t slot_index) const {
  return reinterpret_cast<float*>(reinterpret_cast<uint8_t*>(&slot(slot_index)) +
                                  PartialsOffset(shape_));
}

void WakeStore(MailboxHeader& header) {
  header.wake.fetch_add(1);
  if (header.store_sleeps.load() != 0) SharedFutexWakeAll(header.wake);
}

void RingPosted(MailboxHeader& header, MailboxSlot& slot, uint64_t count) {
  slot.posted.store(count);
  WakeStore(header);
}

void RingAnswered(MailboxSlot& slot, uint64_t count) {
  slot.answered.store(count);
  if (slot.worker_sleeps.load() != 0) SharedFutexWakeAll(LowHalf(slot.answered));
}

bool AwaitAnswered(MailboxHeader& header, MailboxSlot& slot, uint64_t count, absl::Duration timeout,
                   absl::Duration longest_sleep) {
  const absl::Time deadline = absl::Now() + timeout;
  for (int spins = 0;; ++spins) {
    uint64_t answered = slot.answered.load(std::memory_order_acquire);
    if (answered >= count) return true;
    if (header.retired.load(std::memory_order_relaxed) != 0) return false;
    if (spins < kSpins) {
      Pause();
      continue;
    }
    const absl::Duration left = deadline - absl::Now();
    if (left <= absl::ZeroDuration()) return false;
    slot.worker_sleeps.store(1);
    answered = slot.answered.load();
    if (answered < count) {
      SharedFutexWait(LowHalf(slot.answered), static_cast<uint32_t>(answered),
                      std::min(left, longest_sleep));
    }
    slot.worker_sleeps.store(0);
  }
}

}  // namespace headroom
