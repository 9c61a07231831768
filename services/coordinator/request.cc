#include "services/coordinator/request.h"

namespace headroom::coordinator {

uint64_t SeedOfAnswer(uint64_t seed, int32_t index) {
  if (index == 0) return seed;
  uint64_t z = seed + static_cast<uint64_t>(index) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

std::unique_ptr<Request> RequestOfAnswer(const Request& request, int32_t index) {
  auto answer = std::make_unique<Request>(request);
  answer->index = index;
  answer->sampling.set_seed(SeedOfAnswer(request.sampling.seed(), index));
  if (index > 0) {
    answer->session_id.clear();
    answer->score_prompt = false;
  }
  return answer;
}

}  // namespace headroom::coordinator
