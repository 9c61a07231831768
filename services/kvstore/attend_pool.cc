#include "services/kvstore/attend_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/checked_math.h"
#include "common/device/touch_ranges.h"
#include "common/futex.h"
#include "common/segment_format.h"
#include "common/status.h"
#include "common/trace.h"

namespace headroom::kvstore {
namespace {

// 16 MiB: a pass of 1M keys of a head for Llama-3-8B's four rows is 8.5 MB.
constexpr int64_t kScratchFloats = int64_t{1} << 22;
static_assert(kScratchFloats >= kernels::kMinAttendScratchFloats);

// How long to look without sleeping after the latest post. Whoever can wake the pool need not be
// looked for; a GPU's next post comes within a layer's time.
constexpr int64_t kSpinIfWokenNs = 20'000;
constexpr int64_t kSpinNs = 20'000'000;
// A GPU that posts while the pool sleeps is found this much later.
constexpr absl::Duration kNap = absl::Microseconds(50);
constexpr int64_t kNapsNs = 1'000'000'000;
constexpr absl::Duration kSleep = absl::Milliseconds(500);

int64_t NowNs() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

absl::Status Hostile(absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("mailbox: ", what));
}

// Pins the calling thread to the `index`-th last processor that the process may use: what comes first
// is left to others.
void PinTo(int index) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  for (int cpu = CPU_SETSIZE - 1; cpu >= 0; --cpu) {
    if (!CPU_ISSET(cpu, &allowed) || index-- > 0) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    pthread_setaffinity_np(pthread_self(), sizeof(one), &one);
    return;
  }
}

}  // namespace

AttendPool::AttendPool(const uint8_t* data, std::function<int64_t()> ready_bytes, int threads)
    : data_(data),
      ready_bytes_(std::move(ready_bytes)),
      scratch_(std::make_unique<float[]>(kScratchFloats)),
      team_(threads) {
  items_.reserve(4096);
  spans_.reserve(16384);
  thread_ = std::thread([this] { Loop(); });
}

AttendPool::~AttendPool() {
  stop_.store(true);
  {
    MutexLock lock(&mutex_);
    attached_.SignalAll();
    if (waits_on_ != nullptr) WakeStore(waits_on_->header());
  }
  thread_.join();
}

AttendPool::Counters AttendPool::counters() const {
  MutexLock lock(&mutex_);
  return counters_;
}

void AttendPool::Attach(std::shared_ptr<Mailbox> mailbox) {
  // From now on posts are kept until the thread comes to them.
  mailbox->header().attached.store(mailbox->shape().generation);
  MutexLock lock(&mutex_);
  next_ = std::move(mailbox);
  attached_.SignalAll();
  if (waits_on_ != nullptr) WakeStore(waits_on_->header());
}

// ---------------------------------------------------------------- the loop

void AttendPool::Loop() {
  pthread_setname_np(pthread_self(), "attend");
  team_.Run([](int member) { PinTo(member); });
  while (!stop_.load(std::memory_order_relaxed)) {
    Mailbox* const mailbox = Current();
    if (mailbox == nullptr) continue;
    bool served = false;
    for (uint32_t slot = 0; slot < mailbox->shape().num_slots; ++slot) {
      served = ServeSlot(*mailbox, slot) || served;
    }
    if (served) {
      last_active_ns_ = NowNs();
    } else {
      Idle(*mailbox);
    }
  }
}

Mailbox* AttendPool::Current() {
  MutexLock lock(&mutex_);
  if (next_ != nullptr) {
    mailbox_ = std::move(next_);
    served_.clear();
    for (uint32_t slot = 0; slot < mailbox_->shape().num_slots; ++slot) {
      served_.push_back(mailbox_->slot(slot).answered.load());  // it may have been attached before
    }
  } else if (mailbox_ == nullptr && !stop_.load()) {
    attached_.WaitFor(&mutex_, absl::Seconds(1));
  }
  waits_on_ = mailbox_.get();
  return mailbox_.get();
}

bool AttendPool::AnyPost(const Mailbox& mailbox) const {
  for (uint32_t slot = 0; slot < mailbox.shape().num_slots; ++slot) {
    if (mailbox.slot(slot).posted.load() != served_[slot]) return true;
  }
  return false;
}

