// The connections to worker and store: made, watched and made again, off the scheduler's thread.
//
// Calls block for up to seconds when a peer is in trouble, so they run one after the other on a
// thread of this class; their results are posted to the scheduler's thread, where all callbacks
// run. Every method is called on the scheduler's thread.
#ifndef HEADROOM_SERVICES_COORDINATOR_PEERS_H_
#define HEADROOM_SERVICES_COORDINATOR_PEERS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "common/task_thread.h"
#include "headroom/v1/kv_store.pb.h"
#include "headroom/v1/types.pb.h"
#include "headroom/v1/worker.pb.h"
#include "services/coordinator/store_client.h"
#include "services/coordinator/worker_client.h"

namespace headroom::coordinator {

// Both peers as found when a connection was made.
struct PeersFound {
  v1::GetWorkerInfoResponse worker;
  v1::GetStoreInfoResponse store;
  std::vector<v1::StoredSequence> stored;
  v1::MeasureLanesResponse lane_costs;  // empty: could not be measured
};

class Peers {
 public:
  struct Events {
    // Both are there, the store is attached and a new step stream is open, with no sequence in it.
    std::function<void(PeersFound)> on_connected;
    std::function<void(v1::StepResponse)> on_response;
    // The step stream has broken: what was in flight is lost. Connect() again.
    std::function<void(absl::Status)> on_stream_lost;
    // The store does not answer, or answers again (with what it says of itself).
    std::function<void(absl::StatusOr<v1::GetStoreInfoResponse>)> on_store;
    // The store has been started anew: Connect() again when nothing is in flight.
    std::function<void()> on_store_restarted;
    // Why a connection could not be made; it is tried again.
    std::function<void(absl::Status)> on_connect_failed;
  };

  Peers(std::unique_ptr<WorkerClient> worker, std::unique_ptr<StoreClient> store, bool allow_clean,
        TaskThread* scheduler_thread, Events events);
  // No callback runs once the scheduler's thread has stopped; stop that first.
  ~Peers();
  void Start() { calls_.Start(); }

  // Ends the step stream, if there is one, and connects anew; tries until it works. Pauses first if
  // the connection before did not last a second.
  void Connect();
  // Dropped without a stream.
  void Send(v1::StepRequest step);
  bool connected() const { return stream_ != nullptr; }

  using Done = std::function<void(absl::Status)>;
  // Extends a sequence by runs of these capacities, the first at `first_pos`. What came about
  // before an error is handed over with it.
  void AllocateRuns(uint64_t sequence_id, int64_t first_pos, std::vector<int64_t> capacities,
                    std::function<void(absl::Status, std::vector<v1::ExtentRun>)> done);
  void CommitSealed(std::vector<v1::SealedSequence> sequences, Done done);
  void Truncate(uint64_t sequence_id, int64_t tokens, Done done);
  void Release(std::vector<uint64_t> sequence_ids, Done done);
  // A wait for keys in place has given up: the lane is opened anew once the store answers, later if it
  // has not lasted.
  void ReopenInPlace();
  // At worker and store.
  void PreparePlan(v1::Plan plan, Done done);

 private:
  struct Connection {
    PeersFound found;
    std::shared_ptr<StepStream> stream;
  };

  absl::StatusOr<Connection> TryConnect(uint64_t epoch);
  absl::Status BindStore(PeersFound& found);
  v1::MeasureLanesResponse LaneCostsOf(const PeersFound& found);
  void ConnectUntilItWorks(uint64_t epoch);
  void WatchStore();
  // The store watches the mailbox that the worker has made for it. Not having it costs speed only.
  void OpenInPlace(uint64_t generation);
  void PauseInPlace();
  // Whether the store is the cause if a call failed.
  void NoteStore(const absl::Status& status);
  // Posts to the scheduler's thread, to be run only if the connection is still that of `epoch`.
  void PostIfCurrent(uint64_t epoch, TaskThread::Task task);

  const std::unique_ptr<WorkerClient> worker_;
  const std::unique_ptr<StoreClient> store_;
  const bool allow_clean_;
  TaskThread* const scheduler_thread_;
  const Events events_;

  // Scheduler's thread.
  uint64_t epoch_ = 0;  // of the stream
  std::shared_ptr<StepStream> stream_;
  absl::Time connected_at_ = absl::InfinitePast();
  absl::Duration next_pause_;

  // Thread of the calls.
  uint64_t generation_ = 0;  // of the store that is attached; 0: none
  bool store_answers_ = true;
  bool restart_told_ = false;
  absl::Time next_watch_;
  bool in_place_open_ = false;
  absl::Time in_place_retry_ = absl::InfinitePast();   // not before
  absl::Time in_place_opened_ = absl::InfinitePast();  // the latest that worked
  absl::Duration in_place_pause_;                      // before the next try
  std::string measured_for_;  // the peers that lane_costs_ hold for
  v1::MeasureLanesResponse lane_costs_;

  TaskThread calls_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_PEERS_H_
