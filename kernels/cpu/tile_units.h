// What attention in tiles (tiles.h) of few and of many queries has in common: lines that are asked for
// ahead of their use, keys of a unit, queries as a factor of products, and states between pieces.
#ifndef HEADROOM_KERNELS_CPU_TILE_UNITS_H_
#define HEADROOM_KERNELS_CPU_TILE_UNITS_H_

#include <algorithm>

#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/tiles.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kStep = 2 * kTile;  // keys of the longest product
inline constexpr int kLine = 64 / sizeof(BFloat16);
inline constexpr float kLog2E = 1.44269504088896341f;

// 2^x within 8e-5, least squares made even; weights are rounded to 8 bits anyway. 0 for -inf, NaN for NaN;
// where it is more than 2^127 it may be infinity or not. One operation of all before the next: each waits
// for the one before, and a processor does not look far ahead.
template <int kCount>
inline void Exp2(F32x16 (&x)[kCount]) {
  F32x16 f[kCount], p[kCount];
  const auto each = [](auto&& fn) {
#pragma GCC unroll 8
    for (int i = 0; i < kCount; ++i) fn(i);
  };
  each([&](int i) { f[i] = Fraction(x[i]); });
  each([&](int i) { p[i] = Fma(Broadcast(5.517167e-2f), f[i], Broadcast(0.24261112f)); });
  each([&](int i) { x[i] = Sub(x[i], f[i]); });
  each([&](int i) { p[i] = Fma(p[i], f[i], Broadcast(0.69326099f)); });
  each([&](int i) { p[i] = Fma(p[i], f[i], Broadcast(0.99992807f)); });
  each([&](int i) { x[i] = Power(p[i], x[i]); });
}

struct LoadedRows {
  void Set(const BlockRows& its, int32_t) { rows = its; }
  BlockRows rows;
};

