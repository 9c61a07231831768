// Pieces of keys for all queries of a KV head, in tiles (tiles.h), up to 32 queries at a time; of a
// piece unit by unit:
//   scores[key][query] = K q, K's rows read where they lie
//   weights = exp(scores - maximum) as bfloat16, [query][key], the maximum that of the piece so far
//   o = o * exp(maximum before - maximum) + weights V
// Up to 16 queries take V's rows where they lie, at two products for each. For more a pass goes over a
// unit: V's rows are paired into words, which makes it one, in strips of 32 columns, of which all that is
// touched stays in the first cache (with pairs of whole rows a pass took a quarter longer); and weights are
// computed while the processor multiplies the next pass's K. All along the kernel asks for the lines that
// come next, as many as it reads: its speed is the memory's. Nowhere does it go on for long without asking:
// memory has nothing to do when the few lines have come that a core can wait for, some 200 ns of them. (With
// most of them asked for beside K's products, none beside softmax, 32 queries took 8% longer.)
#include "kernels/cpu/tile_attention.h"

#include <algorithm>
#include <utility>

#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/tiles.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

// A piece is what one task computes and what is folded: its partials, 130 floats a query, are written,
// folded and so read once more, which at 256 keys is 5% of what four queries read of K and V.
constexpr int64_t kPieceTokens = 1024;
constexpr int kUnitKeys = static_cast<int>(kUnitTokens);
constexpr int kUnitBlocks = kUnitKeys / kBlock;
constexpr int kStep = 2 * kTile;  // keys
constexpr int kUnitSteps = kUnitKeys / kStep;
constexpr int kPass = 2 * kTile;  // queries of one pass over a unit
constexpr int64_t kRound = 4 * kPass;  // queries that a piece is gone through for
constexpr int kFew = 4;           // queries of which four keys' scores fill a vector
constexpr int kQuarters = 4;      // of the weights of a step: 8 keys
constexpr int kLine = 64 / sizeof(BFloat16);
constexpr float kLog2E = 1.44269504088896341f;

// Lines are asked for so long before they are read, into the second cache: 32 KiB; with more queries
// softmax is longer, which reads none, and with pairs the next unit's keys are read before this one's values.
// Four queries on 16 threads took 105 GB/s so, with 128 or 256 lines 99, with 1024 104; into the first cache
// 97.
inline int64_t LeadOf(int64_t queries) {
  return queries <= kFew ? 512 : queries <= kTile ? 1024 : 2048;
}

// 2^x for x <= 0 (a rounding above it does no harm) within 3e-6, least squares made even; weights are
// rounded to 8 bits anyway. 0 for -inf, NaN for NaN.
inline F32x16 Exp2OfNegative(F32x16 x) {
  const F32x16 f = Fraction(x);
  F32x16 p = Broadcast(9.57009e-3f);
  p = Fma(p, f, Broadcast(5.591785e-2f));
  p = Fma(p, f, Broadcast(0.24024745f));
  p = Fma(p, f, Broadcast(0.69312182f));
  p = Fma(p, f, Broadcast(0.99999926f));
  return Power(p, Sub(x, f));
}

struct LoadedRows {
  void Set(const BlockRows& its, int32_t) { rows = its; }
  BlockRows rows;
};

