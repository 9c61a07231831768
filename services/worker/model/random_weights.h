// Weights drawn from a seed, for measuring a model's geometry without its files.
#ifndef HEADROOM_SERVICES_WORKER_MODEL_RANDOM_WEIGHTS_H_
#define HEADROOM_SERVICES_WORKER_MODEL_RANDOM_WEIGHTS_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "common/device/device.h"
#include "services/worker/model/model_config.h"
#include "services/worker/model/weights.h"

namespace headroom {

// Drawn on the device, in the arena, WeightBytes() of it: the same weights on every device. An
// output of a matrix [n, k] has variance 1 where its inputs have (elements uniform within
// +-sqrt(3 / k)), norms are 1 and biases 0, so that activations and logits stay finite and near 1
// through any number of layers. The fingerprint is of seed and geometry. Errors as those of the
// device.
absl::StatusOr<ModelWeights> DrawWeights(const ModelConfig& config, uint64_t seed, Device& device);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_WORKER_MODEL_RANDOM_WEIGHTS_H_
