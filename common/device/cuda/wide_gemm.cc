#include "common/device/cuda/wide_gemm.h"

#include <cublasLt.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/cuda/shared_library.h"
#include "common/mutex.h"
#include "common/status.h"

namespace headroom {
namespace {

// The functions of cuBLASLt that are used.
struct Library {
  SharedLibrary file;
  decltype(cublasLtCreate)* create;
  decltype(cublasLtDestroy)* destroy;
  decltype(cublasLtMatmul)* matmul;
  decltype(cublasLtMatmulAlgoGetHeuristic)* get_heuristic;
  decltype(cublasLtMatmulDescInit_internal)* desc_init;
  decltype(cublasLtMatmulDescSetAttribute)* desc_set;
  decltype(cublasLtMatrixLayoutInit_internal)* layout_init;
  decltype(cublasLtMatmulPreferenceInit_internal)* preference_init;
  decltype(cublasLtMatmulPreferenceSetAttribute)* preference_set;
  decltype(cublasLtGetStatusName)* status_name;
};

absl::StatusOr<Library> OpenLibrary() {
  Library lib;
  HEADROOM_ASSIGN_OR_RETURN(
      lib.file, SharedLibrary::Open({"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13"}));
  const SharedLibrary& file = lib.file;
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtCreate", &lib.create));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtDestroy", &lib.destroy));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmul", &lib.matmul));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmulAlgoGetHeuristic", &lib.get_heuristic));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmulDescInit_internal", &lib.desc_init));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmulDescSetAttribute", &lib.desc_set));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatrixLayoutInit_internal", &lib.layout_init));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmulPreferenceInit_internal", &lib.preference_init));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtMatmulPreferenceSetAttribute", &lib.preference_set));
  HEADROOM_RETURN_IF_ERROR(file.Find("cublasLtGetStatusName", &lib.status_name));
  return lib;
}

// n, k, rows, type of c, accumulate.
using ShapeClass = std::tuple<int64_t, int64_t, int64_t, cudaDataType, bool>;

int64_t RowClass(int64_t rows) {
  int64_t size = 2 * kernels::kFewGemmRows;
  while (size < rows) size *= 2;
  return size;
}

}  // namespace

struct WideGemm::Impl {
  absl::Status Check(cublasStatus_t status, absl::string_view call) const {
    if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
    return absl::InternalError(absl::StrCat(call, ": ", lib.status_name(status)));
  }

  // c^T = w a^T in cuBLAS's column-major terms: w is [k, n] transposed, a^T is [k, m].
  struct Operands {
    cublasLtMatmulDescOpaque_t product;
    cublasLtMatrixLayoutOpaque_t w, a, c;
  };
  absl::StatusOr<Operands> Describe(int64_t n, int64_t k, int64_t m, int64_t a_stride,
                                    int64_t c_stride, cudaDataType c_type) const;
  absl::StatusOr<cublasLtMatmulAlgo_t> Choose(const ShapeClass& shape) const;
  absl::StatusOr<cublasLtMatmulAlgo_t> AlgorithmOf(const ShapeClass& shape);
  absl::Status Multiply(const kernels::GemmArgs& g, const cublasLtMatmulAlgo_t& algorithm,
                        cudaStream_t stream) const;

  Library lib;
  cublasLtHandle_t handle = nullptr;
  uint8_t* workspace = nullptr;
  Mutex mutex;
  std::map<ShapeClass, cublasLtMatmulAlgo_t> algorithms ABSL_GUARDED_BY(mutex);
  std::atomic<int64_t> plans{0};
};

