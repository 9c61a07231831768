// Log-probabilities and the draw of a token; sample.h states the distribution.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {
namespace {

struct Candidate {
  float weight;  // or logit: anything that grows with the likelihood
  int32_t id;
};
static_assert(sizeof(Candidate) == 2 * sizeof(float));

bool Likelier(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.id < b.id;
}

// Philox-4x32-10 at counter {counter, 0}, key seed: one uniform number in [0, 1) of 24 bits.
float Uniform(uint64_t seed, uint64_t counter) {
  uint32_t c[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0];
    const uint64_t b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0],
                              static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1],
                              static_cast<uint32_t>(a)};
    std::copy(next, next + 4, c);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return static_cast<float>(c[0] >> 8) * 0x1p-24f;
}

// Maximum (lowest id on ties) of the row; false if a logit is not finite.
bool Maximum(const float* logits, int64_t vocab, float& maximum, int32_t& id) {
  maximum = logits[0];
  id = 0;
  // A sum of x * 0 is NaN exactly if some x is NaN or infinite.
  F32x16 zeros = Zero();
  F32x16 top = Broadcast(-std::numeric_limits<float>::infinity());
  const int64_t whole = vocab / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F32x16 x = Load(logits + i);
    zeros = Fma(x, Zero(), zeros);
    top = Max(top, x);
  }
  float check = ReduceAdd(zeros);
  maximum = ReduceMax(top);
  for (int64_t i = whole; i < vocab; ++i) {
    check += logits[i] * 0.0f;
    maximum = std::max(maximum, logits[i]);
  }
  if (check != 0.0f) return false;
  id = static_cast<int32_t>(std::find(logits, logits + vocab, maximum) - logits);
  return true;
}

float LogSumExp(const float* logits, int64_t vocab, float maximum) {
  F32x16 sum = Zero();
  const int64_t whole = vocab / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes) {
    sum = Add(sum, Exp(Sub(Load(logits + i), Broadcast(maximum))));
  }
  float total = ReduceAdd(sum);
  for (int64_t i = whole; i < vocab; ++i) total += Exp(logits[i] - maximum);
  return std::log(total);
}

// The likeliest `count` tokens, kept sorted by insertion.
void TopTokens(const float* logits, int64_t vocab, int32_t count, float maximum, float lse,
               SampleResult& result) {
  Candidate top[kMaxTopLogprobs];
  int32_t have = 0;
  for (int64_t id = 0; id < vocab; ++id) {
    const Candidate candidate{logits[id], static_cast<int32_t>(id)};
    if (have == count && !Likelier(candidate, top[have - 1])) continue;
    int32_t at = have < count ? have++ : have - 1;
    for (; at > 0 && Likelier(candidate, top[at - 1]); --at) top[at] = top[at - 1];
    top[at] = candidate;
  }
  result.num_top = have;
  for (int32_t i = 0; i < have; ++i) {
    result.top_ids[i] = top[i].id;
    result.top_logprobs[i] = top[i].weight - maximum - lse;
  }
}

// weights[id] = exp((logit - maximum) / temperature), at most 1; returns their sum.
double Weigh(const float* logits, int64_t vocab, float maximum, float temperature,
             float* weights) {
  int64_t id = 0;
  for (; id + kLanes <= vocab; id += kLanes) {
    const F32x16 below = Sub(Load(logits + id), Broadcast(maximum));
    Store(weights + id, Exp(Div(below, Broadcast(temperature))));
  }
  for (; id < vocab; ++id) weights[id] = Exp((logits[id] - maximum) / temperature);
  double total = 0;
  for (id = 0; id < vocab; ++id) total += static_cast<double>(weights[id]);
  return total;
}

// The first index at which the sum of weight(0), weight(1), ... exceeds `target`, at most count - 1.
template <typename Weight>
int64_t Select(int64_t count, double target, Weight&& weight) {
  double reached = 0;
  for (int64_t i = 0; i < count - 1; ++i) {
    reached += static_cast<double>(weight(i));
    if (reached > target) return i;
  }
  return count - 1;
}

