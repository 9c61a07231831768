// Log-probabilities and the draw of a token; sample.h states the distribution. One block a row.
//
// Weights exp((logit - max) / temperature), at most 1, are summed as integers of 2^-40: their sum
// has no order, so that a search may form it in any way and still be exact. A token of less weight
// than that is never drawn.
//
// Truncation needs the tokens by likelihood. Instead of sorting, a cut in that order is found by
// bisection of its key (weight's bits, then the lower id), each step one pass over the row.
#include <math_constants.h>

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

// One row's work, shared by the block's threads; all of them call everything together.
struct Row {
  const float* logits;
  int64_t vocab;
  float* weights;      // [vocab]
  uint64_t* shared64;  // [kWarp] each
  float* shared32;

  // f(logit, id) of the thread's part of the row. One multiprocessor reads it: as far ahead as it can.
  template <typename F>
  __device__ void ForEachLogit(F f) const {
    if (vocab % 4 == 0) {
#pragma unroll 4
      for (int64_t i = threadIdx.x; i < vocab / 4; i += kThreads) {
        const float4 four = reinterpret_cast<const float4*>(logits)[i];
        f(four.x, 4 * i);
        f(four.y, 4 * i + 1);
        f(four.z, 4 * i + 2);
        f(four.w, 4 * i + 3);
      }
      return;
    }
    for (int64_t id = threadIdx.x; id < vocab; id += kThreads) f(logits[id], id);
  }

  // The largest key over logits below `below`; 0 if there is none.
  __device__ uint64_t Next(uint64_t below) const {
    uint64_t best = 0;
    ForEachLogit([&](float logit, int64_t id) {
      const uint64_t key = Key(logit, id);
      if (key < below && key > best) best = key;
    });
    return BlockReduce(best, uint64_t{0}, Largest(), shared64);
  }
  // The largest key of all; kNotFinite if a logit is.
  static constexpr uint64_t kNotFinite = ~uint64_t{0};
  __device__ uint64_t First() const {
    uint64_t best = 0;
    ForEachLogit([&](float logit, int64_t id) {
      const uint64_t key = isfinite(logit) ? Key(logit, id) : kNotFinite;
      if (key > best) best = key;
    });
    return BlockReduce(best, uint64_t{0}, Largest(), shared64);
  }

  __device__ float LogSumExp(float maximum) const {
    float sum = 0;
    ForEachLogit([&](float logit, int64_t) { sum += expf(logit - maximum); });
    return logf(BlockReduce(sum, 0.0f, Sum(), shared32));
  }

  __device__ void Weigh(float maximum, float temperature) const {
    for (int64_t id = threadIdx.x; id < vocab; id += kThreads) {
      weights[id] = expf((logits[id] - maximum) / temperature);
    }
    __syncthreads();
  }
  __device__ uint64_t Mass(int64_t id) const {
    return static_cast<uint64_t>(static_cast<double>(weights[id]) * kUnit);
  }