// Asks for lines of consecutive units in the order that they are read in: K's of a unit, V's of it.
class Ahead {
 public:
  // The stream of the units [unit, end) begins.
  void Begin(int64_t unit, int64_t end) {
    unit_ = unit;
    end_ = end;
    runs_ = run_ = 0;
    left_ = owed_ = 0;
    share_ = 1;
  }
  // From now on one line is meant by so many.
  void Share(int share) { share_ = share; }
  void Ask(const Launch& launch, const UnitWork& work, int64_t lines) {
    if (share_ > 1) {
      owed_ += lines;
      lines = owed_ / share_;
      owed_ %= share_;
    }
    while (lines > 0) {
      if (left_ == 0 && !NextRun(launch, work)) return;
      const int64_t count = std::min(lines, left_);
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at_ + i * kLine, 0, 2);
      at_ += count * kLine;
      left_ -= count;
      lines -= count;
    }
  }

 private:
  [[gnu::noinline]] bool NextRun(const Launch& launch, const UnitWork& work) {
    const int32_t d = launch.a.head_dim;
    if (run_ == 2 * runs_) {
      if (unit_ == end_) return false;
      run_ = runs_ = 0;
      LoadedRows block;
      ForEachBlock(launch, *work.item, work.head,
                   std::max(unit_ * kUnitTokens, launch.begin_pos(*work.item)),
                   (unit_ + 1) * kUnitTokens, block, [&](const LoadedRows& loaded) {
                     if (runs_ < kUnitBlocks) blocks_[runs_++] = loaded.rows;
                   });
      ++unit_;
      if (runs_ == 0) return false;
    }
    const BlockRows& block = blocks_[run_ % runs_];
    at_ = run_ < runs_ ? block.keys : block.values;
    left_ = block.count * d / kLine;
    ++run_;
    return true;
  }

  const BFloat16* at_ = nullptr;
  int64_t left_ = 0;  // lines of the run
  int64_t owed_ = 0;  // shares of a line
  int64_t unit_ = 0;  // the next
  int64_t end_ = 0;
  int share_ = 1;
  int runs_ = 0;  // of a unit: blocks, of keys and then of values
  int run_ = 0;   // the next
  BlockRows blocks_[kUnitBlocks];
};

// What a member needs for the pieces of a run.
class TileUnits {
 public:
  static constexpr int64_t kTokens = kPieceTokens;
  static constexpr bool kShortRuns = false;  // a run reads ahead of itself and drains at its end

  void operator()(const Launch& launch, const UnitWork& work, int64_t piece, int64_t end) {
    const AttendItem& item = *work.item;
    const int64_t count = launch.queries(item);
    const bool other = item_ != &item || head_ != work.head;
    launch_ = &launch;
    work_ = &work;
    item_ = &item;
    head_ = work.head;
    d_ = launch.a.head_dim;
    const int64_t begin = std::max(piece * kTokens, launch.begin_pos(item));
    const int64_t until = std::min((piece + 1) * kTokens, launch.end_pos(item));
    const auto in_round = [&](int64_t first) { return std::min(count - first, kRound); };
    if (other) {
      const int64_t last = std::min(end * kTokens, launch.end_pos(item));
      const int64_t passes = (in_round(0) + kPass - 1) / kPass;
      ahead_.Begin(begin / kUnitTokens, (last + kUnitTokens - 1) / kUnitTokens);
      ahead_.Ask(launch, work, LeadOf(count));
      ahead_.Share(static_cast<int>(passes));
    }
    pairs_ = count > kTile;
    rows_ = pairs_ ? kTile : static_cast<int>(std::max<int64_t>(count, kFew));
    for (int64_t first = 0; first < count; first += kRound) {
      if (other || count > kRound) SetQueries(first, in_round(first));
      asks_ = first == 0;
      Open(piece);
      if (!pairs_) {
        AttendRows(begin, until);
      } else if (count_ > kTile) {
        AttendPasses<2>(begin, until);
      } else {
        AttendPasses<1>(begin, until);
      }
      Put(piece);
    }
  }
  void End() {
    if (configured_ != 0) ReleaseTiles();
  }

 private:
  void Ask(int64_t lines) {
    if (asks_) ahead_.Ask(*launch_, *work_, lines);
  }
  // Lines of what passes read, as those of their units that have begun. What each place asks for goes by how
  // long it takes.
  void AskOf(int64_t lines) {
    lines = std::min(lines, owed_);
    owed_ -= lines;
    Ask(lines);
  }

  // Keys of a unit that the item has.
  struct Unit {
    int64_t first_pos = 0;  // of the first block
    int64_t end_pos = 0;
    int skip = 0;  // keys of the first block that are not the item's
    int num_blocks = 0;
    int steps = 0;
    bool masked = false;  // some query does not see some key
    BlockRows blocks[kUnitBlocks];

