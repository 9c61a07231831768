#include "services/headroom/bench/gpu_ceilings.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "common/status.h"
#include "services/headroom/bench/host_memory.h"

namespace headroom {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kElement = sizeof(kernels::BFloat16);
// Of one figure, at least; the best run of that time counts.
constexpr double kLeastSeconds = 0.05;
// Operations of one run: the host looks every 20 us whether they are over, which must not show.
constexpr int kGemms = 8;
constexpr int kAttends = 4;
constexpr int kCopiesWithin = 16;
// Both links at once: so long that the slice that is still read when the copies end does not show, and
// that many times.
constexpr double kBothSeconds = 0.15;
constexpr int kBothRuns = 3;
constexpr int64_t kLargePieceBytes = 16 * kMiB;
constexpr int64_t kLeadPieces = 16;  // copied while the others are enqueued, and not counted
constexpr int64_t kReadSliceBytes = 64 * kMiB;
constexpr absl::Duration kTimeout = absl::Minutes(2);
// Halves of the buffer are whole pieces of any copy, and what CardReadRate() can read.
constexpr int64_t kHalfStep = 16 * kMiB;
constexpr int64_t kTableBytes = 4096;

int64_t Aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }
int64_t WholeSteps(int64_t bytes) { return (bytes + kHalfStep - 1) / kHalfStep * kHalfStep; }

// Where the operands of attention lie in the halves.
struct AttendBytes {
  int64_t q, keys;                    // of the inputs
  int64_t state, out, scratch, used;  // of the results; tables follow
  int64_t scratch_floats;
};
AttendBytes AttendBytesOf(const GpuProbeShape& s) {
  const kernels::WideShape& of = s.attend;
  const int64_t most_keys = *std::max_element(s.attend_keys.begin(), s.attend_keys.end());
  const int64_t q = of.max_rows * of.num_q_heads * of.head_dim * kFloat;
  AttendBytes bytes;
  bytes.q = Aligned(q);
  bytes.keys = 2 * most_keys * of.num_kv_heads * of.head_dim * kElement;
  bytes.state = Aligned(of.max_rows * of.num_q_heads * kFloat *
                        kernels::AttentionStateFloats(of.head_dim));
  bytes.out = Aligned(q);
  bytes.scratch_floats =
      std::max(kernels::kMinAttendScratchFloats, kernels::WideAttendScratchFloats(of));
  bytes.scratch = bytes.scratch_floats * kFloat;
  bytes.used = bytes.state + bytes.out + bytes.scratch + kTableBytes;
  return bytes;
}

int64_t HalfBytes(const GpuProbeShape& s) {
  const AttendBytes attend = AttendBytesOf(s);
  const int64_t gemm_inputs =
      Aligned(s.gemm_m * s.gemm_k * kFloat) + kernels::PackedWeightBytes(s.gemm_n, s.gemm_k);
  const int64_t most = std::max({gemm_inputs, s.gemm_m * s.gemm_n * kFloat,
                                 attend.q + attend.keys, attend.used, s.least_bytes / 2});
  return WholeSteps(most);
}

}  // namespace

int64_t GpuCeilingProbe::ArenaBytes(const GpuProbeShape& shape) { return 2 * HalfBytes(shape); }

int64_t GpuCeilingProbe::HostBytes(const GpuProbeShape& shape) {
  return 2 * WholeSteps(shape.least_bytes / 2);
}

absl::StatusOr<std::unique_ptr<GpuCeilingProbe>> GpuCeilingProbe::Create(Device& device,
                                                                         const GpuProbeShape& shape,
                                                                         uint8_t* host, int threads,
                                                                         ReadRate read_rate) {
  std::unique_ptr<GpuCeilingProbe> probe(
      new GpuCeilingProbe(device, shape, host, threads, std::move(read_rate)));
  HEADROOM_RETURN_IF_ERROR(probe->Init());
  return probe;
}

absl::Status GpuCeilingProbe::Init() {
  HEADROOM_ASSIGN_OR_RETURN(compute_, device_.CreateStream("probe"));
  HEADROOM_ASSIGN_OR_RETURN(in_, device_.CreateStream("probe-in"));
  HEADROOM_ASSIGN_OR_RETURN(out_, device_.CreateStream("probe-out"));
  for (EventId* const event : {&computed_, &copied_in_, &copied_out_, &lead_copied_}) {
    HEADROOM_ASSIGN_OR_RETURN(*event, device_.CreateEvent());
  }
  half_bytes_ = HalfBytes(shape_);
  HEADROOM_ASSIGN_OR_RETURN(inputs_, device_.Allocate(2 * half_bytes_, "probe"));
  results_ = inputs_ + half_bytes_;
  kernels::FillRandomArgs fill;
  fill.out = reinterpret_cast<kernels::BFloat16*>(inputs_);
  fill.k = 256;
  fill.n = 2 * half_bytes_ / (fill.k * kElement);
  fill.scale = 1;
  HEADROOM_RETURN_IF_ERROR(device_.FillRandom(fill));
  return device_.PrepareGemm(shape_.gemm_n, shape_.gemm_k);
}

