#include "common/device/cuda/cudnn_sdpa.h"

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cstring>
#include <exception>
#include <limits>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/string_view.h"
#include "common/status.h"

namespace headroom {
namespace {

// The frontend wants the CUDA runtime from libcudart.so, which nothing else here needs and a host
// with a driver and cuDNN need not have. It asks for the version of 12 too, and refuses to find
// both. For describing and running an attention it takes three functions; this program has them.
void* FrontendOpen(const char* name, int) {
  static char runtime;
  return std::strcmp(name, "libcudart.so.13") == 0 ? &runtime : nullptr;
}
void* FrontendSymbol(void* library, const char* name) {
  if (library == FrontendOpen("libcudart.so.13", 0)) {
    const absl::string_view wanted = name;
    if (wanted == "cudaGetDevice") return reinterpret_cast<void*>(&cudaGetDevice);
    if (wanted == "cudaGetErrorString") return reinterpret_cast<void*>(&cudaGetErrorString);
    if (wanted == "cudaGetDeviceProperties") {
      return reinterpret_cast<void*>(
          static_cast<cudaError_t (*)(cudaDeviceProp*, int)>(&cudaGetDeviceProperties));
    }
    return nullptr;
  }
  return dlsym(library, name);
}

}  // namespace
}  // namespace headroom

// What the headers include is included first: the two names below are theirs alone.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cudnn.h>
#define CUDNN_FRONTEND_SKIP_JSON_LIB
#define dlopen ::headroom::FrontendOpen
#define dlsym ::headroom::FrontendSymbol
#include <cudnn_frontend.h>
#undef dlopen
#undef dlsym

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where the frontend looks cuDNN's functions up
}  // namespace cudnn_frontend

namespace headroom {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;

constexpr size_t kLeastVersion = 91400;

// Names of tensors in a plan.
enum Uid : int64_t { kQ = 1, kK, kV, kO, kLse, kRows, kKeys };

// The frontend reports in values and, for a missing symbol, in exceptions.
template <typename F>
absl::Status Call(F&& f, absl::string_view call, int line) {
  const auto place = [&] { return absl::StrCat(" (", __FILE__, ":", line, ")"); };
  try {
    if constexpr (std::is_same_v<decltype(f()), cudnnStatus_t>) {
      const cudnnStatus_t status = f();
      if (status == CUDNN_STATUS_SUCCESS) return absl::OkStatus();
      return absl::InternalError(
          absl::StrCat(call, ": ", fe::detail::get_error_string(status), place()));
    } else {
      fe::error_object error = f();
      if (error.is_good()) return absl::OkStatus();
      return absl::InternalError(absl::StrCat(call, ": ", error.get_message(), place()));
    }
  } catch (const std::exception& error) {
    return absl::InternalError(absl::StrCat(call, ": ", error.what(), place()));
  }
}
#define HEADROOM_CUDNN_STATUS(call) Call([&] { return call; }, #call, __LINE__)

}  // namespace

struct CudnnSdpa::Library {
  Library() = default;
  ~Library() {
    plans.clear();
    if (handle != nullptr) {
      HEADROOM_CUDNN_STATUS(fe::detail::destroy_handle(handle)).IgnoreError();
    }
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;

  struct Plan {
    std::unique_ptr<fe::graph::Graph> graph;
    bool lengths;
    int64_t workspace_bytes;
  };
  cudnnHandle_t handle = nullptr;
  std::vector<Plan> plans;
};

CudnnSdpa::CudnnSdpa(std::unique_ptr<Library> library) : library_(std::move(library)) {}
CudnnSdpa::~CudnnSdpa() = default;

absl::StatusOr<std::unique_ptr<CudnnSdpa>> CudnnSdpa::Open() {
  // It stays open: the frontend keeps the addresses it has looked up.
  if (fe::cudnn_dlhandle == nullptr) {
    fe::cudnn_dlhandle = dlopen("libcudnn.so.9", RTLD_NOW | RTLD_LOCAL);
  }
  if (fe::cudnn_dlhandle == nullptr) {
    const char* const why = dlerror();
    return absl::UnavailableError(absl::StrCat("cuDNN: ", why != nullptr ? why : "not found"));
  }
  const auto version = reinterpret_cast<size_t (*)()>(dlsym(fe::cudnn_dlhandle, "cudnnGetVersion"));
  if (version == nullptr || version() < kLeastVersion) {
    return absl::UnavailableError(absl::StrCat("cuDNN: libcudnn.so.9 is version ",
                                               version == nullptr ? 0 : version(), "; ",
                                               kLeastVersion, " (9.14) or later is needed"));
  }
  auto library = std::make_unique<Library>();
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(fe::detail::create_handle(&library->handle)));
  return std::unique_ptr<CudnnSdpa>(new CudnnSdpa(std::move(library)));
}

