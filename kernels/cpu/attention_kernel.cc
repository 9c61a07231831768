// How attention's work is divided; attention_block.h has the arithmetic, attention.h the fold.
//
// Many rows are split by rows: a task is some rows of one KV head and walks all keys in order. Few
// rows are split by units of keys: a task computes one unit of one KV head for all rows into scratch,
// and the units are folded in order afterwards. Both leave the same states: a unit is folded into R
// by the launch whose keys reach its border.
#include <algorithm>

#include "kernels/cpu/attention_block.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/runs.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// Queries (rows x group) of one KV head: up to kFewQueries work is split by units, from kManyQueries
// on by rows, where that gives every member several tasks.
constexpr int64_t kFewQueries = 96;
constexpr int64_t kManyQueries = 256;
// Queries of a task that is split by rows: the block, widened once, serves all of them. With its
// states (192 x 264 B) and the block (32 KiB at head_dim 64) it stays in L2. At 96 the widening took 6%.
constexpr int64_t kQueriesATask = 192;
// Up to this many queries share a pass over K and V as they lie.
constexpr int64_t kNarrowQueries = 2 * kNarrowGroup;
// Works of one pass over the scratch.
constexpr int kMaxWorks = 256;

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
  int64_t queries(const AttendItem& item) const { return int64_t{item.row_count} * group; }
  int64_t rows_a_task() const { return std::max<int64_t>(1, kQueriesATask / group); }
  int64_t row_tasks(const AttendItem& item) const {
    return (item.row_count + rows_a_task() - 1) / rows_a_task();
  }
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
  for (int32_t s = 0; s < item.span_count; ++s) {
    const KvSpan& span = launch.spans(item)[s];
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

void Finish(const Launch& launch, int64_t row, int64_t q_head) {
  const Partial result = launch.finished(row, q_head);
  Fold(result, launch.open(row, q_head));
  const F32x16 inverse = Broadcast(1.0f / result.l());
  float* out = launch.out(row, q_head);
  for (int32_t i = 0; i < launch.a.head_dim; i += kLanes) {
    Store(out + i, Mul(Load(result.o + i), inverse));
  }
}

// ---- Many rows -----------------------------------------------------------------------------------

// The keys [begin, end) of one launch for the queries of a task, states brought forward.
void WalkKeys(const Launch& launch, const AttendItem& item, int32_t head, const Query* queries,
              int count) {
  const int32_t d = launch.a.head_dim;
  const int64_t end = launch.end_pos(item);
  const int64_t seen_end = std::min(end, queries[count - 1].pos + 1);
  int64_t done = launch.begin_pos(item);
  const auto fold = [&] {
    for (int n = 0; n < count; ++n) {
      const Partial unit = queries[n].unit;
      Fold({unit.o - (d + 2), d}, unit);
      unit.Reset();
    }
  };
  WideBlock block;
  ForEachBlock(launch, item, head, done, seen_end, block, [&](const WideBlock& loaded) {
    // Queries are in order of position: the first that sees the block.
    int first = 0;
    while (first < count && queries[first].pos < loaded.rows().first_pos) ++first;
    AttendBlock(queries + first, count - first, loaded, d, launch.a.scale);
    done = loaded.rows().first_pos + loaded.rows().count;
    if (done % kUnitTokens == 0) fold();
  });
  // The launch goes on past a unit's border with keys that no row here sees.
  if (done % kUnitTokens != 0 && end / kUnitTokens > done / kUnitTokens) fold();
}

// Task `task` of an item: the last rows see the most keys and go first, so that members end together.
void AttendRows(const Launch& launch, const AttendItem& item, int64_t task) {
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const auto head = static_cast<int32_t>(item.kv_head_begin + task % heads);
  const int64_t row_begin = (launch.row_tasks(item) - 1 - task / heads) * launch.rows_a_task();
  const int64_t row_end = std::min<int64_t>(row_begin + launch.rows_a_task(), item.row_count);
  Query queries[std::max<int64_t>(kQueriesATask, kMaxGqaGroup)];
  int count = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int32_t g = 0; g < launch.group; ++g) {
      const int64_t q_head = int64_t{head} * launch.group + g;
      const int64_t at = item.row_begin + row;
      if (item.reset) {
        launch.finished(at, q_head).Reset();
        launch.open(at, q_head).Reset();
      }
      queries[count++] = {launch.q(at, q_head), launch.open(at, q_head), item.first_pos + row};
    }
  }
  if (launch.has_keys(item)) WalkKeys(launch, item, head, queries, count);
  if (!item.finish) return;
  for (int64_t row = row_begin; row < row_end; ++row) {
    for (int32_t g = 0; g < launch.group; ++g) {
      Finish(launch, item.row_begin + row, int64_t{head} * launch.group + g);
    }
  }
}