    const BFloat16* keys(int step, int32_t d) const {
      return blocks[step / 2].keys + step % 2 * kStep * d;
    }
    const BFloat16* values(int step, int32_t d) const {
      return blocks[step / 2].values + step % 2 * kStep * d;
    }
  };

  // The unit that `begin` lies in, from the first block that has keys. A block that does not lie whole in
  // one span is copied, with zeros where it has no keys. Every other unit shares memory for that.
  void Read(int64_t begin, int64_t until, Unit& unit) {
    const int64_t end = std::min((begin / kUnitTokens + 1) * kUnitTokens, until);
    BFloat16* const copies = copies_[begin / kUnitTokens % 2];
    unit = Unit();
    unit.end_pos = end;
    unit.first_pos = FloorToBlock(begin);
    unit.skip = static_cast<int>(begin - unit.first_pos);
    unit.num_blocks = static_cast<int>((end - unit.first_pos + kBlock - 1) / kBlock);
    unit.steps = unit.num_blocks * (kBlock / kStep);
    const int64_t last_pos = item_->first_pos + (first_ + count_ - 1) / launch_->group;
    unit.masked = unit.skip != 0 || (end - unit.first_pos) % kBlock != 0 ||
                  item_->first_pos + first_ / launch_->group + 1 < end ||
                  FirstSeen(launch_->a.window, last_pos) > unit.first_pos;
    LoadedRows block;
    ForEachBlock(*launch_, *item_, head_, begin, end, block, [&](const LoadedRows& loaded) {
      const BlockRows& rows = loaded.rows;
      const int64_t b = (rows.first_pos - unit.first_pos) / kBlock;
      if (rows.count == kBlock) {
        unit.blocks[b] = rows;
        return;
      }
      BFloat16* const keys = copies + b * 2 * kBlock * d_;
      BFloat16* const values = keys + kBlock * d_;
      if (unit.blocks[b].keys == nullptr) std::fill_n(keys, 2 * kBlock * d_, BFloat16());
      unit.blocks[b] = {keys, values, unit.first_pos + b * kBlock, kBlock};
      const int64_t at = (rows.first_pos - unit.first_pos) % kBlock * d_;
      std::copy_n(rows.keys, rows.count * d_, keys + at);
      std::copy_n(rows.values, rows.count * d_, values + at);
    });
  }

  // q * scale of a round, and which queries these are.
  void SetQueries(int64_t first, int64_t count) {
    first_ = first;
    count_ = static_cast<int>(count);
    alignas(64) BFloat16 rounded[kTile * kMaxHeadDim];
    for (int n = 0; n < RoundUp(count_); n += kTile) {
      const BFloat16* rows[kTile];
      for (int i = 0; i < kTile; ++i) {
        rows[i] = rounded + std::clamp(count_ - 1 - n, 0, i) * d_;  // the last fills the tile
        if (n + i >= count_ && i > 0) continue;
        const int64_t query = first + std::min(n + i, count_ - 1);
        const float* const q = launch_->q(item_->row_begin + query / launch_->group,
                                          int64_t{head_} * launch_->group + query % launch_->group);
        BFloat16* const to = rounded + i * d_;
        for (int32_t j = 0; j < d_; ++j) to[j] = ToBFloat16(q[j] * launch_->a.scale);
      }
      for (int32_t column = 0; column < d_; column += 2 * kTile) {
        TransposeTile(rows, column, queries_ + (n * d_ + column * kTile) / 2, kTile);
      }
    }
  }
  // To whole tiles, and to two if it is more than one.
  static int RoundUp(int count) { return count <= kTile ? kTile : (count + kPass - 1) / kPass * kPass; }

  void Configure(int rows) {
    if (configured_ != rows) ConfigureTiles(configured_ = rows);
  }

