// Exact attention over keys in pieces; attention.h states the fold.
//
// A block of threads takes some queries (rows x GQA group) of one KV head of one item, and blocks
// of 64 keys one after the other: scores with a thread for each key, the softmax with a warp for
// each query, P V with a thread for each pair of columns. A query takes exactly the keys that it
// sees, in chains of fixed order, so that its bits do not depend on the queries beside it.
//
// Where there are few queries, units of keys are computed side by side into scratch and folded in
// order by a second kernel; else a block of threads walks all keys and folds at each unit's border.
// Both leave the same states.
#include <math_constants.h>

#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlock = static_cast<int>(kBlockTokens);
constexpr int64_t kMaxGridY = 65535;
// Queries of a block of threads: of a decode step, and of a chunk.
constexpr int kFewQueries = 8;
constexpr int kManyQueries = 32;
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

// The weights with which the later of two disjoint parts is folded into the earlier one.
struct FoldWeights {
  float a, b, m, l;
  bool keep;  // the later part is empty
  bool take;  // the earlier one is

  __device__ FoldWeights(float am, float al, float bm, float bl)
      : a(1), b(1), m(am), l(al), keep(bl == 0), take(bl != 0 && al == 0) {
    if (keep) return;
    if (take) {
      m = bm;
      l = bl;
      return;
    }
    m = fmaxf(am, bm);
    a = expf(__fsub_rn(am, m));
    b = expf(__fsub_rn(bm, m));
    l = __fmaf_rn(bl, b, __fmul_rn(al, a));
  }
  __device__ float operator()(float ao, float bo) const {
    if (keep) return ao;
    return take ? bo : __fmaf_rn(bo, b, __fmul_rn(ao, a));
  }
};

// Shared memory of a block of threads.
template <int kD, int kQueries>
struct Shared {
  float q[kQueries][kD];
  float p[kQueries][kBlock];                // scores, then exp(score - m)
  uint32_t keys[kBlock][kD / 2 + 1];        // an odd stride: threads meet no bank conflict
  float decay[kQueries];                    // what the block multiplies o by
  float m[kQueries], l[kQueries];           // of U
  float fold_m[kQueries], fold_l[kQueries];  // of R
};

// The queries [first, first + count) of one KV head, held by a block of threads: o of U in
// registers, R in the state.
template <int kD, int kQueries>
class Tile {
 public:
  static constexpr int kPairs = kD / 2;                  // of columns
  static constexpr int kParts = kThreads / kPairs;       // of the queries, in P V
  static constexpr int kEach = kQueries / kParts;        // queries of a thread in P V
  static constexpr int kScoreEach = kQueries / (kThreads / kBlock);
  static_assert(kThreads % kPairs == 0 && kQueries % kParts == 0 && kQueries % kWarps == 0);

  __device__ Tile(const Work& work, Shared<kD, kQueries>& shared, int32_t kv_head, int64_t first)
      : work_(work),
        s_(shared),
        kv_head_(kv_head),
        first_(first),
        count_(static_cast<int>(work.num_queries() - first < kQueries ? work.num_queries() - first
                                                                      : kQueries)),
        column_(static_cast<int>(threadIdx.x) % kPairs * 2),
        part_(static_cast<int>(threadIdx.x) / kPairs * kEach) {
    for (int i = threadIdx.x; i < kQueries * kD; i += kThreads) {
      s_.q[i / kD][i % kD] = i / kD < count_ ? work.q(kv_head, first + i / kD)[i % kD] : 0.0f;
    }
  }

  __device__ int64_t last_pos() const { return work_.pos(first_ + count_ - 1); }