absl::StatusOr<Ceilings> GpuCeilingProbe::Measure() {
  Ceilings ceilings;
  HEADROOM_ASSIGN_OR_RETURN(ceilings.gemm_flops, GemmFlops());
  for (const int64_t keys : shape_.attend_keys) {
    HEADROOM_ASSIGN_OR_RETURN(const double flops, AttentionFlops(keys));
    ceilings.attention_flops = std::max(ceilings.attention_flops, flops);
  }
  HEADROOM_ASSIGN_OR_RETURN(const double read, read_rate_(inputs_, 2 * half_bytes_));
  HEADROOM_ASSIGN_OR_RETURN(const double copied, CopyWithinDevice());
  ceilings.read_bytes = std::max(read, copied);
  const struct {
    double Ceilings::*rate;
    int64_t piece_bytes;
  } sizes[] = {{&Ceilings::copy_256kib_bytes, kMiB / 4},
               {&Ceilings::copy_1mib_bytes, kMiB},
               {&Ceilings::copy_4mib_bytes, 4 * kMiB},
               {&Ceilings::copy_bytes, 16 * kMiB}};
  for (const auto& size : sizes) {
    HEADROOM_ASSIGN_OR_RETURN(ceilings.*size.rate, CopyRate(size.piece_bytes, true, false));
  }
  HEADROOM_ASSIGN_OR_RETURN(ceilings.copy_back_bytes, CopyRate(16 * kMiB, false, true));
  HEADROOM_ASSIGN_OR_RETURN(ceilings.copy_both_bytes, CopyRate(16 * kMiB, true, true));
  ceilings.host_read_bytes = HostReadRate(host_, 2 * host_half_, readers_, kLeastSeconds);
  HEADROOM_ASSIGN_OR_RETURN(ceilings.both_links_bytes, BothLinksRate(ceilings.copy_bytes));
  return ceilings;
}

absl::Status GpuCeilingProbe::Await(StreamId stream, EventId event) {
  HEADROOM_RETURN_IF_ERROR(device_.Record(stream, event));
  HEADROOM_RETURN_IF_ERROR(device_.Synchronize(event, kTimeout));
  return device_.status();
}

absl::StatusOr<double> GpuCeilingProbe::GemmFlops() {
  kernels::GemmArgs args;
  args.a = {inputs_, device_.product_type()};
  args.a_stride = shape_.gemm_k;
  args.w = {reinterpret_cast<const kernels::BFloat16*>(
                inputs_ + Aligned(shape_.gemm_m * shape_.gemm_k * kFloat)),
            shape_.gemm_n, shape_.gemm_k};
  args.c = {results_, device_.product_type()};
  args.c_stride = shape_.gemm_n;
  args.m = shape_.gemm_m;
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kLeastSeconds, [&]() -> absl::Status {
    for (int i = 0; i < kGemms; ++i) HEADROOM_RETURN_IF_ERROR(device_.Gemm(compute_, args));
    return Await(compute_, computed_);
  }));
  return 2.0 * kGemms * static_cast<double>(shape_.gemm_m * shape_.gemm_n) *
         static_cast<double>(shape_.gemm_k) / seconds;
}

absl::StatusOr<double> GpuCeilingProbe::AttentionFlops(int64_t keys) {
  const kernels::WideShape& of = shape_.attend;
  const AttendBytes bytes = AttendBytesOf(shape_);
  uint8_t* const state = results_;
  uint8_t* const out = state + bytes.state;
  uint8_t* const scratch = out + bytes.out;
  uint8_t* const tables = scratch + bytes.scratch;
  kernels::KvSpan span;
  span.base = inputs_ + bytes.q;
  span.count = span.capacity = static_cast<int32_t>(keys);
  span.kv_head_end = of.num_kv_heads;
  kernels::AttendItem item;
  item.row_count = static_cast<int32_t>(of.max_rows);
  item.first_pos = keys - of.max_rows;
  item.kv_head_end = of.num_kv_heads;
  item.span_count = item.reset = item.finish = 1;
  HEADROOM_RETURN_IF_ERROR(device_.Upload(tables, &span, sizeof(span)));
  uint8_t* const item_table = tables + Aligned(sizeof(span));
  HEADROOM_RETURN_IF_ERROR(device_.Upload(item_table, &item, sizeof(item)));
  kernels::AttendArgs args;
  args.q = reinterpret_cast<const float*>(inputs_);
  args.q_stride = int64_t{of.num_q_heads} * of.head_dim;
  args.state = reinterpret_cast<float*>(state);
  args.out = {out, device_.product_type()};
  args.rows = of.max_rows;
  args.items = {reinterpret_cast<const kernels::AttendItem*>(item_table), &item, 1};
  args.spans = {reinterpret_cast<const kernels::KvSpan*>(tables), &span, 1};
  args.scratch = reinterpret_cast<float*>(scratch);
  args.scratch_floats = bytes.scratch_floats;
  args.scale = 1.0f / std::sqrt(static_cast<float>(of.head_dim));
  args.soft_cap = of.soft_cap;
  args.num_q_heads = of.num_q_heads;
  args.num_kv_heads = of.num_kv_heads;
  args.head_dim = of.head_dim;
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kLeastSeconds, [&]() -> absl::Status {
    for (int i = 0; i < kAttends; ++i) HEADROOM_RETURN_IF_ERROR(device_.Attend(compute_, args));
    return Await(compute_, computed_);
  }));
  // A row sees the keys up to its own.
  const double rows = static_cast<double>(of.max_rows);
  const double pairs = rows * (static_cast<double>(keys) - rows) + rows * (rows + 1) / 2;
  return 4.0 * kAttends * pairs * of.num_q_heads * of.head_dim / seconds;
}

