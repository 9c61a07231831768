// Log-probabilities and the draw of a token; sample.h states the distribution. A cluster of blocks a row,
// each of which has a slice of the vocabulary.
//
// Weights exp((logit - max) / temperature), at most 1, are summed as integers of 2^-40: their sum
// has no order, so that a search may form it in any way and still be exact. A token of less weight
// than that is never drawn.
//
// Truncation needs the tokens by likelihood. Instead of sorting, a cut in that order is searched: the weight's
// bits, two at a step, each step one pass over the row; then, among tokens of that weight, the id.
#include <math_constants.h>

#include "kernels/cuda/cluster.cuh"
#include "kernels/cuda/device_util.cuh"
#include "kernels/cuda/kernels.h"

namespace headroom::kernels::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr double kUnit = 0x1p40;

// Philox-4x32-10 at counter {counter, 0}, key seed: one uniform number in [0, 1) of 24 bits.
__device__ float Uniform(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t c1 = c[1], c3 = c[3];
    c[0] = static_cast<uint32_t>(b >> 32) ^ c1 ^ key[0];
    c[1] = static_cast<uint32_t>(b);
    c[2] = static_cast<uint32_t>(a >> 32) ^ c3 ^ key[1];
    c[3] = static_cast<uint32_t>(a);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<float>(c[0] >> 8) * 0x1p-24f;
}

// Where a token stands: larger is likelier, the lower id first among equals. 0 is below all.
// Works for any order of floats, so for logits too.
__device__ uint64_t Key(float value, int64_t id) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t ordered = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
  return uint64_t{ordered} << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}
__device__ int32_t IdOf(uint64_t key) {
  return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key));
}
__device__ float ValueOf(uint64_t key) {
  const auto ordered = static_cast<uint32_t>(key >> 32);
  return __uint_as_float((ordered & 0x80000000u) != 0 ? ordered & 0x7fffffffu : ~ordered);
}

// One row's work, shared by the threads of a cluster; all of them call everything together.
struct Row {
  const float* logits;
  float* weights;  // [vocab]
  int64_t vocab;
  int64_t begin, end;  // the block's slice
  Cluster& cluster;

  // f(values[id], id) of the thread's part of the slice: as far ahead as it can.
  template <typename F>
  __device__ void ForEach(const float* values, F f) const {
    if (vocab % 4 == 0) {  // slices are whole vectors
#pragma unroll 4
      for (int64_t i = begin / 4 + threadIdx.x; i < end / 4; i += kThreads) {
        const float4 four = reinterpret_cast<const float4*>(values)[i];
        f(four.x, 4 * i);
        f(four.y, 4 * i + 1);
        f(four.z, 4 * i + 2);
        f(four.w, 4 * i + 3);
      }
      return;
    }
    for (int64_t id = begin + threadIdx.x; id < end; id += kThreads) f(values[id], id);
  }
  template <typename T, typename Op>
  __device__ T Reduce(T value, T identity, Op op) const {
    T values[1] = {value};
    cluster.Reduce(values, identity, op);
    return values[0];
  }

  // The largest key over logits below `below`; 0 if there is none.
  __device__ uint64_t Next(uint64_t below) const {
    uint64_t best = 0;
    ForEach(logits, [&](float logit, int64_t id) {
      const uint64_t key = Key(logit, id);
      if (key < below && key > best) best = key;
    });
    return Reduce(best, uint64_t{0}, Largest());
  }
  // The largest key of all; kNotFinite if a logit is.
  static constexpr uint64_t kNotFinite = ~uint64_t{0};
  __device__ uint64_t First() const {
    uint64_t best = 0;
    ForEach(logits, [&](float logit, int64_t id) {
      const uint64_t key = isfinite(logit) ? Key(logit, id) : kNotFinite;
      if (key > best) best = key;
    });
    return Reduce(best, uint64_t{0}, Largest());
  }