  // U and R as an earlier launch left them, or empty.
  __device__ void Open(bool u_from_state, bool r_from_state) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      o_[i] = make_float2(0, 0);
      if (u_from_state && part_ + i < count_) o_[i] = Pair(U(part_ + i));
    }
    for (int n = threadIdx.x; n < kQueries; n += kThreads) {
      const bool u = u_from_state && n < count_;
      const bool r = r_from_state && n < count_;
      s_.m[n] = u ? U(n)[kD] : -CUDART_INF_F;
      s_.l[n] = u ? U(n)[kD + 1] : 0.0f;
      s_.fold_m[n] = r ? R(n)[kD] : -CUDART_INF_F;
      s_.fold_l[n] = r ? R(n)[kD + 1] : 0.0f;
    }
    r_written_ = r_from_state;
    __syncthreads();
  }

  // The item's keys in [begin, end); `begin` is a block's. With kFold units are folded at borders.
  template <bool kFold>
  __device__ void Walk(int64_t begin, int64_t end) {
    for (int32_t i = 0; i < work_.item.span_count; ++i) {
      const KvSpan span = work_.span(i);
      int64_t pos = begin < span.first_pos ? span.first_pos : begin;
      const int64_t whole = span.first_pos + span.count;
      const int64_t span_end = end < whole ? end : whole;
      for (; pos < span_end; pos = FloorToBlock(pos) + kBlockTokens) {
        const int64_t block_end = FloorToBlock(pos) + kBlockTokens;
        const int64_t stop = block_end < span_end ? block_end : span_end;
        TakeBlock(KeyRow(span, kv_head_, pos, kD), ValueRow(span, kv_head_, pos, kD), pos,
                  static_cast<int>(stop - pos));
        if (kFold && stop % kUnitTokens == 0) FoldUnit();
      }
    }
  }

  // U and R to the state; with `finish` the result, o / l of fold(R, U), too.
  __device__ void Close(bool finish) {
    if (finish) FoldUnit();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = part_ + i;
      if (n >= count_) continue;
      if (finish) {
        const float inverse = 1.0f / s_.fold_l[n];
        const float2 o = r_written_ ? Pair(R(n)) : make_float2(0, 0);
        StorePair(work_.out(kv_head_, first_ + n),
                  make_float2(__fmul_rn(o.x, inverse), __fmul_rn(o.y, inverse)));
      }
      if (!r_written_) StorePair(R(n), make_float2(0, 0));
      StorePair(U(n), o_[i]);
    }
    for (int n = threadIdx.x; n < count_; n += kThreads) {
      R(n)[kD] = s_.fold_m[n];
      R(n)[kD + 1] = s_.fold_l[n];
      U(n)[kD] = s_.m[n];
      U(n)[kD + 1] = s_.l[n];
    }
  }

  // U of query n to partial(n).
  template <typename Partial>
  __device__ void StoreUnit(Partial&& partial) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (part_ + i < count_) StorePair(partial(part_ + i), o_[i]);
    }
    for (int n = threadIdx.x; n < count_; n += kThreads) {
      partial(n)[kD] = s_.m[n];
      partial(n)[kD + 1] = s_.l[n];
    }
  }

 private:
  __device__ float* R(int n) const { return work_.state(kv_head_, first_ + n); }
  __device__ float* U(int n) const { return R(n) + kD + 2; }
  __device__ float2 Pair(const float* row) const {
    return *reinterpret_cast<const float2*>(row + column_);
  }
  __device__ void StorePair(float* row, float2 value) const {
    *reinterpret_cast<float2*>(row + column_) = value;
  }

  // How many of `keys` keys from `pos` on query n sees.
  __device__ int Seen(int n, int64_t pos, int keys) const {
    if (n >= count_) return 0;
    const int64_t seen = work_.pos(first_ + n) + 1 - pos;
    return seen <= 0 ? 0 : seen < keys ? static_cast<int>(seen) : keys;
  }

  // Up to 64 keys of a head, rows one behind the other.
  __device__ void TakeBlock(const uint8_t* key_rows, const uint8_t* value_rows, int64_t pos,
                            int keys) {
    constexpr int kVectors = kD / 8;  // 16-byte pieces of a row
    for (int i = threadIdx.x; i < kBlock * kVectors; i += kThreads) {
      const int row = i / kVectors;
      const int word = i % kVectors * 4;
      const uint4 piece = row < keys ? reinterpret_cast<const uint4*>(key_rows)[i]
                                     : make_uint4(0, 0, 0, 0);
      s_.keys[row][word] = piece.x;
      s_.keys[row][word + 1] = piece.y;
      s_.keys[row][word + 2] = piece.z;
      s_.keys[row][word + 3] = piece.w;
    }
    __syncthreads();
    Score();
    __syncthreads();
    Softmax(pos, keys);
    __syncthreads();
    AddValues(reinterpret_cast<const uint32_t*>(value_rows), pos, keys);
  }

  __device__ void Score() {
    const int key = static_cast<int>(threadIdx.x) % kBlock;
    const int from = static_cast<int>(threadIdx.x) / kBlock * kScoreEach;
    float score[kScoreEach] = {};
#pragma unroll 4
    for (int word = 0; word < kD / 2; ++word) {
      const uint32_t k = s_.keys[key][word];
#pragma unroll
      for (int n = 0; n < kScoreEach; ++n) {
        const float2 q = *reinterpret_cast<const float2*>(&s_.q[from + n][2 * word]);
        score[n] = __fmaf_rn(q.x, WidenLow(k), score[n]);
        score[n] = __fmaf_rn(q.y, WidenHigh(k), score[n]);
      }
    }
#pragma unroll
    for (int n = 0; n < kScoreEach; ++n) s_.p[from + n][key] = __fmul_rn(score[n], work_.a.scale);
  }

  __device__ void Softmax(int64_t pos, int keys) {
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    for (int n = static_cast<int>(threadIdx.x) / kWarp; n < kQueries; n += kWarps) {
      const int seen = Seen(n, pos, keys);
      const float a = lane < seen ? s_.p[n][lane] : -CUDART_INF_F;
      const float b = lane + kWarp < seen ? s_.p[n][lane + kWarp] : -CUDART_INF_F;
      const float old = s_.m[n];
      const float m = fmaxf(old, WarpReduce(fmaxf(a, b), Largest()));
      const float pa = lane < seen ? expf(__fsub_rn(a, m)) : 0.0f;
      const float pb = lane + kWarp < seen ? expf(__fsub_rn(b, m)) : 0.0f;
      const float sum = WarpReduce(__fadd_rn(pa, pb), Sum());
      s_.p[n][lane] = pa;
      s_.p[n][lane + kWarp] = pb;
      __syncwarp();  // every lane has read m
      if (lane == 0) {
        const float decay = seen > 0 ? expf(__fsub_rn(old, m)) : 1.0f;
        s_.decay[n] = decay;
        s_.l[n] = __fmaf_rn(s_.l[n], decay, sum);
        s_.m[n] = m;
      }
    }
  }

  // Keys that a query does not see are left out (their p is 0, but their values may be anything).
  __device__ void AddValues(const uint32_t* value_rows, int64_t pos, int keys) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float decay = s_.decay[part_ + i];
      o_[i] = make_float2(__fmul_rn(o_[i].x, decay), __fmul_rn(o_[i].y, decay));
    }
    const bool all_seen = Seen(0, pos, keys) == keys;
    for (int key = 0; key < keys; key += 4) {
      uint32_t v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        v[j] = key + j < keys ? value_rows[(key + j) * kPairs + column_ / 2] : 0;
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float4 four = *reinterpret_cast<const float4*>(&s_.p[part_ + i][key]);
        const float p[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (!all_seen && p[j] == 0) continue;
          o_[i].x = __fmaf_rn(p[j], WidenLow(v[j]), o_[i].x);
          o_[i].y = __fmaf_rn(p[j], WidenHigh(v[j]), o_[i].y);
        }
      }
    }
  }

  // R = fold(R, U), U = empty.
  __device__ void FoldUnit() {
    __syncthreads();  // m and l are those of all queries' last block
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int n = part_ + i;
      if (n >= count_) continue;
      const FoldWeights fold(s_.fold_m[n], s_.fold_l[n], s_.m[n], s_.l[n]);
      const float2 r = r_written_ ? Pair(R(n)) : make_float2(0, 0);
      StorePair(R(n), make_float2(fold(r.x, o_[i].x), fold(r.y, o_[i].y)));
      o_[i] = make_float2(0, 0);
    }
    r_written_ = true;
    __syncthreads();
    for (int n = threadIdx.x; n < kQueries; n += kThreads) {
      const FoldWeights fold(s_.fold_m[n], s_.fold_l[n], s_.m[n], s_.l[n]);
      s_.fold_m[n] = fold.m;
      s_.fold_l[n] = fold.l;
      s_.m[n] = -CUDART_INF_F;
      s_.l[n] = 0;
    }
    __syncthreads();
  }

  const Work& work_;
  Shared<kD, kQueries>& s_;
  const int32_t kv_head_;
  const int64_t first_;
  const int count_;
  const int column_;  // the thread's pair of columns
  const int part_;    // its first query in P V
  float2 o_[kEach];
  bool r_written_ = false;  // the state's R holds something
};

