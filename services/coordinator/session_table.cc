#include "services/coordinator/session_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/kv_layout.h"

namespace headroom::coordinator {
namespace {

constexpr size_t kMaxIdBytes = 128;

// A vacated extent is the same as before.
bool SameExtents(const v1::ExtentRun& a, const v1::ExtentRun& b) {
  if (a.first_pos() != b.first_pos() || a.capacity_tokens() != b.capacity_tokens()) return false;
  return std::equal(a.extents().begin(), a.extents().end(), b.extents().begin(), b.extents().end(),
                    [](const v1::Extent& x, const v1::Extent& y) {
                      return x.layer() == y.layer() && x.extent_id() == y.extent_id() &&
                             (x.vacated() || y.vacated() || x.data_offset() == y.data_offset());
                    });
}

}  // namespace

int64_t HostBytes(const Sequence& sequence, const KvGeometry& geometry) {
  int64_t tokens = 0;  // of one layer each
  for (const v1::ExtentRun& run : sequence.runs) {
    tokens += run.capacity_tokens() *
              std::count_if(run.extents().begin(), run.extents().end(),
                            [](const v1::Extent& extent) { return !extent.vacated(); });
  }
  return tokens * geometry.BytesPerTokenPerLayer();
}

bool CanGoOnFrom(const Sequence& sequence, const LayerWindows& windows, int64_t pos) {
  return std::none_of(
      sequence.runs.begin(), sequence.runs.end(), [&](const v1::ExtentRun& run) {
        const int64_t end = run.first_pos() + run.capacity_tokens();
        return std::any_of(run.extents().begin(), run.extents().end(), [&](const v1::Extent& extent) {
          return extent.vacated() && end > FirstKey(windows, extent.layer(), pos);
        });
      });
}

int64_t CachedTokens(const Sequence& sequence, const std::vector<int32_t>& prompt,
                     const LayerWindows& windows) {
  const int64_t most =
      std::min<int64_t>(sequence.sealed_tokens, static_cast<int64_t>(prompt.size()) - 1);
  int64_t common = 0;
  while (common < std::min<int64_t>(most, sequence.token_ids.size()) &&
         sequence.token_ids[common] == prompt[common]) {
    ++common;
  }
  common = FloorToBlock(common);
  return CanGoOnFrom(sequence, windows, common) ? common : 0;
}

v1::SealedSequence TakeSealed(Sequence& sequence, const KvGeometry& geometry,
                              const LayerWindows& windows) {
  v1::SealedSequence sealed;
  sealed.set_sequence_id(sequence.id);
  sealed.set_sealed_tokens(sequence.sealed_tokens);
  if (windows.empty()) return sealed;
  const int64_t pos = std::max<int64_t>(0, sequence.sealed_tokens - kBlockTokens);
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    sealed.add_kept_from(FirstKey(windows, layer, pos));
  }
  for (v1::ExtentRun& run : sequence.runs) {
    for (v1::Extent& extent : *run.mutable_extents()) {
      if (run.first_pos() + run.capacity_tokens() > sealed.kept_from(extent.layer())) continue;
      extent.clear_data_offset();
      extent.set_vacated(true);
    }
  }
  return sealed;
}

void Truncate(Sequence& sequence, int64_t tokens) {
  while (!sequence.runs.empty() && sequence.runs.back().first_pos() >= tokens) {
    sequence.runs.pop_back();
  }
  if (static_cast<int64_t>(sequence.token_ids.size()) > tokens) sequence.token_ids.resize(tokens);
  sequence.sealed_tokens = std::min(sequence.sealed_tokens, tokens);
  sequence.committed_tokens = std::min(sequence.committed_tokens, tokens);
}

void Reconcile(Sequence& sequence, const v1::StoredSequence* stored) {
  if (stored == nullptr) {
    sequence.runs.clear();
    sequence.sealed_tokens = sequence.committed_tokens = 0;
    return;
  }
  // Runs in the same extents as before; what follows them must be taken as the store says.
  int64_t same_tokens = 0;
  for (int i = 0; i < stored->runs_size() && i < static_cast<int>(sequence.runs.size()); ++i) {
    if (!SameExtents(stored->runs(i), sequence.runs[i])) break;
    same_tokens = stored->runs(i).first_pos() + stored->runs(i).capacity_tokens();
  }
  sequence.runs.assign(stored->runs().begin(), stored->runs().end());
  sequence.sealed_tokens = std::min(sequence.sealed_tokens, same_tokens);
  sequence.committed_tokens = std::min(stored->sealed_tokens(), sequence.sealed_tokens);
}

bool SessionTable::IsValidId(absl::string_view id) {
  return !id.empty() && id.size() <= kMaxIdBytes &&
         std::all_of(id.begin(), id.end(), [](unsigned char c) {
           return absl::ascii_isalnum(c) || c == '_' || c == '.' || c == '-';
         });
}

Session* SessionTable::Find(absl::string_view id) {
  const auto found = sessions_.find(std::string(id));
  return found == sessions_.end() ? nullptr : &found->second;
}

Session* SessionTable::FindIdle(uint64_t sequence_id) {
  const auto found = std::find_if(sessions_.begin(), sessions_.end(), [&](const auto& entry) {
    return !entry.second.busy && entry.second.sequence.id == sequence_id;
  });
  return found == sessions_.end() ? nullptr : &found->second;
}

absl::StatusOr<Session*> SessionTable::FindOrMake(const std::string& id, absl::Time now) {
  if (Session* const found = Find(id)) return found;
  if (size() >= max_sessions_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("there are ", size(), " sessions, as many as may be: delete some"));
  }
  Session& session = sessions_[id];
  session.id = id;
  session.last_used = now;
  return &session;
}

void SessionTable::Erase(const std::string& id) { sessions_.erase(id); }

std::vector<const Session*> SessionTable::List(const std::string& after, size_t most) const {
  std::vector<const Session*> listed;
  for (auto at = sessions_.upper_bound(after); at != sessions_.end() && listed.size() < most;
       ++at) {
    listed.push_back(&at->second);
  }
  return listed;
}

template <typename Condition>
std::vector<Sequence> SessionTable::TakeWhere(Condition condition) {
  std::vector<Sequence> taken;
  for (auto at = sessions_.begin(); at != sessions_.end();) {
    if (at->second.busy || !condition(at->second)) {
      ++at;
      continue;
    }
    taken.push_back(std::move(at->second.sequence));
    at = sessions_.erase(at);
  }
  return taken;
}

std::vector<Sequence> SessionTable::TakeExpired(absl::Time now) {
  return TakeWhere([now](const Session& session) {
    return !session.pinned && session.ttl.has_value() && session.last_used + *session.ttl <= now;
  });
}

std::vector<Sequence> SessionTable::TakeIdle() {
  return TakeWhere([](const Session&) { return true; });
}

int64_t SessionTable::idle_bytes(const KvGeometry& geometry) const {
  int64_t bytes = 0;
  for (const auto& [id, session] : sessions_) {
    if (!session.busy) bytes += HostBytes(session.sequence, geometry);
  }
  return bytes;
}

int64_t SessionTable::idle_runs() const {
  int64_t runs = 0;
  for (const auto& [id, session] : sessions_) {
    if (!session.busy) runs += static_cast<int64_t>(session.sequence.runs.size());
  }
  return runs;
}

}  // namespace headroom::coordinator
