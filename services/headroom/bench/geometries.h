// Published models by name, for `headroom bench --geometry`: their shapes and options, no weights.
#ifndef HEADROOM_SERVICES_HEADROOM_BENCH_GEOMETRIES_H_
#define HEADROOM_SERVICES_HEADROOM_BENCH_GEOMETRIES_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/worker/model/model_config.h"

namespace headroom {

// In the order of the table.
std::vector<std::string> GeometryNames();

// NOT_FOUND names those that there are.
absl::StatusOr<ModelConfig> GeometryOf(absl::string_view name);

}  // namespace headroom

#endif  // HEADROOM_SERVICES_HEADROOM_BENCH_GEOMETRIES_H_