  __device__ float LogSumExp(float maximum) const {
    float sum = 0;
    ForEach(logits, [&](float logit, int64_t) { sum += expf(logit - maximum); });
    return logf(Reduce(sum, 0.0f, Sum()));
  }

  __device__ void Weigh(float maximum, float temperature) const {
    for (int64_t id = begin + threadIdx.x; id < end; id += kThreads) {
      weights[id] = expf((logits[id] - maximum) / temperature);
    }
    __syncthreads();
  }
  __device__ static uint64_t MassOf(float weight) {
    return static_cast<uint64_t>(static_cast<double>(weight) * kUnit);
  }

  // Of the keys from `cut` on.
  __device__ uint64_t Mass(uint64_t cut) const {
    uint64_t sum = 0;
    ForEach(weights, [&](float weight, int64_t id) {
      if (Key(weight, id) >= cut) sum += MassOf(weight);
    });
    return Reduce(sum, uint64_t{0}, Sum());
  }

  // In order of ids, the one with which the sum of value(id) exceeds target(the sum of all); -1: none.
  template <typename Value, typename Target>
  __device__ int32_t FindById(Value value, Target target) const {
    __shared__ uint64_t of_warps[kWarp];
    const int64_t each = (end - begin + kThreads - 1) / kThreads;
    const int64_t its_begin = min(begin + threadIdx.x * each, end);
    const int64_t its_end = min(its_begin + each, end);
    uint64_t its = 0;
    for (int64_t id = its_begin; id < its_end; ++id) its += value(id);
    const int lane = static_cast<int>(threadIdx.x) % kWarp;
    const int warp = static_cast<int>(threadIdx.x) / kWarp;
    uint64_t upto = its;  // of the warp's lanes up to and with this one
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
      const uint64_t left = __shfl_up_sync(kFullMask, upto, offset);
      if (lane >= offset) upto += left;
    }
    if (lane == kWarp - 1) of_warps[warp] = upto;
    __syncthreads();
    uint64_t of_block[1] = {0};
    uint64_t before = 0;
    for (int other = 0; other < kThreads / kWarp; ++other) {
      if (other == warp) before = of_block[0];
      of_block[0] += of_warps[other];
    }
    const Cluster::Words* const of_blocks = cluster.Tell(of_block);
    uint64_t all = 0;
    for (uint32_t rank = 0; rank < Cluster::Size(); ++rank) {
      if (rank == Cluster::Rank()) before += all;
      all += of_blocks[rank][0];
    }
    const uint64_t wanted = target(all);
    uint64_t reached = before + upto - its;
    uint64_t found = 0;  // id + 1
    if (reached <= wanted && wanted < reached + its) {
      for (int64_t id = its_begin; found == 0; ++id) {
        reached += value(id);
        if (reached > wanted) found = static_cast<uint64_t>(id) + 1;
      }
    }
    return static_cast<int32_t>(Reduce(found, uint64_t{0}, Largest())) - 1;
  }

  // The largest cut from which on there are at least `need` tokens, or is that much mass, but not below `lowest`.
  template <bool kCount>
  __device__ uint64_t Reach(uint64_t need, uint64_t lowest) const {
    // Cuts by weight alone: `low` reaches it, unless nothing does, `high` does not, but `above`.
    auto low = static_cast<uint32_t>(lowest >> 32) & 0x7fffffffu;
    uint32_t high = __float_as_uint(1.0f) + 1;  // weights are at most 1
    uint64_t above = 0;
    while (high > low + 1) {
      constexpr int kCuts = 3;
      uint32_t cuts[kCuts];
      uint64_t sums[kCuts] = {};
      for (int i = 0; i < kCuts; ++i) {
        cuts[i] = low + static_cast<uint32_t>(uint64_t{high - low} * (i + 1) / (kCuts + 1));
      }
      ForEach(weights, [&](float weight, int64_t id) {
        const uint32_t bits = __float_as_uint(weight);
        if (bits < cuts[0] || Key(weight, id) < lowest) return;
        const uint64_t mass = kCount ? 1 : MassOf(weight);
        sums[0] += mass;
        if (bits >= cuts[1]) sums[1] += mass;
        if (bits >= cuts[2]) sums[2] += mass;
      });
      cluster.Reduce(sums, uint64_t{0}, Sum());
      for (int i = 0; i < kCuts; ++i) {  // cuts that do not reach it follow those that do
        if (sums[i] >= need) {
          low = cuts[i];
        } else {
          high = cuts[i];
          above = sums[i];
          break;
        }
      }
    }
    const uint64_t mass = kCount ? 1 : MassOf(__uint_as_float(low));
    if (high <= low || mass == 0) return lowest;
    const int32_t id = FindById(
        [&](int64_t at) {
          const bool counts = __float_as_uint(weights[at]) == low && Key(weights[at], at) >= lowest;
          return uint64_t{counts ? 1u : 0u};
        },
        [&](uint64_t) { return (need - above - 1) / mass; });
    return id < 0 ? lowest : Key(__uint_as_float(low), id);
  }

  __device__ int32_t Draw(const SampleRow& row, float maximum) const {
    Weigh(maximum, row.temperature);
    const double uniform = Uniform(row.seed, row.counter);
    const auto target = [&](uint64_t mass) { return static_cast<uint64_t>(uniform * static_cast<double>(mass)); };
    const bool all = row.top_k <= 0 || row.top_k >= vocab;
    if (all && !(row.top_p < 1) && !(row.min_p > 0)) {
      return FindById([&](int64_t id) { return MassOf(weights[id]); }, target);
    }
    uint64_t cut = 0;
    if (!all) cut = Reach<true>(static_cast<uint64_t>(row.top_k), cut);
    if (row.top_p < 1) {
      const double mass = static_cast<double>(row.top_p) * static_cast<double>(Mass(cut));
      const auto need = static_cast<uint64_t>(ceil(mass));
      cut = Reach<false>(need > 1 ? need : 1, cut);
    }
    if (row.min_p > 0) {
      const uint64_t key = uint64_t{__float_as_uint(row.min_p) | 0x80000000u} << 32;
      cut = cut < key ? key : cut;
    }
    return IdOf(Reach<false>(target(Mass(cut)) + 1, cut));
  }
};

