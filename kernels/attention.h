// Exact attention over keys that arrive in pieces.
//
// For every (row, q_head) a state is carried in float32 across launches:
//   R: the fold of all finished units, U: the open unit; each {m, l, o[head_dim]} with
//   m = max of the scaled scores (natural units), l = sum of exp(score - m), o = sum of
//   exp(score - m) * v, not divided by l.
// Keys are taken in ascending position. Inside a unit of kUnitTokens absolute positions blocks of
// kBlockTokens keys are folded by online softmax (Milakov and Gimelshein, arXiv 1805.02867) from an
// empty U; at the unit's border U is folded into R (Rabe and Staats, arXiv 2112.05682). So the bits
// depend on the row's own keys only: not on which lane or launch brought them, on chunk borders, on
// other rows or on the number of threads. Folding with an empty state (m = -inf, l = 0) is the
// identity.
//
// (On a GPU, rows of up to 512 queries a KV head: U is the fold of its blocks, each from empty.)
//
// Masking is causal by absolute position: a row at position p sees keys <= p, with a window of w of them
// those > p - w. A score is q . k * scale, or, with a soft cap c, c * tanh(q . k * scale / c).
//
// A device may have a faster way for items of at least kWideRows rows (kernels/wide_shape.h), which
// rounds q, p and each piece's result to bfloat16 and cuts keys at multiples of kWidePieceTokens, and where some
// rows' windows begin; then the bits of such rows depend on the item's first_pos and row_count, and on where
// launches end, too.
// The states it leaves have an empty U.
#ifndef HEADROOM_KERNELS_ATTENTION_H_
#define HEADROOM_KERNELS_ATTENTION_H_

#include "kernels/types.h"
#include "kernels/wide_shape.h"

namespace headroom::kernels {

class CpuTeam;

// The most query heads that may share a KV head.
inline constexpr int32_t kMaxGqaGroup = 64;

// Floats of the state of one (row, q_head): R and U, each [o: head_dim][m][l].
HEADROOM_HOST_DEVICE inline constexpr int64_t AttentionStateFloats(int32_t head_dim) {
  return 2 * (head_dim + 2);
}

// Rows of one sequence against consecutive spans of keys, for some KV heads. Spans are
// spans[span_begin, span_begin + span_count), ascending in position, each a run of whole blocks
// except that the last may end inside one; each covers the heads [kv_head_begin, kv_head_end). The
// keys of a launch go on where those of the rows' launch before ended, unless it resets. Without spans
// an item only resets or finishes its rows.
// REQUIRES: items of one launch do not meet in a (row, kv_head).
struct AttendItem {
  int32_t row_begin = 0;  // rows [row_begin, row_begin + row_count) of the batch
  int32_t row_count = 0;
  int64_t first_pos = 0;  // position of row_begin; the others follow
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
  int32_t span_begin = 0;
  int32_t span_count = 0;
  int32_t reset = 0;   // 1: begin from the empty state (the old contents are not read)
  // 1: after the last span write o / l of fold(R, U) to `out`. What the state is then is not defined.
  int32_t finish = 0;
};

struct AttendArgs {
  const float* q = nullptr;  // row r, head h at q + r * q_stride + h * head_dim
  int64_t q_stride = 0;
  float* state = nullptr;  // [rows, num_q_heads, AttentionStateFloats(head_dim)]
  Activations out;         // [rows, num_q_heads * head_dim]; null: no item finishes
  int64_t rows = 0;        // of the whole batch: the size of q, state and out
  Table<AttendItem> items;
  Table<KvSpan> spans;
  // [scratch_floats]: partials of rows split over threads; with WideAttendScratchFloats() the faster
  // way for items of many rows can be taken.
  float* scratch = nullptr;
  int64_t scratch_floats = 0;
  float scale = 0;  // usually 1 / sqrt(head_dim)
  float soft_cap = 0;  // 0: none
  int64_t window = 0;  // tokens that a row sees, its own among them; 0: all up to it
  int32_t num_q_heads = 0;  // num_kv_heads x at most kMaxGqaGroup
  int32_t num_kv_heads = 0;
  int32_t head_dim = 0;  // 64, 128 or 256
};

// The least scratch that an AttendArgs may come with.
inline constexpr int64_t kMinAttendScratchFloats = int64_t{1} << 18;

// The first position that a row at `pos` sees.
HEADROOM_HOST_DEVICE inline int64_t FirstSeen(int64_t window, int64_t pos) {
  return window == 0 || pos < window ? 0 : pos - window + 1;
}

template <typename F>
void ForEachRange(const AttendArgs& a, F&& f) {
  constexpr int64_t kFloat = sizeof(float);
  const int64_t q_width = int64_t{a.num_q_heads} * a.head_dim;
  if (a.rows == 0) return;
  f(a.q, ((a.rows - 1) * a.q_stride + q_width) * kFloat, Access::kRead);
  f(a.state, a.rows * a.num_q_heads * AttentionStateFloats(a.head_dim) * kFloat,
    Access::kReadWrite);
  if (a.out.data != nullptr) f(a.out.data, a.out.Bytes(a.rows * q_width), Access::kWrite);
  f(a.scratch, a.scratch_floats * kFloat, Access::kWrite);
  f(a.items.device, a.items.count * static_cast<int64_t>(sizeof(AttendItem)), Access::kRead);
  f(a.spans.device, a.spans.count * static_cast<int64_t>(sizeof(KvSpan)), Access::kRead);
  for (int32_t i = 0; i < a.items.count; ++i) {
    const AttendItem& item = a.items.host[i];
    for (int32_t s = 0; s < item.span_count; ++s) {
      KvSpan span = a.spans.host[item.span_begin + s];
      span.base += (item.kv_head_begin - span.kv_head_begin) * SpanHeadBytes(span, a.head_dim);
      span.kv_head_begin = item.kv_head_begin;
      span.kv_head_end = item.kv_head_end;
      ForEachSpanRun(span, a.head_dim,
                     [&](const void* p, int64_t bytes) { f(p, bytes, Access::kRead); });
    }
  }
}

namespace cpu {
void Attend(const AttendArgs& args, CpuTeam& team);
}
namespace reference {
void Attend(const AttendArgs& args);
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_ATTENTION_H_
