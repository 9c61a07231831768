// Norm, activation, rotation, embedding and moves: everything that is bound by memory and small.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/cpu/kernels.h"

namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE {

namespace {

struct NormWeight {
  const BFloat16* data;
  float offset = 0;
};

// write(i, value, vector or float) gets the normalised x, times the weights; it may write to x[i].
template <typename Write>
void NormRow(const float* x, NormWeight weight, int64_t size, float epsilon, Write&& write) {
  const int64_t whole = size / kLanes * kLanes;
  F32x16 sum = Zero();
  for (int64_t i = 0; i < whole; i += kLanes) {
    const F32x16 v = Load(x + i);
    sum = Fma(v, v, sum);
  }
  float total = ReduceAdd(sum);
  for (int64_t i = whole; i < size; ++i) total = std::fma(x[i], x[i], total);
  const float scale = 1.0f / std::sqrt(total / static_cast<float>(size) + epsilon);
  for (int64_t i = 0; i < whole; i += kLanes) {
    write(i, Mul(Mul(Load(x + i), Broadcast(scale)),
                 Add(LoadBf16(weight.data + i), Broadcast(weight.offset))));
  }
  for (int64_t i = whole; i < size; ++i) {
    write(i, x[i] * scale * (ToFloat(weight.data[i]) + weight.offset));
  }
}

// Writes to out[i]; with `add`, what was there is added.
struct ToRow {
  float* out;
  bool add = false;
  void operator()(int64_t i, F32x16 value) const {
    Store(out + i, add ? Add(Load(out + i), value) : value);
  }
  void operator()(int64_t i, float value) const { out[i] = add ? out[i] + value : value; }
};

}  // namespace

void RmsNorm(const RmsNormArgs& args, CpuTeam& team) {
  team.ForEach(args.rows, [&](int64_t row) {
    const int64_t from =
        args.row_index.device != nullptr ? args.row_index.device[row] : row;
    NormRow(args.x + from * args.hidden, {args.weight, args.weight_offset}, args.hidden, args.epsilon,
            ToRow{args.out.floats() + row * args.hidden, args.accumulate});
  });
}

namespace {

// silu(g) * u = g / (1 + exp(-g)) * u. Gates below -88, where exp(88) ends, are taken as -88: a result of
// -5e-37. A NaN stays one.
F32x16 SiluTimes(F32x16 gate, F32x16 up) {
  const F32x16 g = Max(Broadcast(-88.0f), gate);
  return Mul(Div(g, Add(Broadcast(1.0f), Exp(Sub(Zero(), g)))), up);
}

// Likewise: what goes into the exponential is taken as -88, the gate, which falls more slowly, as -16.
F32x16 GeluTimes(F32x16 gate, F32x16 up) {
  const F32x16 g = Max(Broadcast(-16.0f), gate);
  const F32x16 twice =
      Mul(g, Fma(Mul(g, g), Broadcast(kGeluCubic), Broadcast(kGeluLinear)));
  const F32x16 y = Max(Broadcast(-88.0f), twice);
  return Mul(Div(g, Add(Broadcast(1.0f), Exp(Sub(Zero(), y)))), up);
}

}  // namespace

void SwiGlu(const SwiGluArgs& args, CpuTeam& team) {
  const auto vector = args.activation == GateActivation::kSilu ? &SiluTimes : &GeluTimes;
  team.ForEach(args.rows, [&](int64_t row) {
    const float* gate = args.gate_up.floats() + row * 2 * args.width;
    const float* up = gate + args.width;
    float* out = args.out.floats() + row * args.width;
    int64_t i = 0;
    for (; i + kLanes <= args.width; i += kLanes) {
      Store(out + i, vector(Load(gate + i), Load(up + i)));
    }
    for (; i < args.width; ++i) {
      alignas(64) float lane[kLanes];
      Store(lane, vector(Broadcast(gate[i]), Broadcast(up[i])));
      out[i] = lane[0];
    }
  });
}

void Embed(const EmbedArgs& args, CpuTeam& team) {
  const int64_t k = args.table.k;
  team.ForEach(args.rows.count, [&](int64_t row) {
    const EmbedRow& what = args.rows.device[row];
    const int64_t id = what.token_id >= 0 ? what.token_id : args.last_tokens[what.slot];
    const BFloat16* from = args.table.data + PackedWeightIndex(k, id, 0);
    float* out = args.out + row * k;
    for (int64_t i = 0; i < k; ++i) out[i] = ToFloat(from[i * kPanelOutputs]) * args.scale;
  });
}

void SoftCap(const SoftCapArgs& args, CpuTeam& team) {
  team.ForEach(args.rows, [&](int64_t row) {
    float* const x = args.x + row * args.width;
    int64_t i = 0;
    for (; i + kLanes <= args.width; i += kLanes) Store(x + i, Capped(Load(x + i), args.cap));
    for (; i < args.width; ++i) {
      alignas(64) float lane[kLanes];
      Store(lane, Capped(Broadcast(x[i]), args.cap));
      x[i] = lane[0];
    }
  });
}

void RopeTable(const RopeTableArgs& args, CpuTeam& team) {
  const int32_t half = args.head_dim / 2;
  team.ForEach(args.positions.count, [&](int64_t row) {
    const auto position = static_cast<float>(args.positions.device[row]);
    float* cos_sin = args.cos_sin + row * args.head_dim;
    for (int32_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position * args.inverse_frequency[i]);
      cos_sin[i] = static_cast<float>(std::cos(angle));
      cos_sin[half + i] = static_cast<float>(std::sin(angle));
    }
  });
}

