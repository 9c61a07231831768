// Exact attention over keys in pieces; attention.h states the fold.
//
// A block of four warps takes some queries (rows x GQA group) of one KV head of one item, and
// blocks of 64 keys one after the other, on the tensor cores: q and p are split into two bfloat16
// (see tensor_core.cuh), K and V are bfloat16 already. With many queries every warp has 16 of its
// own; with few, warps share 16 queries and divide the keys of the scores, then the columns of the
// result. All sums have one order, whichever way: a query's bits depend on the keys that it sees
// alone.
//
// Where there are few queries, units of keys are computed side by side into scratch and folded in
// order by a second kernel; else a block of threads walks all keys and folds at each unit's border.
// Both leave the same states.
#include <math_constants.h>

#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/fold_weights.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlock = static_cast<int>(kBlockTokens);
constexpr int64_t kMaxGridY = 65535;
// Queries of a warp, or of the warps that share them: the rows of a product.
constexpr int kRowQueries = 16;
// How many such rows a block of threads has in a decode step, and in a chunk (where a wide head's
// result must be divided over two warps to fit their registers).
constexpr int kFewRows = 1;
constexpr int kFewQueries = kFewRows * kRowQueries;
template <int kD>
constexpr int kManyRows = kD <= 128 ? 4 : 2;
// From so many queries of an item on, more rows at once are worth it.
constexpr int64_t kManyQueries = 33;
// Blocks of threads that keep every multiprocessor of a large GPU (132) busy.
constexpr int64_t kEnoughBlocks = 264;

// What the units [first, first + count) of every item leave in scratch, for FoldKernel: floats of
// one query and unit, [o: d][m][l], at Slot().
struct UnitWindow {
  int64_t first;  // counted from the unit of the item's first key
  int64_t count;
  int64_t heads;    // of the item that has the most
  int64_t queries;  // likewise
  __device__ int64_t Slot(int64_t item, int64_t unit, int64_t head, int64_t query) const {
    return ((item * count + unit) * heads + head) * queries + query;
  }
};

// An item's keys and places of its queries.
struct Work {
  const AttendArgs& a;
  const AttendItem& item;
  int32_t group;

  __device__ Work(const AttendArgs& args, const AttendItem& its)
      : a(args), item(its), group(args.num_q_heads / args.num_kv_heads) {}

  __device__ const KvSpan& span(int32_t i) const { return a.spans.device[item.span_begin + i]; }
  __device__ int64_t begin_pos() const { return item.span_count > 0 ? span(0).first_pos : 0; }
  __device__ int64_t end_pos() const {
    if (item.span_count == 0) return 0;
    const KvSpan& last = span(item.span_count - 1);
    return last.first_pos + last.count;
  }
  __device__ int64_t num_queries() const { return int64_t{item.row_count} * group; }
  __device__ int64_t row(int64_t query) const { return item.row_begin + query / group; }
  __device__ int64_t pos(int64_t query) const { return item.first_pos + query / group; }
  __device__ int64_t q_head(int32_t kv_head, int64_t query) const {
    return int64_t{kv_head} * group + query % group;
  }
  __device__ const float* q(int32_t kv_head, int64_t query) const {
    return a.q + row(query) * a.q_stride + q_head(kv_head, query) * a.head_dim;
  }
  // R; U follows it.
  __device__ float* state(int32_t kv_head, int64_t query) const {
    const int64_t floats = 2 * (a.head_dim + 2);  // AttentionStateFloats()
    return a.state + (row(query) * a.num_q_heads + q_head(kv_head, query)) * floats;
  }
  __device__ float* out(int32_t kv_head, int64_t query) const {
    return a.out + (row(query) * a.num_q_heads + q_head(kv_head, query)) * a.head_dim;
  }
};

// Shared memory of a block of threads.
template <int kD, int kRows>
struct Shared {
  static constexpr int kStages = kD <= 128 ? 2 : 1;
  static constexpr int kStride = kD + 8;  // so that the rows of a matrix lie in different banks
  // What warps tell each other of the 16 queries that they share.
  struct Exchange {
    uint32_t hi[kWarps][kWarp][4], lo[kWarps][kWarp][4];  // p of a slice of 16 keys
    float sum[kWarps][kRowQueries];                       // of a slice
    float largest[kWarps][kRowQueries];
  };
  BFloat16 keys[kStages][kBlock][kStride];
  BFloat16 values[kStages][kBlock][kStride];
  Exchange exchange[kRows < kWarps ? kRows : 1];
};

