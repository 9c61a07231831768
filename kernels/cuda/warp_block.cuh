// A few queries over one block of keys, by one warp alone: what unit_attention.cu and short_attention.cu consist of.
//
// Keys and values go from memory straight into the fragments of m16n8k16 products: up to 16 KiB a warp
// are on their way, 128 KiB a multiprocessor, the next unit's keys before this one's values are done.
// (Four warps that shared blocks through shared memory needed four times the instructions and reached
// 2.0 of 3.1 TB/s.)
//
// Products: scores^T = K q^T and o^T = V^T p^T, so that the 8 columns are queries and the 16 rows, keys
// or dimensions, are all of use. q and p are split into two bfloat16 (tensor_core.cuh). A query's bits
// depend on its own keys only: it is a column.
#ifndef HEADROOM_KERNELS_CUDA_WARP_BLOCK_CUH_
#define HEADROOM_KERNELS_CUDA_WARP_BLOCK_CUH_

#include "kernels/cuda/tensor_core.cuh"
#include "kernels/cuda/unit_window.cuh"

namespace headroom::kernels::cuda::unit {

inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * kWarp;
inline constexpr int kGroup = 16;   // keys of one product
inline constexpr int kGroups = kBlock / kGroup;
static_assert(kWarps * kBlock == kUnitTokens);

// Keys and values are read once.
__device__ inline uint4 LoadOnce(const uint8_t* from) {
  uint4 value;
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "l"(from)
               : "memory");
  return value;
}

