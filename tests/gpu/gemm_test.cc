// Products on a GPU against sums in float64, on odd shapes.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {
namespace {

using namespace kernels;  // NOLINT: every name here is a kernel's

struct GemmCase {
  GemmCase(int64_t the_m, int64_t the_n, int64_t the_k, uint32_t seed)
      : m(the_m), n(the_n), k(the_k) {
    Random random(seed);
    a = random.Bf16(m * k);
    w = random.Bf16(n * k);
    c = random.Floats(m * n);
  }
  int64_t m, n, k;
  std::vector<float> c;
  std::vector<BFloat16> a, w;  // row-major
};

class GemmTest : public GpuTest {
 protected:
  std::vector<float> Run(const GemmCase& g, int64_t row, int64_t rows, bool accumulate,
                         int64_t a_stride) {
    std::vector<BFloat16> a(static_cast<size_t>(rows * a_stride), kernels::ToBFloat16(kNan));
    for (int64_t r = 0; r < rows; ++r) {
      std::copy_n(g.a.begin() + (row + r) * g.k, g.k, a.begin() + r * a_stride);
    }
    GemmArgs args;
    args.a = gpu_.Put(a);
    args.a_stride = a_stride;
    uint8_t* const packed = gpu_.Take(device_.PackedBytes(g.n, g.k));
    EXPECT_OK(device_.LoadWeightRows(g.w.data(), 0, g.n, g.n, g.k, packed));
    args.w = {reinterpret_cast<const BFloat16*>(packed), g.n, g.k};
    args.c = accumulate ? gpu_.Put(std::vector<float>(g.c.begin() + row * g.n,
                                                      g.c.begin() + (row + rows) * g.n))
                        : gpu_.Take<float>(rows * g.n);
    args.c_stride = g.n;
    args.m = rows;
    args.accumulate = accumulate;
    std::vector<float> result = After(device_.Gemm(gpu_.stream(), args), args.c.floats(), rows * g.n);
    gpu_.Reset();
    return result;
  }
};

TEST_F(GemmTest, SumsProductsOfBFloat16InFloat32OnOddShapes) {
  const int64_t shapes[][3] = {{1, 1, 1},      {1, 33, 7},     {1, 576, 576},  {2, 31, 8},
                               {3, 100, 72},   {15, 64, 100},  {16, 32, 64},   {17, 65, 63},
                               {33, 576, 192}, {64, 49, 1536}, {65, 129, 65},  {128, 128, 32},
                               {130, 960, 24}, {300, 1000, 9}, {700, 2049, 40}, {1, 49152, 576},
                               {9, 576, 1536}, {24, 40, 4096}, {129, 64, 64}, {8200, 72, 64}};
  uint32_t seed = 1;
  for (const auto& [m, n, k] : shapes) {
    const GemmCase g(m, n, k, seed++);
    for (const bool accumulate : {false, true}) {
      const std::vector<float> c = Run(g, 0, m, accumulate, accumulate ? k + 8 : k);
      double worst = 0;
      for (int64_t r = 0; r < m; ++r) {
        for (int64_t o = 0; o < n; ++o) {
          double sum = accumulate ? g.c[r * n + o] : 0, size = std::abs(sum) + 1e-6;
          for (int64_t i = 0; i < k; ++i) {
            const double product =
                static_cast<double>(ToFloat(g.a[r * k + i])) * ToFloat(g.w[o * k + i]);
            sum += product;
            size += std::abs(product);
          }
          const double error = std::abs(c[r * n + o] - sum) / size;
          worst = error <= worst ? worst : error;  // NaN stays
        }
      }
      EXPECT_LT(worst, 1e-5) << m << " x " << n << " x " << k << ", accumulate " << accumulate;
    }
  }
}

TEST_F(GemmTest, ARowHasTheSameBitsInEveryBatchOfADecodeStep) {
  for (const auto& [n, k] :
       {std::pair<int64_t, int64_t>{576, 576}, {200, 72}, {2048, 256}, {100, 63}, {48, 14336}}) {
    const GemmCase g(kernels::kFewGemmRows, n, k, 77);
    const std::vector<float> all = Run(g, 0, kernels::kFewGemmRows, true, k);
    for (const auto& [row, rows] : {std::pair<int64_t, int64_t>{0, 1}, {17, 3}, {5, 8}, {30, 9},
                                    {48, 16}, {11, 17}, {32, 32}, {31, 33}, {63, 1}}) {
      const std::vector<float> part(all.begin() + row * n, all.begin() + (row + rows) * n);
      EXPECT_TRUE(SameBits(Run(g, row, rows, true, k), part)) << rows << " rows from " << row;
    }
  }
}

TEST_F(GemmTest, AGatedProductIsTheProductAndThenTheActivation) {
  for (const auto& [width, k] : {std::pair<int64_t, int64_t>{24, 64}, {1536, 576}, {100, 4096}}) {
    const GemmCase g(kernels::kFewGemmRows, 2 * width, k, 5);
    for (const int64_t rows : {1, 7, 9, 16, 17, 33, 64}) {
      // Weights of such a size, exactly, that gates are of size 1.
      const double scale = std::exp2(-std::round(std::log2(static_cast<double>(k)) / 2));
      std::vector<BFloat16> w;
      for (const BFloat16 value : g.w) {
        w.push_back(kernels::ToBFloat16(static_cast<float>(ToFloat(value) * scale)));
      }
      std::vector<float> gate_up(rows * 2 * width), expected(rows * width);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t o = 0; o < 2 * width; ++o) {
          double sum = 0;
          for (int64_t i = 0; i < k; ++i) {
            sum += static_cast<double>(ToFloat(g.a[r * k + i])) * ToFloat(w[o * k + i]);
          }
          gate_up[r * 2 * width + o] = static_cast<float>(sum);
        }
      }
      reference::SwiGlu({gate_up.data(), expected.data(), rows, width});
      uint8_t* const packed = gpu_.Take(device_.PackedBytes(g.n, g.k));
      EXPECT_OK(device_.LoadWeightRows(w.data(), 0, g.n, g.n, g.k, packed));
      GatedGemmArgs args;
      args.gemm.a = gpu_.Put(g.a);
      args.gemm.a_stride = k;
      args.gemm.w = {reinterpret_cast<const BFloat16*>(packed), g.n, k};
      args.gemm.c = gpu_.TakeActivations(rows * 2 * width, ElementType::kBFloat16);
      args.gemm.c_stride = 2 * width;
      args.gemm.m = rows;
      args.swiglu = {args.gemm.c, gpu_.TakeActivations(rows * width, ElementType::kBFloat16), rows,
                     width};
      EXPECT_OK(device_.GatedGemm(gpu_.stream(), args));
      EXPECT_TRUE(Near(gpu_.FetchActivations(args.swiglu.out, rows * width), expected, 0.06f))
          << rows << " x " << width << " x " << k;
      gpu_.Reset();
    }
  }
}

}  // namespace
}  // namespace headroom
