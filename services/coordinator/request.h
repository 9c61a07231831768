// A generation request as the scheduler sees it: checked, every default filled in; and where its
// results go.
#ifndef HEADROOM_SERVICES_COORDINATOR_REQUEST_H_
#define HEADROOM_SERVICES_COORDINATOR_REQUEST_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "headroom/v1/inference.pb.h"
#include "headroom/v1/types.pb.h"
#include "services/coordinator/placement/placement.h"

namespace headroom::coordinator {

struct Request {
  std::string id;
  int32_t n = 1;      // answers that are asked for
  int32_t index = 0;  // of the one that this is about
  std::vector<int32_t> prompt;  // at least one token
  v1::SamplingParams sampling;  // every field set, but for logit_bias
  google::protobuf::Map<int32_t, float> logit_bias;
  std::vector<int32_t> held_back_token_ids;  // not among the first min_tokens
  int64_t max_tokens = 0;       // prompt.size() + max_tokens is within the context limit
  int64_t min_tokens = 0;
  std::vector<std::string> stop_strings;
  std::vector<int32_t> stop_token_ids;
  std::vector<int32_t> eos_token_ids;  // empty where they are to be ignored
  bool include_stop = false;
  absl::Duration time_limit = absl::InfiniteDuration();
  absl::Time deadline = absl::InfiniteFuture();
  absl::Time arrival;
  bool want_logprobs = false;
  int32_t num_top_logprobs = 0;
  bool score_prompt = false;
  std::string session_id;  // empty: the keys go when the request ends
  std::string cache_salt;
  bool bypass_prefix_cache = false;
  PlacementSpec placement;
  bool deterministic = false;
  int64_t chunk_tokens = 0;  // at least 1
  bool explain = false;

  // Whether its draws go by more than the logits.
  bool has_history() const {
    return max_tokens > 0 &&
           ((sampling.has_repetition_penalty() && sampling.repetition_penalty() != 1) ||
            sampling.frequency_penalty() != 0 || sampling.presence_penalty() != 0 ||
            !logit_bias.empty() ||
            (min_tokens > 0 && !held_back_token_ids.empty()));
  }
  // Positions whose keys are computed at most: the last token drawn needs none.
  int64_t end_pos() const {
    return static_cast<int64_t>(prompt.size()) + (max_tokens > 0 ? max_tokens - 1 : 0);
  }
};

// The seed of an answer: that of the first is the request's, the others differ from it and from
// each other. (splitmix64, Steele, Lea, Flood 2014.)
uint64_t SeedOfAnswer(uint64_t seed, int32_t index);

// What is to be done for one of the answers. The first one alone has to do with the session and
// with the prompt's scores.
std::unique_ptr<Request> RequestOfAnswer(const Request& request, int32_t index);

// Receives what becomes of a request, of all its answers: deltas and ends say of which. Called on
// the scheduler's thread, in order; must not block.
class RequestSink {
 public:
  virtual ~RequestSink() = default;
  // An answer is certain to be worked on. Once for each, before everything else of it; not if it
  // fails before.
  virtual void OnAccepted() = 0;
  virtual void OnDelta(v1::Delta delta) = 0;
  // Once for each answer, last. Not OK: `finished` holds the usage so far.
  virtual void OnFinished(const absl::Status& status, v1::Finished finished) = 0;
  // False while the client has not taken what it was sent: the request then pauses, and the sink
  // calls Scheduler::Wake() when it can take more.
  virtual bool CanTake() const = 0;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_REQUEST_H_