absl::StatusOr<WideGemm::Impl::Operands> WideGemm::Impl::Describe(int64_t n, int64_t k, int64_t m,
                                                                  int64_t a_stride,
                                                                  int64_t c_stride,
                                                                  cudaDataType c_type) const {
  Operands o;
  HEADROOM_RETURN_IF_ERROR(Check(
      lib.desc_init(&o.product, sizeof(o.product), CUBLAS_COMPUTE_32F, CUDA_R_32F), "MatmulDescInit"));
  const cublasOperation_t transposed = CUBLAS_OP_T;
  HEADROOM_RETURN_IF_ERROR(Check(lib.desc_set(&o.product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed,
                                              sizeof(transposed)),
                                 "MatmulDescSetAttribute"));
  const struct {
    cublasLtMatrixLayoutOpaque_t* layout;
    cudaDataType type;
    int64_t rows, columns, stride;
  } layouts[] = {{&o.w, CUDA_R_16BF, k, n, k},
                 {&o.a, CUDA_R_16BF, k, m, a_stride},
                 {&o.c, c_type, n, m, c_stride}};
  for (const auto& [layout, type, rows, columns, stride] : layouts) {
    HEADROOM_RETURN_IF_ERROR(
        Check(lib.layout_init(layout, sizeof(*layout), type, static_cast<uint64_t>(rows),
                              static_cast<uint64_t>(columns), stride),
              "MatrixLayoutInit"));
  }
  return o;
}

absl::StatusOr<cublasLtMatmulAlgo_t> WideGemm::Impl::Choose(const ShapeClass& shape) const {
  const auto [n, k, rows, c_type, accumulate] = shape;
  HEADROOM_ASSIGN_OR_RETURN(Operands o, Describe(n, k, rows, k, n, c_type));
  cublasLtMatmulPreferenceOpaque_t preference;
  HEADROOM_RETURN_IF_ERROR(
      Check(lib.preference_init(&preference, sizeof(preference)), "MatmulPreferenceInit"));
  const uint32_t no_split = CUBLASLT_REDUCTION_SCHEME_NONE;
  HEADROOM_RETURN_IF_ERROR(
      Check(lib.preference_set(&preference, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &no_split,
                               sizeof(no_split)),
            "MatmulPreferenceSetAttribute"));
  const uint64_t workspace_bytes = kWorkspaceBytes;
  HEADROOM_RETURN_IF_ERROR(
      Check(lib.preference_set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                               &workspace_bytes, sizeof(workspace_bytes)),
            "MatmulPreferenceSetAttribute"));
  cublasLtMatmulHeuristicResult_t found;
  int count = 0;
  const cublasStatus_t status = lib.get_heuristic(handle, &o.product, &o.w, &o.a, &o.c, &o.c,
                                                  &preference, 1, &found, &count);
  if (status != CUBLAS_STATUS_SUCCESS || count == 0) {
    return absl::InternalError(absl::StrCat("cuBLASLt has no algorithm for ", rows, " x ", n, " x ", k,
                                            ": ", lib.status_name(status)));
  }
  return found.algo;
}

absl::StatusOr<cublasLtMatmulAlgo_t> WideGemm::Impl::AlgorithmOf(const ShapeClass& shape) {
  MutexLock lock(&mutex);
  const auto known = algorithms.find(shape);
  if (known != algorithms.end()) return known->second;
  HEADROOM_ASSIGN_OR_RETURN(const cublasLtMatmulAlgo_t algorithm, Choose(shape));
  algorithms[shape] = algorithm;
  plans.fetch_add(1);
  return algorithm;
}

absl::Status WideGemm::Impl::Multiply(const kernels::GemmArgs& g,
                                      const cublasLtMatmulAlgo_t& algorithm,
                                      cudaStream_t stream) const {
  const cudaDataType c_type =
      g.c.type == kernels::ElementType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF;
  HEADROOM_ASSIGN_OR_RETURN(Operands o,
                            Describe(g.w.n, g.w.k, g.m, g.a_stride, g.c_stride, c_type));
  const float one = 1;
  const float beta = g.accumulate ? 1 : 0;
  return Check(lib.matmul(handle, &o.product, &one, g.w.data, &o.w, g.a.data, &o.a, &beta, g.c.data,
                          &o.c, g.c.data, &o.c, &algorithm, workspace, kWorkspaceBytes, stream),
               absl::StrCat("cublasLtMatmul of ", g.m, " x ", g.w.n, " x ", g.w.k));
}

