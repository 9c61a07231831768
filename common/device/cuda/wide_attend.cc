#include "common/device/cuda/wide_attend.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/cuda/cuda_status.h"
#include "common/status.h"
#include "kernels/cuda/kernels.h"

namespace headroom {
namespace {

using kernels::AttendArgs;
using kernels::AttendItem;
using kernels::kWidePartials;
using kernels::kWidePieceTokens;
using kernels::KvSpan;
using kernels::WideClass;
using kernels::WideShape;

bool Aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Items [begin, end) of a launch as a launch of their own.
AttendArgs Slice(AttendArgs a, int32_t begin, int32_t end) {
  a.items.device += begin;
  a.items.host += begin;
  a.items.count = end - begin;
  return a;
}

static_assert(kernels::kWideLanes == 2);

// Of a piece's call; `partial` says where its result goes.
SdpaBuffers BuffersIn(const kernels::WideLayout& layout, uint8_t* scratch, int32_t lane,
                      int32_t partial) {
  const int64_t result = int64_t{lane} * kWidePartials + partial;
  SdpaBuffers b;
  b.q = scratch + layout.q;
  b.k = scratch + layout.keys + lane * layout.piece_bytes;
  b.v = scratch + layout.values + lane * layout.piece_bytes;
  b.o = scratch + layout.o + result * layout.partial_bytes;
  b.lse = scratch + layout.lse + result * layout.lse_bytes;
  b.lengths = scratch + layout.lengths + lane * kernels::kWideLengthsBytes;
  return b;
}
SdpaBuffers SquareBuffersIn(const kernels::WideLayout& layout, uint8_t* scratch,
                            WidePiece::Of of) {
  const bool edge = of == WidePiece::Of::kEdge;
  SdpaBuffers b = BuffersIn(layout, scratch, 0, 0);
  b.o = scratch + (edge ? layout.edge_o : layout.square_o);
  b.lse = scratch + (edge ? layout.edge_lse : layout.square_lse);
  return b;
}

// What `stream` gets from now on waits for what `first` has been given.
absl::Status Follow(cudaStream_t stream, cudaEvent_t event, cudaStream_t first) {
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaEventRecord(event, first)));
  return HEADROOM_CUDA_STATUS(cudaStreamWaitEvent(stream, event, 0));
}

// The spans of an item that hold keys of [begin, end).
struct SpanRange {
  int32_t begin = 0;
  int32_t count = 0;
};
SpanRange SpansOf(const AttendArgs& a, const AttendItem& item, int64_t begin, int64_t end) {
  const KvSpan* const spans = a.spans.host + item.span_begin;
  const KvSpan* const behind = spans + item.span_count;
  const auto ends_by = [](int64_t pos) {
    return [pos](const KvSpan& span) { return span.first_pos + span.count <= pos; };
  };
  const KvSpan* const first = std::partition_point(spans, behind, ends_by(begin));
  const KvSpan* const last = std::partition_point(first, behind, ends_by(end - 1));
  return {static_cast<int32_t>(first - a.spans.host), static_cast<int32_t>(last - first) + 1};
}

}  // namespace

// Heads of a job, as many as a square takes: what all its blocks share.
struct WideAttend::Pass {
  const AttendArgs& a;
  const Prepared& prepared;
  const Plans& plans;
  const WideJob& job;
  int32_t kv_head_begin;
  int32_t heads;
  cudaStream_t stream;

  const AttendItem& item() const { return a.items.host[job.first_item]; }
  uint8_t* scratch() const { return reinterpret_cast<uint8_t*>(a.scratch); }
  // The item that `kv_head` belongs to.
  const AttendItem& ItemOf(int32_t kv_head) const {
    const AttendItem* its = &item();
    while (its->kv_head_end <= kv_head) ++its;
    return *its;
  }
};

const WideAttend::Plans& WideAttend::Prepared::For(int64_t rows) const {
  const WideClass wanted = classes.For(rows);
  size_t i = 0;
  while (plans[i].of.heads != wanted.heads) ++i;
  return plans[i];
}

// ---- Start-up

