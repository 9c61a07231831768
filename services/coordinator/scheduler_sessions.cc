// The scheduler's answers about sessions and about itself.
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/log.h"
#include "services/coordinator/errors.h"
#include "services/coordinator/plan_proto.h"
#include "services/coordinator/scheduler.h"

namespace headroom::coordinator {
namespace {

constexpr absl::Duration kSessionSweep = absl::Seconds(1);

}  // namespace

v1::Session Scheduler::Describe(const Session& session) const {
  const Sequence* sequence = &session.sequence;
  for (const auto& request : running_) {
    if (request->request().session_id == session.id) sequence = &request->sequence();
  }
  v1::Session out;
  out.set_session_id(session.id);
  out.set_tokens(static_cast<int64_t>(sequence->token_ids.size()));
  out.set_sealed_tokens(sequence->sealed_tokens);
  out.set_host_bytes(HostBytes(*sequence, capacity_.extents.geometry));
  out.set_busy(session.busy);
  if (session.ttl.has_value()) out.set_ttl_ms(absl::ToInt64Milliseconds(*session.ttl));
  out.set_pinned(session.pinned);
  return out;
}

bool Scheduler::GetSession(const std::string& id,
                           std::function<void(absl::StatusOr<v1::Session>)> answer) {
  return thread_.Post([this, id, answer = std::move(answer)] {
    const Session* const session = sessions_.Find(id);
    if (session == nullptr) {
      answer(SessionUnknownError(id));
    } else {
      answer(Describe(*session));
    }
  });
}

bool Scheduler::ListSessions(const std::string& after, size_t most,
                             std::function<void(std::vector<v1::Session>)> answer) {
  return thread_.Post([this, after, most, answer = std::move(answer)] {
    std::vector<v1::Session> listed;
    for (const Session* session : sessions_.List(after, most)) listed.push_back(Describe(*session));
    answer(std::move(listed));
  });
}

bool Scheduler::UpdateSession(const std::string& id, std::optional<int64_t> ttl_ms,
                              std::optional<bool> pinned,
                              std::function<void(absl::StatusOr<v1::Session>)> answer) {
  return thread_.Post([this, id, ttl_ms, pinned, answer = std::move(answer)] {
    Session* const session = sessions_.Find(id);
    if (session == nullptr) {
      answer(SessionUnknownError(id));
      return;
    }
    if (ttl_ms.has_value()) session->ttl = absl::Milliseconds(*ttl_ms);
    if (pinned.has_value()) session->pinned = *pinned;
    session->last_used = absl::Now();
    answer(Describe(*session));
  });
}

// A busy session's request ends too: its owner has asked for the keys to go.
bool Scheduler::DeleteSession(const std::string& id, std::function<void(absl::Status)> answer) {
  return thread_.Post([this, id, answer = std::move(answer)] {
    Session* const session = sessions_.Find(id);
    if (session == nullptr) {
      answer(SessionUnknownError(id));
      return;
    }
    if (session->busy) {
      session->drop = true;
      for (auto& request : running_) {
        if (request->request().session_id == id) {
          request->End(absl::OkStatus(), v1::FINISH_REASON_CANCELLED);
        }
      }
    } else {
      ReleaseLater(session->sequence);
      sessions_.Erase(id);
    }
    answer(absl::OkStatus());
  });
}

void Scheduler::ReleaseLater(const Sequence& sequence) {
  if (sequence.id == 0) return;
  truncations_.erase(sequence.id);
  to_release_.sequence_ids.push_back(sequence.id);
  to_release_.host_bytes += HostBytes(sequence, capacity_.extents.geometry);
  to_release_.runs += static_cast<int64_t>(sequence.runs.size());
}

// A session whose request has ended counts as idle although the worker still lets go of it: its client
// has the whole answer.
bool Scheduler::Flush(std::function<void(int32_t)> answer) {
  return thread_.Post([this, answer = std::move(answer)] {
    const std::vector<Sequence> taken = sessions_.TakeIdle();
    for (const Sequence& sequence : taken) ReleaseLater(sequence);
    auto dropped = static_cast<int32_t>(taken.size());
    for (const auto& request : running_) {
      Session* const session = sessions_.Find(request->request().session_id);
      if (session == nullptr || !request->ended() || session->drop) continue;
      session->drop = true;
      ++dropped;
    }
    answer(dropped);
  });
}

void Scheduler::MaintainSessions(absl::Time now) {
  if (now < next_session_sweep_) return;
  next_session_sweep_ = now + kSessionSweep;
  for (const Sequence& sequence : sessions_.TakeExpired(now)) ReleaseLater(sequence);
}

bool Scheduler::Drain(std::function<void()> answer) {
  {
    MutexLock lock(&mutex_);
    draining_ = true;
  }
  return thread_.Post([this, answer = std::move(answer)] {
    LogInfo(absl::StrCat("draining: ", running_.size(), " requests run, ", num_waiting(), " wait"));
    if (stopping_) {
      answer();
    } else {
      drained_.push_back(answer);
    }
  });
}

bool Scheduler::GetStatus(std::function<void(v1::GetStatusResponse)> answer) {
  return thread_.Post([this, answer = std::move(answer)] { answer(DescribeStatus()); });
}

void Scheduler::NoteWorker(const v1::GetWorkerInfoResponse& worker) {
  thread_.Post([this, registered = worker.memory().registered_host_bytes(),
                built = worker.plans_built(), at_start = worker.plans_at_start()] {
    // The rest of the memory comes with each step, and a step may have passed this.
    device_memory_.set_registered_host_bytes(registered);
    plans_built_ = built;
    plans_at_start_ = at_start;
  });
}

v1::GetStatusResponse Scheduler::DescribeStatus() const {
  v1::GetStatusResponse status = totals_;
  const std::shared_ptr<const PeerFacts> found = facts();
  const auto add_process = [&](const char* name, bool connected, uint64_t life) {
    v1::ProcessStatus* const process = status.add_processes();
    process->set_name(name);
    process->set_connected(connected);
    if (life != 0) process->set_life(life);
    if (!connected) process->set_message(connect_failure_);
  };
  add_process("coordinator", true, 0);
  add_process("worker", connected_, found == nullptr ? 0 : found->worker.incarnation());
  add_process("kvstore", connected_ && store_answers_,
              found == nullptr ? 0 : found->store.generation());
  if (found != nullptr) {
    status.set_device(found->worker.device());
    status.set_host_capacity_bytes(found->store.capacity_bytes());
    status.set_host_used_bytes(found->store.used_bytes());
    if (found->store.has_in_place()) *status.mutable_in_place() = found->store.in_place();
  }
  *status.mutable_device_memory() = device_memory_;
  status.set_running_requests(static_cast<int32_t>(running_.size()));
  status.set_waiting_requests(static_cast<int32_t>(num_waiting()));
  status.set_sessions(static_cast<int32_t>(sessions_.size()));
  if (plan_.ready_version != 0) *status.mutable_plan() = ToProto(plan_.placement, plan_.version);
  status.set_steps(pipeline_.steps_returned());
  status.set_plans_built(plans_built_);
  status.set_plans_at_start(plans_at_start_);
  return status;
}

}  // namespace headroom::coordinator
