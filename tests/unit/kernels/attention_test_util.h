// Places that hold sequences' keys, and launches of attention on them.
#ifndef HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "tests/unit/kernels/attention_sequence.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {

// ---- Places to keep a sequence's keys in ---------------------------------------------------------

// Memory of one run of positions; what no key of the sequence fills is NaN.
class Place {
 public:
  // Positions [first, first + count), row 0 being `origin`.
  Place(const Sequence& sequence, int64_t first, int64_t count, int64_t origin, int32_t capacity,
        int32_t head_begin, int32_t head_end)
      : bytes_(KvLayout{capacity, sequence.shape.head_dim}.BytesFor(head_end - head_begin)) {
    const int32_t d = sequence.shape.head_dim;
    for (size_t i = 0; i < bytes_.size(); i += 2) {
      bytes_[i] = 0xc0;
      bytes_[i + 1] = 0x7f;
    }
    span_.base = bytes_.data();
    span_.origin_pos = origin;
    span_.first_pos = first;
    span_.count = static_cast<int32_t>(count);
    span_.capacity = capacity;
    span_.kv_head_begin = head_begin;
    span_.kv_head_end = head_end;
    const KvLayout layout{capacity, d};
    for (int64_t pos = first; pos < first + count; ++pos) {
      const int64_t row = (pos - origin) % capacity;
      for (int32_t head = head_begin; head < head_end; ++head) {
        const int64_t from = (pos * sequence.shape.num_kv_heads + head) * d;
        std::memcpy(&bytes_[layout.KeyOffset(head - head_begin, row)], &sequence.k[from], d * 2);
        std::memcpy(&bytes_[layout.ValueOffset(head - head_begin, row)], &sequence.v[from], d * 2);
      }
    }
  }
  const KvSpan& span() const { return span_; }

 private:
  std::vector<uint8_t> bytes_;
  KvSpan span_;
};

// Launches on rows of one batch. Each Launch() adds up; the results are in state() and out().
class Batch {
 public:
  Batch(const Shape& shape, int64_t rows)
      : shape_(shape),
        q_(rows * shape.num_q_heads() * shape.head_dim, kNan),
        state_(rows * shape.num_q_heads() * AttentionStateFloats(shape.head_dim), kNan),
        out_(rows * shape.num_q_heads() * shape.head_dim, kNan),
        scratch_(kMinAttendScratchFloats, kNan),
        rows_(rows) {}

  // Rows [row_begin, row_begin + rows) become positions [first_pos, first_pos + rows) of `sequence`.
  void SetRows(const Sequence& sequence, int64_t row_begin, int64_t first_pos, int64_t rows) {
    const int64_t width = shape_.num_q_heads() * shape_.head_dim;
    std::copy_n(sequence.q.begin() + first_pos * width, rows * width, q_.begin() + row_begin * width);
  }

  // An item of the next launch: rows at first_pos against the positions that `places` hold.
  void Add(int64_t row_begin, int64_t rows, int64_t first_pos, bool reset, bool finish,
           const std::vector<const Place*>& places, int32_t head_begin = 0, int32_t head_end = -1) {
    AttendItem item;
    item.row_begin = static_cast<int32_t>(row_begin);
    item.row_count = static_cast<int32_t>(rows);
    item.first_pos = first_pos;
    item.kv_head_begin = head_begin;
    item.kv_head_end = head_end < 0 ? shape_.num_kv_heads : head_end;
    item.span_begin = static_cast<int32_t>(spans_.size());
    item.span_count = static_cast<int32_t>(places.size());
    item.reset = reset;
    item.finish = finish;
    for (const Place* place : places) spans_.push_back(place->span());
    items_.push_back(item);
  }

  void AddSpan(int64_t row_begin, int64_t rows, int64_t first_pos, bool reset, bool finish,
               const KvSpan& span) {
    Add(row_begin, rows, first_pos, reset, finish, {});
    spans_.push_back(span);
    items_.back().span_count = 1;
  }

  AttendArgs Args() {
    AttendArgs args;
    args.q = q_.data();
    args.q_stride = shape_.num_q_heads() * shape_.head_dim;
    args.state = state_.data();
    args.out = out_.data();
    args.rows = rows_;
    args.items = DeviceTable(items_);
    args.spans = DeviceTable(spans_);
    args.scratch = scratch_.data();
    args.scratch_floats = static_cast<int64_t>(scratch_.size());
    args.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    args.num_q_heads = shape_.num_q_heads();
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.window = window;
    args.soft_cap = soft_cap;
    return args;
  }
  int64_t window = 0;
  float soft_cap = 0;

