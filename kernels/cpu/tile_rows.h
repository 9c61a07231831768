// Up to 16 queries of a KV head in tiles (tiles.h), unit by unit:
//   scores[key][query] = K q, K's rows read where they lie
//   weights = exp(scores - maximum) as bfloat16, [query][key], the maximum that of the piece so far
//   o = o * exp(maximum before - maximum) + weights V, V's rows read where they lie, at two products for each
#ifndef HEADROOM_KERNELS_CPU_TILE_ROWS_H_
#define HEADROOM_KERNELS_CPU_TILE_ROWS_H_

#include <algorithm>

#include "kernels/cpu/tile_units.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

inline constexpr int kRowUnit = static_cast<int>(kUnitTokens);

class RowUnits : public TileUnits<kRowUnit, kTile> {
 public:
  // Partials, 130 floats a query, are written, folded and so read once more, which at 256 keys is 5% of what
  // four queries read of K and V.
  static constexpr int64_t kTokens = 1024;
  static constexpr bool kShortRuns = false;  // a run reads ahead of itself and drains at its end

  void operator()(const Launch& launch, const UnitWork& work, int64_t piece, int64_t end) {
    const int64_t begin = std::max(piece * kTokens, launch.begin_pos(*work.item));
    const int64_t until = std::min((piece + 1) * kTokens, launch.end_pos(*work.item));
    if (Turn(launch, work)) {
      rows_ = static_cast<int>(std::max<int64_t>(queries(), kFew));
      BeginToAsk(begin, std::min(end * kTokens, launch.end_pos(*item_)),
                 rows_ == kFew ? kFewLead : kLead);
      SetQueries(0, queries());
    }
    Open(piece * kTokens, [](const float* from, float* low, float* high) {
      F32x16 even = Load(from), odd = Load(from + kLanes);
      Deinterleave(even, odd);
      Store(low, even);
      Store(high, odd);
    });
    Attend(begin, until);
    Put(piece, [](F32x16 even, F32x16 odd, float* to) {
      Interleave(even, odd);
      Store(to, even);
      Store(to + kLanes, odd);
    });
  }

 private:
  static constexpr int kFew = 4;  // queries of which four keys' scores fill a vector
  // Lines are asked for so long before they are read, into the second cache: 32 KiB; with more queries
  // softmax is longer, which reads none. Four queries on 16 threads took 105 GB/s so, with 128 or 256 lines
  // 99, with 1,024 104; into the first cache 97.
  static constexpr int64_t kFewLead = 512;
  static constexpr int64_t kLead = 1024;

  void Attend(int64_t begin, int64_t until) {
    for (int64_t pos = begin; pos < until; pos = unit_.end_pos) {
      Read(pos, until, unit_);
      Configure(kTile);
      if (rows_ == kFew) {
        ScoreFew();
        WeighFew();
      } else {
        for (int step = 0; step < unit_.steps; ++step) MultiplyKeys(step, step);
        Weigh();
      }
      Configure(rows_);
      for (int b = 0; b < unit_.num_blocks; ++b) {
        for (int32_t column = 0; column < d_; column += kLine) {
          Multiply(RowProduct{Weights(b * kBlock), unit_.blocks[b].values + column, d_,
                              kBlock / kTile, rows_, sums_ + column * rows_, b > 0 || !fresh_},
                   [this] { Ask(kTile); });
        }
      }
      fresh_ = false;
    }
  }
  // Scores of a step, where those of step `to` belong. Of its lines one in 16 is left for softmax, which
  // reads none.
  void MultiplyKeys(int step, int to) {
    Multiply<1>(
        ScoreProduct{unit_.keys(step, d_), d_, queries_, d_ / 2, scores_ + to * kStep * kTile, 0},
        [this] { Ask(kTile - 1); });
  }
  void AskInSoftmax() { Ask(2 * (d_ / kLine)); }

  // Weights of 16 keys: [even, odd][query][key].
  uint32_t* Weights(int key) { return weights_ + key * 2 * rows_; }

  // Goes on to the maximum with these scores, and scales what is there. Returns what is added to a score
  // times log2 e.
  F32x16 Advance(F32x16 top) {
    const F32x16 before = Load(m_);
    const F32x16 maximum = Max(top, before);
    Store(m_, maximum);
    Store(factor_, FactorOf(before, maximum));
    bool scales = false;
    for (int i = 0; i < rows_; ++i) scales |= factor_[i] != 1.0f;
    if (scales && !fresh_) ScaleSums(0, factor_);
    return LessOf(maximum);
  }
  void AddWeights(F32x16 sum) { Store(l_, Fma(Load(l_), Load(factor_), sum)); }

