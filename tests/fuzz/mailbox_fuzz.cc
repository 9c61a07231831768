// What a worker writes into a mailbox. The first byte picks: the file's header, which is opened, or
// a post with its table, which is read; then every key that the store would attend to can be read.
#include <xxhash.h>

#include <cstddef>
#include <memory>

#include "common/segment/mailbox.h"
#include "common/segment_format.h"
#include "services/kvstore/post_reader.h"
#include "tests/fuzz/fuzz.h"

using headroom::KvGeometry;
using headroom::Mailbox;
using headroom::MailboxHeader;
using headroom::MailboxShape;
using headroom::fuzz::Input;
using headroom::fuzz::Require;

namespace {

constexpr uint64_t kGeneration = 41;
constexpr int64_t kReadyBytes = int64_t{1} << 18;

KvGeometry Geometry() {
  KvGeometry geometry;
  geometry.num_layers = 2;
  geometry.num_kv_heads = 2;
  geometry.head_dim = 64;
  return geometry;
}

MailboxShape Shape() {
  MailboxShape shape;
  shape.generation = kGeneration;
  shape.incarnation = 7;
  shape.geometry = Geometry();
  shape.num_q_heads = 4;
  shape.num_slots = 1;
  shape.tables_per_slot = 2;
  shape.max_rows = 4;
  shape.table_bytes = 512;
  return shape;
}

// A header that is right but for what the input changes, with or without the checksum that follows.
void OpenHeader(Input& input) {
  static const auto* const folder = new headroom::fuzz::Folder();
  static const int at_exit = std::atexit([] { delete folder; });
  Require(at_exit == 0, "the folder goes at the end");
  const std::string name = headroom::MailboxFile(kGeneration, 1);
  // Numbers that Create() takes: it is not what is tried.
  MailboxShape shape = Shape();
  shape.num_slots = 1 + input.Take<uint8_t>() % 3;
  shape.tables_per_slot = 1 + input.Take<uint8_t>() % 3;
  const bool repair = input.Take<uint8_t>() % 2 == 0;
  const auto made = Mailbox::Create(folder->path(), name, shape);
  if (!made.ok()) return;
  while (input.left() > 0) {
    const uint16_t at = input.Take<uint16_t>() % 256;
    (*made)->data()[at] = input.Take<uint8_t>();
  }
  if (repair) {
    (*made)->header().checksum =
        XXH3_64bits((*made)->data(), offsetof(MailboxHeader, checksum));
  }
  const auto opened = Mailbox::Open(folder->path(), name, Geometry(), kGeneration);
  if (!opened.ok()) return;
  const MailboxShape& found = (*opened)->shape();
  Require(found.num_slots >= 1 && found.tables_per_slot >= 1, "there is something to post in");
  const uint8_t* const end = (*opened)->data() + (*opened)->bytes();
  const uint32_t last = found.num_slots - 1;
  Require((*opened)->table(last, found.tables_per_slot - 1) + found.table_bytes <= end,
          "the last table lies within the file");
  Require(reinterpret_cast<const uint8_t*>((*opened)->partials(last) +
                                           found.max_rows * found.partial_floats()) <= end,
          "and so do the last partials");
}

void ReadPost(Input& input) {
  static Mailbox* const mailbox = [] {
    auto made = Mailbox::CreateUnnamed(Shape());
    Require(made.ok(), "a mailbox can be made");
    return made->release();
  }();
  // Memory of its own, so that AddressSanitizer sees a read beyond it.
  static const uint8_t* const keys = new uint8_t[kReadyBytes]();
  static auto* const reader =
      new headroom::kvstore::PostReader(keys, [] { return kReadyBytes; });
  input.TakeBytes(&mailbox->slot(0).post, sizeof(headroom::MailboxPost));
  for (uint32_t table = 0; table < mailbox->shape().tables_per_slot; ++table) {
    input.TakeBytes(mailbox->table(0, table), mailbox->shape().table_bytes);
  }
  if (!reader->Read(*mailbox, 0).ok()) return;
  const headroom::kernels::AttendArgs& args = reader->args();
  Require(args.rows >= 1 && args.rows <= static_cast<int64_t>(mailbox->shape().max_rows), "rows");
  volatile uint8_t sum = 0;
  for (int32_t i = 0; i < args.spans.count; ++i) {
    const headroom::kernels::KvSpan& span = args.spans.host[i];
    const int64_t bytes = span.capacity * Geometry().BytesPerTokenPerLayer();
    Require(span.count <= span.capacity, "a span is within its extent");
    Require(span.base >= keys && bytes <= keys + kReadyBytes - span.base,
            "an extent lies in memory that has been given out");
    sum = sum + span.base[0] + span.base[bytes - 1];
  }
  for (int32_t i = 0; i < args.items.count; ++i) {
    const headroom::kernels::AttendItem& item = args.items.host[i];
    Require(item.row_begin >= 0 && item.row_begin + item.row_count <= args.rows, "an item's rows");
    Require(item.span_begin >= 0 && item.span_begin + item.span_count <= args.spans.count,
            "an item's spans");
    Require(item.kv_head_begin >= 0 && item.kv_head_end <= args.num_kv_heads, "an item's heads");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  if (input.Take<uint8_t>() % 4 == 0) {
    OpenHeader(input);
  } else {
    ReadPost(input);
  }
  return 0;
}