// An 8 x 8 matrix of bfloat16, a row of it in four lanes, to its transpose.
__device__ inline uint32_t Transposed(uint32_t fragment) {
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

// Up to 64 keys of one block, one behind the other, and likewise their values.
struct Keys {
  const uint8_t* rows = nullptr;
  const uint8_t* value_rows = nullptr;
  int32_t pos = 0;  // of the first; positions are below 2^31
  int32_t count = 0;
};

// Up to kQueries queries of one KV head over one block of keys after the other, by one warp.
//
// Lanes, quad = lane / 4, pair = lane % 4, and queries h = 0 and 1: 2 pair + h. A score of product i of a
// block, float n: key 16 i + quad + n / 2 * 8, query n % 2. Of o, tile t and float n: dimension t / 4 *
// 64 + quad * 8 + t % 4 * 2 + n / 2, query n % 2.
template <int kD>
class WarpBlock {
 public:
  __device__ explicit WarpBlock(const AttendArgs& a)
      : a_(a),
        lane_(static_cast<int>(threadIdx.x) % kWarp),
        quad_(lane_ / 4),
        pair_(lane_ % 4) {}

  // Begins to load some keys.
  __device__ void StartKeys(const Keys& keys) {
    keys_ = LanesPart(keys);
#pragma unroll
    for (int i = 0; i < kSlots; ++i) LoadKeys(slots_[i], keys_, i);
  }

  // The right operand of scores: of query `quad`, the dimensions that LoadKeys() gives a lane. Queries
  // [first, first + kQueries) of a KV head are those that all is about from now on.
  __device__ void LoadQueries(const Work& work, int32_t kv_head, int64_t first) {
    const int64_t query = first + quad_;
    const bool has = query < work.num_queries();
    const float* const q = work.q(kv_head, has ? query : first) + pair_ * 8;
    const int64_t last = min(first + kQueries, work.num_queries()) - 1;
    all_see_from_ = static_cast<int32_t>(FirstSeen(a_.window, work.pos(last)));
    all_see_to_ = static_cast<int32_t>(work.pos(first) + 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int64_t of = first + 2 * pair_ + h;
      pos_[h] = of < work.num_queries() ? static_cast<int32_t>(work.pos(of)) : -1;
    }
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

  // Takes the keys that were begun, and begins with their values.
  __device__ void TakeKeys() {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      Score(slots_[i % kSlots], p_[i]);
      if (i + kSlots < kGroups) {
        LoadKeys(slots_[i % kSlots], keys_, i + kSlots);
      } else {
        LoadValues(slots_[i % kSlots], keys_, i + kSlots - kGroups);
      }
    }
  }

  // Takes the values, and begins with the next keys.
  __device__ void TakeValues(const Keys& next) {
    const Keys keys = keys_;
    keys_ = LanesPart(next);
    // Almost always: nothing is looked at key by key.
    if (keys.count == kBlock && all_see_from_ <= keys.pos && keys.pos + kBlock <= all_see_to_ &&
        a_.soft_cap == 0) {
      Softmax<true>(keys, p_);
    } else {
      Softmax<false>(keys, p_);
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) o_[t][0] = o_[t][1] = o_[t][2] = o_[t][3] = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      AddValues(slots_[i % kSlots], p_[i]);
      if (i + kSlots < kGroups) {
        LoadValues(slots_[i % kSlots], keys, i + kSlots);
      } else {
        LoadKeys(slots_[i % kSlots], keys_, i + kSlots - kGroups);
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

  __device__ int Dimension(int t) const { return t / 4 * 64 + quad_ * 8 + t % 4 * 2; }

  __device__ Keys LanesPart(Keys keys) const {
    keys.rows += quad_ * kRowBytes + pair_ * 16;
    keys.value_rows += 2 * pair_ * kRowBytes + quad_ * 16;
    return keys;
  }

  // The left operand of scores of keys [16 i, 16 i + 16): of two keys, 8 dimensions out of 32 each. Rows
  // that do not exist are zero.
  __device__ void LoadKeys(uint4 (&slot)[kPieces], const Keys& keys, int i) const {
    const auto from = [&](int h, int c) {
      return keys.rows + (i * kGroup + h * 8) * kRowBytes + c * 64;
    };
    if (keys.count == kBlock) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) slot[n] = LoadOnce(from(n % 2, n / 2));
      return;
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const bool exists = i * kGroup + n % 2 * 8 + quad_ < keys.count;
      slot[n] = exists ? LoadOnce(from(n % 2, n / 2)) : make_uint4(0, 0, 0, 0);
    }
  }
  // The values of keys 2 pair, the next, and both + 8: 8 dimensions out of 64 each.
  __device__ void LoadValues(uint4 (&slot)[kPieces], const Keys& keys, int i) const {
    const auto row = [&](int n) { return i * kGroup + n / 2 * 8 + n % 2; };  // beside the lane's
    const auto from = [&](int n) {
      return keys.value_rows + row(n % 4) * kRowBytes + n / 4 * 128;
    };
    if (keys.count == kBlock) {
#pragma unroll
      for (int n = 0; n < kPieces; ++n) slot[n] = LoadOnce(from(n));
      return;
    }
#pragma unroll
    for (int n = 0; n < kPieces; ++n) {
      const bool exists = row(n % 4) + 2 * pair_ < keys.count;
      slot[n] = exists ? LoadOnce(from(n)) : make_uint4(0, 0, 0, 0);
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

  // Which of the keys query h sees.
  __device__ SeenKeys Seen(int h, const Keys& keys) const {
    if (pos_[h] < 0) return {};
    return {a_, pos_[h], keys.pos, keys.count};
  }

  // Scores to exp(score - m). kAll: all queries see all keys, and scores are not capped.
  template <bool kAll>
  __device__ void Softmax(const Keys& keys, float (&p)[kGroups][4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const SeenKeys seen = kAll ? SeenKeys() : Seen(h, keys);
      float largest = -CUDART_INF_F;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int n = h; n < 4; n += 2) {
          const int key = i * kGroup + quad_ + n / 2 * 8;
          if constexpr (kAll) {
            p[i][n] = __fmul_rn(p[i][n], a_.scale);
          } else {
            p[i][n] = seen.Has(key) ? Scored(a_, p[i][n]) : -CUDART_INF_F;
          }
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
          p[i][n] = kAll || seen.Has(key) ? expf(__fsub_rn(p[i][n], m_[h])) : 0.0f;
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

  const AttendArgs& a_;
  const int lane_, quad_, pair_;
  int32_t pos_[2];                     // of the lane's queries; -1: there is none
  int32_t all_see_from_, all_see_to_;  // positions of keys
  Keys keys_;           // the lane's part
  float p_[kGroups][4];  // scores, then exp(score - m)
  uint4 slots_[kSlots][kPieces];  // keys or values on their way
  uint32_t q_hi_[kD / 32][4], q_lo_[kD / 32][4];
  float o_[kTiles][4];
  float m_[2], l_[2];
};

}  // namespace headroom::kernels::cuda::unit

#endif  // HEADROOM_KERNELS_CUDA_WARP_BLOCK_CUH_
