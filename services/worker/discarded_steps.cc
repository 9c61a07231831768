#include "services/worker/discarded_steps.h"

#include <algorithm>

namespace headroom {
namespace {

constexpr size_t kMaxAbandoned = 1024;

}  // namespace

void DiscardedSteps::Abandon(const std::vector<uint64_t>& sequence_ids) {
  if (abandoned_.size() + sequence_ids.size() > kMaxAbandoned) return;
  abandoned_.insert(sequence_ids.begin(), sequence_ids.end());
}

bool DiscardedSteps::AllAbandoned(const Step& step) const {
  return !abandoned_.empty() &&
         std::all_of(step.sequences.begin(), step.sequences.end(),
                     [&](const StepSequence& sequence) {
                       return abandoned_.count(sequence.sequence_id) > 0;
                     });
}

bool DiscardedSteps::MayRun(const Step& step) {
  for (const StepSequence& sequence : step.sequences) {
    if (abandoned_.count(sequence.sequence_id) > 0) return false;
    const auto at = discarded_.find(sequence.sequence_id);
    if (at != discarded_.end() && !at->second.run && sequence.first_pos > at->second.first_pos) {
      return false;
    }
  }
  for (const StepSequence& sequence : step.sequences) {
    const auto at = discarded_.find(sequence.sequence_id);
    if (at != discarded_.end()) at->second.run = true;
  }
  return true;
}

bool DiscardedSteps::Counts(const Step& step) {
  for (const StepSequence& sequence : step.sequences) {
    const auto at = discarded_.find(sequence.sequence_id);
    if (at != discarded_.end() && sequence.first_pos > at->second.first_pos) return false;
  }
  for (const StepSequence& sequence : step.sequences) {
    // What has not been run waits for a later step.
    const auto at = discarded_.find(sequence.sequence_id);
    if (at != discarded_.end() && at->second.run) discarded_.erase(at);
  }
  return true;
}

void DiscardedSteps::Discard(const Step& step, bool run) {
  for (const StepSequence& sequence : step.sequences) {
    const auto [at, added] =
        discarded_.try_emplace(sequence.sequence_id, Discarded{sequence.first_pos, run});
    at->second.first_pos = std::min(at->second.first_pos, sequence.first_pos);
    at->second.run = at->second.run && run;
  }
}

void DiscardedSteps::Close(const std::vector<uint64_t>& sequence_ids) {
  for (const uint64_t id : sequence_ids) {
    discarded_.erase(id);
    abandoned_.erase(id);
  }
}

void DiscardedSteps::Clear() {
  discarded_.clear();
  abandoned_.clear();
}

}  // namespace headroom
