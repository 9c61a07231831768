#include "tests/golden/golden.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace headroom {
namespace {

using Json = nlohmann::json;

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path));
  std::ostringstream content;
  content << file.rdbuf();
  return std::move(content).str();
}

// A safetensors file held whole: 8 bytes of header length, a JSON header, the tensors' bytes.
class Tensors {
 public:
  // Throws Json::exception where the header is not as it should be, as do the members.
  explicit Tensors(std::string content) : content_(std::move(content)) {
    uint64_t header_bytes = 0;
    if (content_.size() >= sizeof(header_bytes)) {
      std::memcpy(&header_bytes, content_.data(), sizeof(header_bytes));
    }
    const size_t rest = content_.size() - std::min(content_.size(), sizeof(header_bytes));
    const size_t bytes = std::min<uint64_t>(header_bytes, rest);
    data_ = sizeof(header_bytes) + bytes;
    header_ = Json::parse(content_.substr(std::min(content_.size(), sizeof(header_bytes)), bytes));
  }

  template <typename T>
  std::vector<T> Read(const std::string& name) const {
    const Json& offsets = header_.at(name).at("data_offsets");
    const auto begin = offsets.at(0).get<uint64_t>(), end = offsets.at(1).get<uint64_t>();
    if (begin > end || data_ > content_.size() || end > content_.size() - data_) return {};
    std::vector<T> values((end - begin) / sizeof(T));
    std::memcpy(values.data(), content_.data() + data_ + begin, values.size() * sizeof(T));
    return values;
  }

 private:
  const std::string content_;
  size_t data_ = 0;
  Json header_;
};

// Whether a case's arrays belong together.
bool Fits(const GoldenCase& golden_case, int64_t length, int64_t vocab_size) {
  const int64_t positions = static_cast<int64_t>(golden_case.positions.size());
  const auto in_prompt = [length](int32_t p) { return p >= 0 && p < length; };
  const auto in_vocab = [vocab_size](int32_t id) { return id >= 0 && id < vocab_size; };
  return length > 0 && static_cast<int64_t>(golden_case.token_ids.size()) == length &&
         positions > 0 && golden_case.positions.back() == length - 1 &&
         std::all_of(golden_case.positions.begin(), golden_case.positions.end(), in_prompt) &&
         std::is_sorted(golden_case.positions.begin(), golden_case.positions.end()) &&
         std::all_of(golden_case.token_ids.begin(), golden_case.token_ids.end(), in_vocab) &&
         static_cast<int64_t>(golden_case.logits.size()) == positions * vocab_size &&
         golden_case.logits_std > 0;
}

// Throws Json::exception.
absl::StatusOr<Golden> Parse(const std::string& sidecar, std::string arrays) {
  Golden golden;
  const Json json = Json::parse(sidecar);
  absl::StatusOr<RandomModelSpec> spec = ParseRandomModelSpec(json.at("spec").dump());
  if (!spec.ok()) return spec.status();
  golden.spec = *spec;
  golden.model_sha256 = json.at("model_sha256").get<std::string>();
  golden.mean_tolerance = json.at("tolerance").at("mean").get<double>();
  golden.max_tolerance = json.at("tolerance").at("max").get<double>();
  const Tensors tensors(std::move(arrays));
  for (const Json& facts : json.at("cases")) {
    const auto length = facts.at("length").get<int64_t>();
    GoldenCase golden_case = {
        .token_ids = tensors.Read<int32_t>(absl::StrCat("tokens.", length)),
        .positions = tensors.Read<int32_t>(absl::StrCat("positions.", length)),
        .logits = tensors.Read<float>(absl::StrCat("logits.", length)),
        .logits_std = facts.at("std").get<double>(),
        .bfloat16_error = {facts.at("bfloat16_error").at("mean").get<double>(),
                           facts.at("bfloat16_error").at("max").get<double>()}};
    if (!Fits(golden_case, length, golden.spec.vocab_size)) {
      return absl::DataLossError(absl::StrCat("arrays of length ", length, " do not fit"));
    }
    golden.cases.push_back(std::move(golden_case));
  }
  return golden;
}

}  // namespace

GoldenError ErrorAgainst(const GoldenCase& golden_case, std::span<const float> got) {
  GoldenError error;
  for (size_t i = 0; i < got.size(); ++i) {
    double difference = std::abs(static_cast<double>(got[i]) - golden_case.logits[i]);
    if (!std::isfinite(difference)) difference = std::numeric_limits<double>::infinity();
    error.mean += difference;
    error.max = std::max(error.max, difference);
  }
  error.mean /= static_cast<double>(got.size()) * golden_case.logits_std;
  error.max /= golden_case.logits_std;
  return error;
}

absl::StatusOr<std::vector<std::string>> GoldenNames(const std::string& dir) {
  std::vector<std::string> names;
  std::error_code error;
  for (std::filesystem::directory_iterator it(dir, error), end; !error && it != end;
       it.increment(error)) {
    if (it->path().extension() == ".json") names.push_back(it->path().stem().string());
  }
  if (error) return absl::NotFoundError(absl::StrCat("cannot list ", dir, ": ", error.message()));
  if (names.empty()) return absl::NotFoundError(absl::StrCat("no golden in ", dir));
  std::sort(names.begin(), names.end());
  return names;
}

absl::StatusOr<Golden> ReadGolden(const std::string& dir, const std::string& name) {
  absl::StatusOr<std::string> sidecar = ReadFile(absl::StrCat(dir, "/", name, ".json"));
  if (!sidecar.ok()) return sidecar.status();
  absl::StatusOr<std::string> arrays = ReadFile(absl::StrCat(dir, "/", name, ".safetensors"));
  if (!arrays.ok()) return arrays.status();
  absl::StatusOr<Golden> golden = absl::DataLossError("not parsed");
  try {  // nlohmann throws on a missing key or a wrong type
    golden = Parse(*sidecar, *std::move(arrays));
  } catch (const Json::exception& e) {
    golden = absl::DataLossError(e.what());
  }
  if (!golden.ok()) {
    return absl::DataLossError(absl::StrCat("golden ", name, ": ", golden.status().ToString()));
  }
  golden->name = name;
  return golden;
}

}  // namespace headroom
