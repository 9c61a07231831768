// Picks the next token of each row from its logits, with log-probabilities.
//
// Log-probabilities are those of the model's own distribution (natural log, before temperature and
// truncation): logit - max - log(sum of exp(logit - max)), summed in a fixed order. Temperature 0 is
// greedy; ties go to the lowest id. Otherwise one uniform number, drawn from a counter-based
// generator (Philox-4x32-10, Salmon et al., SC 2011) at (seed, counter), selects from the tempered
// distribution after top-k, then top-p, then min-p: a repeated step draws the same token.
//
// A sequence whose draws go by more than the logits has a DrawState in device memory;
// log-probabilities stay the model's own. From the logit x of a token that is `count` times in the
// answer so far:
//   in the prompt or count > 0:  x = x > 0 ? x / repetition_penalty : x * repetition_penalty
//                                x -= count * frequency_penalty + (count > 0) * presence_penalty
//                                x += bias
// The repetition penalty is Keskar et al., arXiv 1909.05858; the other two are OpenAI's.
#ifndef HEADROOM_KERNELS_SAMPLE_H_
#define HEADROOM_KERNELS_SAMPLE_H_

#include "kernels/types.h"

namespace headroom::kernels {

class CpuTeam;

inline constexpr int32_t kMaxTopLogprobs = 20;
inline constexpr int32_t kMaxLogitBias = 1024;
inline constexpr int32_t kMaxHeldBack = 128;
// More than there can be steps of one sequence in flight.
inline constexpr int32_t kRecentTokens = 16;

struct TokenBias {
  int32_t token_id = 0;
  float bias = 0;
};

// Steps run ahead of their answers, and some are discarded and run again. So a drawn token is
// written to recent[position % kRecentTokens], which repeating does not change, and only tokens
// that are final are counted, each once: SampleRow::num_settled.
struct DrawState {
  int32_t recent[kRecentTokens] = {};
  TokenBias bias[kMaxLogitBias];  // distinct ids
  int32_t held_back[kMaxHeldBack] = {};  // not drawn before the position held_back_end
  int32_t num_bias = 0;
  int32_t num_held_back = 0;
  uint64_t held_back_end = 0;
  // Follows: uint32_t [vocab], how often each token is in the answer, kInPrompt beside it.
};
inline constexpr uint32_t kInPrompt = uint32_t{1} << 31;

inline constexpr int64_t DrawStateBytes(int64_t vocab) {
  return static_cast<int64_t>(sizeof(DrawState)) + vocab * static_cast<int64_t>(sizeof(uint32_t));
}
HEADROOM_HOST_DEVICE inline uint32_t* DrawCounts(DrawState* state) {
  return reinterpret_cast<uint32_t*>(state + 1);
}

struct SampleRow {
  uint64_t seed = 0;
  uint64_t counter = 0;   // the position of the token that is drawn
  float temperature = 0;  // 0: greedy
  float top_p = 1;        // keep the smallest set of likeliest tokens that reaches this; >= 1: all
  float min_p = 0;        // 0 to 1: drop tokens less likely than min_p x the likeliest; 0: none
  int32_t top_k = 0;      // 0: all
  int32_t num_top_logprobs = 0;  // 0 .. kMaxTopLogprobs
  // >= 0: nothing is drawn; the log-probability of this token is reported (prompt scoring).
  int32_t forced_token = -1;
  int32_t slot = -1;  // >= 0: the drawn token is also stored in last_tokens[slot]
  // Rows of a call may be spread over several launches: the result goes to results[result_index].
  int32_t result_index = 0;
  // Where there is a state, the tokens at the num_recent positions before `counter` are read from
  // its ring; the num_settled ones before these, in the ring too, are counted first.
  DrawState* state = nullptr;  // arena, DrawStateBytes(vocab); null: drawn by the logits alone
  int32_t num_settled = 0;
  int32_t num_recent = 0;
  float repetition_penalty = 1;  // more than 0; 1: none
  float frequency_penalty = 0;
  float presence_penalty = 0;
};

struct SampleResult {
  int32_t token_id = 0;
  float logprob = 0;
  int32_t non_finite = 0;  // 1: a logit of this row was NaN or infinite; token_id is 0
  int32_t num_top = 0;
  int32_t top_ids[kMaxTopLogprobs] = {};  // likeliest first; ties: lower id first
  float top_logprobs[kMaxTopLogprobs] = {};
};

struct SampleArgs {
  const float* logits = nullptr;  // [rows.count, vocab]
  Table<SampleRow> rows;
  SampleResult* results = nullptr;  // [num_results]
  int32_t num_results = 0;
  int32_t* last_tokens = nullptr;  // [num_slots]
  int32_t num_slots = 0;
  int64_t vocab = 0;
  float* scratch = nullptr;  // [rows.count, SampleScratchFloats(vocab)]
};

HEADROOM_HOST_DEVICE inline constexpr int64_t SampleScratchFloats(int64_t vocab) { return 2 * vocab; }

template <typename F>
void ForEachRange(const SampleArgs& a, F&& f) {
  constexpr int64_t kFloat = sizeof(float);
  f(a.logits, a.rows.count * a.vocab * kFloat, Access::kRead);
  f(a.rows.device, a.rows.count * static_cast<int64_t>(sizeof(SampleRow)), Access::kRead);
  f(a.results, a.num_results * static_cast<int64_t>(sizeof(SampleResult)), Access::kWrite);
  f(a.last_tokens, a.num_slots * static_cast<int64_t>(sizeof(int32_t)), Access::kWrite);
  f(a.scratch, a.rows.count * SampleScratchFloats(a.vocab) * kFloat, Access::kWrite);
  for (int32_t i = 0; i < a.rows.count; ++i) {
    DrawState* const state = a.rows.host[i].state;
    if (state != nullptr) f(state, DrawStateBytes(a.vocab), Access::kReadWrite);
  }
}

namespace cpu {
void Sample(const SampleArgs& args, CpuTeam& team);
}
namespace reference {
void Sample(const SampleArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_SAMPLE_H_