  // Caps, masks and advances to scores of which a vector is 16 queries of a key.
  F32x16 AdvanceToScores() {
    if (launch_->a.soft_cap != 0) {
      for (int key = 0; key < unit_.steps * kStep; ++key) Cap(scores_ + key * kTile);
    }
    if (unit_.masked) {
      for (int step = 0; step < unit_.steps; ++step) {
        Mask(unit_, 0, step,
             [&](int key, int n) { return scores_ + (step * kStep + key) * kTile + n; });
      }
    }
    F32x16 top[4];
    for (F32x16& t : top) t = Broadcast(kMinusInfinity);
    for (int key = 0; key < unit_.steps * kStep; key += 4) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) top[i] = Max(Load(scores_ + (key + i) * kTile), top[i]);
    }
    return Advance(Max(Max(top[0], top[1]), Max(top[2], top[3])));
  }

  // Eight sums, of which the vectors of WeighFew have four each: a query has the same bits in both.
  void Weigh() {
    const F32x16 less = AdvanceToScores();
    F32x16 sum[4][2];
    for (F32x16(&s)[2] : sum) s[0] = s[1] = Zero();
    alignas(64) float of_keys[kTileWords];
    alignas(64) float of_queries[kTileWords];
    for (int key = 0; key < unit_.steps * kStep; key += kTile) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        F32x16 weights[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          weights[i] = Fma(Load(scores_ + (key + 4 * j + i) * kTile), Broadcast(kLog2E), less);
        }
        Exp2(weights);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sum[j][i % 2] = Add(sum[j][i % 2], weights[i]);
          Store(of_keys + (4 * j + i) * kTile, weights[i]);
        }
      }
      Transpose(of_keys, reinterpret_cast<uint32_t*>(of_queries), rows_);
      uint32_t* const to = Weights(key);
      for (int n = 0; n < rows_; ++n) {
        StoreHalves(Load(of_queries + n * kTile), to + n * kTile, to + (rows_ + n) * kTile);
      }
      if (key % kStep == 0) AskInSoftmax();
    }
    const auto both = [&](int j) { return Add(sum[j][0], sum[j][1]); };
    AddWeights(Add(Add(both(0), both(2)), Add(both(1), both(3))));
  }

  // Four queries' scores, dense. Rows of a step are gathered a step later: then tiles' stores are done.
  void ScoreFew() {
    few_top_ = Broadcast(kMinusInfinity);
    for (int step = 0; step < unit_.steps; ++step) {
      MultiplyKeys(step, step % 2);
      if (step > 0) GatherFew(step - 1);
    }
    GatherFew(unit_.steps - 1);
  }
  void GatherFew(int step) {
    const float* const rows = scores_ + step % 2 * kStep * kTile;
    float* const to = few_ + step * kStep * kFew;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      const F32x16 scores = FourOfRows(rows + i / 4 * kTileWords, i % 4);
      Store(to + i * kTile, scores);
      if (!unit_.masked && launch_->a.soft_cap == 0) few_top_ = Max(scores, few_top_);
    }
    if (!unit_.masked && launch_->a.soft_cap == 0) return;
    if (launch_->a.soft_cap != 0) {
      for (int i = 0; i < 8; ++i) Cap(to + i * kTile);
    }
    if (unit_.masked) {
      Mask(unit_, 0, step, [&](int key, int n) {
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
    Store(at, Advance(Load(at)));
    const F32x16 less = FourTimes(at);
    F32x16 sum[2] = {Zero(), Zero()};
    for (int key = 0; key < unit_.steps * kStep; key += kTile) {
      F32x16 weights[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        weights[i] = Fma(Load(few_ + key * kFew + i * kTile), Broadcast(kLog2E), less);
      }
      Exp2(weights);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) sum[i % 2] = Add(sum[i % 2], weights[i]);
      ToRows(weights);
      uint32_t* const to = Weights(key);
#pragma GCC unroll 4
      for (int n = 0; n < kFew; ++n) {
        StoreHalves(weights[n], to + n * kTile, to + (kFew + n) * kTile);
      }
      if (key % kStep == 0) AskInSoftmax();
    }
    Store(at, Add(sum[0], sum[1]));
    for (int i = 0; i < kFew; ++i) at[i] = (at[i] + at[8 + i]) + (at[4 + i] + at[12 + i]);
    AddWeights(Load(at));
  }

  Unit unit_;
  F32x16 few_top_;
  alignas(64) float few_[kRowUnit * kFew];
  alignas(64) float factor_[kTile];
  alignas(64) float scores_[kRowUnit * kTile];          // [key][query]
  alignas(64) uint32_t weights_[2 * kRowUnit * kTile];  // [16 keys][even, odd][query][key]
};

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE

#endif  // HEADROOM_KERNELS_CPU_TILE_ROWS_H_
