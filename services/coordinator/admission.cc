#include "services/coordinator/admission.h"

#include "absl/strings/str_cat.h"

namespace headroom::coordinator {

Verdict Admit(const Capacity& capacity, const Commitments& commitments, const Demand& demand) {
  const KvGeometry& geometry = capacity.extents.geometry;
  Verdict verdict;
  int64_t extra_runs = 0;
  verdict.reserved_tokens =
      ReservedTokens(capacity.extents, demand.kept_tokens, demand.final_tokens, &extra_runs);
  verdict.reserved_bytes = MostHostBytes(capacity.extents, verdict.reserved_tokens);
  verdict.reserved_runs = demand.kept_runs + extra_runs;
  const int64_t host_runs = capacity.max_extents / geometry.num_layers;
  const auto refuse = [&](Verdict::Kind kind, std::string reason) {
    verdict.kind = kind;
    verdict.reason = std::move(reason);
    return verdict;
  };

  if (verdict.reserved_bytes > capacity.host_bytes) {
    return refuse(Verdict::kNever,
                  absl::StrCat("the request's ", demand.final_tokens, " tokens take ",
                               verdict.reserved_bytes, " bytes of host memory, the store has ",
                               capacity.host_bytes, " in all"));
  }
  if (verdict.reserved_bytes > capacity.host_bytes - commitments.idle_bytes) {
    return refuse(Verdict::kNever,
                  absl::StrCat("the request takes ", verdict.reserved_bytes,
                               " bytes of host memory, of ", capacity.host_bytes,
                               " idle sessions hold ", commitments.idle_bytes, ": delete some"));
  }
  if (verdict.reserved_runs > host_runs - commitments.idle_runs) {
    return refuse(
        Verdict::kNever,
        absl::StrCat("the request takes ", verdict.reserved_runs * geometry.num_layers,
                     " extents, the store has descriptors for ", capacity.max_extents,
                     ", idle sessions hold ", commitments.idle_runs * geometry.num_layers));
  }
  const int64_t alone_bytes = PoolBytes(capacity, 1, demand.has_history ? 1 : 0);
  if (alone_bytes > capacity.kv_pool_bytes || capacity.max_sequences < 1) {
    return refuse(
        Verdict::kNever,
        absl::StrCat(demand.has_history ? "a sequence's tail and the history of its draws take "
                                        : "a sequence's tail takes ",
                     alone_bytes, " bytes of device memory, the KV pool has ",
                     capacity.kv_pool_bytes));
  }

  if (commitments.running_sequences >= capacity.max_sequences) {
    return refuse(Verdict::kWait, absl::StrCat(commitments.running_sequences, " of ",
                                               capacity.max_sequences, " sequences run"));
  }
  const int64_t pool_used =
      PoolBytes(capacity, commitments.running_sequences, commitments.running_histories);
  if (pool_used + alone_bytes > capacity.kv_pool_bytes) {
    return refuse(Verdict::kWait,
                  absl::StrCat("the KV pool of ", capacity.kv_pool_bytes, " bytes holds ",
                               commitments.running_sequences, " tails of ",
                               capacity.tail_bytes_per_sequence, " bytes and ",
                               commitments.running_histories, " histories of ",
                               capacity.draw_state_bytes, " already"));
  }
  if (verdict.reserved_bytes >
      capacity.host_bytes - commitments.idle_bytes - commitments.running_bytes) {
    return refuse(Verdict::kWait,
                  absl::StrCat("the request takes ", verdict.reserved_bytes,
                               " bytes of host memory, running ones hold ",
                               commitments.running_bytes, " of ", capacity.host_bytes));
  }
  if (verdict.reserved_runs > host_runs - commitments.idle_runs - commitments.running_runs) {
    return refuse(Verdict::kWait, absl::StrCat("of the store's ", capacity.max_extents,
                                               " extents running requests ", "hold ",
                                               commitments.running_runs * geometry.num_layers));
  }
  return verdict;
}

}  // namespace headroom::coordinator
