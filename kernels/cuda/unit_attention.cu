// Attention of few queries over many keys: a decode step's. Its time is that of reading the keys.
//
// Units of kUnitTokens keys are computed side by side into scratch, some by each block of threads, and
// folded in order by a second kernel; attention.h states the fold. Each of the four warps takes one
// block of 64 keys alone; U is the fold of the blocks, in order. (On the CPU blocks go on from each
// other by online softmax: the same but for rounding.)
//
// Keys and values go from memory straight into the fragments of m16n8k16 products: up to 16 KiB a warp
// are on their way, 128 KiB a multiprocessor, the next unit's keys before this one's values are done.
// (Four warps that shared blocks through shared memory needed four times the instructions and reached
// 2.0 of 3.1 TB/s.)
//
// Products: scores^T = K q^T and o^T = V^T p^T, so that the 8 columns are queries and the 16 rows, keys
// or dimensions, are all of use. q and p are split into two bfloat16 (tensor_core.cuh). A query's bits
// depend on its own keys only: it is a column.
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kQueries = 8;  // of a block of threads
constexpr int kGroup = 16;   // keys of one product
constexpr int kGroups = kBlock / kGroup;
static_assert(kWarps * kBlock == kUnitTokens);

// What the units [first, first + count) of every item leave in scratch, for FoldKernel: floats of
// one query and unit, [o: d][m][l], at Slot().
struct UnitWindow {
  int64_t first;  // counted from the unit of the item's first key
  int64_t count;
  int64_t per_block;  // consecutive ones that a block of threads computes
  int64_t heads;      // of the item that has the most
  int64_t queries;    // likewise
  __device__ int64_t Slot(int64_t item, int64_t unit, int64_t head, int64_t query) const {
    return ((item * count + unit) * heads + head) * queries + query;
  }
};

// Keys and values are read once.
__device__ uint4 LoadOnce(const uint8_t* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

// An 8 x 8 matrix of bfloat16, a row of it in four lanes, to its transpose.
__device__ uint32_t Transposed(uint32_t fragment) {
  uint32_t result;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(fragment));
  return result;
}

// op over the lanes that hold the same queries, in the same order each time.
template <typename Op>
__device__ float OverKeys(float value, Op op) {
#pragma unroll
  for (int offset = 4; offset < kWarp; offset *= 2) {
    value = op(value, __shfl_xor_sync(kFullMask, value, offset));
  }
  return value;
}

// What a block of threads has of a unit: a partial of each of its blocks of keys.
template <int kD>
struct Partials {
  float o[kWarps][kQueries][kD];
  float m[kWarps][kQueries];
  float l[kWarps][kQueries];
};

// Queries [first, first + kQueries) of one KV head over one block of keys after the other, by one warp.
//
// Lanes, quad = lane / 4, pair = lane % 4, and queries h = 0 and 1: 2 pair + h. A score of product i of a
// block, float n: key 16 i + quad + n / 2 * 8, query n % 2. Of o, tile t and float n: dimension t / 4 *
// 64 + quad * 8 + t % 4 * 2 + n / 2, query n % 2.
template <int kD>
class WarpBlock {
 public:
  __device__ WarpBlock(const Work& work, int32_t kv_head, int64_t first)
      : work_(work),
        kv_head_(kv_head),
        first_(first),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        quad_(lane_ / 4),
        pair_(lane_ % 4) {}