// Counts what has been settled; adjusted[vocab] = the logits that the row is drawn by.
__device__ void Adjust(const SampleRow& what, const Row& row, float* adjusted) {
  DrawState& state = *what.state;
  uint32_t* const counts = DrawCounts(&state);
  const uint64_t recent_begin = what.counter - static_cast<uint64_t>(what.num_recent);
  if (threadIdx.x == 0 && Cluster::Rank() == 0) {
    for (int32_t i = 1; i <= what.num_settled; ++i) {
      ++counts[state.recent[(recent_begin - i) % kRecentTokens]];
    }
  }
  Cluster::Sync();
  for (int64_t id = row.begin + threadIdx.x; id < row.end; id += kThreads) {
    uint32_t seen = counts[id];
    for (uint64_t pos = recent_begin; pos < what.counter; ++pos) {
      if (state.recent[pos % kRecentTokens] == id) ++seen;
    }
    float x = row.logits[id];
    if (seen != 0) {
      x = x > 0 ? __fdiv_rn(x, what.repetition_penalty) : __fmul_rn(x, what.repetition_penalty);
    }
    const uint32_t count = seen & ~kInPrompt;
    if (count > 0) {
      const float frequency = __fmul_rn(static_cast<float>(count), what.frequency_penalty);
      x = __fsub_rn(x, __fadd_rn(frequency, what.presence_penalty));
    }
    adjusted[id] = x;
  }
  const auto in_slice = [&](int32_t id) { return id >= row.begin && id < row.end; };
  __syncthreads();
  for (int32_t i = threadIdx.x; i < state.num_bias; i += kThreads) {
    const TokenBias& bias = state.bias[i];
    if (in_slice(bias.token_id)) adjusted[bias.token_id] += bias.bias;
  }
  __syncthreads();
  if (what.counter < state.held_back_end) {
    for (int32_t i = threadIdx.x; i < state.num_held_back; i += kThreads) {
      if (in_slice(state.held_back[i])) adjusted[state.held_back[i]] = -CUDART_MAX_NORMAL_F;
    }
  }
  __syncthreads();
}

