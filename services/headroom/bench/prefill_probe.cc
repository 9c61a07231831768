#include "services/headroom/bench/prefill_probe.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>

#include "common/status.h"
#include "common/steady_time.h"
#include "services/worker/device_budget.h"

namespace headroom {
namespace {

class PrefillProbe {
 public:
  PrefillProbe(const PrefillWork& work, const StepPort& port) : work_(work), port_(port) {}

  absl::StatusOr<PrefillTimes> Run() {
    begin_ = last_token_ = SteadySeconds();
    for (;;) {
      const bool more = next_pos_ < work_.context_tokens &&
                        (next_pos_ == 0 || absl::Now() <= work_.deadline);
      if (!more && chunks_.empty()) break;
      if (more && chunks_.size() < kStepsInFlight) {
        HEADROOM_RETURN_IF_ERROR(SubmitChunk());
      } else if (work_.beside != nullptr && decoding_ < kStepsInFlight &&
                 work_.beside->submitted() < work_.most_beside) {
        HEADROOM_RETURN_IF_ERROR(work_.beside->SubmitNext());
        ++decoding_;
      } else {
        HEADROOM_RETURN_IF_ERROR(Take());
      }
    }
    times_.seconds = SteadySeconds() - begin_;
    while (decoding_ > 0) {  // the prefill is over: of no interest
      HEADROOM_RETURN_IF_ERROR(TakeStep(port_).status());
      --decoding_;
    }
    return std::move(times_);
  }

 private:
  struct Chunk {
    uint64_t number;
    int64_t end;
  };

  absl::Status SubmitChunk() {
    const int64_t tokens = std::min(work_.chunk_tokens, work_.context_tokens - next_pos_);
    HEADROOM_RETURN_IF_ERROR(work_.await(next_pos_ + tokens));
    StepSequence sequence;
    sequence.sequence_id = work_.sequence.sequence_id;
    sequence.first_pos = sequence.sealed_tokens = next_pos_;
    for (int64_t i = 0; i < tokens; ++i) {
      sequence.token_ids.push_back(static_cast<int32_t>((next_pos_ + i) * 7919 % work_.vocab));
    }
    auto step = std::make_unique<Step>();
    step->number = port_.next_number();
    step->plan_version = work_.plan_version;
    if (next_pos_ == 0) step->open.push_back(work_.sequence);
    next_pos_ += tokens;
    sequence.draw = next_pos_ == work_.context_tokens;
    step->sequences.push_back(std::move(sequence));
    chunks_.push_back({step->number, next_pos_});
    return port_.submit(std::move(step));
  }

  // Chunks and decode steps each return in their order, but not in each other's.
  absl::Status Take() {
    HEADROOM_ASSIGN_OR_RETURN(const std::unique_ptr<Step> step, TakeStep(port_));
    const double now = SteadySeconds();
    const bool is_chunk = !chunks_.empty() && chunks_.front().number == step->number;
    if (is_chunk == (work_.beside == nullptr)) times_.Add(step->result, 1);
    if (!is_chunk) {
      --decoding_;
      times_.token_seconds.push_back(now - last_token_);
      last_token_ = now;
      return absl::OkStatus();
    }
    times_.prefilled_tokens = chunks_.front().end;
    chunks_.pop_front();
    return work_.on_chunk ? work_.on_chunk(times_.prefilled_tokens, now - begin_)
                          : absl::OkStatus();
  }

  const PrefillWork& work_;
  const StepPort& port_;
  std::deque<Chunk> chunks_;  // in flight
  int64_t next_pos_ = 0;
  int decoding_ = 0;  // in flight
  double begin_ = 0;
  double last_token_ = 0;
  PrefillTimes times_;
};

}  // namespace

absl::StatusOr<PrefillTimes> MeasurePrefill(const PrefillWork& work, const StepPort& port) {
  return PrefillProbe(work, port).Run();
}

}  // namespace headroom
