// Exact attention of many queries over keys in pieces; attention.h states the fold. Few queries take
// another way: unit_attention.cu.
//
// A block of four warps takes some queries (rows x GQA group) of one KV head of one item, walks the keys
// in blocks of 64, on the tensor cores, and folds at each unit's border: q and p are split into two
// bfloat16 (see tensor_core.cuh), K and V are bfloat16 already. Every warp has 16 queries of its own, or,
// of wide heads, two warps share them and divide the keys of the scores, then the columns of the result.
// All sums have one order: a query's bits depend on the keys that it sees alone.
#include "kernels/cuda/attention_parts.cuh"
#include "kernels/cuda/kernels.h"
#include "kernels/cuda/tensor_core.cuh"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
// Queries of a warp, or of the warps that share them: the rows of a product.
constexpr int kRowQueries = 16;
// How many such rows a block of threads has: a wide head's result must be divided over two warps to fit
// their registers.
template <int kD>
constexpr int kRowsOf = kD <= 128 ? 4 : 2;

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
  // Of a block: what lies before it no query sees, nor has seen.
  __device__ int64_t first_seen() const {
    return FloorToBlock(FirstSeen(work_.a.window, work_.pos(first_)));
  }

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

  // The item's keys in [begin, end); `begin` is a block's. Units are folded at their borders.
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
      if ((block.pos + block.keys) % kUnitTokens == 0) FoldUnit();
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
          StorePair(work_.a.out, work_.out(kv_head_, first_ + Query(h)) + Column(tile),
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

  // R = fold(R, U), U = empty.
  __device__ void FoldUnit() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const FoldWeights fold(fold_m_[h], fold_l_[h], m_[h], l_[h]);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (!Has(h)) continue;
        const float2 r = r_written_ ? Load(R(h), tile) : make_float2(0, 0);
        const float2 u = PairOf(h, tile);
        Store(R(h), tile, make_float2(fold(r.x, u.x), fold(r.y, u.y)));
      }
      fold_m_[h] = fold.m;
      fold_l_[h] = fold.l;
    }
    r_written_ = true;
    Clear();
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

  // Which of the block's keys the query h sees.
  __device__ SeenKeys Seen(int h, const Block& block) const {
    if (!Has(h)) return {};
    return {work_.a, work_.pos(first_ + Query(h)), block.pos, block.keys};
  }

  // Of slice `slice` of the warp, the key that register i of its tile t belongs to.
  __device__ int KeyOf(int slice, int t, int i) const {
    return (part_ * kSlices + slice) * 16 + t * 8 + 2 * pair_ + i % 2;
  }

  __device__ void TakeBlock(const Block& block, int stage) {
    float p[kSlices][2][4];  // scores, then exp(score - m)
    Score(stage, p);
    const SeenKeys seen[2] = {Seen(0, block), Seen(1, block)};
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
  __device__ void Softmax(const SeenKeys (&seen)[2], float (&p)[kSlices][2][4], float (&decay)[2],
                          float (&sum)[kWarps][2]) {
    float largest[2] = {-CUDART_INF_F, -CUDART_INF_F};
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = p[slice][t][i];
          x = seen[i / 2].Has(KeyOf(slice, t, i)) ? Scored(work_.a, x) : -CUDART_INF_F;
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
      decay[h] = seen[h].Any() ? expf(__fsub_rn(m_[h], m)) : 1.0f;
      m_[h] = m;
    }
#pragma unroll
    for (int slice = 0; slice < kSlices; ++slice) {
#pragma unroll
      for (int t = 0; t < 2; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float& x = p[slice][t][i];
          x = seen[i / 2].Has(KeyOf(slice, t, i)) ? expf(__fsub_rn(x, m_[i / 2])) : 0.0f;
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

  // U = empty.
  __device__ void Clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) SetPair(h, tile, make_float2(0, 0));
      m_[h] = -CUDART_INF_F;
      l_[h] = 0;
    }
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
  BeginDependent();
  extern __shared__ __align__(16) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kD, kRows>*>(memory);
  const AttendItem item = a.items.device[first_item + blockIdx.y];
  const Work work(a, item);
  if (GoesByUnits(item, work.group)) return;
  const int64_t heads = item.kv_head_end - item.kv_head_begin;
  const int64_t tiles = (work.num_queries() + kQueries - 1) / kQueries;
  if (blockIdx.x >= heads * tiles) return;
  const auto head = static_cast<int32_t>(item.kv_head_begin + blockIdx.x % heads);
  Tile<kD, kRows> tile(work, shared, head, (tiles - 1 - blockIdx.x / heads) * kQueries);
  tile.Open(item.reset == 0, item.reset == 0);
  const int64_t seen = tile.last_pos() + 1;
  const int64_t end = work.end_pos() < seen ? work.end_pos() : seen;
  const int64_t begin = work.begin_pos();
  tile.Walk(begin < tile.first_seen() ? tile.first_seen() : begin, end);
  __syncthreads();
  tile.Close(item.finish != 0);
}

// ---- Launches
// ------------------------------------------------------------------------------------

template <int kD>
cudaError_t Launch(const AttendArgs& a, uint32_t* tickets, cudaStream_t stream) {
  constexpr int kRows = kRowsOf<kD>;
  const int32_t group = a.num_q_heads / a.num_kv_heads;
  int64_t most_heads = 0;  // over the items that are walked
  int64_t most_queries = 0;
  bool by_units = false;
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    if (GoesByUnits(item, group)) {
      by_units = true;
      continue;
    }
    const int64_t heads = item.kv_head_end - item.kv_head_begin;
    const int64_t queries = int64_t{item.row_count} * group;
    most_heads = most_heads < heads ? heads : most_heads;
    most_queries = most_queries < queries ? queries : most_queries;
  }
  if (by_units) HEADROOM_CUDA_RETURN_IF_ERROR(LaunchUnitAttend(a, tickets, stream));
  const int64_t x = most_heads * CeilDiv(most_queries, Tile<kD, kRows>::kQueries);
  if (x == 0) return cudaSuccess;
  for (int64_t first = 0; first < a.items.count; first += kMaxGridY) {
    const int64_t y = a.items.count - first < kMaxGridY ? a.items.count - first : kMaxGridY;
    const dim3 grid(static_cast<unsigned>(x), static_cast<unsigned>(y));
    HEADROOM_CUDA_RETURN_IF_ERROR(LaunchDependentOn(stream, WalkKernel<kD, kRows>, grid, kThreads,
                                                    sizeof(Shared<kD, kRows>), a, first));
  }
  return cudaSuccess;
}

template <int kD>
cudaError_t Load() {
  return LoadKernel(WalkKernel<kD, kRowsOf<kD>>, sizeof(Shared<kD, kRowsOf<kD>>));
}

}  // namespace

cudaError_t LaunchAttend(const AttendArgs& args, uint32_t* tickets, cudaStream_t stream) {
  if (args.items.count == 0 || args.rows == 0) return cudaSuccess;
  return ForHeadDim(args.head_dim, [&](auto d) { return Launch<d()>(args, tickets, stream); });
}

cudaError_t LoadAttend() {
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<64>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<128>());
  HEADROOM_CUDA_RETURN_IF_ERROR(Load<256>());
  return LoadUnitAttend();
}

}  // namespace headroom::kernels::cuda