// The queries [first, first + kRows x 16) of one KV head, held by a block of threads: U in
// registers, R in the state. A row of queries belongs to kParts warps; `part` has the keys of
// kSlices of the four slices of a block, and kTiles x 8 columns of the result.
template <int kD, int kRows>
class Tile {
 public:
  static constexpr int kQueries = kRows * kRowQueries;
  static constexpr int kParts = kWarps / kRows;
  static constexpr int kSlices = kWarps / kParts;
  static constexpr int kTiles = kD / 8 / kParts;
  using SharedMemory = Shared<kD, kRows>;

  __device__ Tile(const Work& work, SharedMemory& shared, int32_t kv_head, int64_t first)
      : work_(work),
        s_(shared),
        kv_head_(kv_head),
        first_(first),
        count_(static_cast<int>(
            work.num_queries() - first < kQueries ? work.num_queries() - first : kQueries)),
        row_(static_cast<int>(threadIdx.x) / kWarp / kParts),
        part_(static_cast<int>(threadIdx.x) / kWarp % kParts),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        quad_(lane_ / 4),
        pair_(lane_ % 4) {
#pragma unroll
    for (int step = 0; step < kD / 16; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 q = make_float2(0, 0);
        if (Has(i % 2)) {
          q = *reinterpret_cast<const float2*>(work.q(kv_head, first + Query(i % 2)) + step * 16 +
                                               2 * pair_ + i / 2 * 8);
        }
        Split(q, q_hi_[step][i], q_lo_[step][i]);
      }
    }
  }

  __device__ int64_t last_pos() const { return work_.pos(first_ + count_ - 1); }

  // U and R as an earlier launch left them, or empty.
  __device__ void Open(bool u_from_state, bool r_from_state) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool u = u_from_state && Has(h);
      const bool r = r_from_state && Has(h);
      m_[h] = u ? U(h)[kD] : -CUDART_INF_F;
      l_[h] = u ? U(h)[kD + 1] : 0.0f;
      fold_m_[h] = r ? R(h)[kD] : -CUDART_INF_F;
      fold_l_[h] = r ? R(h)[kD + 1] : 0.0f;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        SetPair(h, tile, u ? Load(U(h), tile) : make_float2(0, 0));
      }
    }
    r_written_ = r_from_state;
  }

  // The item's keys in [begin, end); `begin` is a block's. With kFold units are folded at borders.
  template <bool kFold>
  __device__ void Walk(int64_t begin, int64_t end) {
    Cursor cursor{0, begin, end};
    Block block, next;
    if (!Next(cursor, block)) return;
    int stage = 0;
    LoadBlock(block, stage);
    for (;;) {
      const bool more = Next(cursor, next);
      if constexpr (SharedMemory::kStages == 2) {
        if (more) LoadBlock(next, 1 - stage);
        CommitCopies();  // also when empty: groups are counted
        AwaitCopies<1>();
      } else {
        AwaitCopies<0>();
      }
      __syncthreads();
      TakeBlock(block, stage);
      if (kFold && (block.pos + block.keys) % kUnitTokens == 0) FoldUnit();
      __syncthreads();  // the stage is free
      if (!more) break;
      if constexpr (SharedMemory::kStages == 1) {
        LoadBlock(next, 0);
      } else {
        stage = 1 - stage;
      }
      block = next;
    }
    AwaitCopies<0>();
  }

  // U and R to the state; with `finish` the result, o / l of fold(R, U), too.
  __device__ void Close(bool finish) {
    if (finish) FoldUnit();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!Has(h)) continue;
      const float inverse = 1.0f / fold_l_[h];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (finish) {
          const float2 o = r_written_ ? Load(R(h), tile) : make_float2(0, 0);
          Store(work_.out(kv_head_, first_ + Query(h)), tile,
                make_float2(__fmul_rn(o.x, inverse), __fmul_rn(o.y, inverse)));
        }
        if (!r_written_) Store(R(h), tile, make_float2(0, 0));
        Store(U(h), tile, PairOf(h, tile));
      }
      if (!Leads()) continue;
      R(h)[kD] = fold_m_[h];
      R(h)[kD + 1] = fold_l_[h];
      U(h)[kD] = m_[h];
      U(h)[kD + 1] = l_[h];
    }
  }

  // U of query n to partial(n).
  template <typename Partial>
  __device__ void StoreUnit(Partial&& partial) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (!Has(h)) continue;
      float* const to = partial(Query(h));
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) Store(to, tile, PairOf(h, tile));
      if (!Leads()) continue;
      to[kD] = m_[h];
      to[kD + 1] = l_[h];
    }
  }

 private:
  // Up to 64 keys, rows one behind the other.
  struct Block {
    const uint8_t* key_rows;
    const uint8_t* value_rows;
    int64_t pos;
    int keys;
  };
  struct Cursor {
    int32_t span;
    int64_t pos;
    int64_t end;
  };

  // A thread holds of two queries, h = 0 and 1, columns 2 pair and the next of each tile.
  __device__ int Query(int h) const { return row_ * kRowQueries + quad_ + h * 8; }
  __device__ bool Has(int h) const { return Query(h) < count_; }
  __device__ bool Leads() const { return part_ == 0 && pair_ == 0; }
  __device__ int Column(int tile) const { return (part_ * kTiles + tile) * 8 + 2 * pair_; }
  __device__ float* R(int h) const { return work_.state(kv_head_, first_ + Query(h)); }
  __device__ float* U(int h) const { return R(h) + kD + 2; }
  __device__ float2 Load(const float* row, int tile) const {
    return *reinterpret_cast<const float2*>(row + Column(tile));
  }
  __device__ void Store(float* row, int tile, float2 value) const {
    *reinterpret_cast<float2*>(row + Column(tile)) = value;
  }
  __device__ float2 PairOf(int h, int tile) const {
    return make_float2(o_[tile][2 * h], o_[tile][2 * h + 1]);
  }
  __device__ void SetPair(int h, int tile, float2 value) {
    o_[tile][2 * h] = value.x;
    o_[tile][2 * h + 1] = value.y;
  }

  __device__ bool Next(Cursor& cursor, Block& block) const {
    for (; cursor.span < work_.item.span_count; ++cursor.span) {
      const KvSpan span = work_.span(cursor.span);
      const int64_t pos = cursor.pos < span.first_pos ? span.first_pos : cursor.pos;
      const int64_t whole = span.first_pos + span.count;
      const int64_t span_end = cursor.end < whole ? cursor.end : whole;
      if (pos >= span_end) continue;
      const int64_t block_end = FloorToBlock(pos) + kBlockTokens;
      block.key_rows = KeyRow(span, kv_head_, pos, kD);
      block.value_rows = ValueRow(span, kv_head_, pos, kD);
      block.pos = pos;
      block.keys = static_cast<int>((block_end < span_end ? block_end : span_end) - pos);
      cursor.pos = block_end;
      return true;
    }
    return false;
  }

  // Rows that do not exist become zeros.
  __device__ void LoadBlock(const Block& block, int stage) {
    constexpr int kPieces = kD / 8;  // 16 bytes each
    for (int i = threadIdx.x; i < kBlock * kPieces; i += kThreads) {
      const int row = i / kPieces;
      const int column = i % kPieces * 8;
      const int bytes = row < block.keys ? 16 : 0;
      const int64_t offset = bytes == 0 ? 0 : int64_t{i} * 16;
      CopyAsync16(&s_.keys[stage][row][column], block.key_rows + offset, bytes);
      CopyAsync16(&s_.values[stage][row][column], block.value_rows + offset, bytes);
    }
    CommitCopies();
  }

  // How many of the block's keys the query h sees.
  __device__ int Seen(int h, const Block& block) const {
    if (!Has(h)) return 0;
    const int64_t seen = work_.pos(first_ + Query(h)) + 1 - block.pos;
    return seen <= 0 ? 0 : seen < block.keys ? static_cast<int>(seen) : block.keys;
  }

  // Of slice `slice` of the warp, the key that register i of its tile t belongs to.
  __device__ int KeyOf(int slice, int t, int i) const {
    return (part_ * kSlices + slice) * 16 + t * 8 + 2 * pair_ + i % 2;
  }

  __device__ void TakeBlock(const Block& block, int stage) {
    float p[kSlices][2][4];  // scores, then exp(score - m)
    Score(stage, p);
    const int seen[2] = {Seen(0, block), Seen(1, block)};
    float decay[2], sum[kWarps][2];
    uint32_t hi[kSlices][4], lo[kSlices][4];
    Softmax(seen, p, decay, sum);
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* const of = &p[slice][i / 2][i % 2 * 2];
        Split(make_float2(of[0], of[1]), hi[slice][i], lo[slice][i]);
      }
    }
    if constexpr (kParts > 1) {
      auto& exchange = s_.exchange[row_];
#pragma unroll
      for (int slice = 0; slice < kSlices; ++slice) {
        const int at = part_ * kSlices + slice;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          exchange.hi[at][lane_][i] = hi[slice][i];
          exchange.lo[at][lane_][i] = lo[slice][i];
        }
        if (pair_ == 0) {
          exchange.sum[at][quad_] = sum[slice][0];
          exchange.sum[at][quad_ + 8] = sum[slice][1];
        }
      }
      __syncthreads();
