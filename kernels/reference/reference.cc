// Plain versions of every operation: obviously right, in float64 where sums are formed. The oracle
// of the tests; never on a serving path.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numbers>
#include <vector>

#include "kernels/attention.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/embed.h"
#include "kernels/fill_random.h"
#include "kernels/gemm.h"
#include "kernels/merge_partials.h"
#include "kernels/rms_norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"
#include "kernels/soft_cap.h"
#include "kernels/swiglu.h"

namespace headroom::kernels::reference {
namespace {

const BFloat16* Key(const KvSpan& span, int32_t head, int64_t pos, int32_t d) {
  return reinterpret_cast<const BFloat16*>(
      span.base + KvLayout{span.capacity, d}.KeyOffset(head - span.kv_head_begin,
                                                       (pos - span.origin_pos) % span.capacity));
}
const BFloat16* Value(const KvSpan& span, int32_t head, int64_t pos, int32_t d) {
  return reinterpret_cast<const BFloat16*>(
      span.base + KvLayout{span.capacity, d}.ValueOffset(head - span.kv_head_begin,
                                                         (pos - span.origin_pos) % span.capacity));
}

}  // namespace

void Gemm(const GemmArgs& g) {
  for (int64_t m = 0; m < g.m; ++m) {
    for (int64_t n = 0; n < g.w.n; ++n) {
      float sum = 0;
      for (int64_t k = 0; k < g.w.k; ++k) {
        sum = std::fma(g.a.Get(m * g.a_stride + k),
                       ToFloat(g.w.data[PackedWeightIndex(g.w.k, n, k)]), sum);
      }
      const int64_t at = m * g.c_stride + n;
      g.c.Set(at, g.accumulate ? g.c.Get(at) + sum : sum);
    }
  }
}

void FillRandom(const FillRandomArgs& a) {
  const int64_t padded_rows = PackedWeightBytes(a.n, a.k) / (a.k * 2);
  for (int64_t row = 0; row < padded_rows; ++row) {
    for (int64_t column = 0; column < a.k; ++column) {
      const int64_t i = row * a.k + column;
      const uint64_t four = SplitMix64(a.seed, static_cast<uint64_t>(i / 4));
      const float value = a.scale * UniformOf16Bits(four >> (16 * (i % 4)));
      a.out[PackedWeightIndex(a.k, row, column)] = row < a.n ? ToBFloat16(value) : BFloat16();
    }
  }
}

void RmsNorm(const RmsNormArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    const int64_t from = args.row_index.device != nullptr ? args.row_index.device[row] : row;
    const float* x = args.x + from * args.hidden;
    double sum = 0;
    for (int64_t i = 0; i < args.hidden; ++i) sum += static_cast<double>(x[i]) * x[i];
    const double scale = 1 / std::sqrt(sum / static_cast<double>(args.hidden) + args.epsilon);
    for (int64_t i = 0; i < args.hidden; ++i) {
      const double value = x[i] * scale * (ToFloat(args.weight[i]) + args.weight_offset);
      const int64_t at = row * args.hidden + i;
      args.out.Set(at, static_cast<float>(args.accumulate ? args.out.Get(at) + value : value));
    }
  }
}

void SwiGlu(const SwiGluArgs& args) {
  for (int64_t row = 0; row < args.rows; ++row) {
    for (int64_t i = 0; i < args.width; ++i) {
      const double gate = args.gate_up.Get(row * 2 * args.width + i);
      const double up = args.gate_up.Get(row * 2 * args.width + args.width + i);
      const double y = std::sqrt(2 / std::numbers::pi) * (gate + 0.044715 * gate * gate * gate);
      const double act = args.activation == GateActivation::kSilu ? gate / (1 + std::exp(-gate))
                                                                  : gate / 2 * (1 + std::tanh(y));
      args.out.Set(row * args.width + i, static_cast<float>(act * up));
    }
  }
}