  // A pass's scores are multiplied beside the weights of the pass before, be it of the same unit or not.
  template <int kGroups>
  void AttendPasses(int64_t begin, int64_t until) {
    Configure(kTile);
    Unit* next = &units_[0];
    unit_ = next;
    Read(begin, until, *next);
    pass_ = 0;
    owed_ = Lines(*next);
    MultiplyKeys<kGroups>(*next, 0, 0);
    for (int64_t pos = begin; pos < until;) {
      unit_ = next;
      next = unit_ == &units_[0] ? &units_[1] : &units_[0];
      pos = unit_->end_pos;
      int64_t of_next = 0;
      for (int first = 0; first < count_; first += kPass) {
        BeginWeights<kGroups>(first);
        if (first + kPass < count_) {
          MultiplyKeys<kGroups>(*unit_, first + kPass, QuartersBeside<kGroups>());
        } else if (pos < until) {
          Read(pos, until, *next);
          of_next = Lines(*next);
          owed_ += of_next;
          MultiplyKeys<kGroups>(*next, 0, QuartersBeside<kGroups>());
        }
        Weigh<kGroups>(kUnitSteps * kGroups * kQuarters);
        AddValues<kGroups>(first);
        EndWeights<kGroups>(first);
      }
      fresh_ = false;
      AskOf(std::max<int64_t>(0, owed_ - of_next));
    }
  }
  int64_t Lines(const Unit& unit) const {
    return int64_t{unit.steps} * kStep * 2 * (d_ / kLine) * ((count_ + kPass - 1) / kPass);
  }
  // Of the weights that are left, beside the product of 16 keys.
  template <int kGroups>
  int QuartersBeside() const {
    return (kGroups * kQuarters * kTile + d_ - 1) / d_;
  }

  // Scores of the pass that comes next.
  template <int kGroups>
  void MultiplyKeys(const Unit& unit, int first, int quarters) {
    float* const scores = scores_[pass_++ % 2];
    for (int step = 0; step < unit.steps; ++step) {
      // To the first cache: a tile is loaded row by row.
      const BFloat16* soon = unit.keys(std::min(step + 1, unit.steps - 1), d_);
      Multiply<kGroups>(ScoreProduct{unit.keys(step, d_), d_, queries_ + first * d_ / 2, d_ / 2,
                                     scores + step * kStep * kTile, kUnitKeys * kTile},
                        [&] {
                          AskOf(10);
                          for (int i = 0; i < kTile; ++i, soon += kLine) __builtin_prefetch(soon, 0, 3);
                          Weigh<kGroups>(quarters);
                        });
    }
  }

  // Of the scores of 16 queries from `first` on and a step's keys those that are not seen; at(key,
  // query) is where one is.
  template <typename At>
  void Mask(int first, int step, At&& at) const {
    const auto within = [&](int64_t pos) {
      return static_cast<int>(std::clamp<int64_t>(pos - unit_->first_pos - step * kStep, 0, kStep));
    };
    for (int i = 0; i < std::min(count_ - first, kTile); ++i) {
      const int64_t pos = item_->first_pos + (first_ + first + i) / launch_->group;
      const int begin =
          within(std::max(unit_->first_pos + unit_->skip, FirstSeen(launch_->a.window, pos)));
      const int end = std::max(begin, within(std::min(pos + 1, unit_->end_pos)));
      for (int key = 0; key < begin; ++key) *at(key, i) = kMinusInfinity;
      for (int key = end; key < kStep; ++key) *at(key, i) = kMinusInfinity;
    }
  }
  void Cap(float* scores) const { Store(scores, Capped(Load(scores), launch_->a.soft_cap)); }

  // Goes on to the maximum of 16 queries from `first` on with these scores, and scales what is there.
  // Returns what is added to a score times log2 e: where no key is seen all weights are 0, -inf less a
  // finite number.
  F32x16 Advance(int first, F32x16 top, float* factor) {
    const F32x16 before = Load(m_ + first);
    const F32x16 maximum = Max(top, before);
    Store(m_ + first, maximum);
    Store(factor, Exp(Sub(before, Max(maximum, Broadcast(-3.0e38f)))));
    bool scales = false;
    for (int i = 0; i < rows_; ++i) scales |= factor[i] != 1.0f;
    if (scales && !fresh_) {
      float* const sums = sums_ + first * d_;
      for (int32_t tile = 0; tile < d_ / kTile; ++tile) {
        for (int i = 0; i < rows_; ++i) {
          float* const row = sums + (tile * rows_ + i) * kTile;
          Store(row, Mul(Load(row), Broadcast(factor[i])));
        }
      }
    }
    return Sub(Zero(), Max(Mul(maximum, Broadcast(kLog2E)), Broadcast(-3.0e38f)));
  }
  void AddWeights(int first, const float* factor, F32x16 sum) {
    Store(l_ + first, Fma(Load(l_ + first), Load(factor), sum));
  }
  static F32x16 Weight(const float* scores, F32x16 less) {
    return Exp2OfNegative(Fma(Load(scores), Broadcast(kLog2E), less));
  }

