// Attention whose work is split by units of keys: a task computes one unit of one KV head for all rows
// into scratch, and the units are folded in order afterwards. What computes a unit is a parameter.
#ifndef HEADROOM_KERNELS_CPU_ATTENTION_UNITS_H_
#define HEADROOM_KERNELS_CPU_ATTENTION_UNITS_H_

#include <algorithm>

#include "kernels/cpu/attention_block.h"
#include "kernels/cpu/runs.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

// Works of one pass over the scratch.
inline constexpr int kMaxWorks = 256;

// A launch's arguments with the addresses that follow from them.
struct Launch {
  const AttendArgs& a;
  int32_t group;  // query heads of a KV head

  const KvSpan* spans(const AttendItem& item) const { return a.spans.device + item.span_begin; }
  // The item's keys are the positions [begin_pos, end_pos). REQUIRES: span_count > 0.
  int64_t begin_pos(const AttendItem& item) const { return spans(item)[0].first_pos; }
  int64_t end_pos(const AttendItem& item) const {
    const KvSpan& last = spans(item)[item.span_count - 1];
    return last.first_pos + last.count;
  }
  bool has_keys(const AttendItem& item) const {
    return item.span_count > 0 && end_pos(item) > begin_pos(item);
  }
  Scoring scoring() const { return {a.scale, a.soft_cap}; }
  // One query of an item: `n` counts rows x group.
  Query query(const AttendItem& item, int32_t kv_head, int64_t n, const Partial& unit) const {
    const int64_t pos = item.first_pos + n / group;
    return {q(item.row_begin + n / group, int64_t{kv_head} * group + n % group), unit, pos,
            FirstSeen(a.window, pos)};
  }
  int64_t queries(const AttendItem& item) const { return int64_t{item.row_count} * group; }
  float* state(int64_t row, int64_t q_head) const {
    return a.state + (row * a.num_q_heads + q_head) * AttentionStateFloats(a.head_dim);
  }
  Partial finished(int64_t row, int64_t q_head) const { return {state(row, q_head), a.head_dim}; }
  Partial open(int64_t row, int64_t q_head) const {
    return {state(row, q_head) + a.head_dim + 2, a.head_dim};
  }
  const float* q(int64_t row, int64_t q_head) const {
    return a.q + row * a.q_stride + q_head * a.head_dim;
  }
  float* out(int64_t row, int64_t q_head) const {
    return a.out.floats() + (row * a.num_q_heads + q_head) * a.head_dim;
  }
};

// Calls fn(block) for every block of the item's keys that begins within [begin, end).
template <typename Block, typename Fn>
void ForEachBlock(const Launch& launch, const AttendItem& item, int32_t head, int64_t begin,
                  int64_t end, Block& block, Fn&& fn) {
  const int32_t d = launch.a.head_dim;
  const KvSpan* const spans = launch.spans(item);
  const KvSpan* const last = spans + item.span_count;
  const KvSpan* at = std::partition_point(
      spans, last, [&](const KvSpan& span) { return span.first_pos + span.count <= begin; });
  for (; at != last && at->first_pos < end; ++at) {
    const KvSpan& span = *at;
    const KvLayout layout{span.capacity, d};
    const int64_t span_end = span.first_pos + span.count;
    for (int64_t pos = std::max(begin, span.first_pos); pos < std::min(end, span_end);) {
      const int64_t block_end = std::min(FloorToBlock(pos) + kBlockTokens, span_end);
      const int64_t row = (pos - span.origin_pos) % span.capacity;
      const uint8_t* keys = span.base + layout.KeyOffset(head - span.kv_head_begin, row);
      const uint8_t* values = span.base + layout.ValueOffset(head - span.kv_head_begin, row);
      block.Set({reinterpret_cast<const BFloat16*>(keys), reinterpret_cast<const BFloat16*>(values),
                 pos, static_cast<int>(block_end - pos)},
                d);
      fn(block);
      pos = block_end;
    }
  }
}

inline void Finish(const Launch& launch, int64_t row, int64_t q_head) {
  const Partial result = launch.finished(row, q_head);
  Fold(result, launch.open(row, q_head));
  const F32x16 inverse = Broadcast(1.0f / result.l());
  float* out = launch.out(row, q_head);
  for (int32_t i = 0; i < launch.a.head_dim; i += kLanes) {
    Store(out + i, Mul(Load(result.o + i), inverse));
  }
}

// A KV head of an item without keys.
inline void ResetOrFinish(const Launch& launch, const AttendItem& item, int32_t head) {
  for (int64_t n = 0; n < launch.queries(item); ++n) {
    const int64_t row = item.row_begin + n / launch.group;
    const int64_t q_head = int64_t{head} * launch.group + n % launch.group;
    if (item.reset) {
      launch.finished(row, q_head).Reset();
      launch.open(row, q_head).Reset();
    }
    if (item.finish) Finish(launch, row, q_head);
  }
}

// Some units of one KV head of an item; partials [unit][query].
struct UnitWork {
  const AttendItem* item;
  int32_t head;
  int64_t first_unit;
  int64_t num_units;
  float* partials;
};

