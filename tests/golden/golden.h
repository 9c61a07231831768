// What tests/golden/data/ holds: logits of random tiny models as transformers computed them in
// float32 (make_goldens.py). The model's folder is made anew from `spec`; `model_sha256` proves
// that it is the one the logits belong to.
#ifndef HEADROOM_TESTS_GOLDEN_GOLDEN_H_
#define HEADROOM_TESTS_GOLDEN_GOLDEN_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "tests/common/random_model.h"

namespace headroom {

// An error of logits over their standard deviation.
struct GoldenError {
  double mean = 0;
  double max = 0;  // infinite where a value is not finite
};

// One prompt and the logits at some of its positions.
struct GoldenCase {
  std::vector<int32_t> token_ids;
  std::vector<int32_t> positions;  // ascending, the first and the last token's among them
  std::vector<float> logits;       // [positions][vocab]
  double logits_std = 0;           // over all of `logits`: what the tolerances are multiples of
  GoldenError bfloat16_error;      // of transformers' own run in bfloat16
};

struct Golden {
  std::string name;  // e.g. "gqa3_d64_tied"
  RandomModelSpec spec;
  std::string model_sha256;  // of model.safetensors as WriteRandomModel(spec, ...) writes it
  // The bar: errors over logits_std. transformers' own bfloat16 run passes it too.
  double mean_tolerance = 0;
  double max_tolerance = 0;
  // Ascending in length: 1, 2, 63, 64, 65, 1000 tokens, and with a window those around it.
  std::vector<GoldenCase> cases;

  // The golden logits of the i-th stored position of a case.
  std::span<const float> Logits(const GoldenCase& golden_case, int64_t i) const {
    return std::span<const float>(golden_case.logits).subspan(i * spec.vocab_size, spec.vocab_size);
  }
};

// Of `got` ([positions][vocab]) against a case's logits.
// REQUIRES: got.size() == golden_case.logits.size()
GoldenError ErrorAgainst(const GoldenCase& golden_case, std::span<const float> got);

// Names of the goldens in `dir` (tests/golden/data), sorted: those of its *.json files.
// Errors: NOT_FOUND (no such folder, or none in it).
absl::StatusOr<std::vector<std::string>> GoldenNames(const std::string& dir);

// Reads dir/NAME.json and dir/NAME.safetensors.
// Errors: NOT_FOUND (a file is missing), DATA_LOSS (a file is not what make_goldens.py writes).
absl::StatusOr<Golden> ReadGolden(const std::string& dir, const std::string& name);

}  // namespace headroom

#endif  // HEADROOM_TESTS_GOLDEN_GOLDEN_H_
