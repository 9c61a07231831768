// More than 16 queries of a KV head in tiles (tiles.h), up to 32 in a pass over a unit's keys:
//   scores[key][query] = K q, K's rows read where they lie
//   weights = exp(score - m) as bfloat16, [query][key]
//   o = o + weights V, V's rows paired into words
// A step of keys is multiplied beside the weights of the step before, so that scores do not leave the
// first cache. Where a unit's scores were kept, their maximum taken before their weights, and pieces were of
// 1,024 keys, 32 queries took 1.3 times as long and 128 queries 1.5 times.
//
// m is not the maximum so far, but a score that few exceed: as long as the weights of eight keys come to
// no more than 2^16, bfloat16 and sums hold them as well as those up to 1. So it moves seldom, and all that
// was weighed by it is scaled when it does.
#ifndef HEADROOM_KERNELS_CPU_TILE_PASSES_H_
#define HEADROOM_KERNELS_CPU_TILE_PASSES_H_

#include <algorithm>

#include "kernels/cpu/tile_units.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kPassUnit = 128;
inline constexpr int kPassRound = 128;

class PassUnits : public TileUnits<kPassUnit, kPassRound> {
 public:
  // Partials are written, folded and so read once more: of 1,024 keys that is a tenth of what 32 queries
  // read of K and V.
  static constexpr int64_t kTokens = 4096;
  static constexpr bool kShortRuns = false;  // a run reads ahead of itself and drains at its end

  void operator()(const Launch& launch, const UnitWork& work, int64_t piece, int64_t end) {
    const bool other = Turn(launch, work);
    const int64_t count = queries();
    const int64_t begin = std::max(piece * kTokens, launch.begin_pos(*item_));
    const int64_t until = std::min((piece + 1) * kTokens, launch.end_pos(*item_));
    if (other) {
      const int64_t passes = (std::min<int64_t>(count, kPassRound) + kPass - 1) / kPass;
      rate_ = (int64_t{1} << kRateBits) / passes;
      BeginToAsk(begin, std::min(end * kTokens, launch.end_pos(*item_)), kLead);
    }
    // Later rounds find the keys in the second cache.
    const int64_t stretch = count > kPassRound ? kCached : kTokens;
    for (int64_t from = begin, to; from < until; from = to) {
      to = std::min(until, (from / stretch + 1) * stretch);
      for (int64_t first = 0; first < count; first += kPassRound) {
        if (other || count > kPassRound) {
          SetQueries(first, std::min<int64_t>(count - first, kPassRound));
        }
        asks_ = first == 0;
        if (from == begin) {
          Open(piece * kTokens, LoadColumns);
        } else if (count > kPassRound) {
          GoOnFrom([&](int n) { return PartialOf(piece, n); }, LoadColumns);
        }
        if (count_ > kTile) {
          Attend<2>(from, to);
        } else {
          Attend<1>(from, to);
        }
        Put(piece, StoreColumns);
      }
    }
  }

 private:
  static constexpr int kSteps = kPassUnit / kStep;
  static constexpr int kPass = 2 * kTile;
  static constexpr int kQuarters = 4;  // of a step's weights: 8 keys
  static constexpr int64_t kCached = 1024;  // keys that stay in the second cache
  // Lines are asked for so long before they are read, into the second cache: 48 KiB. 32 queries on 16
  // threads took 88% of the GB/s of four so, with 256 lines 77%, with 2,048 87%, with 4,096 78%.
  static constexpr int64_t kLead = 768;
  static constexpr int kRateBits = 20;
  static constexpr float kMostWeight = 65536.0f;  // of eight keys

  // Some queries' way through a unit.
  struct Pass {
    const Unit* unit = nullptr;
    int first = 0;        // of the round's queries
    bool begins = false;  // its sums
  };

  // As many lines of a pass as come to `lines` of all passes. What each place asks for goes by how long it
  // takes: of a step's 256 lines, at head_dim 128, 160 beside K's products and 96 beside V's.
  void AskFor(int lines) {
    if (!asks_) return;
    owed_ += lines * rate_;
    Ask(owed_ >> kRateBits);
    owed_ &= (int64_t{1} << kRateBits) - 1;
  }