// Asks for lines of consecutive units in the order that they are read in: K's of a unit, V's of it.
template <int kUnitKeys>
class Ahead {
 public:
  // The stream of an item's keys [begin, end) begins.
  void Begin(int64_t begin, int64_t end) {
    unit_ = begin / kUnitKeys;
    end_ = (end + kUnitKeys - 1) / kUnitKeys;
    runs_ = run_ = 0;
    left_ = 0;
  }
  void Ask(const Launch& launch, const UnitWork& work, int64_t lines) {
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
                   std::max(unit_ * kUnitKeys, launch.begin_pos(*work.item)),
                   (unit_ + 1) * kUnitKeys, block, [&](const LoadedRows& loaded) {
                     if (runs_ < kUnitKeys / kBlock) blocks_[runs_++] = loaded.rows;
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
  int64_t unit_ = 0;  // the next
  int64_t end_ = 0;
  int runs_ = 0;  // of a unit: blocks, of keys and then of values
  int run_ = 0;   // the next
  BlockRows blocks_[kUnitKeys / kBlock];
};

// Keys of a unit that the item has.
template <int kUnitKeys>
struct TileUnit {
  static constexpr int kBlocks = kUnitKeys / kBlock;
  int64_t first_pos = 0;  // of the first block
  int64_t end_pos = 0;
  int skip = 0;  // keys of the first block that are not the item's
  int num_blocks = 0;
  int steps = 0;
  bool masked = false;  // some query does not see some key
  BlockRows blocks[kBlocks];

  const BFloat16* keys(int step, int32_t d) const {
    return blocks[step / 2].keys + step % 2 * kStep * d;
  }
  const BFloat16* values(int step, int32_t d) const {
    return blocks[step / 2].values + step % 2 * kStep * d;
  }
};

// kUnit keys at a time of pieces, for rounds of up to kRound queries of an item.
template <int kUnit, int kRound>
class TileUnits {
 public:
  void End() {
    if (configured_ != 0) ReleaseTiles();
  }

 protected:
  using Unit = TileUnit<kUnit>;

  // Turns to the keys of a head. True: they are others than before.
  bool Turn(const Launch& launch, const UnitWork& work) {
    const bool other = item_ != work.item || head_ != work.head;
    launch_ = &launch;
    work_ = &work;
    item_ = work.item;
    head_ = work.head;
    d_ = launch.a.head_dim;
    return other;
  }
  int64_t queries() const { return launch_->queries(*item_); }
  void BeginToAsk(int64_t begin, int64_t end, int64_t lead) {
    ahead_.Begin(begin, end);
    Ask(lead);
  }
  void Ask(int64_t lines) { ahead_.Ask(*launch_, *work_, lines); }

  void Configure(int rows) {
    if (configured_ != rows) ConfigureTiles(configured_ = rows);
  }

  // The unit that `begin` lies in, from the first block that has keys. A block that does not lie whole in
  // one span is copied, with zeros where it has no keys. Every other unit shares memory for that.
  void Read(int64_t begin, int64_t until, Unit& unit) {
    const int64_t end = std::min((begin / kUnit + 1) * kUnit, until);
    BFloat16* const copies = copies_[begin / kUnit % 2];
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
  static int RoundUp(int count) {
    return count <= kTile ? kTile : (count + 2 * kTile - 1) / (2 * kTile) * (2 * kTile);
  }

  // Of the scores of 16 queries from `first` on and a step's keys those that are not seen; at(key,
  // query) is where one is.
  template <typename At>
  void Mask(const Unit& unit, int first, int step, At&& at) const {
    const auto within = [&](int64_t pos) {
      return static_cast<int>(std::clamp<int64_t>(pos - unit.first_pos - step * kStep, 0, kStep));
    };
    for (int i = 0; i < std::min(count_ - first, kTile); ++i) {
      const int64_t pos = item_->first_pos + (first_ + first + i) / launch_->group;
      const int begin = within(std::max(unit.first_pos + unit.skip, FirstSeen(launch_->a.window, pos)));
      const int end = std::max(begin, within(std::min(pos + 1, unit.end_pos)));
      for (int key = 0; key < begin; ++key) *at(key, i) = kMinusInfinity;
      for (int key = end; key < kStep; ++key) *at(key, i) = kMinusInfinity;
    }
  }
  void Cap(float* scores) const { Store(scores, Capped(Load(scores), launch_->a.soft_cap)); }

  // What is added to a score times log2 e for the power of its weight. Where no key was seen all weights
  // are 0, those of -inf less a finite number.
  static F32x16 LessOf(F32x16 m) {
    return Sub(Zero(), Max(Mul(m, Broadcast(kLog2E)), Broadcast(-3.0e38f)));
  }
  // Of what was weighed by `before`, now that it is `maximum`.
  static F32x16 FactorOf(F32x16 before, F32x16 maximum) {
    return Exp(Sub(before, Max(maximum, Broadcast(-3.0e38f))));
  }
  // Scales the sums of 16 queries from `first` on.
  void ScaleSums(int first, const float* factor) {
    float* const sums = sums_ + first * d_;
    for (int32_t tile = 0; tile < d_ / kTile; ++tile) {
      for (int i = 0; i < rows_; ++i) {
        float* const row = sums + (tile * rows_ + i) * kTile;
        Store(row, Mul(Load(row), Broadcast(factor[i])));
      }
    }
  }
  // 16 rows of 16 words, the first `rows` of the other side.
  static void Transpose(const float* from, uint32_t* to, int rows = kTile) {
    const BFloat16* at[kTile];
    for (int i = 0; i < kTile; ++i) at[i] = reinterpret_cast<const BFloat16*>(from + i * kTile);
    TransposeTile(at, 0, to, kTile, (rows + 3) / 4);
  }

  int64_t row(int n) const { return item_->row_begin + (first_ + n) / launch_->group; }
  int64_t q_head(int n) const {
    return int64_t{head_} * launch_->group + (first_ + n) % launch_->group;
  }
  // Where a piece leaves the state of a query of the round.
  Partial PartialOf(int64_t piece, int n) const {
    return {work_->partials + ((piece - work_->first_unit) * queries() + first_ + n) * (d_ + 2), d_};
  }
  // Where the sums of 32 columns of a query of the round lie, the second half rows_ * kTile further.
  float* Sums(int n, int32_t column) {
    return sums_ + n / kTile * kTile * d_ + column * rows_ + n % kTile * kTile;
  }

  // A round's states before a piece that begins at position `piece_begin`: one that an earlier launch
  // opened goes on from there. split(from, low, high) makes two vectors of sums of 32 columns.
  template <typename Split>
  void Open(int64_t piece_begin, Split&& split) {
    std::fill_n(m_, kRound, kMinusInfinity);
    std::fill_n(l_, kRound, 0.0f);
    fresh_ = item_->reset != 0 || launch_->begin_pos(*item_) <= piece_begin;
    if (fresh_) return;
    std::fill_n(sums_, RoundUp(count_) * d_, 0.0f);
    GoOnFrom([&](int n) { return launch_->open(row(n), q_head(n)); }, split);
  }
  template <typename StateOf, typename Split>
  void GoOnFrom(StateOf&& state_of, Split&& split) {
    fresh_ = false;
    for (int n = 0; n < count_; ++n) {
      const Partial from = state_of(n);
      for (int32_t column = 0; column < d_; column += kLine) {
        float* const to = Sums(n, column);
        split(from.o + column, to, to + rows_ * kTile);
      }
      m_[n] = from.m();
      l_[n] = from.l();
    }
  }
  // The states after a piece. join(low, high, to) makes 32 columns of two vectors of sums.
  template <typename Join>
  void Put(int64_t piece, Join&& join) {
    for (int n = 0; n < count_; ++n) {
      const Partial to = PartialOf(piece, n);
      for (int32_t column = 0; column < d_; column += kLine) {
        const float* const from = Sums(n, column);
        join(Load(from), Load(from + rows_ * kTile), to.o + column);
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
  int64_t first_ = 0;   // of the item's queries: the round's
  int count_ = 0;       // of the round
  int rows_ = kTile;    // of the tiles that queries are rows of
  int configured_ = 0;
  bool fresh_ = false;  // the sums are to be begun
  Ahead<kUnit> ahead_;

  alignas(64) float m_[kRound];
  alignas(64) float l_[kRound];
  alignas(64) uint32_t queries_[kRound * kMaxHeadDim / 2];  // [group of 16][word][query]
  alignas(64) float sums_[kRound * kMaxHeadDim];            // [group][tile][query][column]
  // [odd unit][block][K, V][64][d]
  alignas(64) BFloat16 copies_[2][Unit::kBlocks * 2 * kBlock * kMaxHeadDim];
};

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_TILE_UNITS_H_