  // Begins to load the item's keys in [begin, end): some of one block, from its beginning on, or none.
  __device__ void Start(int64_t begin, int64_t end) {
    next_ = Find(begin, end);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) LoadKeys(slots_[i], next_, i);
    LoadQueries();
  }

  // Takes the keys that were begun, and begins with [next_begin, next_end).
  __device__ void Run(int64_t next_begin, int64_t next_end) {
    const Keys keys = next_;
    next_ = Find(next_begin, next_end);
    float score[kGroups][4];
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Score(slots_[i % kSlots], score[i]);
      if (i + kSlots < kGroups) {
        LoadKeys(slots_[i % kSlots], keys, i + kSlots);
      } else {
        LoadValues(slots_[i % kSlots], keys, i + kSlots - kGroups);
      }
    }
    Softmax(keys, score);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) o_[t][0] = o_[t][1] = o_[t][2] = o_[t][3] = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      AddValues(slots_[i % kSlots], score[i]);
      if (i + kSlots < kGroups) {
        LoadValues(slots_[i % kSlots], keys, i + kSlots);
      } else {
        LoadKeys(slots_[i % kSlots], next_, i + kSlots - kGroups);
      }
    }
  }

  __device__ void Store(Partials<kD>& to, int warp) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = 2 * pair_ + h;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        *reinterpret_cast<float2*>(&to.o[warp][query][Dimension(t)]) =
            make_float2(o_[t][h], o_[t][2 + h]);
      }
      if (quad_ != 0) continue;
      to.m[warp][query] = m_[h];
      to.l[warp][query] = l_[h];
    }
  }

 private:
  static constexpr int kTiles = kD / 16;            // products of o
  static constexpr int kPieces = kD / 32 * 2;       // 16 bytes each that a lane loads of 16 keys
  static constexpr int kSlots = kD <= 128 ? 4 : 2;  // groups of keys, or of values, on their way
  static constexpr int kRowBytes = kD * static_cast<int>(kKvElementBytes);

  __device__ bool Has(int h) const { return first_ + 2 * pair_ + h < work_.num_queries(); }
  __device__ int Dimension(int t) const { return t / 4 * 64 + quad_ * 8 + t % 4 * 2; }

  // Up to 64 keys, one behind the other, and likewise their values. Positions are below 2^31.
  struct Keys {
    const uint8_t* rows = nullptr;
    const uint8_t* value_rows = nullptr;
    int32_t pos = 0;
    int32_t count = 0;
  };

  // Where keys [begin, end) lie; nowhere if there are none. The lanes look at a span each: a long context
  // has some forty.
  __device__ Keys Find(int64_t begin, int64_t end) const {
    Keys keys;
    if (begin >= end) return keys;
    for (int32_t base = 0; base < work_.item.span_count; base += kWarp) {
      const int32_t i = base + lane_;
      bool here = false;
      if (i < work_.item.span_count) {
        const KvSpan& span = work_.span(i);
        here = span.first_pos <= begin && begin < span.first_pos + span.count;
      }
      const unsigned found = __ballot_sync(kFullMask, here);
      if (found == 0) continue;
      const KvSpan& span = work_.span(base + __ffs(static_cast<int>(found)) - 1);
      const int64_t span_end = span.first_pos + span.count;
      keys.rows = KeyRow(span, kv_head_, begin, kD);
      keys.value_rows = ValueRow(span, kv_head_, begin, kD);
      keys.pos = static_cast<int32_t>(begin);
      keys.count = static_cast<int32_t>((end < span_end ? end : span_end) - begin);
      break;
    }
    return keys;
  }

  // The left operand of scores of keys [16 i, 16 i + 16): of two keys, 8 dimensions out of 32 each. Rows
  // that do not exist are zero.
  __device__ void LoadKeys(uint4 (&slot)[kPieces], const Keys& keys, int i) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool exists = i * kGroup + h * 8 + quad_ < keys.count;
      const uint8_t* const from = keys.rows + quad_ * kRowBytes + pair_ * 16;
