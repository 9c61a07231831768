#include "tests/bench/in_place_bench.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <utility>

#include "common/kv_layout.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/tile_attention.h"
#include "services/headroom/bench/host_memory.h"
#include "tests/bench/best_seconds.h"

namespace headroom::kernels {
namespace {

const KvLayout kLayout{InPlaceBench::kExtent, InPlaceBench::kDim};

InPlaceBench::Rate RateOf(int64_t bytes, const RunSeconds& seconds) {
  return {static_cast<double>(bytes) / seconds.best / 1e9,
          static_cast<double>(bytes) * seconds.runs / seconds.total / 1e9};
}

}  // namespace

std::vector<InPlaceKernel> InPlaceKernels() {
  std::vector<InPlaceKernel> kernels = {{"float32", &cpu::Attend}};
  if (const cpu::TileAttention* const tiles = cpu::BestTileAttention()) {
    kernels.push_back({tiles->name, tiles->attend});
  }
  return kernels;
}

InPlaceBench::InPlaceBench(CpuTeam& team, int64_t bytes) {
  bytes_ = bytes / kLayout.BytesFor(kHeads) * kLayout.BytesFor(kHeads);
  absl::StatusOr<MappedRegion> region = MapSharedMemory(bytes_, "in-place-bench");
  if (!region.ok()) {
    std::fprintf(stderr, "%s\n", region.status().ToString().c_str());
    std::abort();
  }
  region_ = *std::move(region);
  data_ = region_.data();
  region_.MakeHugePages(0, bytes_);
  FillWithKeys(data_, bytes_, team);
}

InPlaceBench::Rate InPlaceBench::Reads(CpuTeam& team) const {
  return RateOf(bytes_, TimeRuns([&] { ReadHost(data_, bytes_, team); }));
}

InPlaceBench::Rate InPlaceBench::Attend(CpuTeam& team, int32_t rows,
                                        const InPlaceKernel& kernel) const {
  const int64_t extents = bytes_ / kLayout.BytesFor(kHeads);
  std::mt19937 random(1);
  std::vector<float> q(rows * kHeads * kGroup * kDim);
  for (float& value : q) value = static_cast<float>(random()) * 0x1p-31f - 1.0f;
  std::vector<float> state(rows * kHeads * kGroup * AttentionStateFloats(kDim));
  std::vector<float> scratch(int64_t{1} << 22);
  AttendItem item;
  item.row_count = rows;
  item.first_pos = extents * kExtent;
  item.kv_head_end = kHeads;
  item.span_count = static_cast<int32_t>(extents);
  item.reset = 1;
  std::vector<KvSpan> spans(extents);
  for (int64_t e = 0; e < extents; ++e) {
    spans[e].base = data_ + e * kLayout.BytesFor(kHeads);
    spans[e].origin_pos = spans[e].first_pos = e * kExtent;
    spans[e].count = spans[e].capacity = kExtent;
    spans[e].kv_head_end = kHeads;
  }
  AttendArgs args;
  args.q = q.data();
  args.q_stride = int64_t{kHeads} * kGroup * kDim;
  args.state = state.data();
  args.rows = rows;
  args.items = {&item, &item, 1};
  args.spans = {spans.data(), spans.data(), static_cast<int32_t>(extents)};
  args.scratch = scratch.data();
  args.scratch_floats = static_cast<int64_t>(scratch.size());
  args.scale = 0.0883883f;
  args.num_q_heads = kHeads * kGroup;
  args.num_kv_heads = kHeads;
  args.head_dim = kDim;
  return RateOf(bytes_, TimeRuns([&] { kernel.attend(args, team); }));
}

}  // namespace headroom::kernels