#pragma unroll
      for (int at = 0; at < kWarps; ++at) {
        sum[at][0] = exchange.sum[at][quad_];
        sum[at][1] = exchange.sum[at][quad_ + 8];
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float total = __fadd_rn(__fadd_rn(__fadd_rn(sum[0][h], sum[1][h]), sum[2][h]),
                                    sum[3][h]);
      l_[h] = __fmaf_rn(l_[h], decay[h], total);
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) o_[tile][i] = __fmul_rn(o_[tile][i], decay[i / 2]);
    }
#pragma unroll
    for (int slice = 0; slice < kWarps; ++slice) {
      if constexpr (kParts > 1) {
        AddValues(stage, slice, s_.exchange[row_].hi[slice][lane_],
                  s_.exchange[row_].lo[slice][lane_]);
      } else {
        AddValues(stage, slice, hi[slice], lo[slice]);
      }
    }
  }

  __device__ void Score(int stage, float (&score)[kSlices][2][4]) {
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
        const int key = (part_ * kSlices + slice) * 16 + t * 8 + lane_ % 8;
        float(&c)[4] = score[slice][t];
        c[0] = c[1] = c[2] = c[3] = 0;
#pragma unroll
        for (int step = 0; step < kD / 16; step += 2) {
          uint32_t k[4];  // of 32 dimensions
          LoadMatrices(k, &s_.keys[stage][key][step * 16 + lane_ / 8 * 8]);
          Multiply(c, q_hi_[step], k[0], k[1]);
          Multiply(c, q_lo_[step], k[0], k[1]);
          Multiply(c, q_hi_[step + 1], k[2], k[3]);
          Multiply(c, q_lo_[step + 1], k[2], k[3]);
        }
      }
    }
  }

  // Scores to exp(score - m) with the new m; their sums by slice; what the old sums are scaled by.
  __device__ void Softmax(const int (&seen)[2], float (&p)[kSlices][2][4], float (&decay)[2],
                          float (&sum)[kWarps][2]) {
    float largest[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = p[slice][t][i];
          x = KeyOf(slice, t, i) < seen[i / 2] ? __fmul_rn(x, work_.a.scale) : -CUDART_INF_F;
          largest[i / 2] = fmaxf(largest[i / 2], x);
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) largest[h] = QuadReduce(largest[h], Largest());
    if constexpr (kParts > 1) {
      auto& exchange = s_.exchange[row_];
      if (pair_ == 0) {
        exchange.largest[part_][quad_] = largest[0];
        exchange.largest[part_][quad_ + 8] = largest[1];
      }
      __syncthreads();
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        largest[0] = fmaxf(largest[0], exchange.largest[part][quad_]);
        largest[1] = fmaxf(largest[1], exchange.largest[part][quad_ + 8]);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float m = fmaxf(m_[h], largest[h]);
      decay[h] = seen[h] > 0 ? expf(__fsub_rn(m_[h], m)) : 1.0f;
      m_[h] = m;
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = p[slice][t][i];
          x = KeyOf(slice, t, i) < seen[i / 2] ? expf(__fsub_rn(x, m_[i / 2])) : 0.0f;
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float first = __fadd_rn(p[slice][0][2 * h], p[slice][0][2 * h + 1]);
        const float second = __fadd_rn(p[slice][1][2 * h], p[slice][1][2 * h + 1]);
        sum[slice][h] = QuadReduce(__fadd_rn(first, second), Sum());
      }
    }
  }

  // o += p V of one slice of 16 keys. Keys that a query does not see have p = 0.
  __device__ void AddValues(int stage, int slice, const uint32_t (&hi)[4],
                            const uint32_t (&lo)[4]) {
#pragma unroll
    for (int tile = 0; tile < kTiles; tile += 2) {
      uint32_t v[4];
      const int column = (part_ * kTiles + tile) * 8 + lane_ / 16 * 8;
      LoadMatricesTransposed(v, &s_.values[stage][slice * 16 + lane_ % 16][column]);
      Multiply(o_[tile], hi, v[0], v[1]);
      Multiply(o_[tile + 1], hi, v[2], v[3]);
      Multiply(o_[tile], lo, v[0], v[1]);
      Multiply(o_[tile + 1], lo, v[2], v[3]);
    }
  }

  // R = fold(R, U), U = empty.
  __device__ void FoldUnit() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const FoldWeights fold(fold_m_[h], fold_l_[h], m_[h], l_[h]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (Has(h)) {
          const float2 r = r_written_ ? Load(R(h), tile) : make_float2(0, 0);
          const float2 u = PairOf(h, tile);
          Store(R(h), tile, make_float2(fold(r.x, u.x), fold(r.y, u.y)));
        }
        SetPair(h, tile, make_float2(0, 0));
      }
      fold_m_[h] = fold.m;
      fold_l_[h] = fold.l;
      m_[h] = -CUDART_INF_F;
      l_[h] = 0;
    }
    r_written_ = true;
  }

  // op over the four lanes of a query, in the same order each time.
  template <typename Op>
  __device__ static float QuadReduce(float value, Op op) {
    value = op(value, __shfl_xor_sync(kFullMask, value, 1));
    return op(value, __shfl_xor_sync(kFullMask, value, 2));
  }

  const Work& work_;
  SharedMemory& s_;
  const int32_t kv_head_;
  const int64_t first_;
  const int count_;
  const int row_;   // which 16 queries
  const int part_;  // which of the warps that share them
  const int lane_, quad_, pair_;
  uint32_t q_hi_[kD / 16][4], q_lo_[kD / 16][4];
  float o_[kTiles][4];
  float m_[2], l_[2];            // of U
  float fold_m_[2], fold_l_[2];  // of R
  bool r_written_ = false;       // the state's R holds something
};