  void Launch(const cpu::KernelTable& kernels, CpuTeam& team) { Launch(kernels.attend, team); }
  void Launch(void (*attend)(const AttendArgs&, CpuTeam&), CpuTeam& team) {
    attend(Args(), team);
    items_.clear();
    spans_.clear();
  }
  void LaunchReference() { reference::Attend(Args()); }

  const std::vector<float>& out() const { return out_; }
  const std::vector<float>& state() const { return state_; }

 private:
  Shape shape_;
  std::vector<float> q_, state_, out_, scratch_;
  int64_t rows_;
  std::vector<AttendItem> items_;
  std::vector<KvSpan> spans_;
};

// The keys [0, tokens) in one place, somewhat larger.
inline Place Whole(const Sequence& sequence, int64_t tokens) {
  return Place(sequence, 0, tokens, 0, static_cast<int32_t>(CeilToBlock(tokens) + 64), 0,
               sequence.shape.num_kv_heads);
}

// One launch of the last `rows` rows of the first `tokens` tokens.
inline std::vector<float> Plain(const Sequence& sequence, int64_t tokens, int64_t rows,
                         const cpu::KernelTable& kernels, CpuTeam& team) {
  const Place place = Whole(sequence, tokens);
  Batch batch(sequence.shape, rows);
  batch.SetRows(sequence, 0, tokens - rows, rows);
  batch.Add(0, rows, tokens - rows, true, true, {&place});
  batch.Launch(kernels, team);
  return batch.out();
}

// The keys of [0, tokens) cut at `cuts` (multiples of 64), each part in a place of its own kind.
inline std::vector<std::unique_ptr<Place>> CutPlaces(const Sequence& sequence, int64_t tokens,
                                              std::vector<int64_t> cuts) {
  std::vector<std::unique_ptr<Place>> places;
  const int32_t heads = sequence.shape.num_kv_heads;
  cuts.push_back(tokens);
  int64_t first = 0;
  for (const int64_t end : cuts) {
    const int64_t count = end - first;
    if (count <= 0) continue;
    const int kind = static_cast<int>(places.size() % 3);
    if (kind == 0 || count > kTailTokens) {  // an extent
      places.push_back(std::make_unique<Place>(sequence, first, count, first,
                                               static_cast<int32_t>(CeilToBlock(count)), 0, heads));
    } else if (kind == 1) {  // a tail: a ring of 256 rows that wraps
      places.push_back(std::make_unique<Place>(sequence, first, count, 0,
                                               static_cast<int32_t>(kTailTokens), 0, heads));
    } else {  // a longer extent that began earlier
      const int64_t origin = std::max<int64_t>(0, first - 128);
      places.push_back(std::make_unique<Place>(
          sequence, first, count, origin, static_cast<int32_t>(CeilToBlock(end - origin) + 64), 0,
          heads));
    }
    first = end;
  }
  return places;
}

// The last `rows` of `tokens` tokens, launch by launch over places cut at `cuts`, from `first_key` on.
inline std::vector<float> Windowed(const Sequence& sequence, int64_t tokens, int64_t rows, int64_t window,
                            float soft_cap, void (*attend)(const AttendArgs&, CpuTeam&),
                            int64_t first_key = 0, const std::vector<int64_t>& cuts = {}) {
  CpuTeam team(2);
  Batch batch(sequence.shape, rows);
  batch.window = window;
  batch.soft_cap = soft_cap;
  batch.SetRows(sequence, 0, tokens - rows, rows);
  int64_t begin = first_key;
  std::vector<int64_t> ends = cuts;
  ends.push_back(tokens);
  for (const int64_t end : ends) {
    if (end <= begin) continue;
    // Rows before the first are there, and are NaN.
    const Place place(sequence, begin, end - begin, FloorToBlock(begin / 2),
                      static_cast<int32_t>(CeilToBlock(end)), 0, sequence.shape.num_kv_heads);
    batch.Add(0, rows, tokens - rows, begin == first_key, end == tokens, {&place});
    if (attend == nullptr) {
      batch.LaunchReference();
    } else {
      batch.Launch(attend, team);
    }
    begin = end;
  }
  return batch.out();
}

inline constexpr int64_t kWindows[] = {1, 40, 64, 65, 300, 5000};

}  // namespace headroom::kernels

#endif  // HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_TEST_UTIL_H_