  template <int kGroups>
  void Attend(int64_t begin, int64_t until) {
    Configure(kTile);
    for (int n = 0; n < RoundUp(count_); n += kTile) Store(less_ + n, LessOf(Load(m_ + n)));
    Pass before;
    bool begins = fresh_;
    left_ = 0;
    for (int64_t pos = begin; pos < until;) {
      Unit& unit = units_[turn_];
      turn_ ^= 1;
      Read(pos, until, unit);
      pos = unit.end_pos;
      for (int first = 0; first < count_; first += kPass) {
        const Pass pass{&unit, first, begins};
        for (int step = 0; step < unit.steps; ++step) {
          MultiplyKeys<kGroups>(pass, step);
          if (step == 0 && before.unit != nullptr) AddValues<kGroups>(before);
          BeginWeights<kGroups>(pass, step);
        }
        before = pass;
      }
      begins = false;
    }
    Weigh<kGroups>(left_);
    AddValues<kGroups>(before);
  }

  // Scores of a step, beside the weights of the step before.
  template <int kGroups>
  void MultiplyKeys(const Pass& pass, int step) {
    const int quarters = (kGroups * kQuarters * kTile + d_ - 1) / d_;
    float* const scores = scores_[parity_ ^= 1];
    Multiply<kGroups>(ScoreProduct{pass.unit->keys(step, d_), d_, queries_ + pass.first * d_ / 2,
                                   d_ / 2, scores, kStep * kTile},
                      [&] {
                        AskFor(20);
                        Weigh<kGroups>(quarters);
                      });
    Weigh<kGroups>(left_);
  }