// Block (head and tile of queries, item): all keys of the launch, in order. Tiles of late rows see
// the most keys and go first.
template <int kD, int kRows>
__global__ void __launch_bounds__(kThreads) WalkKernel(const __grid_constant__ AttendArgs a,
                                                        int64_t first_item) {
  constexpr int kQueries = Tile<kD, kRows>::kQueries;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kD, kRows>*>(memory);
  const AttendItem item = a.items.device[first_item + blockIdx.y];
  const Work work(a, item);
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t tiles = (work.num_queries() + kQueries - 1) / kQueries;
  if (blockIdx.x >= heads * tiles) return;
  const auto head = static_cast<int32_t>(item.kv_head_begin + blockIdx.x % heads);
  Tile<kD, kRows> tile(work, shared, head, (tiles - 1 - blockIdx.x / heads) * kQueries);
  tile.Open(item.reset == 0, item.reset == 0);
  const int64_t seen = tile.last_pos() + 1;
  const int64_t end = work.end_pos() < seen ? work.end_pos() : seen;
  tile.template Walk<true>(work.begin_pos(), end);
  __syncthreads();
  tile.Close(item.finish != 0);
}

// Block (unit, head and tile of queries; item): one unit, to scratch.
template <int kD>
__global__ void __launch_bounds__(kThreads) UnitKernel(const __grid_constant__ AttendArgs a,
                                                        UnitWindow window) {
  constexpr int kQueries = kFewQueries;
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kD, kFewRows>*>(memory);
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t tiles = (work.num_queries() + kQueries - 1) / kQueries;
  const int64_t in_window = blockIdx.x / (heads * tiles);
  const int64_t task = blockIdx.x % (heads * tiles);
  const int64_t begin_pos = work.begin_pos();
  const int64_t unit = begin_pos / kUnitTokens + window.first + in_window;
  if (in_window >= window.count || unit * kUnitTokens >= work.end_pos()) return;
  const int64_t head = task % heads;
  const int64_t first_query = task / heads * kQueries;
  Tile<kD, kFewRows> tile(work, shared, static_cast<int32_t>(item.kv_head_begin + head),
                          first_query);
  // A unit that an earlier launch opened goes on from there.
  tile.Open(item.reset == 0 && begin_pos > unit * kUnitTokens, false);
  const int64_t begin = begin_pos > unit * kUnitTokens ? begin_pos : unit * kUnitTokens;
  int64_t end = (unit + 1) * kUnitTokens;
  if (end > work.end_pos()) end = work.end_pos();
  if (end > tile.last_pos() + 1) end = tile.last_pos() + 1;
  tile.template Walk<false>(begin, end);
  __syncthreads();
  tile.StoreUnit([&](int n) {
    return a.scratch + window.Slot(blockIdx.y, in_window, head, first_query + n) * (kD + 2);
  });
}