#pragma unroll
      for (int c = 0; c < kD / 32; ++c) {
        slot[2 * c + h] = exists ? LoadOnce(from + (i * kGroup + h * 8) * kRowBytes + c * 64)
                                 : make_uint4(0, 0, 0, 0);
      }
    }
  }
  // The values of keys 2 pair, the next, and both + 8: 8 dimensions out of 64 each.
  __device__ void LoadValues(uint4 (&slot)[kPieces], const Keys& keys, int i) const {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const int row = i * kGroup + n / 2 * 8 + n % 2;  // beside the lane's
      const bool exists = row + 2 * pair_ < keys.count;
      const uint8_t* const from =
          keys.value_rows + 2 * pair_ * kRowBytes + quad_ * 16;
#pragma unroll
      for (int c = 0; c < kD / 64; ++c) {
        slot[4 * c + n] =
            exists ? LoadOnce(from + row * kRowBytes + c * 128) : make_uint4(0, 0, 0, 0);
      }
    }
  }

  // The right operand of scores: of query `quad`, the dimensions that LoadKeys() gives a lane.
  __device__ void LoadQueries() {
    const int64_t query = first_ + quad_;
    const bool has = query < work_.num_queries();
    const float* const q = work_.q(kv_head_, has ? query : first_) + pair_ * 8;
#pragma unroll
    for (int c = 0; c < kD / 32; ++c) {
      float4 low = make_float4(0, 0, 0, 0), high = low;
      if (has) {
        low = *reinterpret_cast<const float4*>(q + c * 32);
        high = *reinterpret_cast<const float4*>(q + c * 32 + 4);
      }
      Split(make_float2(low.x, low.y), q_hi_[c][0], q_lo_[c][0]);
      Split(make_float2(low.z, low.w), q_hi_[c][1], q_lo_[c][1]);
      Split(make_float2(high.x, high.y), q_hi_[c][2], q_lo_[c][2]);
      Split(make_float2(high.z, high.w), q_hi_[c][3], q_lo_[c][3]);
    }
  }

  __device__ void Score(const uint4 (&keys)[kPieces], float (&score)[4]) const {
    float hi[4] = {}, lo[4] = {};  // two chains, half as long
#pragma unroll
    for (int c = 0; c < kD / 32; ++c) {
      const uint4 a = keys[2 * c];
      const uint4 b = keys[2 * c + 1];
      Multiply(hi, {a.x, b.x, a.y, b.y}, q_hi_[c][0], q_hi_[c][1]);
      Multiply(lo, {a.x, b.x, a.y, b.y}, q_lo_[c][0], q_lo_[c][1]);
      Multiply(hi, {a.z, b.z, a.w, b.w}, q_hi_[c][2], q_hi_[c][3]);
      Multiply(lo, {a.z, b.z, a.w, b.w}, q_lo_[c][2], q_lo_[c][3]);
    }
#pragma unroll
    for (int n = 0; n < 4; ++n) score[n] = __fadd_rn(hi[n], lo[n]);
  }

  // How many of the keys query h sees.
  __device__ int Seen(int h, const Keys& keys) const {
    if (!Has(h)) return 0;
    const int64_t seen = work_.pos(first_ + 2 * pair_ + h) + 1 - keys.pos;
    return seen <= 0 ? 0 : seen < keys.count ? static_cast<int>(seen) : keys.count;
  }

  // Scores to exp(score - m).
  __device__ void Softmax(const Keys& keys, float (&p)[kGroups][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int seen = Seen(h, keys);
      float largest = -CUDART_INF_F;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int n = h; n < 4; n += 2) {
          const int key = i * kGroup + quad_ + n / 2 * 8;
          p[i][n] = key < seen ? __fmul_rn(p[i][n], work_.a.scale) : -CUDART_INF_F;
          largest = fmaxf(largest, p[i][n]);
        }
      }
      m_[h] = OverKeys(largest, Largest());
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int n = h; n < 4; n += 2) {
          const int key = i * kGroup + quad_ + n / 2 * 8;
          p[i][n] = key < seen ? expf(__fsub_rn(p[i][n], m_[h])) : 0.0f;
          sum = __fadd_rn(sum, p[i][n]);
        }
      }
      l_[h] = OverKeys(sum, Sum());
    }
  }

  // o^T += V^T p^T of 16 keys. Values come in rows of keys; the left operand wants pairs of keys.
  __device__ void AddValues(const uint4 (&values)[kPieces], const float (&p)[4]) {
    uint32_t hi[2], lo[2];
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      Split(make_float2(p[2 * n], p[2 * n + 1]), hi[n], lo[n]);
      hi[n] = Transposed(hi[n]);
      lo[n] = Transposed(lo[n]);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      uint32_t v[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        const uint32_t first = Word(values[t / 4 * 4 + 2 * n], t % 4);
        const uint32_t second = Word(values[t / 4 * 4 + 2 * n + 1], t % 4);
        v[2 * n] = __byte_perm(first, second, 0x5410);      // the even dimension of both keys
        v[2 * n + 1] = __byte_perm(first, second, 0x7632);  // the odd one
      }
      Multiply(o_[t], v, hi[0], hi[1]);
      Multiply(o_[t], v, lo[0], lo[1]);
    }
  }
  __device__ static uint32_t Word(const uint4& piece, int i) {
    return i == 0 ? piece.x : i == 1 ? piece.y : i == 2 ? piece.z : piece.w;
  }

  const Work& work_;
  const int32_t kv_head_;
  const int64_t first_;
  const int lane_, quad_, pair_;
  Keys next_;
  uint4 slots_[kSlots][kPieces];  // keys or values on their way
  uint32_t q_hi_[kD / 32][4], q_lo_[kD / 32][4];
  float o_[kTiles][4];
  float m_[2], l_[2];
};