absl::Status WideAttend::Open() {
  cudaStream_t stream = nullptr;
  HEADROOM_RETURN_IF_ERROR(
      HEADROOM_CUDA_STATUS(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking)));
  aside_ = CudaStream(stream);
  for (CudaEvent* const its : {&forked_, &joined_}) {
    cudaEvent_t event = nullptr;
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDA_STATUS(cudaEventCreateWithFlags(&event, cudaEventDisableTiming)));
    *its = CudaEvent(event);
  }
  HEADROOM_ASSIGN_OR_RETURN(cudnn_, CudnnSdpa::Open());
  return absl::OkStatus();
}

absl::Status WideAttend::Prepare(const WideShape& shape, float* scratch, int64_t scratch_floats,
                                 cudaStream_t stream) {
  if (shape.max_rows < kernels::kWideRows) {
    return absl::UnavailableError(absl::StrCat("items of at most ", shape.max_rows,
                                               " rows are none of many"));
  }
  auto prepared = std::make_unique<Prepared>(shape);
  const int64_t floats = kernels::WideAttendScratchFloats(shape);
  if (scratch_floats < floats || !Aligned(scratch)) {
    return absl::InvalidArgumentError(absl::StrCat("PrepareWideAttend: ", scratch_floats,
                                                   " floats of scratch, ", floats,
                                                   " are needed, aligned to 16 bytes"));
  }
  if (!opened_) {
    opened_ = true;
    open_status_ = Open();
  }
  HEADROOM_RETURN_IF_ERROR(open_status_);
  HEADROOM_RETURN_IF_ERROR(BuildPlans(*prepared));
  HEADROOM_RETURN_IF_ERROR(WarmUp(*prepared, reinterpret_cast<uint8_t*>(scratch), stream));
  prepared_.push_back(std::move(prepared));
  return absl::OkStatus();
}

absl::Status WideAttend::BuildPlans(Prepared& prepared) {
  const WideShape& shape = prepared.shape;
  const kernels::WideClasses& classes = prepared.classes;
  for (int32_t heads = classes.least_heads; heads <= classes.most_heads; heads *= 2) {
    Plans plans;
    plans.of = classes.Of(heads);
    const struct {
      int* plan;
      int64_t keys;
      int32_t heads;
      SdpaShape::Mask mask;
    } wanted[] = {{&plans.piece, kWidePieceTokens, heads, SdpaShape::Mask::kNone},
                  {&plans.lengths, kWidePieceTokens, heads, SdpaShape::Mask::kLengths},
                  {&plans.square, plans.of.rows, plans.of.square_heads, SdpaShape::Mask::kCausal}};
    for (const auto& [plan, keys, its_heads, mask] : wanted) {
      const SdpaShape its = {plans.of.rows,  keys, its_heads * shape.group(), its_heads,
                             shape.head_dim, mask, shape.soft_cap};
      HEADROOM_ASSIGN_OR_RETURN(*plan, cudnn_->Build(its, kernels::kWideWorkspaceBytes));
      ++plans_built_;
    }
    prepared.plans.push_back(plans);
  }
  return absl::OkStatus();
}

// A kernel that is loaded at its first launch waits for the device to be idle.
absl::Status WideAttend::WarmUp(const Prepared& prepared, uint8_t* scratch, cudaStream_t stream) {
  const SdpaBuffers buffers = BuffersIn(prepared.layout, scratch, 0, 0);
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(cudaMemsetAsync(
      scratch, 0, static_cast<size_t>(prepared.layout.workspace), stream)));
  kernels::cuda::WideKeysArgs lengths;
  lengths.head_dim = prepared.shape.head_dim;
  lengths.count = lengths.row_capacity = lengths.query_rows = 1;
  lengths.lengths = static_cast<int32_t*>(buffers.lengths);
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(kernels::cuda::LaunchWideKeys(lengths, stream)));
  const SdpaBuffers square = SquareBuffersIn(prepared.layout, scratch, WidePiece::Of::kSquare);
  uint8_t* const workspace = scratch + prepared.layout.workspace;
  for (const Plans& plans : prepared.plans) {
    HEADROOM_RETURN_IF_ERROR(cudnn_->Run(plans.piece, buffers, workspace, stream));
    HEADROOM_RETURN_IF_ERROR(cudnn_->Run(plans.lengths, buffers, workspace, stream));
    HEADROOM_RETURN_IF_ERROR(cudnn_->Run(plans.square, square, workspace, stream));
  }
  return absl::OkStatus();
}

