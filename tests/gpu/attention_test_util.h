// Sequences with random q, K and V, their keys laid as the worker would, and attention over them on
// the GPU and by the plain reference.
#ifndef HEADROOM_TESTS_GPU_ATTENTION_TEST_UTIL_H_
#define HEADROOM_TESTS_GPU_ATTENTION_TEST_UTIL_H_

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/attention_sequence.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {

using kernels::AttendArgs;
using kernels::AttendItem;
using kernels::AttentionStateFloats;
using kernels::KvSpan;
using kernels::Near;
using kernels::SameBits;
using kernels::Sequence;
using kernels::Shape;

// A sequence's positions [first, first + count), all heads, as they lie in `capacity` rows; the rest is NaN.
inline std::vector<uint8_t> Lay(const Sequence& s, int64_t first, int64_t count, int64_t origin,
                                int32_t capacity) {
  const int32_t d = s.shape.head_dim;
  const KvLayout layout{capacity, d};
  std::vector<uint8_t> bytes(static_cast<size_t>(layout.BytesFor(s.shape.num_kv_heads)), 0xff);
  for (int64_t pos = first; pos < first + count; ++pos) {
    const int64_t row = (pos - origin) % capacity;
    for (int32_t head = 0; head < s.shape.num_kv_heads; ++head) {
      const int64_t from = (pos * s.shape.num_kv_heads + head) * d;
      std::memcpy(&bytes[layout.KeyOffset(head, row)], &s.k[from], d * 2);
      std::memcpy(&bytes[layout.ValueOffset(head, row)], &s.v[from], d * 2);
    }
  }
  return bytes;
}

// A place with keys: [first, first + count), row 0 being `origin`.
struct Piece {
  int64_t first;
  int64_t count;
  int64_t origin;
  int32_t capacity;
};

struct Launch {
  std::vector<Piece> pieces;
  bool head_by_head = false;  // an item for each KV head
  int32_t only_head = -1;     // and the others left out
  int64_t scratch_floats = kernels::kMinAttendScratchFloats;
};

class AttentionTest : public GpuTest {
 protected:
  // Rows [first_pos, first_pos + rows) of the sequence against the pieces of each launch in turn.
  std::vector<float> Attend(const Sequence& s, int64_t first_pos, int64_t rows,
                            const std::vector<Launch>& launches) {
    const Shape& shape = s.shape;
    int64_t scratch_floats = 0;
    for (const Launch& launch : launches) {
      scratch_floats = std::max(scratch_floats, launch.scratch_floats);
    }
    AttendArgs args = Args(s, first_pos, rows, scratch_floats);
    for (size_t n = 0; n < launches.size(); ++n) {
      std::vector<KvSpan> spans;
      int64_t tokens = 0;
      for (const Piece& piece : launches[n].pieces) {
        KvSpan span = {gpu_.Put(Lay(s, piece.first, piece.count, piece.origin, piece.capacity)),
                       piece.origin, piece.first, static_cast<int32_t>(piece.count),
                       piece.capacity, 0, shape.num_kv_heads};
        spans.push_back(span);
        tokens += piece.count;
      }
      AttendItem item = ItemOf(s, first_pos, rows, spans);
      item.reset = n == 0;
      item.finish = n + 1 == launches.size();
      std::vector<AttendItem> items = {item};
      if (launches[n].head_by_head) {
        items.assign(shape.num_kv_heads, item);
        for (int32_t head = 0; head < shape.num_kv_heads; ++head) {
          items[head].kv_head_begin = head;
          items[head].kv_head_end = head + 1;
        }
      }
      const int32_t only_head = launches[n].only_head;
      if (only_head >= 0) items = {items[only_head]};
      args.items = gpu_.PutTable(items);
      args.spans = gpu_.PutTable(spans);
      args.scratch_floats = launches[n].scratch_floats;
      OpAccount account;
      EXPECT_OK(device_.Attend(gpu_.stream(), args, &account));
      gpu_.Await();
      const int64_t heads = only_head >= 0 ? 1 : shape.num_kv_heads;
      EXPECT_EQ(account.bytes.load(), tokens * heads * shape.head_dim * 4);
    }
    std::vector<float> out = gpu_.FetchActivations(args.out, rows * s.q_width());
    gpu_.Reset();
    return out;
  }
  std::vector<float> Attend(const Sequence& s, int64_t first_pos, int64_t rows,
                            const std::vector<std::vector<Piece>>& launches,
                            int64_t scratch_floats = kernels::kMinAttendScratchFloats) {
    std::vector<Launch> all;
    for (const auto& pieces : launches) all.push_back({pieces, false, -1, scratch_floats});
    return Attend(s, first_pos, rows, all);
  }
  // ... all keys in one place, one launch.
  std::vector<float> Whole(const Sequence& s, int64_t first_pos, int64_t rows) {
    return Attend(s, first_pos, rows, {{Everything(first_pos + rows)}});
  }
  static Piece Everything(int64_t tokens) {
    return {0, tokens, 0, static_cast<int32_t>(CeilToBlock(tokens) + 64)};
  }

  std::vector<float> Reference(const Sequence& s, int64_t first_pos, int64_t rows) {
    const Piece piece = Everything(first_pos + rows);
    std::vector<uint8_t> bytes = Lay(s, piece.first, piece.count, piece.origin, piece.capacity);
    const std::vector<KvSpan> spans = {{bytes.data(), 0, 0, static_cast<int32_t>(piece.count),
                                        piece.capacity, 0, s.shape.num_kv_heads}};
    AttendItem item = ItemOf(s, first_pos, rows, spans);
    item.reset = item.finish = 1;
    const std::vector<AttendItem> items = {item};
    std::vector<float> out(static_cast<size_t>(rows * s.q_width()));
    AttendArgs args;
    Fill(s, rows, args);
    args.q = s.q.data() + first_pos * s.q_width();
    args.out = out.data();
    args.items = kernels::DeviceTable(items);
    args.spans = kernels::DeviceTable(spans);
    kernels::reference::Attend(args);
    return out;
  }

  // Of the launches and of the reference.
  int64_t window_ = 0;
  float soft_cap_ = 0;

  void Fill(const Sequence& s, int64_t rows, AttendArgs& args) const {
    args.window = window_;
    args.soft_cap = soft_cap_;
    args.q_stride = s.q_width();
    args.rows = rows;
    args.scale = 1 / std::sqrt(static_cast<float>(s.shape.head_dim));
    args.num_q_heads = s.shape.num_q_heads();
    args.num_kv_heads = s.shape.num_kv_heads;
    args.head_dim = s.shape.head_dim;
  }
  AttendArgs Args(const Sequence& s, int64_t first_pos, int64_t rows, int64_t scratch_floats) {
    AttendArgs args;
    Fill(s, rows, args);
    const auto q = s.q.begin() + first_pos * s.q_width();
    args.q = gpu_.Put(std::vector<float>(q, q + rows * s.q_width()));
    args.state = gpu_.Take<float>(rows * s.shape.num_q_heads() *
                                  AttentionStateFloats(s.shape.head_dim));
    args.out = gpu_.Take<float>(rows * s.q_width());
    args.scratch_floats = scratch_floats;
    args.scratch = gpu_.Take<float>(scratch_floats);
    return args;
  }
  static AttendItem ItemOf(const Sequence& s, int64_t first_pos, int64_t rows,
                           const std::vector<KvSpan>& spans) {
    AttendItem item;
    item.row_count = static_cast<int32_t>(rows);
    item.first_pos = first_pos;
    item.kv_head_end = s.shape.num_kv_heads;
    item.span_count = static_cast<int32_t>(spans.size());
    return item;
  }
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_GPU_ATTENTION_TEST_UTIL_H_