namespace {

// [1, heads, rows, head_dim], each head's rows one behind the other.
Tensor_attributes Matrix(Uid uid, const char* name, int64_t heads, int64_t rows, int64_t head_dim) {
  return Tensor_attributes()
      .set_uid(uid)
      .set_name(name)
      .set_data_type(fe::DataType_t::BFLOAT16)
      .set_dim({1, heads, rows, head_dim})
      .set_stride({heads * rows * head_dim, rows * head_dim, head_dim, 1});
}
Tensor_attributes Length(Uid uid, const char* name) {
  return Tensor_attributes()
      .set_uid(uid)
      .set_name(name)
      .set_data_type(fe::DataType_t::INT32)
      .set_dim({1, 1, 1, 1})
      .set_stride({1, 1, 1, 1});
}

using Tensor = std::shared_ptr<Tensor_attributes>;

// The scores with a soft cap, then with the shape's mask: it must come behind the cap, and the frontend's
// own come before. `keys` is their number where the mask is of lengths. (The frontend's padding mask would
// look at rows too; rows that are not there have no use.)
Tensor CappedScores(const SdpaShape& s, const Tensor& keys, fe::graph::Graph& graph, Tensor score) {
  using fe::PointwiseMode_t;
  const auto op = [](const char* name, PointwiseMode_t mode, fe::DataType_t type) {
    return fe::graph::Pointwise_attributes().set_name(name).set_mode(mode).set_compute_data_type(
        type);
  };
  score = graph.pointwise(score, op("tanh", PointwiseMode_t::TANH_FWD, fe::DataType_t::FLOAT));
  score = graph.pointwise(score, std::make_shared<Tensor_attributes>(s.soft_cap),
                          op("cap", PointwiseMode_t::MUL, fe::DataType_t::FLOAT));
  if (s.mask == SdpaShape::Mask::kNone) return score;
  const auto index = [&](const char* name, int64_t axis) {
    Tensor of = graph.pointwise(
        score, op(name, PointwiseMode_t::GEN_INDEX, fe::DataType_t::INT32).set_axis(axis));
    of->set_data_type(fe::DataType_t::INT32);
    return of;
  };
  const Tensor key = index("key", 3);
  const bool causal = s.mask == SdpaShape::Mask::kCausal;
  const Tensor seen = graph.pointwise(
      causal ? index("row", 2) : key, causal ? key : keys,
      op("seen", causal ? PointwiseMode_t::CMP_GE : PointwiseMode_t::CMP_LT, fe::DataType_t::BOOLEAN));
  seen->set_data_type(fe::DataType_t::BOOLEAN);
  return graph.pointwise(
      score, std::make_shared<Tensor_attributes>(-std::numeric_limits<float>::infinity()), seen,
      op("masked", PointwiseMode_t::BINARY_SELECT, fe::DataType_t::FLOAT));
}

void Describe(const SdpaShape& s, fe::graph::Graph& graph) {
  graph.set_io_data_type(fe::DataType_t::BFLOAT16)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const auto q = graph.tensor(Matrix(kQ, "q", s.num_q_heads, s.rows, s.head_dim));
  const auto k = graph.tensor(Matrix(kK, "k", s.num_kv_heads, s.keys, s.head_dim));
  const auto v = graph.tensor(Matrix(kV, "v", s.num_kv_heads, s.keys, s.head_dim));
  // Of the two ways to describe an attention this is the one with masks.
  auto attention = fe::graph::SDPA_attributes()
                       .set_name("attention")
                       .set_implementation(fe::AttentionImplementation_t::COMPOSITE)
                       .set_generate_stats(true)
                       .set_attn_scale(1.0f);
  const bool capped = s.soft_cap != 0;
  Tensor keys;
  if (s.mask == SdpaShape::Mask::kLengths) {
    keys = graph.tensor(Length(kKeys, "keys"));
    // With a cap they only say what need not be computed.
    attention.set_padding_mask(!capped)
        .set_seq_len_q(graph.tensor(Length(kRows, "rows")))
        .set_seq_len_kv(keys);
  }
  if (s.mask == SdpaShape::Mask::kCausal && !capped) {
    attention.set_diagonal_alignment(fe::DiagonalAlignment_t::TOP_LEFT)
        .set_diagonal_band_right_bound(0);
  }
  if (capped) {
    attention.set_score_mod([s, keys](const std::shared_ptr<fe::graph::Graph>& its, Tensor score) {
      return CappedScores(s, keys, *its, std::move(score));
    });
  }
  const auto [o, lse] = graph.sdpa(q, k, v, attention);
  o->set_output(true)
      .set_uid(kO)
      .set_data_type(fe::DataType_t::BFLOAT16)
      .set_dim(q->get_dim())
      .set_stride(q->get_stride());
  lse->set_output(true)
      .set_uid(kLse)
      .set_data_type(fe::DataType_t::FLOAT)
      .set_dim({1, s.num_q_heads, s.rows, 1})
      .set_stride({s.num_q_heads * s.rows, s.rows, 1, 1});
}

fe::error_object Described(const SdpaShape& shape, fe::graph::Graph& graph) {
  Describe(shape, graph);
  return graph.validate();
}

}  // namespace