WideAttendUse WideAttend::use() const {
  return {plans_built_, calls_};
}

// ---- Launches

// The last that was prepared for such heads with no more scratch than there is.
const WideAttend::Prepared* WideAttend::Find(const AttendArgs& a) const {
  if (!Aligned(a.q) || !Aligned(a.state) || !Aligned(a.out.data) || !Aligned(a.scratch) ||
      a.q_stride % 4 != 0) {
    return nullptr;
  }
  for (auto p = prepared_.rbegin(); p != prepared_.rend(); ++p) {
    const WideShape& shape = (*p)->shape;
    if (shape.num_q_heads == a.num_q_heads && shape.num_kv_heads == a.num_kv_heads &&
        shape.head_dim == a.head_dim && shape.soft_cap == a.soft_cap &&
        (shape.windowed || a.window == 0) &&
        (*p)->layout.bytes <= a.scratch_floats * static_cast<int64_t>(sizeof(float))) {
      return p->get();
    }
  }
  return nullptr;
}

absl::Status WideAttend::Attend(const AttendArgs& a, uint32_t* tickets, cudaStream_t stream) {
  const Prepared* const prepared = Find(a);
  const auto wide = [&](int32_t i) {
    const AttendItem& item = a.items.host[i];
    return prepared != nullptr && item.row_count >= kernels::kWideRows &&
           (a.window == 0 || a.window >= kernels::kWideWindow) && KeysFollow(a, item);
  };
  for (int32_t begin = 0; begin < a.items.count;) {
    const bool is_wide = wide(begin);
    int32_t end = begin + 1;
    while (end < a.items.count && wide(end) == is_wide) ++end;
    if (!is_wide) {
      HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDA_STATUS(
          kernels::cuda::LaunchAttend(Slice(a, begin, end), tickets, stream)));
      begin = end;
      continue;
    }
    while (begin < end) {
      const WideJob job = JobAt(a, begin, end);
      begin += job.num_items;
      const AttendItem& item = a.items.host[job.first_item];
      const Plans& plans = prepared->For(kernels::WideRowsOfCall(item.row_count, job.window));
      for (int32_t head = job.kv_head_begin; head < job.kv_head_end;
           head += plans.of.square_heads) {
        const int32_t heads = std::min(plans.of.square_heads, job.kv_head_end - head);
        const Pass pass = {a, *prepared, plans, job, head, heads, stream};
        HEADROOM_RETURN_IF_ERROR(
            ForEachBlock(item, job, plans.of.rows,
                         [&](const WideBlock& block) { return AttendBlock(pass, block); }));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status WideAttend::AttendBlock(const Pass& pass, const WideBlock& block) {
  const WideClass& of = pass.plans.of;
  if (block.edge > 0) {
    HEADROOM_RETURN_IF_ERROR(Queries(pass, block.row, block.edge, of.square_heads, true));
    HEADROOM_RETURN_IF_ERROR(AttendSquare(
        pass, block, {block.seen_begin - block.edge, block.edge, WidePiece::Of::kEdge}));
  }
  if (block.seen_end > block.seen_begin || block.square) {
    // What calls take and is not there is computed for nothing, but with numbers.
    const int32_t of_pieces = (pass.heads + of.heads - 1) / of.heads * of.heads;
    HEADROOM_RETURN_IF_ERROR(Queries(pass, block.row, block.rows,
                                     block.square ? of.square_heads : of_pieces, false));
  }
  if (block.square) {
    HEADROOM_RETURN_IF_ERROR(
        AttendSquare(pass, block, {block.seen_end, block.rows, WidePiece::Of::kSquare}));
  }
  const bool lanes = pass.heads > of.heads;
  if (lanes) HEADROOM_RETURN_IF_ERROR(Follow(aside_.get(), forked_.get(), pass.stream));
  absl::Status status;
  for (int32_t head = 0; head < pass.heads && status.ok(); head += of.heads) {
    status = AttendPieces(pass, block, head, std::min(of.heads, pass.heads - head),
                          head / of.heads % kernels::kWideLanes);
  }
  // Also after an error: what lane 1 has been given ends before the stream goes on.
  if (lanes) {
    const absl::Status joined = Follow(pass.stream, joined_.get(), aside_.get());
    if (status.ok()) status = joined;
  }
  return status;
}

// The pass's rows [row, row + count), or the last of them first, as calls of `heads` KV heads take them.
absl::Status WideAttend::Queries(const Pass& pass, int64_t row, int64_t count, int32_t heads,
                                 bool backwards) {
  const AttendArgs& a = pass.a;
  const WideShape& shape = pass.prepared.shape;
  kernels::cuda::WideQueriesArgs q;
  q.q = a.q + (pass.item().row_begin + row) * a.q_stride +
        int64_t{pass.kv_head_begin} * shape.group() * shape.head_dim;
  q.q_stride = a.q_stride;
  q.to = reinterpret_cast<kernels::BFloat16*>(pass.scratch() + pass.prepared.layout.q);
  q.rows = count;
  q.row_capacity = pass.plans.of.rows;
  q.heads = pass.heads * shape.group();
  q.head_capacity = heads * shape.group();
  q.head_dim = shape.head_dim;
  q.scale = a.soft_cap == 0 ? a.scale : a.scale / a.soft_cap;
  q.backwards = backwards;
  return HEADROOM_CUDA_STATUS(kernels::cuda::LaunchWideQueries(q, pass.stream));
}

// Of all heads of the pass.
absl::Status WideAttend::AttendSquare(const Pass& pass, const WideBlock& block,
                                      const WidePiece& piece) {
  const kernels::WideLayout& layout = pass.prepared.layout;
  const SdpaBuffers buffers = SquareBuffersIn(layout, pass.scratch(), piece.of);
  HEADROOM_RETURN_IF_ERROR(Gather(pass, block, piece, 0, pass.heads, pass.plans.of.rows, buffers,
                                  pass.stream));
  ++calls_;
  return cudnn_->Run(pass.plans.square, buffers, pass.scratch() + layout.workspace, pass.stream);
}

absl::Status WideAttend::AttendPieces(const Pass& pass, const WideBlock& block, int32_t head,
                                      int32_t heads, int32_t lane) {
  const AttendItem& item = pass.item();
  const WideShape& shape = pass.prepared.shape;
  const kernels::WideLayout& layout = pass.prepared.layout;
  const int64_t first_query =
      (item.row_begin + block.row) * shape.num_q_heads +
      int64_t{pass.kv_head_begin + head} * shape.group();
  const cudaStream_t stream = lane == 0 ? pass.stream : aside_.get();
  // Where the heads begin in what holds those of a square.
  const int64_t at = head * shape.group() * pass.plans.of.rows;

  kernels::cuda::WideFoldArgs fold;
  fold.heads = heads * shape.group();
  fold.head_dim = shape.head_dim;
  fold.num_q_heads = shape.num_q_heads;
  fold.rows = block.rows;
  fold.row_capacity = pass.plans.of.rows;
  fold.state = pass.a.state + first_query * kernels::AttentionStateFloats(shape.head_dim);
  fold.out = pass.a.out + first_query * shape.head_dim;  // read if it finishes
  fold.reset = item.reset != 0;
  const auto add = [&fold](const SdpaBuffers& result, int64_t query, int64_t rows,
                           bool backwards) {
    fold.partials[fold.num_partials++] = {
        static_cast<const kernels::BFloat16*>(result.o) + query * fold.head_dim,
        static_cast<const float*>(result.lse) + query, rows, backwards};
  };
  HEADROOM_RETURN_IF_ERROR(
      ForEachPiece(pass.job, block, [&](const WidePiece& piece) -> absl::Status {
        if (fold.num_partials == kWidePartials) {
          HEADROOM_RETURN_IF_ERROR(
              HEADROOM_CUDA_STATUS(kernels::cuda::LaunchWideFold(fold, stream)));
          fold.num_partials = 0;
          fold.reset = false;
        }
        if (piece.of != WidePiece::Of::kAllRows) {
          const bool edge = piece.of == WidePiece::Of::kEdge;
          add(SquareBuffersIn(layout, pass.scratch(), piece.of), at, piece.count, edge);
          return absl::OkStatus();
        }
        SdpaBuffers buffers = BuffersIn(layout, pass.scratch(), lane, fold.num_partials);
        buffers.q = static_cast<kernels::BFloat16*>(buffers.q) + at * shape.head_dim;
        add(buffers, 0, block.rows, false);
        return AttendPiece(pass, block, piece, head, heads, lane, buffers);
      }));
  fold.finish = item.finish != 0;
  if (fold.num_partials == 0 && !fold.reset && !fold.finish) return absl::OkStatus();
  return HEADROOM_CUDA_STATUS(kernels::cuda::LaunchWideFold(fold, stream));
}

absl::Status WideAttend::AttendPiece(const Pass& pass, const WideBlock& block,
                                     const WidePiece& piece, int32_t head, int32_t heads,
                                     int32_t lane, const SdpaBuffers& scratch) {
  const AttendArgs& a = pass.a;
  const cudaStream_t stream = lane == 0 ? pass.stream : aside_.get();
  const int32_t kv_head = pass.kv_head_begin + head;
  const SpanRange spans =
      SpansOf(a, pass.ItemOf(kv_head), piece.begin, piece.begin + piece.count);
  const KvSpan& span = a.spans.host[spans.begin];
  const int64_t row = (piece.begin - span.origin_pos) % span.capacity;
  const bool whole = piece.count == kWidePieceTokens;
  SdpaBuffers buffers = scratch;
  if (pass.plans.of.heads == 1 && whole && spans.count == 1 &&
      row + piece.count <= span.capacity && Aligned(span.base)) {
    const KvLayout where = {span.capacity, a.head_dim};
    buffers.k = span.base + where.KeyOffset(kv_head - span.kv_head_begin, row);
    buffers.v = span.base + where.ValueOffset(kv_head - span.kv_head_begin, row);
  } else {
    HEADROOM_RETURN_IF_ERROR(
        Gather(pass, block, piece, head, heads, kWidePieceTokens, buffers, stream));
  }
  ++calls_;
  return cudnn_->Run(whole ? pass.plans.piece : pass.plans.lengths, buffers,
                     pass.scratch() + pass.prepared.layout.workspace +
                         lane * kernels::kWideWorkspaceBytes,
                     stream);
}

// The piece's keys of heads [head, head + heads) of the pass's, `capacity` rows each.
absl::Status WideAttend::Gather(const Pass& pass, const WideBlock& block, const WidePiece& piece,
                                int32_t head, int32_t heads, int64_t capacity,
                                const SdpaBuffers& to, cudaStream_t stream) {
  kernels::cuda::WideKeysArgs keys;
  keys.num_heads = heads;
  for (int32_t h = 0; h < heads; ++h) {
    const int32_t kv_head = pass.kv_head_begin + head + h;
    const SpanRange spans =
        SpansOf(pass.a, pass.ItemOf(kv_head), piece.begin, piece.begin + piece.count);
    keys.heads[h] = {spans.begin, spans.count, kv_head};
  }
  keys.spans = pass.a.spans.device;
  keys.head_dim = pass.a.head_dim;
  keys.begin = piece.begin;
  keys.count = piece.count;
  keys.row_capacity = capacity;
  keys.keys = static_cast<kernels::BFloat16*>(to.k);
  keys.values = static_cast<kernels::BFloat16*>(to.v);
  keys.lengths = static_cast<int32_t*>(to.lengths);
  keys.query_rows = static_cast<int32_t>(block.rows);
  keys.backwards = piece.of == WidePiece::Of::kEdge;
  return HEADROOM_CUDA_STATUS(kernels::cuda::LaunchWideKeys(keys, stream));
}

}  // namespace headroom
