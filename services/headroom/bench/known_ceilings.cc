#include "services/headroom/bench/known_ceilings.h"

#include "absl/strings/match.h"

namespace headroom {
namespace {

struct KnownCard {
  absl::string_view name_part;
  Ceilings ceilings;
};

// GEMM: cuBLASLt at Llama-3-8B's linear layers, 4,096 to 16,384 rows (680 to 720 TFLOP/s).
// Attention: cuDNN, head_dim 128, chunks of 4,096 to 16,384 queries (650 to 680). Copies: PCIe 5 x16,
// host to device in pieces of 16 MiB.
constexpr KnownCard kCards[] = {
    {"H100 80GB",
     {.gemm_flops = 700e12,
      .attention_flops = 665e12,
      .read_bytes = 3.07e12,
      .copy_bytes = 54.2e9,
      .copy_256kib_bytes = 34.3e9,
      .copy_1mib_bytes = 47.2e9,
      .copy_4mib_bytes = 52.6e9,
      .copy_back_bytes = 51.1e9,
      .copy_both_bytes = 84.7e9}},
    {"H200",
     {.gemm_flops = 700e12,
      .attention_flops = 665e12,
      .read_bytes = 4.53e12,
      .copy_bytes = 55.1e9,
      .copy_256kib_bytes = 36.4e9,
      .copy_1mib_bytes = 48.6e9,
      .copy_4mib_bytes = 53.5e9,
      .copy_back_bytes = 55.3e9,
      .copy_both_bytes = 101.7e9}},
};

}  // namespace

Ceilings KnownCeilings(absl::string_view device_name) {
  for (const KnownCard& card : kCards) {
    if (absl::StrContains(device_name, card.name_part)) return card.ceilings;
  }
  return {};
}

Ceilings FloorCeilings(const Ceilings& measured, const Ceilings& known) {
  Ceilings share = known;
  for (const CeilingField& field : kCeilingFields) share.*field.value *= kKnownShare;
  return Larger(measured, share);
}

}  // namespace headroom