absl::StatusOr<std::unique_ptr<WideGemm>> WideGemm::Open(uint8_t* workspace) {
  auto impl = std::make_unique<Impl>();
  absl::StatusOr<Library> lib = OpenLibrary();
  if (!lib.ok()) return Annotate(lib.status(), "cuBLASLt 13 cannot be used");
  impl->lib = *std::move(lib);
  impl->workspace = workspace;
  HEADROOM_RETURN_IF_ERROR(impl->Check(impl->lib.create(&impl->handle), "cublasLtCreate"));
  return std::unique_ptr<WideGemm>(new WideGemm(std::move(impl)));
}

WideGemm::WideGemm(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

WideGemm::~WideGemm() { impl_->lib.destroy(impl_->handle); }

absl::Status WideGemm::Prepare(int64_t n, int64_t k, const uint8_t* weights, cudaStream_t stream) {
  kernels::GemmArgs one_row;
  one_row.a = reinterpret_cast<const kernels::BFloat16*>(impl_->workspace);
  one_row.a_stride = k;
  one_row.w = {reinterpret_cast<const kernels::BFloat16*>(weights), n, k};
  one_row.c_stride = n;
  one_row.m = 1;
  // Both operands' places for one row; the workspace is not so small.
  if (!Takes(one_row, /*any_rows=*/true) || (2 * k + 4 * n) > kWorkspaceBytes / 2) {
    return absl::OkStatus();
  }
  for (int64_t rows = RowClass(1); rows <= kMaxRows; rows *= 2) {
    for (const bool accumulate : {false, true}) {
      for (const auto type : {kernels::ElementType::kFloat32, kernels::ElementType::kBFloat16}) {
        if (accumulate && type != kernels::ElementType::kFloat32) continue;
        HEADROOM_ASSIGN_OR_RETURN(
            const cublasLtMatmulAlgo_t algorithm,
            impl_->AlgorithmOf({n, k, rows,
                                type == kernels::ElementType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF,
                                accumulate}));
        one_row.c = {impl_->workspace + kWorkspaceBytes / 2, type};
        one_row.accumulate = accumulate;
        HEADROOM_RETURN_IF_ERROR(impl_->Multiply(one_row, algorithm, stream));
      }
    }
  }
  return absl::OkStatus();
}

bool WideGemm::Takes(const kernels::GemmArgs& g, bool any_rows) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  return (any_rows || g.m > kernels::kFewGemmRows) && g.a.type == kernels::ElementType::kBFloat16 &&
         g.w.k % 8 == 0 && g.w.n % 8 == 0 && g.a_stride % 8 == 0 && g.c_stride % 8 == 0 &&
         aligned(g.a.data) && aligned(g.w.data) && aligned(g.c.data) &&
         !(g.accumulate && g.c.type != kernels::ElementType::kFloat32);
}

absl::Status WideGemm::Run(const kernels::GemmArgs& args, cudaStream_t stream) {
  for (int64_t row = 0; row < args.m; row += kMaxRows) {
    kernels::GemmArgs part = args;
    part.m = std::min(kMaxRows, args.m - row);
    part.a = args.a + row * args.a_stride;
    part.c = args.c + row * args.c_stride;
    HEADROOM_ASSIGN_OR_RETURN(
        const cublasLtMatmulAlgo_t algorithm,
        impl_->AlgorithmOf(
            {args.w.n, args.w.k, RowClass(part.m),
             args.c.type == kernels::ElementType::kFloat32 ? CUDA_R_32F : CUDA_R_16BF,
             args.accumulate}));
    HEADROOM_RETURN_IF_ERROR(impl_->Multiply(part, algorithm, stream));
  }
  return absl::OkStatus();
}

int64_t WideGemm::plans() const { return impl_->plans.load(); }

}  // namespace headroom
