// The executor's completion thread: waits for steps, judges what their waits came to, and hands them back.
#include <pthread.h>

#include <algorithm>
#include <iterator>
#include <utility>

#include "common/steady_time.h"
#include "common/trace.h"
#include "services/worker/step_executor.h"

namespace headroom {

void StepExecutor::CompletionLoop() {
  pthread_setname_np(pthread_self(), "completion");
  for (;;) {
    Running running;
    {
      MutexLock lock(&mutex_);
      while (running_.empty()) {
        if (executor_ended_) return;
        enqueued_.WaitFor(&mutex_, absl::Seconds(1));
      }
      running = running_.front();
    }
    Context& context = *running.context;
    StepContext::Flight& flight = context.state->flight(running.flight);
    absl::Status waited = device_.Synchronize(flight.done, options_.step_timeout);
    if (waited.ok() && flight.seals) {
      waited = device_.Synchronize(flight.sealed_done, options_.step_timeout);
    }
    if (flight.status.ok()) flight.status = waited;
    if (flight.status.ok()) flight.status = device_.status();
    if (flight.status.ok()) flight.status = JudgeAwaits(flight);
    std::unique_ptr<Step> step =
        Complete(flight, std::max(flight.enqueued_ns, context.last_done_ns));
    context.last_done_ns = SteadyNs();
    {
      MutexLock lock(&mutex_);
      running_.pop_front();
      context.flight_busy[running.flight] = false;
      ++events_;
      work_.Signal();
    }
    done_(std::move(step));
  }
}

// A step whose partials did not come is discarded, and with it what was sent to go on from it.
absl::Status StepExecutor::JudgeAwaits(StepContext::Flight& flight) {
  Step& step = *flight.step;
  const uint32_t result = flight.await_result->load(std::memory_order_acquire);
  MutexLock lock(&mutex_);
  if (result == kernels::kAwaitOk && discarded_.Counts(step)) return absl::OkStatus();
  discarded_.Discard(step, /*run=*/true);
  step.result.retry = true;
  flight.num_results = 0;
  constexpr const char* kWhy[] = {"an earlier step of the sequence was discarded",
                                  "the keys in place were not attended to in time",
                                  "the keys in place are not attended to any more",
                                  "the kvstore's answer is to another question",
                                  "the kvstore refuses to attend to the keys in place"};
  return absl::UnavailableError(kWhy[std::min<size_t>(result, std::size(kWhy) - 1)]);
}

std::unique_ptr<Step> StepExecutor::Complete(StepContext::Flight& flight, int64_t begun_ns) {
  std::unique_ptr<Step> step = std::move(flight.step);
  StepResult& result = step->result;
  result.status = flight.status;
  result.tokens.assign(flight.host_results, flight.host_results + flight.num_results);
  for (const kernels::SampleResult& token : result.tokens) {
    if (token.non_finite != 0 && result.status.ok()) {
      result.status = absl::DataLossError(
          "the model's logits are not finite: weights or keys are damaged");
    }
  }
  const int64_t ended_ns = SteadyNs();
  result.duration_ns = ended_ns - begun_ns;
  TraceSlice(step->has_chunk() ? "chunk step" : "token step", begun_ns, ended_ns, "step",
             static_cast<int64_t>(step->number));
  if (absl::IsCancelled(result.status)) return step;  // its accounts are of part of it, or of another
  for (int lane = 0; lane < kNumLanes; ++lane) {
    LaneAccount& account = result.lanes[lane];
    account.kv_heads = flight.kv_heads[lane];
    account.bytes = flight.accounts[lane].bytes;
    account.busy_ns = flight.accounts[lane].EstimatedBusyNs();
    account.idle_ns =
        account.bytes > 0 ? std::max<int64_t>(0, result.duration_ns - account.busy_ns) : 0;
  }
  // Tiles were read once each, so what else those launches read were resident keys.
  if (flight.status.ok()) {
    result.lanes[static_cast<int>(Lane::kResident)].bytes +=
        flight.tile_reads.bytes - flight.accounts[static_cast<int>(Lane::kFetched)].bytes;
  }
  if (flight.in_place_totals != nullptr && flight.status.ok()) {
    LaneAccount& account = result.lanes[static_cast<int>(Lane::kInPlace)];
    account.bytes = static_cast<int64_t>(flight.in_place_totals->bytes);
    account.busy_ns = static_cast<int64_t>(flight.in_place_totals->busy_ns);
    account.idle_ns = std::max<int64_t>(0, result.duration_ns - account.busy_ns);
  }
  result.fetch_wait_ns = flight.fetch_wait.EstimatedBusyNs();
  result.in_place_wait_ns = flight.in_place_wait.EstimatedBusyNs();
  result.sealed_bytes = flight.sealed.bytes;
  return step;
}

}  // namespace headroom