// A cluster a row.
__global__ void __launch_bounds__(kThreads) SampleKernel(const __grid_constant__ SampleArgs a) {
  __shared__ Cluster::Shared shared;
  Cluster cluster(shared);
  const uint32_t blocks = Cluster::Size();
  const uint32_t index = blockIdx.x / blocks;
  const SampleRow what = a.rows.device[index];
  float* const scratch = a.scratch + index * SampleScratchFloats(a.vocab);
  const int64_t each = (a.vocab + 4 * blocks - 1) / (4 * blocks) * 4;
  const int64_t begin = min(Cluster::Rank() * each, a.vocab);
  const Row row = {a.logits + index * a.vocab, scratch, a.vocab, begin, min(begin + each, a.vocab), cluster};
  Cluster::Sync();
  BeginDependent();
  SampleResult& result = a.results[what.result_index];
  const bool writes = threadIdx.x == 0 && Cluster::Rank() == 0;
  int32_t token = 0;
  uint64_t key = row.First();
  if (key == Row::kNotFinite) {
    if (writes) {
      result.logprob = 0;
      result.non_finite = 1;
      result.num_top = 0;
    }
  } else {
    token = IdOf(key);
    const float maximum = ValueOf(key);
    float likeliest = maximum;
    float* const adjusted = scratch + a.vocab;
    const Row drawn_by = {what.state != nullptr ? adjusted : row.logits, row.weights, row.vocab, row.begin, row.end,
                          cluster};
    if (what.state != nullptr) {
      Adjust(what, row, adjusted);
      const uint64_t first = drawn_by.Next(~uint64_t{0});
      token = IdOf(first);
      likeliest = ValueOf(first);
    }
    if (what.forced_token >= 0) {
      token = what.forced_token;
    } else if (what.temperature > 0) {
      token = drawn_by.Draw(what, likeliest);
    }
    if (what.state != nullptr && writes) what.state->recent[what.counter % kRecentTokens] = token;
    const float lse = row.LogSumExp(maximum);
    const int64_t wanted =
        what.num_top_logprobs < kMaxTopLogprobs ? what.num_top_logprobs : kMaxTopLogprobs;
    const auto top = static_cast<int32_t>(wanted < a.vocab ? wanted : a.vocab);
    for (int32_t i = 0; i < top; ++i, key = row.Next(key)) {
      if (!writes) continue;
      result.top_ids[i] = IdOf(key);
      result.top_logprobs[i] = ValueOf(key) - maximum - lse;
    }
    if (writes) {
      result.logprob = row.logits[token] - maximum - lse;
      result.non_finite = 0;
      result.num_top = top;
    }
  }
  if (!writes) return;
  result.token_id = token;
  if (what.slot >= 0) a.last_tokens[what.slot] = token;
}

}  // namespace

cudaError_t LaunchSample(const SampleArgs& args, cudaStream_t stream) {
  if (args.rows.count == 0) return cudaSuccess;
  return LaunchClustersOn(stream, SampleKernel, dim3(static_cast<unsigned>(args.rows.count)), Cluster::kMost, kThreads,
                          0, args);
}

cudaError_t LoadSample() { return LoadDecodeKernel(SampleKernel); }

}  // namespace headroom::kernels::cuda