absl::StatusOr<int> CudnnSdpa::Build(const SdpaShape& shape, int64_t most_workspace_bytes) {
  Library& l = *library_;
  Library::Plan plan;
  plan.graph = std::make_unique<fe::graph::Graph>();
  plan.lengths = shape.mask == SdpaShape::Mask::kLengths;
  fe::graph::Graph& graph = *plan.graph;
  const auto built = [&]() -> absl::Status {
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(Described(shape, graph)));
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(graph.build_operation_graph(l.handle)));
    HEADROOM_RETURN_IF_ERROR(
        HEADROOM_CUDNN_STATUS(graph.create_execution_plans({fe::HeurMode_t::A})));
    graph.deselect_workspace_greater_than(most_workspace_bytes);
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(graph.check_support()));
    HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(graph.build_plans()));
    return HEADROOM_CUDNN_STATUS(graph.get_workspace_size(plan.workspace_bytes));
  }();
  if (!built.ok()) {
    constexpr const char* kMasks[] = {"no mask", "a causal mask", "lengths"};
    return absl::UnavailableError(absl::StrCat(
        "cuDNN: no attention of ", shape.num_q_heads, " query heads and ", shape.num_kv_heads,
        " KV heads of ", shape.head_dim, ", ", shape.rows, " rows and ", shape.keys, " keys, with ",
        kMasks[static_cast<int>(shape.mask)], shape.soft_cap == 0 ? "" : " and a soft cap", ": ",
        absl::StrReplaceAll(built.message(), {{"\n", " "}})));
  }
  l.plans.push_back(std::move(plan));
  return static_cast<int>(l.plans.size()) - 1;
}

absl::Status CudnnSdpa::Run(int plan, const SdpaBuffers& b, void* workspace, cudaStream_t stream) {
  Library& l = *library_;
  const Library::Plan& its = l.plans[static_cast<size_t>(plan)];
  HEADROOM_RETURN_IF_ERROR(HEADROOM_CUDNN_STATUS(fe::detail::set_stream(l.handle, stream)));
  std::unordered_map<int64_t, void*> tensors = {
      {kQ, b.q}, {kK, b.k}, {kV, b.v}, {kO, b.o}, {kLse, b.lse}};
  if (its.lengths) {
    auto* const lengths = static_cast<int32_t*>(b.lengths);
    tensors.emplace(kRows, lengths);
    tensors.emplace(kKeys, lengths + 1);
  }
  return HEADROOM_CUDNN_STATUS(its.graph->execute(l.handle, tensors, workspace));
}

int64_t CudnnSdpa::plans() const { return static_cast<int64_t>(library_->plans.size()); }

int64_t CudnnSdpa::workspace_bytes(int plan) const {
  return library_->plans[static_cast<size_t>(plan)].workspace_bytes;
}

std::string CudnnSdpa::name(int plan) const {
  std::string name;
  const auto& graph = library_->plans[static_cast<size_t>(plan)].graph;
  if (!HEADROOM_CUDNN_STATUS(graph->get_plan_name(name)).ok()) return "unnamed";
  return name;
}

}  // namespace headroom