namespace {

// out[i], out[i + half] = the pair of `x` turned by the row's angle.
template <typename Write>
void Rotate(const float* x, const float* cos_sin, int32_t half, Write&& write) {
  for (int32_t i = 0; i < half; ++i) {
    const float c = cos_sin[i];
    const float s = cos_sin[half + i];
    write(i, x[i] * c - x[i + half] * s);
    write(i + half, x[i + half] * c + x[i] * s);
  }
}

// What a row of q, k and v gets before it is turned.
void BiasAndNorm(const RopeAppendArgs& args, float* qkv) {
  const int32_t d = args.head_dim;
  const int64_t rotated = int64_t{args.num_q_heads + args.num_kv_heads} * d;
  const int64_t width = rotated + int64_t{args.num_kv_heads} * d;
  if (args.bias != nullptr) {
    for (int64_t i = 0; i < width; i += kLanes) {
      Store(qkv + i, Add(Load(qkv + i), LoadBf16(args.bias + i)));
    }
  }
  if (args.q_norm == nullptr) return;
  for (int64_t i = 0; i < rotated; i += d) {
    const bool is_q = i < int64_t{args.num_q_heads} * d;
    NormRow(qkv + i, {is_q ? args.q_norm : args.k_norm}, d, args.norm_epsilon, ToRow{qkv + i});
  }
}

}  // namespace

void RopeAppend(const RopeAppendArgs& args, CpuTeam& team) {
  const int32_t d = args.head_dim;
  const int32_t half = d / 2;
  const int64_t width = int64_t{args.num_q_heads + 2 * args.num_kv_heads} * d;
  for (int32_t i = 0; i < args.items.count; ++i) {
    const AppendItem& item = args.items.device[i];
    const KvSpan& to = item.target;
    const KvLayout layout{to.capacity, d};
    team.ForEach(to.count, [&](int64_t at) {
      const int64_t row = item.row_begin + at;
      float* q = args.qkv + row * width;
      BiasAndNorm(args, q);
      const float* k = q + int64_t{args.num_q_heads} * d;
      const float* v = k + int64_t{args.num_kv_heads} * d;
      const float* cos_sin = args.cos_sin + row * d;
      for (int32_t head = 0; head < args.num_q_heads; ++head) {
        float* x = q + head * d;
        for (int32_t j = 0; j < half; ++j) {
          const float low = x[j] * cos_sin[j] - x[j + half] * cos_sin[half + j];
          x[j + half] = x[j + half] * cos_sin[j] + x[j] * cos_sin[half + j];
          x[j] = low;
        }
      }
      const int64_t kv_row = (to.first_pos + at - to.origin_pos) % to.capacity;
      for (int32_t head = to.kv_head_begin; head < to.kv_head_end; ++head) {
        auto* key = reinterpret_cast<BFloat16*>(
            to.base + layout.KeyOffset(head - to.kv_head_begin, kv_row));
        auto* value = reinterpret_cast<BFloat16*>(
            to.base + layout.ValueOffset(head - to.kv_head_begin, kv_row));
        Rotate(k + head * d, cos_sin, half,
               [&](int32_t j, float x) { key[j] = ToBFloat16(x); });
        for (int32_t j = 0; j < d; ++j) value[j] = ToBFloat16(v[head * d + j]);
      }
    });
  }
}

void CopyKvRows(const CopyKvRowsArgs& args, CpuTeam& team) {
  team.ForEach(args.items.count, [&](int64_t i) {
    const CopyKvItem& item = args.items.device[i];
    const KvSpan from = CopyKvSource(item, args.head_dim);
    const KvSpan& to = item.to;
    const KvLayout from_layout{from.capacity, args.head_dim};
    const KvLayout to_layout{to.capacity, args.head_dim};
    const int32_t heads = to.kv_head_end - to.kv_head_begin;
    for (int64_t done = 0; done < to.count;) {
      const int64_t from_row = (from.first_pos + done - from.origin_pos) % from.capacity;
      const int64_t to_row = (to.first_pos + done - to.origin_pos) % to.capacity;
      const int64_t run = std::min({to.count - done, from.capacity - from_row, to.capacity - to_row});
      for (int32_t head = 0; head < heads; ++head) {
        std::memcpy(to.base + to_layout.KeyOffset(head, to_row),
                    from.base + from_layout.KeyOffset(head, from_row), run * to_layout.RowBytes());
        std::memcpy(to.base + to_layout.ValueOffset(head, to_row),
                    from.base + from_layout.ValueOffset(head, from_row),
                    run * to_layout.RowBytes());
      }
      done += run;
    }
  });
}

}  // namespace headroom::kernels::cpu::HEADROOM_ISA_NAMESPACE