// Block (query and head, item): folds the window's units in order. A thread for each column.
template <int kD>
__global__ void __launch_bounds__(kD) FoldKernel(const __grid_constant__ AttendArgs a,
                                                 UnitWindow window) {
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t head = blockIdx.x / window.queries;
  const int64_t query = blockIdx.x % window.queries;
  if (head >= heads || query >= work.num_queries() || item.span_count == 0) return;
  const auto kv_head = static_cast<int32_t>(item.kv_head_begin + head);
  const int64_t first_unit = work.begin_pos() / kUnitTokens;
  const int64_t end_pos = work.end_pos();
  const int64_t units = (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
  if (window.first >= units) return;
  const int64_t last = window.first + window.count < units ? window.first + window.count : units;

  const int i = static_cast<int>(threadIdx.x);
  float* const r = work.state(kv_head, query);
  float* const u = r + kD + 2;
  const bool empty = window.first == 0 && item.reset != 0;
  float o = empty ? 0.0f : r[i];
  float m = empty ? -CUDART_INF_F : r[kD];
  float l = empty ? 0.0f : r[kD + 1];
  float open_o = 0, open_m = -CUDART_INF_F, open_l = 0;  // it went into the first unit's partial
  for (int64_t unit = window.first; unit < last; ++unit) {
    const float* const part =
        a.scratch + window.Slot(blockIdx.y, unit - window.first, head, query) * (kD + 2);
    if ((first_unit + unit + 1) * kUnitTokens <= end_pos) {
      const FoldWeights fold(m, l, part[kD], part[kD + 1]);
      o = fold(o, part[i]);
      m = fold.m;
      l = fold.l;
    } else {
      open_o = part[i];
      open_m = part[kD];
      open_l = part[kD + 1];
    }
  }
  if (last == units && item.finish != 0) {
    const FoldWeights fold(m, l, open_m, open_l);
    o = fold(o, open_o);
    m = fold.m;
    l = fold.l;
    open_o = open_l = 0;
    open_m = -CUDART_INF_F;
    work.out(kv_head, query)[i] = __fmul_rn(o, 1.0f / l);
  }
  __syncthreads();  // all have read m and l
  r[i] = o;
  u[i] = open_o;
  if (i != 0) return;
  r[kD] = m;
  r[kD + 1] = l;
  u[kD] = open_m;
  u[kD + 1] = open_l;
}

// ---- Launches
// ------------------------------------------------------------------------------------

// The largest of each over a launch's items.
struct Extents {
  int64_t heads = 0;
  int64_t queries = 0;
  int64_t units = 0;
  int64_t blocks = 0;  // of threads, over all items, each with kFewQueries
  bool keys_everywhere = true;
};

Extents ExtentsOf(const AttendArgs& a) {
  const auto raise = [](int64_t& value, int64_t to) { value = value < to ? to : value; };
  Extents e;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    const int64_t heads = item.kv_head_end - item.kv_head_begin;
    const int64_t queries = int64_t{item.row_count} * (a.num_q_heads / a.num_kv_heads);
    raise(e.heads, heads);
    raise(e.queries, queries);
    e.blocks += heads * CeilDiv(queries, kFewQueries);
    if (item.span_count == 0) {
      e.keys_everywhere = false;
      continue;
    }
    const KvSpan& first = a.spans.host[item.span_begin];
    const KvSpan& last = a.spans.host[item.span_begin + item.span_count - 1];
    const int64_t end = last.first_pos + last.count;
    raise(e.units, CeilDiv(end, kUnitTokens) - first.first_pos / kUnitTokens);
    if (end <= first.first_pos) e.keys_everywhere = false;
  }
  return e;
}