void Embed(const EmbedArgs& args) {
  for (int64_t row = 0; row < args.rows.count; ++row) {
    const EmbedRow& what = args.rows.device[row];
    const int64_t id = what.token_id >= 0 ? what.token_id : args.last_tokens[what.slot];
    for (int64_t i = 0; i < args.table.k; ++i) {
      args.out[row * args.table.k + i] =
          ToFloat(args.table.data[PackedWeightIndex(args.table.k, id, i)]) * args.scale;
    }
  }
}

void SoftCap(const SoftCapArgs& args) {
  for (int64_t i = 0; i < args.rows * args.width; ++i) {
    const double cap = args.cap;
    args.x[i] = static_cast<float>(cap * std::tanh(args.x[i] / cap));
  }
}

void RopeTable(const RopeTableArgs& args) {
  const int32_t half = args.head_dim / 2;
  for (int64_t row = 0; row < args.positions.count; ++row) {
    for (int32_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(static_cast<float>(args.positions.device[row]) *
                                               args.inverse_frequency[i]);
      args.cos_sin[row * args.head_dim + i] = static_cast<float>(std::cos(angle));
      args.cos_sin[row * args.head_dim + half + i] = static_cast<float>(std::sin(angle));
    }
  }
}

void RopeAppend(const RopeAppendArgs& args) {
  const int32_t d = args.head_dim;
  const int32_t half = d / 2;
  const int64_t width = int64_t{args.num_q_heads + 2 * args.num_kv_heads} * d;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const AppendItem& item = args.items.device[i];
    for (int64_t at = 0; at < item.target.count; ++at) {
      const int64_t row = item.row_begin + at;
      float* const base = args.qkv + row * width;
      for (int64_t j = 0; args.bias != nullptr && j < width; ++j) base[j] += ToFloat(args.bias[j]);
      for (int32_t head = 0; args.q_norm != nullptr && head < args.num_q_heads + args.num_kv_heads;
           ++head) {
        const BFloat16* weight = head < args.num_q_heads ? args.q_norm : args.k_norm;
        RmsNorm({base + head * d, 1, weight, base + head * d, 1, d, args.norm_epsilon, {}});
      }
      const float* cos_sin = args.cos_sin + row * d;
      const auto rotated = [&](const float* x, int32_t j) {
        const int32_t pair = j % half;
        return j < half ? x[pair] * cos_sin[pair] - x[pair + half] * cos_sin[half + pair]
                        : x[pair + half] * cos_sin[pair] + x[pair] * cos_sin[half + pair];
      };
      for (int32_t head = 0; head < args.num_q_heads; ++head) {
        std::vector<float> turned(d);
        for (int32_t j = 0; j < d; ++j) turned[j] = rotated(base + head * d, j);
        std::copy(turned.begin(), turned.end(), base + head * d);
      }
      const float* k = base + int64_t{args.num_q_heads} * d;
      const float* v = k + int64_t{args.num_kv_heads} * d;
      for (int32_t head = 0; head < args.num_kv_heads; ++head) {
        const int64_t pos = item.target.first_pos + at;
        auto* key = const_cast<BFloat16*>(Key(item.target, head, pos, d));
        auto* value = const_cast<BFloat16*>(Value(item.target, head, pos, d));
        for (int32_t j = 0; j < d; ++j) {
          key[j] = ToBFloat16(rotated(k + head * d, j));
          value[j] = ToBFloat16(v[head * d + j]);
        }
      }
    }
  }
}

void CopyKvRows(const CopyKvRowsArgs& args) {
  const KvLayout row{1, args.head_dim};
  for (int32_t i = 0; i < args.items.count; ++i) {
    const CopyKvItem& item = args.items.device[i];
    for (int32_t head = item.to.kv_head_begin; head < item.to.kv_head_end; ++head) {
      for (int64_t pos = item.to.first_pos; pos < item.to.first_pos + item.to.count; ++pos) {
        std::memcpy(const_cast<BFloat16*>(Key(item.to, head, pos, args.head_dim)),
                    Key(item.from, head, pos, args.head_dim), row.RowBytes());
        std::memcpy(const_cast<BFloat16*>(Value(item.to, head, pos, args.head_dim)),
                    Value(item.from, head, pos, args.head_dim), row.RowBytes());
      }
    }
  }
}