void AttendPool::Idle(Mailbox& mailbox) {
  MailboxHeader& header = mailbox.header();
  const bool woken = mailbox.shape().poster_wakes;
  const uint32_t wake = header.wake.load();
  // A step begins: its first post may be some time off.
  if (wake != wake_) last_active_ns_ = NowNs();
  wake_ = wake;
  const int64_t quiet_ns = NowNs() - last_active_ns_;
  if (quiet_ns < (woken ? kSpinIfWokenNs : kSpinNs)) {
    for (int i = 0; i < 64; ++i) Pause();
    return;
  }
  // It says that it sleeps before it looks again; who posts looks after posting.
  header.store_sleeps.store(1);
  bool more = AnyPost(mailbox) || stop_.load();
  if (!more) {
    MutexLock lock(&mutex_);
    more = next_ != nullptr;
  }
  if (!more) SharedFutexWait(header.wake, wake, woken || quiet_ns > kNapsNs ? kSleep : kNap);
  header.store_sleeps.store(0);
}

// ---------------------------------------------------------------- one post

bool AttendPool::ServeSlot(Mailbox& mailbox, uint32_t slot) {
  MailboxSlot& at = mailbox.slot(slot);
  const uint64_t count = at.posted.load(std::memory_order_acquire);
  if (count == served_[slot]) return false;
  served_[slot] = count;
  const int64_t begun_ns = NowNs();
  const TraceScope trace("attend in place", "layer", at.post.layer);
  Work work;
  const absl::Status status = ReadPost(mailbox, slot, work);
  if (status.ok()) {
    TouchRanges(work.args);
    kernels::cpu::Attend(work.args, team_);
  }
  Answer(mailbox, slot, work, count, status, begun_ns);
  return true;
}

void AttendPool::Answer(Mailbox& mailbox, uint32_t slot, const Work& work, uint64_t count,
                        const absl::Status& status, int64_t begun_ns) {
  const auto busy_ns = static_cast<uint64_t>(NowNs() - begun_ns);
  const bool late = mailbox.header().retired.load(std::memory_order_acquire) != 0;
  {
    MutexLock lock(&mutex_);
    ++(late ? counters_.late_partials : status.ok() ? counters_.posts : counters_.refused);
    if (status.ok()) {
      counters_.bytes += static_cast<uint64_t>(work.bytes);
      counters_.busy_ns += busy_ns;
    }
  }
  if (late) return;
  MailboxAnswer answer = {};
  answer.generation = mailbox.shape().generation;
  answer.step = work.post.step;
  answer.attempt = work.post.attempt;
  answer.layer = work.post.layer;
  answer.code = static_cast<uint32_t>(status.code());
  MailboxSlot& at = mailbox.slot(slot);
  at.answer = answer;
  if (status.ok()) {
    auto* const totals = reinterpret_cast<MailboxTotals*>(mailbox.table(slot, work.post.table));
    totals->bytes += static_cast<uint64_t>(work.bytes);
    totals->busy_ns += busy_ns;
    ++totals->posts;
  }
  RingAnswered(at, count);
}

// Everything in the mailbox is read once, then checked, then used: the worker could change it at any
// time.
absl::Status AttendPool::ReadPost(const Mailbox& mailbox, uint32_t slot, Work& work) {
  const MailboxShape& shape = mailbox.shape();
  std::memcpy(&work.post, &mailbox.slot(slot).post, sizeof(work.post));
  const MailboxPost& post = work.post;
  if (post.rows < 1 || post.rows > shape.max_rows) return Hostile("rows");
  if (post.layer >= static_cast<uint32_t>(shape.geometry.num_layers)) return Hostile("layer");
  if (post.table >= shape.tables_per_slot) return Hostile("table");
  if (!std::isfinite(post.scale)) return Hostile("scale");
  const int32_t d = shape.geometry.head_dim;
  if (d != 64 && d != 128 && d != 256) return absl::UnimplementedError("mailbox: the head size");
  if (post.soft_cap != 0) return absl::UnimplementedError("mailbox: a soft cap");
  kernels::AttendArgs& args = work.args;
  args.q = mailbox.queries(slot);
  args.q_stride = shape.query_floats();
  args.state = mailbox.partials(slot);
  args.rows = post.rows;
  args.scratch = scratch_.get();
  args.scratch_floats = kScratchFloats;
  args.scale = post.scale;
  args.num_q_heads = shape.num_q_heads;
  args.num_kv_heads = shape.geometry.num_kv_heads;
  args.head_dim = shape.geometry.head_dim;
  HEADROOM_RETURN_IF_ERROR(ReadItems(mailbox, mailbox.table(slot, post.table), work));
  args.items = {items_.data(), items_.data(), static_cast<int32_t>(items_.size())};
  args.spans = {spans_.data(), spans_.data(), static_cast<int32_t>(spans_.size())};
  return absl::OkStatus();
}