// Runs the items [begin, end), all split by rows.
void AttendManyRows(const Launch& launch, int32_t begin, int32_t end, CpuTeam& team) {
  const auto tasks = [&](int32_t i) {
    const AttendItem& item = launch.a.items.device[i];
    return launch.row_tasks(item) * (item.kv_head_end - item.kv_head_begin);
  };
  int64_t total = 0;
  for (int32_t i = begin; i < end; ++i) total += tasks(i);
  team.ForEach(total, [&](int64_t task) {
    int32_t i = begin;
    for (; task >= tasks(i); ++i) task -= tasks(i);
    AttendRows(launch, launch.a.items.device[i], task);
  });
}

// ---- Few rows ------------------------------------------------------------------------------------

// Some units of one KV head of an item; partials [unit][query].
struct UnitWork {
  const AttendItem* item;
  int32_t head;
  int64_t first_unit;
  int64_t num_units;
  float* partials;
};

template <typename Block>
void AttendUnitBlocks(const Launch& launch, const UnitWork& work, int64_t unit,
                      const Query* queries, int count) {
  const AttendItem& item = *work.item;
  Block block;
  ForEachBlock(launch, item, work.head, unit * kUnitTokens, (unit + 1) * kUnitTokens, block,
               [&](const Block& loaded) {
                 int first = 0;
                 while (first < count && queries[first].pos < loaded.rows().first_pos) ++first;
                 AttendBlock(queries + first, count - first, loaded, launch.a.head_dim,
                             launch.a.scale);
               });
}

void AttendUnit(const Launch& launch, const UnitWork& work, int64_t unit) {
  const AttendItem& item = *work.item;
  const int32_t d = launch.a.head_dim;
  const auto count = static_cast<int>(launch.queries(item));
  // A unit that an earlier launch opened goes on from there.
  const bool opened = !item.reset && launch.begin_pos(item) > unit * kUnitTokens;
  Query queries[kManyQueries];
  float* partials = work.partials + (unit - work.first_unit) * count * (d + 2);
  for (int n = 0; n < count; ++n) {
    const int64_t row = item.row_begin + n / launch.group;
    const int64_t q_head = int64_t{work.head} * launch.group + n % launch.group;
    const Partial partial{partials + int64_t{n} * (d + 2), d};
    if (opened) {
      partial.CopyFrom(launch.open(row, q_head));
    } else {
      partial.Reset();
    }
    queries[n] = {launch.q(row, q_head), partial, item.first_pos + n / launch.group};
  }
  if (count <= kNarrowQueries) {
    AttendUnitBlocks<NarrowBlock>(launch, work, unit, queries, count);
  } else {
    AttendUnitBlocks<WideBlock>(launch, work, unit, queries, count);
  }
}

// Folds the pass's units of one KV head into the states, in order.
void FoldUnits(const Launch& launch, const UnitWork& work) {
  const AttendItem& item = *work.item;
  const int32_t d = launch.a.head_dim;
  const int64_t count = launch.queries(item);
  const int64_t end = launch.end_pos(item);
  const bool first_pass = work.first_unit == launch.begin_pos(item) / kUnitTokens;
  const bool last_pass = (work.first_unit + work.num_units) * kUnitTokens >= end;
  for (int64_t n = 0; n < count; ++n) {
    const int64_t row = item.row_begin + n / launch.group;
    const int64_t q_head = int64_t{work.head} * launch.group + n % launch.group;
    const Partial finished = launch.finished(row, q_head);
    const Partial open = launch.open(row, q_head);
    if (first_pass && item.reset) finished.Reset();
    if (first_pass) open.Reset();  // its contents went into the first unit's partial
    for (int64_t i = 0; i < work.num_units; ++i) {
      const Partial unit{work.partials + (i * count + n) * (d + 2), d};
      if ((work.first_unit + i + 1) * kUnitTokens <= end) {
        Fold(finished, unit);
      } else {
        open.CopyFrom(unit);
      }
    }
    if (last_pass && item.finish) Finish(launch, row, q_head);
  }
}

// Collects works until the scratch is full, then runs them: units in any order, folds after them.
class UnitPass {
 public:
  UnitPass(const Launch& launch, CpuTeam& team) : launch_(launch), team_(team) {}