  // How many tokens, or what mass, the keys from `cut` on have.
  template <bool kCount>
  __device__ uint64_t Measure(uint64_t cut) const {
    uint64_t sum = 0;
    for (int64_t id = threadIdx.x; id < vocab; id += kThreads) {
      if (Key(weights[id], id) >= cut) sum += kCount ? 1 : Mass(id);
    }
    return BlockReduce(sum, uint64_t{0}, Sum(), shared64);
  }
  // The largest cut whose measure is at least `need`, but not below `lowest`.
  template <bool kCount>
  __device__ uint64_t Reach(uint64_t need, uint64_t lowest) const {
    uint64_t low = lowest, high = Key(1.0f, 0) + 1;  // weights are at most 1
    while (high - low > 1) {
      const uint64_t middle = low + (high - low) / 2;
      if (Measure<kCount>(middle) >= need) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }

  // Without truncation: the first id at which the mass in order of ids exceeds uniform x total.
  __device__ int32_t DrawById(double uniform) const {
    __shared__ uint64_t masses[kThreads];
    __shared__ int32_t drawn;
    const int64_t each = (vocab + kThreads - 1) / kThreads;
    const int64_t begin = threadIdx.x * each < vocab ? threadIdx.x * each : vocab;
    const int64_t end = begin + each < vocab ? begin + each : vocab;
    uint64_t mass = 0;
    for (int64_t id = begin; id < end; ++id) mass += Mass(id);
    masses[threadIdx.x] = mass;
    __syncthreads();
    for (int distance = 1; distance < kThreads; distance *= 2) {  // inclusive prefix sums
      const uint64_t before =
          static_cast<int>(threadIdx.x) >= distance ? masses[threadIdx.x - distance] : 0;
      __syncthreads();
      masses[threadIdx.x] += before;
      __syncthreads();
    }
    const auto target = static_cast<uint64_t>(uniform * static_cast<double>(masses[kThreads - 1]));
    uint64_t reached = masses[threadIdx.x] - mass;
    if (reached <= target && target < masses[threadIdx.x]) {
      for (int64_t id = begin; id < end; ++id) {
        reached += Mass(id);
        if (reached <= target) continue;
        drawn = static_cast<int32_t>(id);
        break;
      }
    }
    __syncthreads();
    return drawn;
  }

  __device__ int32_t Draw(const SampleRow& row, float maximum) const {
    Weigh(maximum, row.temperature);
    const double uniform = Uniform(row.seed, row.counter);
    const bool all = row.top_k <= 0 || row.top_k >= vocab;
    if (all && !(row.top_p < 1) && !(row.min_p > 0)) return DrawById(uniform);
    uint64_t cut = 0;
    if (!all) cut = Reach<true>(static_cast<uint64_t>(row.top_k), cut);
    if (row.top_p < 1) {
      const double mass = static_cast<double>(row.top_p) * static_cast<double>(Measure<false>(cut));
      const auto need = static_cast<uint64_t>(ceil(mass));
      cut = Reach<false>(need > 1 ? need : 1, cut);
    }
    if (row.min_p > 0) {
      const float least = row.min_p < 1 ? row.min_p : 1.0f;
      const uint64_t key = uint64_t{__float_as_uint(least) | 0x80000000u} << 32;
      cut = cut < key ? key : cut;
    }
    const auto target =
        static_cast<uint64_t>(uniform * static_cast<double>(Measure<false>(cut)));
    return IdOf(Reach<false>(target + 1, cut));
  }
};

// Counts what has been settled; adjusted[vocab] = the logits that the row is drawn by. All threads
// of the block together.
__device__ void Adjust(const SampleRow& row, const float* logits, int64_t vocab, float* adjusted) {
  DrawState& state = *row.state;
  uint32_t* const counts = DrawCounts(&state);
  const uint64_t recent_begin = row.counter - static_cast<uint64_t>(row.num_recent);
  if (threadIdx.x == 0) {
    for (int32_t i = 1; i <= row.num_settled; ++i) {
      ++counts[state.recent[(recent_begin - i) % kRecentTokens]];
    }
  }
  __syncthreads();
  for (int64_t id = threadIdx.x; id < vocab; id += kThreads) {
    uint32_t seen = counts[id];
    for (uint64_t pos = recent_begin; pos < row.counter; ++pos) {
      if (state.recent[pos % kRecentTokens] == id) ++seen;
    }
    float x = logits[id];
    if (seen != 0) {
      x = x > 0 ? __fdiv_rn(x, row.repetition_penalty) : __fmul_rn(x, row.repetition_penalty);
    }
    const uint32_t count = seen & ~kInPrompt;
    if (count > 0) {
      const float frequency = __fmul_rn(static_cast<float>(count), row.frequency_penalty);
      x = __fsub_rn(x, __fadd_rn(frequency, row.presence_penalty));
    }
    adjusted[id] = x;
  }
  __syncthreads();
  for (int32_t i = threadIdx.x; i < state.num_bias; i += kThreads) {
    adjusted[state.bias[i].token_id] += state.bias[i].bias;
  }
  __syncthreads();
  if (row.counter < state.held_back_end) {
    for (int32_t i = threadIdx.x; i < state.num_held_back; i += kThreads) {
      adjusted[state.held_back[i]] = -CUDART_MAX_NORMAL_F;
    }
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kThreads) SampleKernel(SampleArgs a) {
  __shared__ uint64_t shared64[kWarp];
  __shared__ float shared32[kWarp];
  const SampleRow what = a.rows.device[blockIdx.x];
  const int64_t scratch_floats = 2 * a.vocab;  // SampleScratchFloats()
  const Row row = {a.logits + blockIdx.x * a.vocab, a.vocab,
                   a.scratch + blockIdx.x * scratch_floats, shared64, shared32};
  SampleResult& result = a.results[what.result_index];
  const bool writes = threadIdx.x == 0;
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
    const float maximum = row.logits[token];
    Row drawn_by = row;
    float likeliest = maximum;
    if (what.state != nullptr) {
      float* const adjusted = row.weights + a.vocab;
      Adjust(what, row.logits, a.vocab, adjusted);
      drawn_by.logits = adjusted;
      token = IdOf(drawn_by.Next(~uint64_t{0}));
      likeliest = adjusted[token];
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
      result.top_logprobs[i] = row.logits[IdOf(key)] - maximum - lse;
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
  return LaunchOn(stream, SampleKernel, dim3(args.rows.count), kThreads, 0, args);
}

cudaError_t LoadSample() { return LoadDecodeKernel(SampleKernel); }

}  // namespace headroom::kernels::cuda
