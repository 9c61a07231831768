// A unit of keys for all queries of a KV head, in tiles (tiles.h), 16 or 32 queries at a time:
//   scores[key][query] = K q, K's rows read where they lie
//   weights = exp(scores - maximum) as bfloat16, [query][key]
//   o = weights V, V's rows read where they lie: a word is two columns of a key, so each weight comes
//       once with nothing for the odd columns and once with nothing for the even ones
// The maximum is the whole unit's, so nothing is rescaled. A line of K or V costs about two
// instructions, and all along the kernel asks for the lines that come next: its speed is the memory's.
#include "kernels/cpu/tile_attention.h"

#include <algorithm>

#include "kernels/cpu/attention_units.h"
#include "kernels/cpu/tiles.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

constexpr int kUnitKeys = static_cast<int>(kUnitTokens);
constexpr int kUnitBlocks = kUnitKeys / kBlock;
constexpr int kPass = 2 * kTile;  // queries of one pass over a unit
constexpr int kPasses = 4;        // whose queries are kept
constexpr int kLine = 64 / sizeof(BFloat16);
// Lines are asked for so long before they are read: 16 KiB. Of the 32 lines that a step reads 30 more
// are asked for; softmax, which reads none, asks for the rest.
constexpr int kLead = 256;
constexpr int kAsked = 30;
constexpr float kLog2E = 1.44269504088896341f;

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

// Asks for lines in the order that they are read in: K's blocks, V's blocks, the next unit's keys.
class Ahead {
 public:
  void Begin(const BlockRows* blocks, int num_blocks, int32_t d, int64_t asked) {
    blocks_ = blocks;
    num_blocks_ = num_blocks;
    lines_ = kBlock * d / kLine;
    run_ = static_cast<int>(asked / lines_);
    line_ = asked % lines_;
    SetRun();
  }
  void Ask(int64_t lines) {
    while (lines > 0) {
      const int64_t count = std::min(lines, lines_ - line_);
      for (int64_t i = 0; i < count; ++i) __builtin_prefetch(at_ + (line_ + i) * kLine);
      lines -= count;
      line_ += count;
      if (line_ < lines_) return;
      line_ = 0;
      ++run_;
      SetRun();
    }
  }

 private:
  void SetRun() {
    if (run_ < num_blocks_) {
      at_ = blocks_[run_].keys;
    } else if (run_ < 2 * num_blocks_) {
      at_ = blocks_[run_ - num_blocks_].values;
    } else {  // a guess: most units follow each other
      at_ = blocks_[num_blocks_ - 1].keys + (run_ - 2 * num_blocks_ + 1) * lines_ * kLine;
    }
  }
  const BlockRows* blocks_ = nullptr;
  const BFloat16* at_ = nullptr;
  int num_blocks_ = 0;
  int run_ = 0;
  int64_t line_ = 0;
  int64_t lines_ = 0;  // of a block's keys, or values
};

// What a member needs for the units of a run.
class TileUnits {
 public:
  void operator()(const Launch& launch, const UnitWork& work, int64_t unit) {
    d_ = launch.a.head_dim;
    ReadBlocks(launch, work, unit);
    ahead_.Begin(blocks_, num_blocks_, d_, kLead);
    const int64_t count = launch.queries(*work.item);
    for (int64_t first = 0; first < count; first += kPass) {
      const int now = static_cast<int>(std::min<int64_t>(count - first, kPass));
      if (first % (kPasses * kPass) == 0) SetQueries(launch, work, first);
      if (now > kTile) {
        Attend<2>(launch, work, unit, first, now);
      } else {
        Attend<1>(launch, work, unit, first, now);
      }
    }
  }

 private:
  // The unit's blocks from the first that has keys. One that does not lie whole in one span is
  // copied, with zeros where it has no keys.
  void ReadBlocks(const Launch& launch, const UnitWork& work, int64_t unit) {
    const int64_t begin = std::max(unit * kUnitTokens, launch.begin_pos(*work.item));
    end_pos_ = std::min((unit + 1) * kUnitTokens, launch.end_pos(*work.item));
    first_pos_ = FloorToBlock(begin);
    skip_ = static_cast<int>(begin - first_pos_);
    num_blocks_ = static_cast<int>((end_pos_ - first_pos_ + kBlock - 1) / kBlock);
    std::fill_n(blocks_, kUnitBlocks, BlockRows());
    struct Rows {
      void Set(const BlockRows& its, int32_t) { rows = its; }
      BlockRows rows;
    } block;
    ForEachBlock(launch, *work.item, work.head, begin, end_pos_, block, [&](const Rows& loaded) {
      const BlockRows& rows = loaded.rows;
      const int64_t b = (rows.first_pos - first_pos_) / kBlock;
      if (rows.count == kBlock) {
        blocks_[b] = rows;
        return;
      }
      BFloat16* const keys = copies_ + b * 2 * kBlock * d_;
      BFloat16* const values = keys + kBlock * d_;
      if (blocks_[b].keys == nullptr) std::fill_n(keys, 2 * kBlock * d_, BFloat16());
      blocks_[b] = {keys, values, first_pos_ + b * kBlock, kBlock};
      const int64_t at = (rows.first_pos - first_pos_) % kBlock * d_;
      std::copy_n(rows.keys, rows.count * d_, keys + at);
      std::copy_n(rows.values, rows.count * d_, values + at);
    });
  }