template <int kD, int kRows>
cudaError_t LaunchWalk(const AttendArgs& a, const Extents& e, cudaStream_t stream) {
  const int64_t x = e.heads * CeilDiv(e.queries, Tile<kD, kRows>::kQueries);
  for (int64_t first = 0; first < a.items.count; first += kMaxGridY) {
    const int64_t y = a.items.count - first < kMaxGridY ? a.items.count - first : kMaxGridY;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchOn(stream, WalkKernel<kD, kRows>, grid, kThreads,
                                           sizeof(Shared<kD, kRows>), a, first));
  }
  return cudaSuccess;
}

template <int kD>
cudaError_t LaunchUnits(const AttendArgs& a, const Extents& e, int64_t window_units,
                        cudaStream_t stream) {
  UnitWindow window = {0, window_units, e.heads, e.queries};
  const auto y = static_cast<unsigned>(a.items.count);
  const int64_t tasks = e.heads * CeilDiv(e.queries, kFewQueries);
  for (; window.first < e.units; window.first += window.count) {
    const dim3 units(static_cast<unsigned>(window.count * tasks), y);
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchOn(stream, UnitKernel<kD>, units, kThreads,
                                           sizeof(Shared<kD, kFewRows>), a, window));
    const dim3 folds(static_cast<unsigned>(e.heads * e.queries), y);
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchOn(stream, FoldKernel<kD>, folds, kD, 0, a, window));
  }
  return cudaSuccess;
}