int32_t Draw(const float* logits, int64_t vocab, const SampleRow& row, float maximum,
             float* scratch) {
  const float* weights = scratch + vocab;
  double total = Weigh(logits, vocab, maximum, row.temperature, scratch + vocab);
  const double uniform = static_cast<double>(Uniform(row.seed, row.counter));
  const bool all = row.top_k <= 0 || row.top_k >= vocab;
  if (all && !(row.top_p < 1) && !(row.min_p > 0)) {
    return static_cast<int32_t>(
        Select(vocab, uniform * total, [&](int64_t i) { return weights[i]; }));
  }
  // Without top-k, what cannot survive is not sorted: tokens lighter than the mean of the (1 - top_p)
  // that may be dropped are in the dropped part (half of it, to be clear of rounding). The likeliest
  // token weighs 1 and stays.
  const double least = row.min_p > 0 ? row.min_p : 0;
  double floor = 0;
  if (all) {
    floor = row.top_p < 1 ? 0.5 * (1 - row.top_p) * total / static_cast<double>(vocab) : 0;
    floor = std::min(1.0, std::max(floor, least));
  }
  // Candidate c takes the place of floats that were read: its two lie below weights[id], id >= c.
  auto* candidates = reinterpret_cast<Candidate*>(scratch);
  int64_t kept = 0;
  for (int64_t id = 0; id < vocab; ++id) {
    if (static_cast<double>(weights[id]) >= floor) {
      candidates[kept++] = {weights[id], static_cast<int32_t>(id)};
    }
  }
  const int64_t sorted = all ? kept : row.top_k;
  std::partial_sort(candidates, candidates + sorted, candidates + kept, Likelier);
  kept = sorted;
  const auto weight = [&](int64_t i) { return candidates[i].weight; };
  if (!all) {
    total = 0;
    for (int64_t i = 0; i < kept; ++i) total += static_cast<double>(weight(i));
  }
  if (row.top_p < 1) {
    double reached = 0;
    int64_t i = 0;
    while (i < kept && reached < row.top_p * total) reached += static_cast<double>(weight(i++));
    kept = std::max<int64_t>(i, 1);
  }
  while (kept > 1 && static_cast<double>(weight(kept - 1)) < least) --kept;
  total = 0;
  for (int64_t i = 0; i < kept; ++i) total += static_cast<double>(weight(i));
  return candidates[Select(kept, uniform * total, weight)].id;
}

int32_t& Recent(DrawState& state, uint64_t pos) { return state.recent[pos % kRecentTokens]; }

// Counts what has been settled; adjusted[vocab] = the logits that the row is drawn by.
void Adjust(const SampleRow& row, const float* logits, int64_t vocab, float* adjusted) {
  DrawState& state = *row.state;
  uint32_t* const counts = DrawCounts(&state);
  const uint64_t recent_begin = row.counter - static_cast<uint64_t>(row.num_recent);
  for (int32_t i = 1; i <= row.num_settled; ++i) ++counts[Recent(state, recent_begin - i)];
  const auto penalise = [&](int64_t id, uint32_t seen) {
    float x = logits[id];
    if (seen != 0) x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    const uint32_t count = seen & ~kInPrompt;
    if (count > 0) {
      x -= static_cast<float>(count) * row.frequency_penalty + row.presence_penalty;
    }
    return x;
  };
  for (int64_t id = 0; id < vocab; ++id) adjusted[id] = penalise(id, counts[id]);
  for (uint64_t pos = recent_begin; pos < row.counter; ++pos) {
    const int32_t id = Recent(state, pos);
    uint32_t seen = counts[id];
    for (uint64_t other = recent_begin; other < row.counter; ++other) {
      if (Recent(state, other) == id) ++seen;
    }
    adjusted[id] = penalise(id, seen);
  }
  for (int32_t i = 0; i < state.num_bias; ++i) {
    adjusted[state.bias[i].token_id] += state.bias[i].bias;
  }
  if (row.counter >= state.held_back_end) return;
  for (int32_t i = 0; i < state.num_held_back; ++i) {
    adjusted[state.held_back[i]] = std::numeric_limits<float>::lowest();
  }
}

}  // namespace

void Sample(const SampleArgs& args, CpuTeam& team) {
  team.ForEach(args.rows.count, [&](int64_t i) {
    const SampleRow& row = args.rows.device[i];
    const float* logits = args.logits + i * args.vocab;
    SampleResult& result = args.results[row.result_index];
    result.non_finite = result.num_top = 0;
    float maximum;
    if (!Maximum(logits, args.vocab, maximum, result.token_id)) {
      result.non_finite = 1;
      result.token_id = 0;
      result.logprob = 0;
    } else {
      float* const scratch = args.scratch + i * SampleScratchFloats(args.vocab);
      const float* drawn_by = logits;
      float likeliest = maximum;
      if (row.state != nullptr) {  // in the half of the scratch that Draw() writes to last
        Adjust(row, logits, args.vocab, scratch);
        drawn_by = scratch;
        Maximum(drawn_by, args.vocab, likeliest, result.token_id);
      }
      if (row.forced_token >= 0) {
        result.token_id = row.forced_token;
      } else if (row.temperature > 0) {
        result.token_id = Draw(drawn_by, args.vocab, row, likeliest, scratch);
      }
      if (row.state != nullptr) Recent(*row.state, row.counter) = result.token_id;
      const float lse = LogSumExp(logits, args.vocab, maximum);
      result.logprob = logits[result.token_id] - maximum - lse;
      if (row.num_top_logprobs > 0) {
        TopTokens(logits, args.vocab, std::min(row.num_top_logprobs, kMaxTopLogprobs), maximum,
                  lse, result);
      }
    }
    if (row.slot >= 0) args.last_tokens[row.slot] = result.token_id;
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
