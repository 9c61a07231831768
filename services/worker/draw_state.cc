#include "services/worker/draw_state.h"

#include <algorithm>
#include <new>

#include "absl/strings/str_cat.h"

namespace headroom {

absl::Status CheckHistory(const DrawHistory& history, int64_t vocab) {
  const auto known = [vocab](int32_t id) { return id >= 0 && id < vocab; };
  const auto wrong = [vocab](int32_t id) {
    return absl::InvalidArgumentError(
        absl::StrCat("history: token id ", id, " of a vocabulary of ", vocab));
  };
  for (const auto* ids :
       {&history.prompt_token_ids, &history.drawn_token_ids, &history.held_back_token_ids}) {
    const auto at = std::find_if_not(ids->begin(), ids->end(), known);
    if (at != ids->end()) return wrong(*at);
  }
  for (const kernels::TokenBias& bias : history.bias) {
    if (!known(bias.token_id)) return wrong(bias.token_id);
  }
  if (history.bias.size() > kernels::kMaxLogitBias ||
      history.held_back_token_ids.size() > kernels::kMaxHeldBack) {
    return absl::InvalidArgumentError(
        absl::StrCat("history: ", history.bias.size(), " biases and ",
                     history.held_back_token_ids.size(), " tokens held back, at most ",
                     kernels::kMaxLogitBias, " and ", kernels::kMaxHeldBack));
  }
  return absl::OkStatus();
}

void WriteDrawState(const DrawHistory& history, int64_t vocab, kernels::DrawState* out) {
  kernels::DrawState& state = *new (out) kernels::DrawState();
  std::copy(history.bias.begin(), history.bias.end(), state.bias);
  std::copy(history.held_back_token_ids.begin(), history.held_back_token_ids.end(),
            state.held_back);
  state.num_bias = static_cast<int32_t>(history.bias.size());
  state.num_held_back = static_cast<int32_t>(history.held_back_token_ids.size());
  state.held_back_end = static_cast<uint64_t>(history.held_back_end);
  uint32_t* const counts = kernels::DrawCounts(&state);
  std::fill(counts, counts + vocab, 0);
  for (const int32_t id : history.prompt_token_ids) counts[id] |= kernels::kInPrompt;
  for (const int32_t id : history.drawn_token_ids) ++counts[id];
}

}  // namespace headroom