  // Queries [first, first + count) of the item's, in kGroups of up to 16.
  template <int kGroups>
  void Attend(const Launch& launch, const UnitWork& work, int64_t unit, int64_t first, int count) {
    // Later passes find the unit in the cache.
    const auto ask = [&](int64_t lines) {
      if (first == 0) ahead_.Ask(lines);
    };
    ConfigureTiles(kTile);
    const uint32_t* const queries = queries_ + first / kPass % kPasses * (d_ / 2) * kPass;
    for (int b = 0; b < num_blocks_; ++b) {
      for (int key = 0; key < kBlock; key += 2 * kTile) {
        const BFloat16* const keys = blocks_[b].keys + key * d_;
        float* const out = scores_ + (b * kBlock + key) * kPass;
        Multiply<kGroups>({{keys, keys + kTile * d_}, d_ / 2, queries, kPass, d_ / 2,
                           {out, out + kTile * kPass}, kPass, false},
                          kTile, [&] { ask(kAsked); });
      }
    }
    for (int n = 0; n < count; ++n) {
      if (n % kTile == 0) TransposeScores(n, std::min(count - n, kTile));
      if (n % 4 == 0) ask(32);
      const int64_t pos = work.item->first_pos + (first + n) / launch.group;
      const auto within = [this](int64_t key) {
        return std::clamp<int64_t>(key - first_pos_, 0, kUnitKeys);
      };
      if (launch.a.soft_cap != 0) Cap(n, launch.a.soft_cap);
      Softmax(n, std::max<int64_t>(skip_, within(FirstSeen(launch.a.window, pos))),
              within(std::min(pos + 1, end_pos_)));
    }
    const int rows = std::min(count, kTile);
    ConfigureTiles(rows);
    for (int b = 0; b < num_blocks_; ++b) {
      for (int g = 0; g < kGroups; ++g) {
        const uint32_t* const low = weights_[0] + g * kTile * kUnitKeys + b * kBlock;
        const uint32_t* const high = weights_[1] + g * kTile * kUnitKeys + b * kBlock;
        for (int32_t column = 0; column < d_; column += 4 * kTile) {
          float* const even = even_ + g * kTile * (d_ / 2) + column / 2;
          float* const odd = odd_ + g * kTile * (d_ / 2) + column / 2;
          Multiply<2>({{low, high}, kUnitKeys, blocks_[b].values + column, d_ / 2, kBlock,
                       {even, odd}, d_ / 2, b > 0},
                      rows, [&] {
                        if (g == 0) ask(kAsked);
                      });
        }
      }
    }
    ReleaseTiles();
    Put(launch, work, unit, first, count);
  }

  // q * scale of kPasses from `first` on, kept for the units that follow.
  void SetQueries(const Launch& launch, const UnitWork& work, int64_t first) {
    if (item_ == work.item && head_ == work.head && first_ == first) return;
    item_ = work.item;
    head_ = work.head;
    first_ = first;
    const int64_t count = std::min<int64_t>(launch.queries(*work.item) - first, kPasses * kPass);
    alignas(64) BFloat16 rounded[kTile * kMaxHeadDim];
    for (int64_t n = 0; n < count; n += kTile) {
      const BFloat16* rows[kTile];
      for (int i = 0; i < kTile; ++i) {
        BFloat16* const to = rounded + i * d_;
        rows[i] = to;
        const int64_t query = first + std::min(n + i, count - 1);  // the last fills the tile
        const float* const q = launch.q(work.item->row_begin + query / launch.group,
                                        int64_t{work.head} * launch.group + query % launch.group);
        for (int32_t j = 0; j < d_; ++j) to[j] = ToBFloat16(q[j] * launch.a.scale);
      }
      uint32_t* const words = queries_ + n / kPass * (d_ / 2) * kPass + n % kPass;
      for (int32_t column = 0; column < d_; column += 2 * kTile) {
        TransposeTile(rows, column, words + column / 2 * kPass, kPass);
      }
    }
  }