absl::Status AttendPool::ReadItems(const Mailbox& mailbox, const uint8_t* table, Work& work) {
  const MailboxShape& shape = mailbox.shape();
  const KvGeometry& geometry = shape.geometry;
  MailboxTableHeader header;
  std::memcpy(&header, table, sizeof(header));
  const auto fits = [&](uint64_t offset, uint64_t count, uint64_t bytes) {
    return offset % 8 == 0 && offset + count * bytes <= static_cast<uint64_t>(shape.table_bytes);
  };
  if (!fits(header.items_offset, header.num_items, sizeof(MailboxItem)) ||
      !fits(header.spans_offset, header.num_spans, sizeof(MailboxSpan))) {
    return Hostile("the table's offsets");
  }
  MailboxLayer layer;
  std::memcpy(&layer, table + sizeof(header) + work.post.layer * sizeof(layer), sizeof(layer));
  if (uint64_t{layer.item_begin} + layer.item_count > header.num_items) return Hostile("the layer");
  items_.clear();
  spans_.clear();
  taken_.assign(size_t{work.post.rows} * geometry.num_kv_heads, false);
  const int64_t ready_bytes = ready_bytes_();
  uint64_t next_span = 0;
  for (uint32_t i = 0; i < layer.item_count; ++i) {
    MailboxItem from;
    std::memcpy(&from, table + header.items_offset + (layer.item_begin + i) * sizeof(from),
                sizeof(from));
    const std::optional<int64_t> row_end = CheckedAdd(from.row_begin, from.row_count);
    if (from.row_begin < 0 || from.row_count < 1 || *row_end > int64_t{work.post.rows} ||
        from.kv_head_begin < 0 || from.kv_head_begin >= from.kv_head_end ||
        from.kv_head_end > geometry.num_kv_heads || from.first_pos < 0 ||
        !CheckedAdd(from.first_pos, from.row_count).has_value() ||
        uint64_t{from.span_begin} + from.span_count > header.num_spans || from.span_count == 0) {
      return Hostile("an item");
    }
    // Each span belongs to one item: however long the lists, the work is that of the table's bytes.
    if (i > 0 && from.span_begin != next_span) return Hostile("spans of several items");
    next_span = uint64_t{from.span_begin} + from.span_count;
    // Two items may not write one state.
    for (int64_t row = from.row_begin; row < *row_end; ++row) {
      for (int32_t head = from.kv_head_begin; head < from.kv_head_end; ++head) {
        auto taken = taken_[row * geometry.num_kv_heads + head];
        if (taken) return Hostile("items that meet");
        taken = true;
      }
    }
    kernels::AttendItem item;
    item.row_begin = from.row_begin;
    item.row_count = from.row_count;
    item.first_pos = from.first_pos;
    item.kv_head_begin = from.kv_head_begin;
    item.kv_head_end = from.kv_head_end;
    item.span_begin = static_cast<int32_t>(spans_.size());
    item.span_count = static_cast<int32_t>(from.span_count);
    item.reset = 1;
    items_.push_back(item);
    int64_t next_pos = 0;
    for (uint32_t s = 0; s < from.span_count; ++s) {
      MailboxSpan span;
      std::memcpy(&span, table + header.spans_offset + (from.span_begin + s) * sizeof(span),
                  sizeof(span));
      if (span.capacity < kBlockTokens || span.capacity > geometry.MaxExtentTokens() ||
          !std::has_single_bit(static_cast<uint32_t>(span.capacity)) || span.count < 1 ||
          span.count > span.capacity || span.count % kBlockTokens != 0 ||
          (s > 0 && span.first_pos != next_pos) || span.first_pos < 0 ||
          span.first_pos % kBlockTokens != 0 ||
          span.first_pos >= kMaxPositions || span.first_pos < from.first_valid_pos) {
        return Hostile("a span");
      }
      // The extent must lie in memory that the store has given out.
      if (span.data_offset > static_cast<uint64_t>(ready_bytes) || span.data_offset % 64 != 0 ||
          !RangeFits(static_cast<int64_t>(span.data_offset),
                     span.capacity * geometry.BytesPerTokenPerLayer(), ready_bytes)) {
        return Hostile("an extent leaves the segment");
      }
      next_pos = span.first_pos + span.count;
      kernels::KvSpan keys;
      // Attention reads keys only; a span is also a place to write to elsewhere.
      keys.base = const_cast<uint8_t*>(data_) + span.data_offset;
      keys.origin_pos = keys.first_pos = span.first_pos;
      keys.count = span.count;
      keys.capacity = span.capacity;
      keys.kv_head_end = geometry.num_kv_heads;
      spans_.push_back(keys);
      work.bytes += span.count * (from.kv_head_end - from.kv_head_begin) *
                    geometry.BytesPerTokenPerHead();
    }
    if (next_pos > from.first_pos) return Hostile("keys at and after the queries");
  }
  return absl::OkStatus();
}

}  // namespace headroom::kvstore