// U of one query and some columns: what an earlier launch has opened, if there is such, and then the
// partials of the unit's blocks, in order. To `to`.
template <int kD, int kColumns>
__device__ void FoldPartials(const Partials<kD>& partials, int query, int column, const float* opened,
                             float* to) {
  float m = opened != nullptr ? opened[kD] : -CUDART_INF_F;
  float l = opened != nullptr ? opened[kD + 1] : 0.0f;
  float o[kColumns];
#pragma unroll
  for (int i = 0; i < kColumns; ++i) o[i] = opened != nullptr ? opened[column + i] : 0.0f;
#pragma unroll
  for (int part = 0; part < kWarps; ++part) {
    const FoldWeights fold(m, l, partials.m[part][query], partials.l[part][query]);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) o[i] = fold(o[i], partials.o[part][query][column + i]);
    m = fold.m;
    l = fold.l;
  }
#pragma unroll
  for (int i = 0; i < kColumns; i += 2) {
    *reinterpret_cast<float2*>(to + column + i) = make_float2(o[i], o[i + 1]);
  }
  if (column != 0) return;
  to[kD] = m;
  to[kD + 1] = l;
}

// Block (some units of the window, head and queries; item = blockIdx.y).
template <int kD>
__global__ void __launch_bounds__(kThreads, kD <= 128 ? 2 : 1)
    UnitKernel(const __grid_constant__ AttendArgs a, UnitWindow window) {
  BeginDependent();
  extern __shared__ __align__(16) uint8_t memory[];
  auto* const partials = reinterpret_cast<Partials<kD>*>(memory);  // two, by turns
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  if (!GoesByUnits(item, work.group)) return;
  const int64_t parts = (window.count + window.per_block - 1) / window.per_block;
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t head = blockIdx.x / parts % heads;
  const int64_t first_query = blockIdx.x / parts / heads * kQueries;
  if (first_query >= work.num_queries()) return;
  // Units count from that of the item's first key.
  const int64_t begin_pos = work.begin_pos();
  const int64_t end_pos = work.end_pos();
  const int64_t first_unit = begin_pos / kUnitTokens;
  int64_t unit = window.first + blockIdx.x % parts * window.per_block;
  int64_t end_unit = unit + window.per_block;
  if (end_unit > window.first + window.count) end_unit = window.first + window.count;
  const int64_t item_units = (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
  if (end_unit > item_units) end_unit = item_units;
  if (unit >= end_unit) return;

  const auto kv_head = static_cast<int32_t>(item.kv_head_begin + head);
  const int64_t last_query = first_query + kQueries < work.num_queries() ? first_query + kQueries
                                                                         : work.num_queries();
  int64_t seen = work.pos(last_query - 1) + 1;
  if (seen > end_pos) seen = end_pos;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  // The warp's keys of a unit: [begin_of, end_of), or none.
  const auto begin_of = [&](int64_t of) { return (first_unit + of) * kUnitTokens + warp * kBlock; };
  const auto end_of = [&](int64_t of) {
    const int64_t begin = begin_of(of);
    if (of >= end_unit || begin < begin_pos) return begin;
    return begin + kBlock < seen ? begin + kBlock : seen;
  };
  constexpr int kColumns = kD * kQueries / kThreads;
  const int query = static_cast<int>(threadIdx.x) * kQueries / kThreads;
  const int column = static_cast<int>(threadIdx.x) % (kThreads / kQueries) * kColumns;

  WarpBlock<kD> block(work, kv_head, first_query);
  block.Start(begin_of(unit), end_of(unit));
  for (int turn = 0; unit < end_unit; ++unit, turn = 1 - turn) {
    block.Run(begin_of(unit + 1), end_of(unit + 1));
    block.Store(partials[turn], warp);
    __syncthreads();
    if (first_query + query >= last_query) continue;
    const bool opened = begin_pos > (first_unit + unit) * kUnitTokens && item.reset == 0;
    FoldPartials<kD, kColumns>(
        partials[turn], query, column,
        opened ? work.state(kv_head, first_query + query) + kD + 2 : nullptr,
        a.scratch + window.Slot(blockIdx.y, unit - window.first, head, first_query + query) *
                        (kD + 2));
  }
}

// Units whose results are on their way at once: a load takes as long as some hundred additions.
constexpr int kFoldAhead = 16;

// Block (query and head, item): folds the window's units in order. A thread for each column.
//
// 128K tokens are 512 units: what the fold hangs on (the largest score so far, and with it both weights
// of each unit) is found for kD units at once, so that only a multiplication and an addition a unit
// remain one after the other.
template <int kD>
__global__ void __launch_bounds__(kD) FoldKernel(const __grid_constant__ AttendArgs a,
                                                 UnitWindow window) {
  BeginDependent();
  // Of the unit: weights of what is before it and of itself, and its l. Where nothing is before it the
  // first is negative.
  __shared__ float weight_before[kD], weight[kD], unit_l[kD];
  __shared__ float largest_of_warp[kD / kWarp];
  const AttendItem item = a.items.device[blockIdx.y];
  const Work work(a, item);
  if (!GoesByUnits(item, work.group)) return;
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t head = blockIdx.x / window.queries;
  const int64_t query = blockIdx.x % window.queries;
  if (head >= heads || query >= work.num_queries()) return;
  const auto kv_head = static_cast<int32_t>(item.kv_head_begin + head);
  const int64_t first_unit = work.begin_pos() / kUnitTokens;
  const int64_t end_pos = work.end_pos();
  const int64_t units =
      item.span_count == 0 ? 0 : (end_pos + kUnitTokens - 1) / kUnitTokens - first_unit;
  if (window.first > 0 && window.first >= units) return;
  const int64_t last = window.first + window.count < units ? window.first + window.count : units;
  const bool opens = last == units && units > 0 && end_pos % kUnitTokens != 0;
  const int64_t last_whole = opens ? last - 1 : last;
  const auto part_of = [&](int64_t unit) {
    return a.scratch + window.Slot(blockIdx.y, unit - window.first, head, query) * (kD + 2);
  };

  const int i = static_cast<int>(threadIdx.x);
  float* const r = work.state(kv_head, query);
  float* const u = r + kD + 2;
  const bool empty = window.first == 0 && item.reset != 0;
  float o = empty ? 0.0f : r[i];
  float m = empty ? -CUDART_INF_F : r[kD];
  float l = empty ? 0.0f : r[kD + 1];
  for (int64_t begin = window.first; begin < last_whole; begin += kD) {
    const int count = static_cast<int>(last_whole - begin < kD ? last_whole - begin : kD);
    const float* const part = part_of(begin + (i < count ? i : 0));
    const float its_m = i < count ? part[kD] : -CUDART_INF_F;
    const float its_l = i < count ? part[kD + 1] : 0.0f;
    // The largest up to and with each unit.
    float upto = its_m;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const float left = __shfl_up_sync(kFullMask, upto, offset);
      if (i % kWarp >= offset) upto = fmaxf(upto, left);
    }
    __syncthreads();  // the round before has read its weights
    if (i % kWarp == kWarp - 1) largest_of_warp[i / kWarp] = upto;
    float before = __shfl_up_sync(kFullMask, upto, 1);
    if (i % kWarp == 0) before = -CUDART_INF_F;
    __syncthreads();
    float earlier = m;
#pragma unroll
    for (int warp = 0; warp < kD / kWarp; ++warp) {
      if (warp < i / kWarp) earlier = fmaxf(earlier, largest_of_warp[warp]);
      m = fmaxf(m, largest_of_warp[warp]);
    }
    before = fmaxf(before, earlier);
    upto = fmaxf(upto, earlier);
    const bool nothing_before = before == -CUDART_INF_F;
    weight_before[i] = its_l == 0 ? 1.0f : nothing_before ? -1.0f : expf(__fsub_rn(before, upto));
    weight[i] = its_l == 0 ? 0.0f : nothing_before ? 1.0f : expf(__fsub_rn(its_m, upto));
    unit_l[i] = its_l;
    __syncthreads();
    for (int n = 0; n < count; n += kFoldAhead) {
      float its_o[kFoldAhead];
#pragma unroll
      for (int k = 0; k < kFoldAhead; ++k) {
        its_o[k] = n + k < count ? part_of(begin + n + k)[i] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kFoldAhead; ++k) {  // weights past the last are those of nothing
        const float wa = n + k < kD ? weight_before[n + k] : 1.0f;
        const float wb = n + k < kD ? weight[n + k] : 0.0f;
        const float its_l = n + k < kD ? unit_l[n + k] : 0.0f;
        o = wa < 0 ? its_o[k] : __fmaf_rn(its_o[k], wb, __fmul_rn(o, wa));
        l = wa < 0 ? its_l : __fmaf_rn(its_l, wb, __fmul_rn(l, wa));
      }
    }
  }
  // What was open went into the first unit's partial, if there is one.
  float open_o = 0, open_m = -CUDART_INF_F, open_l = 0;
  if (opens || (units == 0 && item.reset == 0)) {
    const float* const part = opens ? part_of(last - 1) : u;
    open_o = part[i];
    open_m = part[kD];
    open_l = part[kD + 1];
  }
  if (last == units && item.finish != 0) {
    const FoldWeights fold(m, l, open_m, open_l);
    o = fold(o, open_o);
    m = fold.m;
    l = fold.l;
    open_o = open_l = 0;
    open_m = -CUDART_INF_F;
    StoreActivation(a.out, work.out(kv_head, query) + i, __fmul_rn(o, 1.0f / l));
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

// Blocks of threads of a long launch: two waves of what 132 multiprocessors hold. With one wave those
// that end early stay idle: 234 us at 128K, against 228.
constexpr int64_t kFullGrid = 528;
template <int kD>
constexpr int kShared = 2 * static_cast<int>(sizeof(Partials<kD>));

// The largest of each over the items that go by units.
struct Extents {
  int64_t heads = 0;
  int64_t queries = 0;
  int64_t units = 0;
};

Extents ExtentsOf(const AttendArgs& a) {
  const auto raise = [](int64_t& value, int64_t to) { value = value < to ? to : value; };
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  Extents e;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    if (!GoesByUnits(item, group)) continue;
    raise(e.heads, item.kv_head_end - item.kv_head_begin);
    raise(e.queries, int64_t{item.row_count} * group);
    if (item.span_count == 0) continue;
    const KvSpan& first = a.spans.host[item.span_begin];
    const KvSpan& last = a.spans.host[item.span_begin + item.span_count - 1];
    raise(e.units, CeilDiv(last.first_pos + last.count, kUnitTokens) -
                       first.first_pos / kUnitTokens);
  }
  return e;
}

template <int kD>
cudaError_t Launch(AttendArgs a, cudaStream_t stream) {
  const Extents e = ExtentsOf(a);
  if (e.heads == 0 || e.queries == 0) return cudaSuccess;
  // Items of a launch that fit the grid and leave scratch for a unit of each.
  const int64_t an_item = e.heads * e.queries * (kD + 2);
  int64_t most_items = a.scratch_floats / an_item;
  if (most_items > kMaxGridY) most_items = kMaxGridY;
  if (most_items == 0) return cudaErrorInvalidValue;
  const AttendArgs all = a;
  for (int64_t item = 0; item < all.items.count; item += most_items) {
    const int64_t items = all.items.count - item < most_items ? all.items.count - item : most_items;
    a.items = {all.items.device + item, all.items.host + item, static_cast<int32_t>(items)};
    const int64_t fit = a.scratch_floats / (items * an_item);
    UnitWindow window = {0, fit < e.units ? fit : e.units, 1, e.heads, e.queries};
    if (window.count == 0) window.count = 1;
    const auto y = static_cast<unsigned>(items);
    const int64_t tasks = e.heads * CeilDiv(e.queries, kQueries);
    window.per_block = CeilDiv(window.count * tasks * items, kFullGrid);
    do {
      const dim3 units(
          static_cast<unsigned>(CeilDiv(window.count, window.per_block) * tasks), y);
      HEADROOM_CUDA_RETURN_IF_ERROR(
          LaunchDependentOn(stream, UnitKernel<kD>, units, kThreads, kShared<kD>, a, window));
      const dim3 folds(static_cast<unsigned>(e.heads * e.queries), y);
      HEADROOM_CUDA_RETURN_IF_ERROR(
          LaunchDependentOn(stream, FoldKernel<kD>, folds, kD, 0, a, window));
      window.first += window.count;
    } while (window.first < e.units);
  }
  return cudaSuccess;
}

template <int kD>
cudaError_t Load() {
  HEADROOM_CUDA_RETURN_IF_ERROR(LoadKernel(UnitKernel<kD>, kShared<kD>));
  return LoadKernel(FoldKernel<kD>);
}

}  // namespace

cudaError_t LaunchUnitAttend(const AttendArgs& args, cudaStream_t stream) {
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

cudaError_t LoadUnitAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  return Load<256>();
}

}  // namespace headroom::kernels::cuda