  // Adds all units of one KV head of an item, in as many passes as it takes.
  void Add(const AttendItem& item, int32_t head) {
    const int64_t unit_floats = launch_.queries(item) * (launch_.a.head_dim + 2);
    const int64_t last_unit = (launch_.end_pos(item) - 1) / kUnitTokens;
    for (int64_t unit = launch_.begin_pos(item) / kUnitTokens; unit <= last_unit;) {
      // Passes of one head follow each other: it goes into one run only once.
      const bool more = num_works_ > 0 && works_[num_works_ - 1].item == &item &&
                        works_[num_works_ - 1].head == head;
      if (more || num_works_ == kMaxWorks || used_ + unit_floats > launch_.a.scratch_floats) Run();
      const int64_t fit = (launch_.a.scratch_floats - used_) / unit_floats;
      const int64_t count = std::min(last_unit - unit + 1, fit);
      works_[num_works_] = {&item, head, unit, count, launch_.a.scratch + used_};
      units_before_[num_works_ + 1] = units_before_[num_works_] + count;
      ++num_works_;
      used_ += count * unit_floats;
      unit += count;
    }
  }

  void Run() {
    // Units in a row, because each prefetches for the next.
    ForEachRun(team_, units_before_[num_works_], [&](int64_t begin, int64_t end) {
      int w = 0;
      for (int64_t i = begin; i < end; ++i) {
        while (units_before_[w + 1] <= i) ++w;
        AttendUnit(launch_, works_[w], works_[w].first_unit + i - units_before_[w]);
      }
    });
    team_.ForEach(num_works_, [&](int64_t w) { FoldUnits(launch_, works_[w]); });
    num_works_ = 0;
    used_ = 0;
  }

 private:
  const Launch& launch_;
  CpuTeam& team_;
  int num_works_ = 0;
  int64_t used_ = 0;  // floats of the scratch
  UnitWork works_[kMaxWorks];
  int64_t units_before_[kMaxWorks + 1] = {};
};

}  // namespace

void Attend(const AttendArgs& args, CpuTeam& team) {
  const Launch launch{args, args.num_q_heads / args.num_kv_heads};
  UnitPass pass(launch, team);
  // The choice does not show in the bits. An item without keys is a reset or a finish of its rows.
  const auto by_rows = [&](const AttendItem& item) {
    const int64_t heads = item.kv_head_end - item.kv_head_begin;
    return !launch.has_keys(item) || launch.queries(item) > kManyQueries ||
           (launch.queries(item) > kFewQueries &&
            launch.row_tasks(item) * heads >= 4 * team.size());
  };
  for (int32_t begin = 0, end; begin < args.items.count; begin = end) {
    const bool rows = by_rows(args.items.device[begin]);
    for (end = begin + 1; end < args.items.count; ++end) {
      if (by_rows(args.items.device[end]) != rows) break;
    }
    if (rows) {
      AttendManyRows(launch, begin, end, team);
      continue;
    }
    for (int32_t i = begin; i < end; ++i) {
      const AttendItem& item = args.items.device[i];
      for (int32_t head = item.kv_head_begin; head < item.kv_head_end; ++head) {
        pass.Add(item, head);
      }
    }
    pass.Run();
  }
}

// ---- Partial states ------------------------------------------------------------------------------

void MergePartials(const MergePartialsArgs& args, CpuTeam& team) {
  AttendArgs as;  // the states' layout
  as.state = args.state;
  as.out = args.out;
  as.num_q_heads = args.num_q_heads;
  as.num_kv_heads = args.num_kv_heads;
  as.head_dim = args.head_dim;
  AttendArgs theirs = as;
  theirs.state = const_cast<float*>(args.partials);
  const int32_t group = args.num_q_heads / args.num_kv_heads;
  const Launch to{as, group};
  const Launch from{theirs, group};
  alignas(64) thread_local float sum[kMaxHeadDim + kLanes];
  const auto merge = [&](const MergeItem& item, int64_t row, int64_t q_head) {
    const Partial finished = to.finished(row, q_head);
    if (item.reset != 0) {
      finished.CopyFrom(from.finished(row, q_head));
      to.open(row, q_head).CopyFrom(from.open(row, q_head));
    } else {
      const Partial before{sum, args.head_dim};
      before.CopyFrom(from.finished(row, q_head));
      Fold(before, from.open(row, q_head));
      Fold(before, finished);
      finished.CopyFrom(before);
    }
    if (item.finish != 0) Finish(to, row, q_head);
  };
  int64_t total = 0;
  for (int32_t i = 0; i < args.items.count; ++i) total += args.items.device[i].row_count;
  team.ForEach(total, [&](int64_t row) {
    int32_t i = 0;
    for (; row >= args.items.device[i].row_count; ++i) row -= args.items.device[i].row_count;
    const MergeItem& item = args.items.device[i];
    for (int64_t q_head = int64_t{item.kv_head_begin} * group;
         q_head < int64_t{item.kv_head_end} * group; ++q_head) {
      merge(item, item.row_begin + row, q_head);
    }
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
