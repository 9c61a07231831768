#include "tests/bench/in_place_bench.h"

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <random>

#include "common/kv_layout.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/tile_attention.h"
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
  // At an address where 2 MiB pages can begin.
  constexpr int64_t kHugePage = int64_t{2} << 20;
  room_bytes_ = bytes_ + kHugePage;
  room_ = mmap(nullptr, static_cast<size_t>(room_bytes_), PROT_NONE,
               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(room_) + kHugePage - 1) & -kHugePage;
  void* const data =
      room_ == MAP_FAILED
          ? MAP_FAILED
          : mmap(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes_), PROT_READ | PROT_WRITE,
                 MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
  if (data == MAP_FAILED) {
    std::perror("mmap");
    std::abort();
  }
  data_ = static_cast<uint8_t*>(data);
  team.Run([&](int member) {
    std::mt19937_64 random(member);
    auto* const words = reinterpret_cast<uint64_t*>(data_);
    const int64_t count = bytes_ / 8 / team.size();
    for (int64_t i = member * count; i < (member + 1) * count; ++i) {
      words[i] = (random() & 0x807f807f807f807full) | 0x3f003f003f003f00ull;
    }
  });
  constexpr int kCollapse = 25;  // MADV_COLLAPSE
  madvise(data_, static_cast<size_t>(bytes_), kCollapse);
}

InPlaceBench::~InPlaceBench() { munmap(room_, static_cast<size_t>(room_bytes_)); }

InPlaceBench::Rate InPlaceBench::Reads(CpuTeam& team) const {
  std::vector<uint64_t> sums(8);
  return RateOf(bytes_, TimeRuns([&] {
    constexpr int64_t kPart = int64_t{1} << 20;
    team.ForEach(bytes_ / kPart, [&](int64_t part) {
      const auto* const p = reinterpret_cast<const uint64_t*>(data_) + part * (kPart / 8);
      uint64_t sum[8] = {};
      for (int64_t i = 0; i < kPart / 8; i += 8) {
        __builtin_prefetch(p + i + 2048);
        for (int j = 0; j < 8; ++j) sum[j] += p[i + j];
      }
      sums[part % 8] = sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7];
    });
  }));
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
