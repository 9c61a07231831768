// How attention's work is divided; attention_block.h has the arithmetic, attention.h the fold.
//
// Many rows are split by rows: a task is some rows of one KV head and walks all keys in order. Few
// rows are split by units of keys (attention_units.h). Both leave the same states: a unit is folded into
// R by the launch whose keys reach its border.
#include <algorithm>

#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// Queries (rows x group) of one KV head: up to kFewQueries work is split by units, from kManyQueries
// on by rows, where that gives every member several tasks.
constexpr int64_t kFewQueries = 96;
constexpr int64_t kManyQueries = 256;
// Queries of a task that is split by rows: the block, widened once, serves all of them. With its
// states (192 x 264 B) and the block (32 KiB at head_dim 64) it stays in L2. At 96 the widening took 6%.
constexpr int64_t kQueriesATask = 192;
int64_t RowsATask(const Launch& launch) {
  return std::max<int64_t>(1, kQueriesATask / launch.group);
}
int64_t RowTasks(const Launch& launch, const AttendItem& item) {
  return (item.row_count + RowsATask(launch) - 1) / RowsATask(launch);
}
// Up to this many queries share a pass over K and V as they lie.
constexpr int64_t kNarrowQueries = 2 * kNarrowGroup;

// ---- Many rows -----------------------------------------------------------------------------------

// Of `count` queries in order of position, those that see some of the block: [first, last).
struct Seers {
  int first = 0;
  int last = 0;
};
Seers SeersOf(const Query* queries, int count, const BlockRows& block) {
  Seers seers{0, count};
  while (seers.first < count && queries[seers.first].pos < block.first_pos) ++seers.first;
  const int64_t end = block.first_pos + block.count;
  while (seers.last > seers.first && queries[seers.last - 1].first_seen >= end) --seers.last;
  return seers;
}

// The keys [begin, end) of one launch for the queries of a task, states brought forward.
void WalkKeys(const Launch& launch, const AttendItem& item, int32_t head, const Query* queries,
              int count) {
  const int32_t d = launch.a.head_dim;
  const int64_t end = launch.end_pos(item);
  const int64_t seen_end = std::min(end, queries[count - 1].pos + 1);
  // What lies behind the first query's window no query sees, nor has seen.
  int64_t done = std::max(launch.begin_pos(item), FloorToBlock(queries[0].first_seen));
  const auto fold = [&] {
    for (int n = 0; n < count; ++n) {
      const Partial unit = queries[n].unit;
      Fold({unit.o - (d + 2), d}, unit);
      unit.Reset();
    }
  };
  WideBlock block;
  ForEachBlock(launch, item, head, done, seen_end, block, [&](const WideBlock& loaded) {
    const Seers seers = SeersOf(queries, count, loaded.rows());
    AttendBlock(queries + seers.first, seers.last - seers.first, loaded, d, launch.scoring());
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
  const int64_t row_begin = (RowTasks(launch, item) - 1 - task / heads) * RowsATask(launch);
  const int64_t row_end = std::min<int64_t>(row_begin + RowsATask(launch), item.row_count);
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
      queries[count++] =
          launch.query(item, head, row * launch.group + g, launch.open(at, q_head));
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
    return RowTasks(launch, item) * (item.kv_head_end - item.kv_head_begin);
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

template <typename Block>
void AttendUnitBlocks(const Launch& launch, const UnitWork& work, int64_t unit,
                      const Query* queries, int count) {
  const AttendItem& item = *work.item;
  Block block;
  ForEachBlock(launch, item, work.head, unit * kUnitTokens, (unit + 1) * kUnitTokens, block,
               [&](const Block& loaded) {
                 const Seers seers = SeersOf(queries, count, loaded.rows());
                 AttendBlock(queries + seers.first, seers.last - seers.first, loaded,
                             launch.a.head_dim, launch.scoring());
               });
}

// OneGroup: the form of a block for up to kNarrowGroup queries.
template <typename OneGroup>
struct Float32Units {
  static constexpr int64_t kTokens = kUnitTokens;
  static constexpr bool kShortRuns = true;  // nothing is kept from unit to unit
  void operator()(const Launch& launch, const UnitWork& work, int64_t unit, int64_t end) const;
  void End() const {}
};

template <typename OneGroup>
void Float32Units<OneGroup>::operator()(const Launch& launch, const UnitWork& work,
                                        int64_t unit, int64_t /*end*/) const {
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
    queries[n] = launch.query(item, work.head, n, partial);
  }
  if (count <= kNarrowGroup) {
    AttendUnitBlocks<OneGroup>(launch, work, unit, queries, count);
  } else if (count <= kNarrowQueries) {
    AttendUnitBlocks<NarrowBlock>(launch, work, unit, queries, count);
  } else {
    AttendUnitBlocks<WideBlock>(launch, work, unit, queries, count);
  }
}

template <typename OneGroup>
void AttendWith(const AttendArgs& args, CpuTeam& team) {
  const Launch launch{args, args.num_q_heads / args.num_kv_heads};
  UnitPass<Float32Units<OneGroup>> pass(launch, team);
  // The choice does not show in the bits. An item without keys is a reset or a finish of its rows.
  const auto by_rows = [&](const AttendItem& item) {
    const int64_t heads = item.kv_head_end - item.kv_head_begin;
    return !launch.has_keys(item) || launch.queries(item) > kManyQueries ||
           (launch.queries(item) > kFewQueries &&
            RowTasks(launch, item) * heads >= 4 * team.size());
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

}  // namespace

void Attend(const AttendArgs& args, CpuTeam& team) { AttendWith<NarrowBlock>(args, team); }
void AttendStreamed(const AttendArgs& args, CpuTeam& team) { AttendWith<StreamedBlock>(args, team); }

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
