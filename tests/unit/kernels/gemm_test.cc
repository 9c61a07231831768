#include "kernels/gemm.h"

#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

std::vector<BFloat16> Pack(const std::vector<BFloat16>& rows, int64_t n, int64_t k) {
  // Not 64-byte aligned here: alignment is for speed only.
  std::vector<BFloat16> packed(PackedWeightBytes(n, k) / 2, ToBFloat16(kNan));
  cpu::PackWeightRows(rows.data(), 0, n, n, k, packed.data());
  return packed;
}

// A product with room around a and c: strides larger than the rows, NaN between them.
struct Product {
  Product(int64_t the_m, int64_t the_n, int64_t the_k, uint32_t seed)
      : m(the_m), n(the_n), k(the_k), a_stride(k + 3), c_stride(n + 5) {
    Random random(seed);
    weights = Pack(random.Bf16(n * k), n, k);
    a.assign(m * a_stride, kNan);
    c.assign(m * c_stride, kNan);
    for (int64_t row = 0; row < m; ++row) {
      for (int64_t i = 0; i < k; ++i) a[row * a_stride + i] = random.Normal();
      for (int64_t i = 0; i < n; ++i) c[row * c_stride + i] = random.Normal();
    }
  }
  GemmArgs Args(bool accumulate, std::vector<float>& out) const {
    GemmArgs args;
    args.a = a.data();
    args.a_stride = a_stride;
    args.w = {weights.data(), n, k};
    args.c = out.data();
    args.c_stride = c_stride;
    args.m = m;
    args.accumulate = accumulate;
    return args;
  }
  // Rows [begin, begin + rows) of the result, padding included.
  std::vector<float> Run(const cpu::KernelTable& kernels, CpuTeam& team, bool accumulate,
                         int64_t begin, int64_t rows) const {
    std::vector<float> out(c.begin() + begin * c_stride, c.begin() + (begin + rows) * c_stride);
    GemmArgs args = Args(accumulate, out);
    args.a += begin * a_stride;
    args.m = rows;
    kernels.gemm(args, team);
    return out;
  }
  std::vector<float> Run(const cpu::KernelTable& kernels, CpuTeam& team, bool accumulate) const {
    return Run(kernels, team, accumulate, 0, m);
  }

  int64_t m, n, k, a_stride, c_stride;
  std::vector<BFloat16> weights;
  std::vector<float> a, c;
};

// The reference is the chain itself, so the bits are the same; what lies between rows is untouched.
TEST(Gemm, IsOneChainOfFusedMultiplyAddsPerOutput) {
  CpuTeam team(2);
  for (const int64_t m : {1, 2, 3, 4, 5, 7, 8, 13, 23, 24, 25, 64, 65}) {
    for (const int64_t n : {1, 31, 32, 33, 127, 161, 300}) {
      for (const int64_t k : {1, 2, 17, 64, 201}) {
        const Product product(m, n, k, static_cast<uint32_t>(m * 1000 + n + k));
        for (const bool accumulate : {false, true}) {
          std::vector<float> expected = product.c;
          reference::Gemm(product.Args(accumulate, expected));
          ASSERT_TRUE(SameBits(product.Run(BestKernels(), team, accumulate), expected))
              << m << " x " << n << " x " << k << (accumulate ? ", accumulating" : "");
        }
      }
    }
  }
}

TEST(Gemm, KeepsTheChainOverBlocksOfK) {
  CpuTeam team(2);
  for (const int64_t k : {2047, 2048, 2049, 5000}) {
    for (const int64_t m : {1, 3, 24, 257, 500}) {
      const Product product(m, 40, k, 3);
      std::vector<float> expected = product.c;
      reference::Gemm(product.Args(true, expected));
      EXPECT_TRUE(SameBits(product.Run(BestKernels(), team, true), expected)) << m << ", " << k;
    }
  }
}

TEST(Gemm, ARowAloneHasTheBitsOfTheRowInABatch) {
  CpuTeam team(2);
  const Product product(257, 576, 577, 4);
  for (const bool accumulate : {false, true}) {
    const std::vector<float> together = product.Run(BestKernels(), team, accumulate);
    for (const int64_t rows : {1, 2, 5, 12, 13, 64}) {
      for (const int64_t begin : {int64_t{0}, int64_t{100}, 257 - rows}) {
        const auto from = together.begin() + begin * product.c_stride;
        EXPECT_TRUE(SameBits(product.Run(BestKernels(), team, accumulate, begin, rows),
                             std::vector<float>(from, from + rows * product.c_stride)))
            << rows << " rows from " << begin;
      }
    }
  }
}

TEST(Gemm, GivesTheSameBitsWithOneThreadAndSeveral) {
  CpuTeam one(1);
  for (const int64_t m : {1, 2, 13, 64}) {
    const Product product(m, 1000, 300, 5);
    const std::vector<float> expected = product.Run(BestKernels(), one, false);
    for (const int size : {2, 3, 5}) {
      CpuTeam team(size);
      EXPECT_TRUE(SameBits(product.Run(BestKernels(), team, false), expected)) << m << ", " << size;
    }
  }
}

TEST(Gemm, GivesTheSameBitsOnEveryInstructionSet) {
  CpuTeam team(2);
  for (const int64_t m : {1, 2, 3, 7, 13, 65}) {
    const Product product(m, 99, 2100, 6);
    const std::vector<float> expected = product.Run(BestKernels(), team, true);
    for (const cpu::KernelTable* kernels : AllKernels()) {
      EXPECT_TRUE(SameBits(product.Run(*kernels, team, true), expected)) << kernels->name << ", " << m;
    }
  }
}

TEST(Gemm, DoesNothingWithoutRows) {
  CpuTeam team(2);
  const Product product(1, 33, 16, 7);
  std::vector<float> out = product.c;
  GemmArgs args = product.Args(false, out);
  args.m = 0;
  cpu::Gemm(args, team);
  EXPECT_TRUE(SameBits(out, product.c));
}

TEST(PackWeightRows, PutsEveryElementWhereTheIndexSays) {
  for (const int64_t n : {1, 32, 33, 95}) {
    const int64_t k = 19;
    Random random(8);
    const std::vector<BFloat16> rows = random.Bf16(n * k);
    const std::vector<BFloat16> packed = Pack(rows, n, k);
    for (int64_t row = 0; row < (n + 31) / 32 * 32; ++row) {
      for (int64_t column = 0; column < k; ++column) {
        const uint16_t expected = row < n ? rows[row * k + column].bits : 0;
        ASSERT_EQ(packed[PackedWeightIndex(k, row, column)].bits, expected) << row << ", " << column;
      }
    }
  }
}

TEST(PackWeightRows, TakesRowsInAnyOrderAndGrouping) {
  const int64_t n = 75, k = 33;
  Random random(9);
  const std::vector<BFloat16> rows = random.Bf16(n * k);
  const std::vector<BFloat16> whole = Pack(rows, n, k);
  std::vector<BFloat16> pieces(whole.size(), ToBFloat16(kNan));
  const std::vector<std::pair<int64_t, int64_t>> order = {{70, 5}, {3, 37}, {40, 30}, {0, 3}};
  for (const auto& [begin, count] : order) {
    cpu::PackWeightRows(rows.data() + begin * k, begin, count, n, k, pieces.data());
  }
  EXPECT_EQ(std::memcmp(pieces.data(), whole.data(), whole.size() * 2), 0);
}

}  // namespace
}  // namespace headroom::kernels