absl::StatusOr<double> GpuCeilingProbe::CopyWithinDevice() {
  CopyArgs copy;
  copy.dst = results_;
  copy.src = inputs_;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = half_bytes_;
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kLeastSeconds, [&]() -> absl::Status {
    for (int i = 0; i < kCopiesWithin; ++i) HEADROOM_RETURN_IF_ERROR(device_.Copy(compute_, copy));
    return Await(compute_, computed_);
  }));
  return 2.0 * kCopiesWithin * static_cast<double>(half_bytes_) / seconds;
}

absl::Status GpuCeilingProbe::EnqueueCopy(StreamId stream, int64_t at, int64_t piece_bytes,
                                          bool to_device) {
  CopyArgs copy;
  copy.dst = to_device ? results_ + at : host_ + host_half_ + at;
  copy.src = to_device ? host_ + at : inputs_ + at;
  copy.width_bytes = copy.dst_pitch_bytes = copy.src_pitch_bytes = piece_bytes;
  return device_.Copy(stream, copy);
}

absl::StatusOr<double> GpuCeilingProbe::BothLinksRate(double copy_rate) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point begin) {
    return std::chrono::duration<double>(Clock::now() - begin).count();
  };
  const int64_t piece = std::min(kLargePieceBytes, host_half_);
  const int64_t slice = std::min(kReadSliceBytes, 2 * host_half_);
  const auto pieces = static_cast<int64_t>(kBothSeconds * copy_rate / static_cast<double>(piece)) + 1;
  double best = 0;
  for (int run = 0; run < kBothRuns; ++run) {
    for (int64_t i = 0; i < kLeadPieces + pieces; ++i) {
      HEADROOM_RETURN_IF_ERROR(EnqueueCopy(in_, i * piece % host_half_, piece, true));
      if (i + 1 == kLeadPieces) HEADROOM_RETURN_IF_ERROR(device_.Record(in_, lead_copied_));
    }
    HEADROOM_RETURN_IF_ERROR(device_.Record(in_, copied_in_));
    HEADROOM_RETURN_IF_ERROR(device_.Synchronize(lead_copied_, kTimeout));
    const auto begin = Clock::now();
    int64_t read = 0;
    for (int64_t at = 0; !device_.Done(copied_in_); at = (at + slice) % (2 * host_half_)) {
      if (seconds_since(begin) > absl::ToDoubleSeconds(kTimeout)) break;  // Await() says why
      ReadHost(host_ + at, std::min(slice, 2 * host_half_ - at), readers_);
      read += std::min(slice, 2 * host_half_ - at);
    }
    const double seconds = seconds_since(begin);
    HEADROOM_RETURN_IF_ERROR(Await(in_, copied_in_));
    best = std::max(best, static_cast<double>(pieces * piece + read) / seconds);
  }
  return best;
}

absl::StatusOr<double> GpuCeilingProbe::CopyRate(int64_t piece_bytes, bool to_device,
                                                 bool from_device) {
  const int64_t pieces = std::max<int64_t>(1, shape_.copy_bytes / piece_bytes);
  HEADROOM_ASSIGN_OR_RETURN(const double seconds, BestSeconds(kLeastSeconds, [&]() -> absl::Status {
    for (int64_t i = 0; i < pieces; ++i) {
      const int64_t at = i * piece_bytes % host_half_;
      if (to_device) HEADROOM_RETURN_IF_ERROR(EnqueueCopy(in_, at, piece_bytes, true));
      if (from_device) HEADROOM_RETURN_IF_ERROR(EnqueueCopy(out_, at, piece_bytes, false));
    }
    HEADROOM_RETURN_IF_ERROR(Await(in_, copied_in_));
    return Await(out_, copied_out_);
  }));
  return static_cast<double>(pieces * piece_bytes * (int{to_device} + int{from_device})) / seconds;
}

}  // namespace headroom