  // Caps, masks and advances to scores of which a vector is 16 queries of a key.
  F32x16 AdvanceTo(int first, float* scores, float* factor) {
    if (launch_->a.soft_cap != 0) {
      for (int key = 0; key < unit_->steps * kStep; ++key) Cap(scores + key * kTile);
    }
    if (unit_->masked) {
      for (int step = 0; step < unit_->steps; ++step) {
        Mask(first, step, [&](int key, int n) { return scores + (step * kStep + key) * kTile + n; });
      }
    }
    F32x16 top[4];
    for (F32x16& t : top) t = Broadcast(kMinusInfinity);
    for (int key = 0; key < unit_->steps * kStep; key += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) top[i] = Max(Load(scores + (key + i) * kTile), top[i]);
    }
    return Advance(first, Max(Max(top[0], top[1]), Max(top[2], top[3])), factor);
  }
  static F32x16 Sum(const F32x16 (&sum)[4][2]) {
    const auto both = [&](int j) { return Add(sum[j][0], sum[j][1]); };
    return Add(Add(both(0), both(2)), Add(both(1), both(3)));
  }

  // Of the pass whose scores were multiplied last.
  template <int kGroups>
  void BeginWeights(int first) {
    weighed_ = 0;
    from_ = scores_[(pass_ - 1) % 2];
    for (int g = 0; g < kGroups; ++g) {
      AskOf(3 * d_ / kTile);
      less_[g] = AdvanceTo(first + g * kTile, from_ + g * kUnitKeys * kTile, factor_[g]);
      for (F32x16(&s)[2] : sum_[g]) s[0] = s[1] = Zero();
    }
  }
  // As many quarters of the weights that are left, of a step and 16 queries each.
  template <int kGroups>
  void Weigh(int quarters) {
    const int end = std::min(weighed_ + quarters, unit_->steps * kGroups * kQuarters);
    for (; weighed_ < end; ++weighed_) {
      const int step = weighed_ / (kGroups * kQuarters);
      const int g = weighed_ / kQuarters % kGroups;
      WeighQuarter(g, step, weighed_ % kQuarters);
    }
  }
  void WeighQuarter(int group, int step, int quarter) {
    const float* const from = from_ + (group * kUnitKeys + step * kStep + quarter * 8) * kTile;
    float* const pairs = pairs_of_step_ + quarter * 4 * kTile;
    F32x16 even = sum_[group][quarter][0], odd = sum_[group][quarter][1];
#pragma GCC unroll 4
    for (int pair = 0; pair < 4; ++pair) {
      const F32x16 low = Weight(from + 2 * pair * kTile, less_[group]);
      const F32x16 high = Weight(from + (2 * pair + 1) * kTile, less_[group]);
      even = Add(even, low);
      odd = Add(odd, high);
      Store(pairs + pair * kTile, PairsOf(low, high));
    }
    sum_[group][quarter][0] = even;
    sum_[group][quarter][1] = odd;
    AskOf(5 * d_ / (2 * kLine));
    if (quarter + 1 < kQuarters) return;
    Transpose(pairs_of_step_, weights_ + (group * kUnitSteps + step) * kTileWords);
  }
  // 16 rows of 16 words, the first `rows` of the other side.
  static void Transpose(const float* from, uint32_t* to, int rows = kTile) {
    const BFloat16* at[kTile];
    for (int i = 0; i < kTile; ++i) at[i] = reinterpret_cast<const BFloat16*>(from + i * kTile);
    TransposeTile(at, 0, to, kTile, (rows + 3) / 4);
  }
  template <int kGroups>
  void EndWeights(int first) {
    for (int g = 0; g < kGroups; ++g) AddWeights(first + g * kTile, factor_[g], Sum(sum_[g]));
  }

  // Units for up to 16 queries.
  void AttendRows(int64_t begin, int64_t until) {
    Unit& unit = units_[0];
    unit_ = &unit;
    for (int64_t pos = begin; pos < until; pos = unit.end_pos) {
      Read(pos, until, unit);
      Configure(kTile);
      if (rows_ == kFew) {
        ScoreFew();
        WeighFew();
      } else {
        for (int step = 0; step < unit.steps; ++step) MultiplyRows(step, step);
        WeighRows();
      }
      Configure(rows_);
      for (int b = 0; b < unit.num_blocks; ++b) {
        for (int32_t column = 0; column < d_; column += kLine) {
          Multiply(RowProduct{RowWeights(b * kBlock), unit.blocks[b].values + column, d_,
                              kBlock / kTile, rows_, sums_ + column * rows_, b > 0 || !fresh_},
                   [this] { Ask(kTile); });
        }
      }
      fresh_ = false;
    }
  }
  // Scores of a step, where those of step `to` belong. Of its lines one in 16 is left for softmax, which
  // reads none.
  void MultiplyRows(int step, int to) {
    Multiply<1>(ScoreProduct{unit_->keys(step, d_), d_, queries_, d_ / 2,
                             scores_[0] + to * kStep * kTile, 0},
                [this] { Ask(kTile - 1); });
  }
  void AskInSoftmax() { Ask(2 * (d_ / kLine)); }

  // Weights of 16 keys: [even, odd][query][key].
  uint32_t* RowWeights(int key) { return weights_ + key * 2 * rows_; }

  // Eight sums, of which the vectors of WeighFew have four each: a query has the same bits in both.
  void WeighRows() {
    const F32x16 less = AdvanceTo(0, scores_[0], factor_[0]);
    F32x16 sum[4][2];
    for (F32x16(&s)[2] : sum) s[0] = s[1] = Zero();
    alignas(64) float of_keys[kTileWords];
    alignas(64) float of_queries[kTileWords];
    for (int key = 0; key < unit_->steps * kStep; key += kTile) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
#pragma GCC unroll 4
        for (int i = 4 * j; i < 4 * j + 4; ++i) {
          const F32x16 weight = Weight(scores_[0] + (key + i) * kTile, less);
          sum[j][i % 2] = Add(sum[j][i % 2], weight);
          Store(of_keys + i * kTile, weight);
        }
      }
      Transpose(of_keys, reinterpret_cast<uint32_t*>(of_queries), rows_);
      uint32_t* const to = RowWeights(key);
      for (int n = 0; n < rows_; ++n) {
        StoreHalves(Load(of_queries + n * kTile), to + n * kTile, to + (rows_ + n) * kTile);
      }
      if (key % kStep == 0) AskInSoftmax();
    }
    AddWeights(0, factor_[0], Sum(sum));
  }

  // Four queries' scores, dense. Rows of a step are gathered a step later: then tiles' stores are done.
  void ScoreFew() {
    few_top_ = Broadcast(kMinusInfinity);
    for (int step = 0; step < unit_->steps; ++step) {
      MultiplyRows(step, step % 2);
      if (step > 0) GatherFew(step - 1);
    }
    GatherFew(unit_->steps - 1);
  }
  void GatherFew(int step) {
    const float* const rows = scores_[0] + step % 2 * kStep * kTile;
    float* const to = few_ + step * kStep * kFew;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const F32x16 scores = FourOfRows(rows + i / 4 * kTileWords, i % 4);
      Store(to + i * kTile, scores);
      if (!unit_->masked && launch_->a.soft_cap == 0) few_top_ = Max(scores, few_top_);
    }
    if (!unit_->masked && launch_->a.soft_cap == 0) return;
    if (launch_->a.soft_cap != 0) {
      for (int i = 0; i < 8; ++i) Cap(to + i * kTile);
    }
    if (unit_->masked) {
      Mask(0, step, [&](int key, int n) {
        return to + (key / kTile * 4 + key % 4) * kTile + key % kTile / 4 * kFew + n;
      });
    }
    for (int i = 0; i < 8; ++i) few_top_ = Max(Load(to + i * kTile), few_top_);
  }
  // A vector is four keys of four queries.
  void WeighFew() {
    alignas(64) float at[kTile];
    Store(at, few_top_);
    for (int i = 0; i < kFew; ++i) {
      for (int j = 1; j < 4; ++j) at[i] = std::max(at[i], at[4 * j + i]);
    }
    Store(at, Advance(0, Load(at), factor_[0]));
    const F32x16 less = FourTimes(at);
    F32x16 sum[2] = {Zero(), Zero()};
    for (int key = 0; key < unit_->steps * kStep; key += kTile) {
      F32x16 weights[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        weights[i] = Weight(few_ + key * kFew + i * kTile, less);
        sum[i % 2] = Add(sum[i % 2], weights[i]);
      }
      ToRows(weights);
      uint32_t* const to = RowWeights(key);
#pragma GCC unroll 4
      for (int n = 0; n < kFew; ++n) {
        StoreHalves(weights[n], to + n * kTile, to + (kFew + n) * kTile);
      }
      if (key % kStep == 0) AskInSoftmax();
    }
    Store(at, Add(sum[0], sum[1]));
    for (int i = 0; i < kFew; ++i) at[i] = (at[i] + at[8 + i]) + (at[4 + i] + at[12 + i]);
    AddWeights(0, factor_[0], Load(at));
  }

  // Strip by strip, 16 queries at a time, whose sums stay in tiles. Pairs of a step are made beside the
  // products of the step before, for the first 16; several passes keep them.
  template <int kGroups>
  void AddValues(int first) {
    for (int32_t column = 0; column < d_; column += kLine) {
      uint32_t* const pairs =
          pairs_of_values_ + (count_ > kPass ? column * kUnitSteps * kTile : 0);
      for (int g = 0; g < kGroups; ++g) {
        const auto pair = [&](int step) {
          if (first == 0 && g == 0 && step < unit_->steps) {
            PairValues(step, column, pairs + step * 2 * kTileWords);
          }
        };
        pair(0);
        Multiply(PairProduct{weights_ + g * kUnitSteps * kTileWords, pairs, unit_->steps,
                             sums_ + (first + g * kTile) * d_ + column * kTile, !fresh_},
                 [&](int step) {
                   AskOf(12);
                   pair(step + 1);
                 });
      }
    }
  }
  void PairValues(int step, int32_t column, uint32_t* to) const {
    const BFloat16* const values = unit_->values(step, d_) + column;
    for (int i = 0; i < kTile; ++i) {
      const BFloat16* const row = values + 2 * i * d_;
      PairRows(row, row + d_, to + i * kTile, to + kTileWords + i * kTile);
    }
  }

  int64_t row(int n) const { return item_->row_begin + (first_ + n) / launch_->group; }
  int64_t q_head(int n) const {
    return int64_t{head_} * launch_->group + (first_ + n) % launch_->group;
  }
  // Where the sums of 32 columns of a query of the round lie, the second half rows_ * kTile further.
  float* Sums(int n, int32_t column) {
    return sums_ + n / kTile * kTile * d_ + column * rows_ + n % kTile * kTile;
  }

  // The states of a round before a piece; one that an earlier launch opened goes on from there.
  void Open(int64_t piece) {
    std::fill_n(m_, kRound, kMinusInfinity);
    std::fill_n(l_, kRound, 0.0f);
    fresh_ = item_->reset != 0 || launch_->begin_pos(*item_) <= piece * kTokens;
    if (fresh_) return;
    std::fill_n(sums_, RoundUp(count_) * d_, 0.0f);
    for (int n = 0; n < count_; ++n) {
      const Partial from = launch_->open(row(n), q_head(n));
      for (int32_t column = 0; column < d_; column += kLine) {
        float* const to = Sums(n, column);
        if (pairs_) {
          LoadColumns(from.o + column, to, to + rows_ * kTile);
          continue;
        }
        F32x16 even = Load(from.o + column), odd = Load(from.o + column + kLanes);
        Deinterleave(even, odd);
        Store(to, even);
        Store(to + rows_ * kTile, odd);
      }
      m_[n] = from.m();
      l_[n] = from.l();
    }
  }
  void Put(int64_t piece) {
    const int64_t count = launch_->queries(*item_);
    float* const partials =
        work_->partials + ((piece - work_->first_unit) * count + first_) * (d_ + 2);
    for (int n = 0; n < count_; ++n) {
      const Partial to{partials + n * (d_ + 2), d_};
      for (int32_t column = 0; column < d_; column += kLine) {
        const float* const from = Sums(n, column);
        F32x16 even = Load(from), odd = Load(from + rows_ * kTile);
        if (pairs_) {
          StoreColumns(even, odd, to.o + column);
          continue;
        }
        Interleave(even, odd);
        Store(to.o + column, even);
        Store(to.o + column + kLanes, odd);
      }
      to.m() = m_[n];
      to.l() = l_[n];
    }
  }

  const Launch* launch_ = nullptr;
  const UnitWork* work_ = nullptr;
  const AttendItem* item_ = nullptr;
  int32_t head_ = 0;
  int32_t d_ = 0;
  int64_t first_ = 0;  // of the item's queries: the round's
  int count_ = 0;      // of the round
  int rows_ = 0;       // of the tiles that queries are rows of
  int configured_ = 0;
  bool pairs_ = false;  // V's rows are paired
  bool asks_ = false;  // later rounds find the piece in the cache
  bool fresh_ = false;  // the sums are to be begun
  Ahead ahead_;
  int64_t owed_ = 0;  // lines that passes have still to ask for

  Unit units_[2];
  const Unit* unit_ = nullptr;  // whose weights are computed

  F32x16 few_top_;
  alignas(64) float few_[kUnitKeys * kFew];
  alignas(64) float factor_[2][kTile];  // of a group
  alignas(64) float m_[kRound];
  alignas(64) float l_[kRound];
  alignas(64) uint32_t queries_[kRound * kMaxHeadDim / 2];  // [group of 16][word][query]
  int pass_ = 0;  // of a piece: the next whose scores are multiplied
  alignas(64) float scores_[2][2 * kUnitKeys * kTile];      // [odd pass][group][key][query]
  // Of the weights of a pass.
  int weighed_ = 0;  // quarters
  float* from_ = nullptr;
  F32x16 less_[2];
  F32x16 sum_[2][kQuarters][2];
  alignas(64) float pairs_of_step_[kTileWords];
  // [group][step][query][16 pairs], or [16 keys][even, odd][query][key].
  alignas(64) uint32_t weights_[4 * kUnitSteps * kTileWords];
  // [strip][step][tile][pair][column], or of one strip
  alignas(64) uint32_t pairs_of_values_[kUnitSteps * kMaxHeadDim * kTile];
  alignas(64) float sums_[kRound * kMaxHeadDim];              // [group][tile][query][column]
  // [odd unit][block][K, V][64][d]
  alignas(64) BFloat16 copies_[2][kUnitBlocks * 2 * kBlock * kMaxHeadDim];
};

void AttendTiles(const AttendArgs& args, CpuTeam& team) {
  const Launch launch{args, args.num_q_heads / args.num_kv_heads};
  UnitPass<TileUnits> pass(launch, team);
  for (int32_t i = 0; i < args.items.count; ++i) {
    const AttendItem& item = args.items.device[i];
    for (int32_t head = item.kv_head_begin; head < item.kv_head_end; ++head) {
      if (launch.has_keys(item)) {
        pass.Add(item, head);
      } else {
        ResetOrFinish(launch, item, head);
      }
    }
  }
  pass.Run();
}

}  // namespace
}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

namespace headroom::kernels::cpu {

#if defined(__AMX_BF16__)
const TileAttention kAmxAttention = {"amx", &amx::AttendTiles};
#else
const TileAttention kPortableTileAttention = {"portable", &portable::AttendTiles};
#endif

}  // namespace headroom::kernels::cpu