  // The weights that come next are those of the step that was multiplied last.
  template <int kGroups>
  void BeginWeights(const Pass& pass, int step) {
    pass_ = pass;
    step_ = step;
    left_ = kGroups * kQuarters;
    weighed_ = scores_[parity_];
    for (int g = 0; g < kGroups; ++g) {
      float* const scores = scores_[parity_] + g * kStep * kTile;
      if (launch_->a.soft_cap != 0) {
        for (int key = 0; key < kStep; ++key) Cap(scores + key * kTile);
      }
      if (pass.unit->masked) {
        Mask(*pass.unit, pass.first + g * kTile, step,
             [&](int key, int n) { return scores + key * kTile + n; });
      }
    }
  }
  // As many quarters of the weights that are left.
  template <int kGroups>
  void Weigh(int quarters) {
    for (int i = std::min(quarters, left_); i > 0; --i, --left_) {
      const int done = kGroups * kQuarters - left_;
      WeighQuarter(done / kQuarters, done % kQuarters);
    }
  }
  void WeighQuarter(int group, int quarter) {
    const float* const scores = weighed_ + (group * kStep + quarter * 8) * kTile;
    const int first = pass_.first + group * kTile;
    F32x16 pairs[4], sum;
    const auto weigh = [&] {
      const F32x16 less = Load(less_ + first);
      F32x16 x[8];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) x[i] = Fma(Load(scores + i * kTile), Broadcast(kLog2E), less);
      Exp2(x);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) pairs[i] = PairsOf(x[2 * i], x[2 * i + 1]);
      // Of what is multiplied: where few keys matter, their rounding falls out.
      sum = Add(AddWords(AddWords(Zero(), pairs[0]), pairs[1]),
                AddWords(AddWords(Zero(), pairs[2]), pairs[3]));
    };
    weigh();
    if (SomeAbove(sum, kMostWeight)) [[unlikely]] {
      MoveMaximum(scores, group, quarter, sum);
      weigh();
    }
    Store(l_ + first, Add(Load(l_ + first), sum));
    float* const to = pairs_of_step_ + quarter * 4 * kTile;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) Store(to + i * kTile, pairs[i]);
    if (quarter + 1 < kQuarters) return;
    Transpose(pairs_of_step_, weights_ + (group * kSteps + step_) * kTileWords);
  }

  // m of the queries whose weights would be too large becomes the maximum of these eight keys, and what was
  // weighed by the one before is scaled. Each query by itself: its bits do not hang on others.
  [[gnu::noinline]] void MoveMaximum(const float* scores, int group, int quarter, F32x16 sum) {
    const int first = pass_.first + group * kTile;
    alignas(64) float above[kTile], factor[kTile];
    Store(above, sum);
    const F32x16 before = Load(m_ + first);
    for (int n = 0; n < kTile; ++n) {
      if (!(above[n] > kMostWeight)) continue;
      m_[first + n] = kMinusInfinity;
      for (int key = 0; key < 8; ++key) m_[first + n] = std::max(m_[first + n], scores[key * kTile + n]);
    }
    const F32x16 maximum = Load(m_ + first);
    Store(less_ + first, LessOf(maximum));
    const F32x16 by = FactorOf(before, maximum);
    Store(factor, by);
    Store(l_ + first, Mul(Load(l_ + first), by));
    if (!pass_.begins) ScaleSums(first, factor);
    // Words, each two weights.
    const auto scale = [](auto* words, F32x16 f) {
      float* const at = reinterpret_cast<float*>(words);
      Store(at, PairsOf(Mul(LowBf16(words), f), Mul(HighBf16(words), f)));
    };
    for (int i = 0; i < quarter * 4; ++i) scale(pairs_of_step_ + i * kTile, by);
    for (int step = 0; step < step_; ++step) {
      uint32_t* const weights = weights_ + (group * kSteps + step) * kTileWords;
      for (int n = 0; n < kTile; ++n) scale(weights + n * kTile, Broadcast(factor[n]));
    }
  }

  // Strip by strip of columns, 16 queries at a time, whose sums stay in tiles. Pairs of a step are made
  // beside the products of the step before, for the first 16; several passes keep them.
  template <int kGroups>
  void AddValues(const Pass& pass) {
    const int steps = pass.unit->steps;
    for (int32_t column = 0; column < d_; column += kLine) {
      uint32_t* const pairs =
          pairs_of_values_ + (count_ > kPass ? column * kSteps * kTile : 0);
      for (int g = 0; g < kGroups; ++g) {
        const auto pair = [&](int step) {
          if (pass.first == 0 && g == 0 && step < steps) {
            PairValues(*pass.unit, step, column, pairs + step * 2 * kTileWords);
          }
        };
        pair(0);
        Multiply(PairProduct{weights_ + g * kSteps * kTileWords, pairs, steps,
                             sums_ + (pass.first + g * kTile) * d_ + column * kTile, !pass.begins},
                 [&](int step) {
                   AskFor(24 / kGroups);
                   pair(step + 1);
                 });
      }
    }
  }
  void PairValues(const Unit& unit, int step, int32_t column, uint32_t* to) const {
    const BFloat16* const values = unit.values(step, d_) + column;
    for (int i = 0; i < kTile; ++i) {
      const BFloat16* const row = values + 2 * i * d_;
      PairRows(row, row + d_, to + i * kTile, to + kTileWords + i * kTile);
    }
  }

  bool asks_ = false;
  int64_t rate_ = 0;  // lines of a pass for a line of all
  int64_t owed_ = 0;  // parts of a line

  Unit units_[2];
  int turn_ = 0;    // of units
  int parity_ = 0;  // of scores
  // The weights that come next.
  Pass pass_;
  int step_ = 0;
  int left_ = 0;  // quarters
  const float* weighed_ = nullptr;
  alignas(64) float less_[kPassRound];
  alignas(64) float scores_[2][2 * kStep * kTile];  // [odd step][group][key][query]
  alignas(64) float pairs_of_step_[kTileWords];
  alignas(64) uint32_t weights_[2 * kSteps * kTileWords];  // [group][step][query][16 pairs]
  // [strip][step][tile][pair][column], or of one strip
  alignas(64) uint32_t pairs_of_values_[kSteps * kMaxHeadDim * kTile];
};

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_TILE_PASSES_H_