// Whole softmax over all keys of one launch; REQUIRES: every item resets and finishes.
void Attend(const AttendArgs& args) {
  const int32_t d = args.head_dim;
  const int32_t group = args.num_q_heads / args.num_kv_heads;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const AttendItem& item = args.items.device[i];
    for (int32_t q_head = item.kv_head_begin * group; q_head < item.kv_head_end * group; ++q_head) {
      for (int64_t row = 0; row < item.row_count; ++row) {
        const float* q = args.q + (item.row_begin + row) * args.q_stride + int64_t{q_head} * d;
        std::vector<double> scores;
        std::vector<const BFloat16*> values;
        for (int32_t s = 0; s < item.span_count; ++s) {
          const KvSpan& span = args.spans.device[item.span_begin + s];
          for (int64_t pos = span.first_pos; pos < span.first_pos + span.count; ++pos) {
            if (pos > item.first_pos + row) continue;
            if (args.window != 0 && pos <= item.first_pos + row - args.window) continue;
            const BFloat16* key = Key(span, q_head / group, pos, d);
            double score = 0;
            for (int32_t j = 0; j < d; ++j) score += static_cast<double>(q[j]) * ToFloat(key[j]);
            score *= args.scale;
            if (args.soft_cap != 0) score = args.soft_cap * std::tanh(score / args.soft_cap);
            scores.push_back(score);
            values.push_back(Value(span, q_head / group, pos, d));
          }
        }
        const double top = *std::max_element(scores.begin(), scores.end());
        double total = 0;
        std::vector<double> out(d, 0);
        for (size_t k = 0; k < scores.size(); ++k) {
          const double weight = std::exp(scores[k] - top);
          total += weight;
          for (int32_t j = 0; j < d; ++j) out[j] += weight * ToFloat(values[k][j]);
        }
        const int64_t at = ((item.row_begin + row) * args.num_q_heads + q_head) * d;
        for (int32_t j = 0; j < d; ++j) args.out.Set(at + j, static_cast<float>(out[j] / total));
      }
    }
  }
}

// In float64 from both states' parts: {R, U} of each, exact but for the last rounding.
void MergePartials(const MergePartialsArgs& args) {
  const int32_t d = args.head_dim;
  const int64_t state_floats = AttentionStateFloats(d);
  const int32_t group = args.num_q_heads / args.num_kv_heads;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const MergeItem& item = args.items.device[i];
    for (int64_t row = item.row_begin; row < item.row_begin + item.row_count; ++row) {
      for (int32_t q_head = item.kv_head_begin * group; q_head < item.kv_head_end * group;
           ++q_head) {
        const int64_t at = row * args.num_q_heads + q_head;
        float* const state = args.state + at * state_floats;
        const float* const partial = args.partials + at * state_floats;
        if (item.reset != 0) std::copy(partial, partial + state_floats, state);
        // Each {o[d], m, l}; those with l = 0 hold nothing.
        std::vector<const float*> parts = {state, state + d + 2};
        if (item.reset == 0) parts = {partial, partial + d + 2, state};
        const auto sum = [&](std::vector<double>& o, double* l) {
          double m = -std::numeric_limits<double>::infinity();
          for (const float* part : parts) {
            if (part[d + 1] != 0) m = std::max<double>(m, part[d]);
          }
          for (const float* part : parts) {
            if (part[d + 1] == 0) continue;
            const double weight = std::exp(part[d] - m);
            *l += weight * part[d + 1];
            for (int32_t j = 0; j < d; ++j) o[j] += weight * part[j];
          }
          return m;
        };
        if (item.reset == 0) {
          std::vector<double> o(d, 0);
          double l = 0;
          const double m = sum(o, &l);
          for (int32_t j = 0; j < d; ++j) state[j] = static_cast<float>(o[j]);
          state[d] = static_cast<float>(m);
          state[d + 1] = static_cast<float>(l);
          parts = {state, state + d + 2};
        }
        if (item.finish == 0) continue;
        std::vector<double> o(d, 0);
        double l = 0;
        sum(o, &l);
        for (int32_t j = 0; j < d; ++j) args.out.Set(at * d + j, static_cast<float>(o[j] / l));
      }
    }
  }
}