// Block (head and tile of queries, item): all keys of the launch, in order. Tiles of late rows see
// the most keys and go first.
template <int kD, int kQueries>
__global__ void __launch_bounds__(kThreads) WalkKernel(const __grid_constant__ AttendArgs a,
                                                        int64_t first_item) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kD, kQueries>*>(memory);
  const AttendItem item = a.items.device[first_item + blockIdx.y];
  const Work work(a, item);
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t tiles = (work.num_queries() + kQueries - 1) / kQueries;
  if (blockIdx.x >= heads * tiles) return;
  const auto head = static_cast<int32_t>(item.kv_head_begin + blockIdx.x % heads);
  Tile<kD, kQueries> tile(work, shared, head, (tiles - 1 - blockIdx.x / heads) * kQueries);
  tile.Open(item.reset == 0, item.reset == 0);
  const int64_t seen = tile.last_pos() + 1;
  const int64_t end = work.end_pos() < seen ? work.end_pos() : seen;
  tile.template Walk<true>(work.begin_pos(), end);
  __syncthreads();
  tile.Close(item.finish != 0);
}

// Block (unit, head and tile of queries; item): one unit, to scratch.
template <int kD, int kQueries>
__global__ void __launch_bounds__(kThreads) UnitKernel(const __grid_constant__ AttendArgs a,
                                                        UnitWindow window) {
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kD, kQueries>*>(memory);
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
  Tile<kD, kQueries> tile(work, shared, static_cast<int32_t>(item.kv_head_begin + head),
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

template <int kD, int kQueries>
cudaError_t LaunchWalk(const AttendArgs& a, const Extents& e, cudaStream_t stream) {
  const int64_t x = e.heads * CeilDiv(e.queries, kQueries);
  for (int64_t first = 0; first < a.items.count; first += kMaxGridY) {
    const int64_t y = a.items.count - first < kMaxGridY ? a.items.count - first : kMaxGridY;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
    WalkKernel<kD, kQueries>
        <<<grid, kThreads, sizeof(Shared<kD, kQueries>), stream>>>(a, first);
    HEADROOM_CUDA_RETURN_IF_ERROR(cudaGetLastError());
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
    UnitKernel<kD, kFewQueries>
        <<<units, kThreads, sizeof(Shared<kD, kFewQueries>), stream>>>(a, window);
    HEADROOM_CUDA_RETURN_IF_ERROR(cudaGetLastError());
    const dim3 folds(static_cast<unsigned>(e.heads * e.queries), y);
    FoldKernel<kD><<<folds, kD, 0, stream>>>(a, window);
    HEADROOM_CUDA_RETURN_IF_ERROR(cudaGetLastError());
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
  if (e.queries > kManyQueries) return LaunchWalk<kD, kManyQueries>(a, e, stream);
  // A window of fewer than four units would leave less side by side than it costs to fold them.
  if (e.blocks >= kEnoughBlocks || e.units <= 2 || window < 4 || !e.keys_everywhere ||
      a.items.count > kMaxGridY) {
    return LaunchWalk<kD, kFewQueries>(a, e, stream);
  }
  return LaunchUnits<kD>(a, e, window, stream);
}

template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(
      LoadKernel(WalkKernel<kD, kManyQueries>, sizeof(Shared<kD, kManyQueries>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(
      LoadKernel(WalkKernel<kD, kFewQueries>, sizeof(Shared<kD, kFewQueries>)));
  HEADROOM_CUDA_RETURN_IF_ERROR(
      LoadKernel(UnitKernel<kD, kFewQueries>, sizeof(Shared<kD, kFewQueries>)));
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
