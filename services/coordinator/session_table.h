// Sequences and the sessions that keep them between requests.
//
// A sequence's token ids are kept here as long as its keys are in the store, so that any key can be
// computed again. Not thread-safe: the scheduler's thread owns the table; a running request takes
// its sequence out and puts it back.
#ifndef HEADROOM_SERVICES_COORDINATOR_SESSION_TABLE_H_
#define HEADROOM_SERVICES_COORDINATOR_SESSION_TABLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "headroom/v1/kv_store.pb.h"
#include "headroom/v1/types.pb.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

// One token stream and where its keys lie.
struct Sequence {
  uint64_t id = 0;
  std::vector<int32_t> token_ids;
  std::vector<v1::ExtentRun> runs;
  int64_t sealed_tokens = 0;     // keys below are in extents; a multiple of 64
  int64_t committed_tokens = 0;  // of these, what the store knows of

  int64_t capacity_tokens() const {
    return runs.empty() ? 0 : runs.back().first_pos() + runs.back().capacity_tokens();
  }
};

// Host memory of its extents, those that are vacated left out.
int64_t HostBytes(const Sequence& sequence, const KvGeometry& geometry);

// Whether the sequence can be computed from position `pos` on: no extent that then is read is vacated.
bool CanGoOnFrom(const Sequence& sequence, const LayerWindows& windows, int64_t pos);

// Tokens of `prompt` whose keys the sequence has: whole blocks of the longest common prefix, and at
// least the last prompt token is left to compute, since its logits are wanted. 0 if keys that the next
// position would see are gone: what is before them lies still farther behind the window.
int64_t CachedTokens(const Sequence& sequence, const std::vector<int32_t>& prompt,
                     const LayerWindows& windows = {});

// What the store is to be told of the sequence's sealed keys; vacates what it is then to give back. One
// block more than the next position sees is kept: a loss, or a session that goes on with no more tokens than
// it had, computes the last one anew.
v1::SealedSequence TakeSealed(Sequence& sequence, const KvGeometry& geometry,
                              const LayerWindows& windows);

// Forgets what lies at and beyond `tokens` (a multiple of 64): the runs that begin there or later,
// ids, sealed counts. The store must be told (TruncateSequence).
void Truncate(Sequence& sequence, int64_t tokens);

// Brings the sequence in line with what a store that has come back holds of it (nullptr: nothing).
// Where the extents are still the same, keys that were sealed but not yet committed when the store
// went are kept: the bytes lie in the segment, which outlives the store. Which extents are vacated is the
// store's word: of what it was told last it may have heard or not.
void Reconcile(Sequence& sequence, const v1::StoredSequence* stored);

struct Session {
  std::string id;
  std::string cache_salt;
  Sequence sequence;                  // valid unless busy
  bool busy = false;                  // a request has the sequence
  bool drop = false;                  // deleted while busy: goes when the request ends
  std::optional<absl::Duration> ttl;  // unset: kept until deleted
  bool pinned = false;
  absl::Time last_used;
};

class SessionTable {
 public:
  // At most `max_sessions`, each id 1 to 128 of [A-Za-z0-9_.-].
  explicit SessionTable(int64_t max_sessions) : max_sessions_(max_sessions) {}

  static bool IsValidId(absl::string_view id);

  // nullptr if there is none.
  Session* Find(absl::string_view id);
  // The one that is idle and has the sequence, likewise.
  Session* FindIdle(uint64_t sequence_id);
  // The session, made if need be. RESOURCE_EXHAUSTED if there are too many.
  absl::StatusOr<Session*> FindOrMake(const std::string& id, absl::Time now);
  void Erase(const std::string& id);

  // In order of id, from the first after `after` on.
  std::vector<const Session*> List(const std::string& after, size_t most) const;
  // Idle sessions whose time is over, and all idle ones: taken out, for their extents to be freed.
  std::vector<Sequence> TakeExpired(absl::Time now);
  std::vector<Sequence> TakeIdle();

  template <typename F>
  void ForEach(F&& f) {
    for (auto& [id, session] : sessions_) f(session);
  }
  int64_t size() const { return static_cast<int64_t>(sessions_.size()); }
  // Of idle sessions.
  int64_t idle_bytes(const KvGeometry& geometry) const;
  int64_t idle_runs() const;

 private:
  template <typename Condition>
  std::vector<Sequence> TakeWhere(Condition condition);

  const int64_t max_sessions_;
  std::map<std::string, Session> sessions_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_SESSION_TABLE_H_