  // Scores of the 16 queries from `first` on to by_query_; only those of `rows`.
  void TransposeScores(int first, int rows) {
    for (int key = 0; key < num_blocks_ * kBlock; key += kTile) {
      const BFloat16* at[kTile];
      for (int i = 0; i < kTile; ++i) {
        at[i] = reinterpret_cast<const BFloat16*>(scores_ + (key + i) * kPass + first);
      }
      TransposeTile(at, 0, reinterpret_cast<uint32_t*>(by_query_) + key, kUnitKeys, (rows + 3) / 4);
    }
  }

  void Cap(int n, float soft_cap) {
    float* const scores = by_query_ + n % kTile * kUnitKeys;
    for (int key = 0; key < num_blocks_ * kBlock; key += kLanes) {
      Store(scores + key, Capped(Load(scores + key), soft_cap));
    }
  }

  // The weights of query n of the pass, which sees keys [begin, end) of the unit's.
  void Softmax(int n, int64_t begin, int64_t end) {
    const int keys = num_blocks_ * kBlock;
    float* const scores = by_query_ + n % kTile * kUnitKeys;
    std::fill_n(scores, std::min<int64_t>(begin, keys), kMinusInfinity);
    std::fill(scores + std::min<int64_t>(end, keys), scores + keys, kMinusInfinity);
    F32x16 top[4];
    for (F32x16& t : top) t = Broadcast(kMinusInfinity);
    for (int key = 0; key < keys; key += kBlock) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) top[i] = Max(Load(scores + key + i * kLanes), top[i]);
    }
    const float maximum = ReduceMax(Max(Max(top[0], top[1]), Max(top[2], top[3])));
    // Where no key is seen all weights are 0: -inf less a finite number.
    const F32x16 less = Broadcast(-std::max(maximum * kLog2E, -3.0e38f));
    F32x16 sum[2] = {Zero(), Zero()};
    for (int key = 0; key < keys; key += 2 * kLanes) {
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        const int at = key + i * kLanes;
        const F32x16 e = Exp2OfNegative(Fma(Load(scores + at), Broadcast(kLog2E), less));
        sum[i] = Add(sum[i], e);
        StoreHalves(e, weights_[0] + n * kUnitKeys + at, weights_[1] + n * kUnitKeys + at);
      }
    }
    m_[n] = maximum;
    l_[n] = ReduceAdd(Add(sum[0], sum[1]));
  }

  // The partials of a pass; one that an earlier launch opened goes on from there.
  void Put(const Launch& launch, const UnitWork& work, int64_t unit, int64_t first, int count) {
    const AttendItem& item = *work.item;
    const bool opened = !item.reset && launch.begin_pos(item) > unit * kUnitTokens;
    float* const partials =
        work.partials + ((unit - work.first_unit) * launch.queries(item) + first) * (d_ + 2);
    for (int n = 0; n < count; ++n) {
      const Partial to{partials + n * (d_ + 2), d_};
      const int32_t at = n * (d_ / 2);
      for (int32_t i = 0; i < d_; i += 2 * kLanes) {
        F32x16 even = Load(even_ + at + i / 2);
        F32x16 odd = Load(odd_ + at + i / 2);
        Interleave(even, odd);
        Store(to.o + i, even);
        Store(to.o + i + kLanes, odd);
      }
      to.m() = m_[n];
      to.l() = l_[n];
      if (!opened) continue;
      const int64_t row = item.row_begin + (first + n) / launch.group;
      const int64_t q_head = int64_t{work.head} * launch.group + (first + n) % launch.group;
      alignas(64) float before[kMaxHeadDim + kLanes];
      const Partial open{before, d_};
      open.CopyFrom(launch.open(row, q_head));
      Fold(open, to);
      to.CopyFrom(open);
    }
  }

  int32_t d_ = 0;
  const AttendItem* item_ = nullptr;  // whose queries are there
  int32_t head_ = 0;
  int64_t first_ = 0;
  int64_t first_pos_ = 0;  // of the first block
  int64_t end_pos_ = 0;    // of the unit's keys
  int skip_ = 0;           // keys of the first block that are not the item's
  int num_blocks_ = 0;
  Ahead ahead_;
  BlockRows blocks_[kUnitBlocks];
  alignas(64) uint32_t queries_[kPasses * kMaxHeadDim / 2 * kPass];  // [pass][word][query]
  alignas(64) float scores_[kUnitKeys * kPass];                      // [key][query]
  alignas(64) float by_query_[kTile * kUnitKeys];                    // [query][key]
  alignas(64) uint32_t weights_[2][kPass * kUnitKeys];  // in the low, the high half [query][key]
  alignas(64) float even_[kPass * kMaxHeadDim / 2];     // o [query][column]
  alignas(64) float odd_[kPass * kMaxHeadDim / 2];
  float m_[kPass];
  float l_[kPass];
  alignas(64) BFloat16 copies_[kUnitBlocks * 2 * kBlock * kMaxHeadDim];  // [block][K, V][64][d]
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