template <int kD>
cudaError_t Launch(const AttendArgs& a, cudaStream_t stream) {
  const Extents e = ExtentsOf(a);
  if (e.heads == 0 || e.queries == 0) return cudaSuccess;
  const int64_t a_unit = a.items.count * e.heads * e.queries * (kD + 2);  // floats of scratch
  const int64_t fit = a.scratch_floats / a_unit;
  const int64_t window = fit < e.units ? fit : e.units;
  if (e.queries >= kManyQueries) return LaunchWalk<kD, kManyRows<kD>>(a, e, stream);
  // A window of fewer than four units would leave less side by side than it costs to fold them.
  if (e.blocks >= kEnoughBlocks || e.units <= 2 || window < 4 || !e.keys_everywhere ||
      a.items.count > kMaxGridY) {
    return LaunchWalk<kD, kFewRows>(a, e, stream);
  }
  return LaunchUnits<kD>(a, e, window, stream);
}

template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(
      LoadKernel(WalkKernel<kD, kManyRows<kD>>, sizeof(Shared<kD, kManyRows<kD>>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(
      LoadKernel(WalkKernel<kD, kFewRows>, sizeof(Shared<kD, kFewRows>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(UnitKernel<kD>, sizeof(Shared<kD, kFewRows>)));
  return LoadKernel(FoldKernel<kD>);
}

}  // namespace

cudaError_t LaunchAttend(const AttendArgs& args, cudaStream_t stream) {
  if (args.items.count == 0 || args.rows == 0) return cudaSuccess;
  switch (args.head_dim) {
    case 64:
      return Launch<64>(args, stream);
    case 128:
      return Launch<128>(args, stream);
    case 256:
      return Launch<256>(args, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

cudaError_t LoadAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  return Load<256>();
}

}  // namespace headroom::kernels::cuda