namespace {

// The logits that a row is drawn by, after what has been settled is counted.
std::vector<double> Adjusted(const SampleRow& row, const float* logits, int64_t vocab) {
  DrawState& state = *row.state;
  uint32_t* const counts = DrawCounts(&state);
  const auto recent = [&](int64_t pos) { return state.recent[pos % kRecentTokens]; };
  const auto end = static_cast<int64_t>(row.counter);
  for (int64_t pos = end - row.num_recent - row.num_settled; pos < end - row.num_recent; ++pos) {
    ++counts[recent(pos)];
  }
  std::vector<uint32_t> seen(counts, counts + vocab);
  for (int64_t pos = end - row.num_recent; pos < end; ++pos) ++seen[recent(pos)];
  std::vector<double> adjusted(logits, logits + vocab);
  for (int64_t id = 0; id < vocab; ++id) {
    double& x = adjusted[id];
    const uint32_t count = seen[id] & ~kInPrompt;
    if (seen[id] != 0) x = x > 0 ? x / row.repetition_penalty : x * row.repetition_penalty;
    x -= static_cast<double>(count) * row.frequency_penalty;
    if (count > 0) x -= row.presence_penalty;
  }
  for (int32_t i = 0; i < state.num_bias; ++i) {
    adjusted[state.bias[i].token_id] += state.bias[i].bias;
  }
  for (int32_t i = 0; i < state.num_held_back && row.counter < state.held_back_end; ++i) {
    adjusted[state.held_back[i]] = -std::numeric_limits<double>::infinity();
  }
  return adjusted;
}

}  // namespace

// Log-probabilities, greedy and forced rows; a tempered draw has no second source of randomness to
// be compared with, and is tested by its distribution.
void Sample(const SampleArgs& args) {
  for (int32_t i = 0; i < args.rows.count; ++i) {
    const SampleRow& row = args.rows.device[i];
    const float* logits = args.logits + i * args.vocab;
    SampleResult& result = args.results[row.result_index];
    result = SampleResult();
    std::vector<int32_t> order(args.vocab);
    for (int32_t id = 0; id < args.vocab; ++id) order[id] = id;
    std::stable_sort(order.begin(), order.end(),
                     [&](int32_t a, int32_t b) { return logits[a] > logits[b]; });
    double total = 0;
    for (int64_t id = 0; id < args.vocab; ++id) {
      if (!std::isfinite(logits[id])) result.non_finite = 1;
      total += std::exp(static_cast<double>(logits[id]) - logits[order[0]]);
    }
    if (result.non_finite == 0) {
      const double lse = logits[order[0]] + std::log(total);
      result.token_id = order[0];
      if (row.state != nullptr) {
        const std::vector<double> adjusted = Adjusted(row, logits, args.vocab);
        const auto best = std::max_element(adjusted.begin(), adjusted.end());
        result.token_id = static_cast<int32_t>(best - adjusted.begin());
      }
      if (row.forced_token >= 0) result.token_id = row.forced_token;
      if (row.state != nullptr) row.state->recent[row.counter % kRecentTokens] = result.token_id;
      result.logprob = static_cast<float>(logits[result.token_id] - lse);
      result.num_top = static_cast<int32_t>(std::min<int64_t>(row.num_top_logprobs, args.vocab));
      for (int32_t t = 0; t < result.num_top; ++t) {
        result.top_ids[t] = order[t];
        result.top_logprobs[t] = static_cast<float>(logits[order[t]] - lse);
      }
    }
    if (row.slot >= 0) args.last_tokens[row.slot] = result.token_id;
  }
}

}  // namespace headroom::kernels::reference