// Folds the pass's units of one query of a KV head into its state, in order.
template <int64_t kTokens>
inline void FoldUnits(const Launch& launch, const UnitWork& work, int64_t query) {
  const AttendItem& item = *work.item;
  const int32_t d = launch.a.head_dim;
  const int64_t count = launch.queries(item);
  const int64_t end = launch.end_pos(item);
  const bool first_pass = work.first_unit == launch.begin_pos(item) / kTokens;
  const bool last_pass = (work.first_unit + work.num_units) * kTokens >= end;
  const int64_t row = item.row_begin + query / launch.group;
  const int64_t q_head = int64_t{work.head} * launch.group + query % launch.group;
  const Partial finished = launch.finished(row, q_head);
  const Partial open = launch.open(row, q_head);
  if (first_pass && item.reset) finished.Reset();
  if (first_pass) open.Reset();  // its contents went into the first unit's partial
  for (int64_t i = 0; i < work.num_units; ++i) {
    const Partial unit{work.partials + (i * count + query) * (d + 2), d};
    if ((work.first_unit + i + 1) * kTokens <= end) {
      Fold(finished, unit);
    } else {
      open.CopyFrom(unit);
    }
  }
  if (!last_pass) return;
  // Whoever goes on from a border of kUnitTokens takes it that no unit is open there.
  if constexpr (kTokens != kUnitTokens) {
    if (end % kTokens != 0 && end % kUnitTokens == 0) {
      Fold(finished, open);
      open.Reset();
    }
  }
  if (item.finish) Finish(launch, row, q_head);
}

// Collects works until the scratch is full, then runs them: units in any order, folds after them.
// Units has kTokens, the positions of a unit, and `void operator()(const Launch&, const UnitWork&,
// int64_t unit, int64_t end)`, which computes one unit for all queries; those up to `end` follow; and
// End(). Each run of units has one of its own. With kShortRuns a member's units are one stream in many runs
// (ForEachStream), else few long ones.
template <typename Units>
class UnitPass {
 public:
  UnitPass(const Launch& launch, CpuTeam& team) : launch_(launch), team_(team) {}

  // Adds all units of one KV head of an item, in as many passes as it takes.
  void Add(const AttendItem& item, int32_t head) {
    const int64_t unit_floats = launch_.queries(item) * (launch_.a.head_dim + 2);
    const int64_t last_unit = (launch_.end_pos(item) - 1) / Units::kTokens;
    for (int64_t unit = launch_.begin_pos(item) / Units::kTokens; unit <= last_unit;) {
      // Passes of one head follow each other: it goes into one run only once.
      const bool more = num_works_ > 0 && works_[num_works_ - 1].item == &item &&
                        works_[num_works_ - 1].head == head;
      if (more || num_works_ == kMaxWorks || used_ + unit_floats > launch_.a.scratch_floats) Run();
      const int64_t fit = (launch_.a.scratch_floats - used_) / unit_floats;
      const int64_t count = std::min(last_unit - unit + 1, fit);
      works_[num_works_] = {&item, head, unit, count, launch_.a.scratch + used_};
      units_before_[num_works_ + 1] = units_before_[num_works_] + count;
      queries_before_[num_works_ + 1] = queries_before_[num_works_] + launch_.queries(item);
      ++num_works_;
      used_ += count * unit_floats;
      unit += count;
    }
  }

  void Run() {
    // Units in a row, because each prefetches for the next.
    const auto compute = [&](int64_t begin, int64_t end) {
      Units units;
      Walk(units_before_, begin, end, [&](const UnitWork& work, int64_t unit, int64_t count) {
        units(launch_, work, work.first_unit + unit, work.first_unit + unit + count);
      });
      units.End();
    };
    if constexpr (Units::kShortRuns) {
      ForEachStream(team_, units_before_[num_works_],
                    [&](int64_t begin, int64_t end, int64_t) { compute(begin, end); });
    } else {
      ForEachRun(team_, units_before_[num_works_], compute);
    }
    // Query by query: many queries' folds are as much work as their units.
    ForEachRun(team_, queries_before_[num_works_], [&](int64_t begin, int64_t end) {
      Walk(queries_before_, begin, end, [&](const UnitWork& work, int64_t query, int64_t) {
        FoldUnits<Units::kTokens>(launch_, work, query);
      });
    });
    num_works_ = 0;
    used_ = 0;
  }

 private:
  // Calls fn(work, i, count) for [begin, end) of all works' units or queries, i counted from the
  // work's first, of which `count` are left.
  template <typename Fn>
  void Walk(const int64_t* before, int64_t begin, int64_t end, Fn&& fn) {
    int w = 0;
    for (int64_t i = begin; i < end; ++i) {
      while (before[w + 1] <= i) ++w;
      fn(works_[w], i - before[w], std::min(end, before[w + 1]) - i);
    }
  }

  const Launch& launch_;
  CpuTeam& team_;
  int num_works_ = 0;
  int64_t used_ = 0;  // floats of the scratch
  UnitWork works_[kMaxWorks];
  int64_t units_before_[kMaxWorks + 1] = {};  // of the works before
  int64_t queries_before_[kMaxWorks + 1] = {};
};

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_ATTENTION_UNITS_H_
