#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/embed.h"
#include "kernels/fill_random.h"
#include "kernels/rms_norm.h"
#include "kernels/soft_cap.h"
#include "kernels/swiglu.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

// ---- FillRandom ----------------------------------------------------------------------------------

std::vector<uint16_t> Filled(void (*fill)(const FillRandomArgs&), FillRandomArgs args) {
  // Poisoned, so that padding that is not cleared shows.
  std::vector<BFloat16> out(static_cast<size_t>(PackedWeightBytes(args.n, args.k) / 2), {0xffff});
  args.out = out.data();
  fill(args);
  std::vector<uint16_t> bits;
  for (const BFloat16& value : out) bits.push_back(value.bits);
  return bits;
}

template <int kThreads>
void FillOnCpu(const FillRandomArgs& args) {
  CpuTeam team(kThreads);
  cpu::FillRandom(args, team);
}

TEST(FillRandom, MatchesTheReferenceToTheBitWithAnyNumberOfThreads) {
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {31, 5}, {32, 64}, {33, 3}, {70, 130}, {256, 9}};
  for (const auto& [n, k] : shapes) {
    FillRandomArgs args;
    args.n = n;
    args.k = k;
    args.seed = 77 + static_cast<uint64_t>(n);
    args.scale = 0.37f;
    const std::vector<uint16_t> expected = Filled(&reference::FillRandom, args);
    EXPECT_EQ(Filled(&FillOnCpu<1>, args), expected) << n << " x " << k;
    EXPECT_EQ(Filled(&FillOnCpu<3>, args), expected) << n << " x " << k;
    ++args.seed;
    EXPECT_NE(Filled(&FillOnCpu<1>, args), expected) << n << " x " << k;
  }
}

TEST(FillRandom, IsTheGeneratorThatTheHeaderNames) {
  // The first outputs that SplitMix64's authors give for a state of 0.
  EXPECT_EQ(SplitMix64(0, 0), 0xe220a8397b1dcdafu);
  EXPECT_EQ(SplitMix64(0, 1), 0x6e789e6aa1b965f4u);
  EXPECT_EQ(UniformOf16Bits(0), -65535.0f / 65536);
  EXPECT_EQ(UniformOf16Bits(0xffff), 65535.0f / 65536);
  FillRandomArgs args;
  args.n = 1;
  args.k = 5;
  args.scale = 2;
  const std::vector<uint16_t> bits = Filled(&reference::FillRandom, args);
  const uint32_t pieces[] = {0xcdaf, 0x7b1d, 0xa839, 0xe220, 0x65f4};
  for (int i = 0; i < 5; ++i) {
    const float expected = 2 * (2 * static_cast<float>(pieces[i]) - 65535) / 65536;
    EXPECT_EQ(bits[static_cast<size_t>(i * kPanelOutputs)], ToBFloat16(expected).bits) << i;
  }
}

TEST(FillRandom, HasTheMeanAndTheVarianceOfUniformNumbers) {
  FillRandomArgs args;
  args.n = 512;
  args.k = 512;
  args.seed = 5;
  args.scale = 0.5f;
  double sum = 0, squares = 0;
  for (const uint16_t bits : Filled(&FillOnCpu<2>, args)) {
    const double value = ToFloat({bits});
    EXPECT_LE(std::abs(value), 0.5);
    sum += value;
    squares += value * value;
  }
  constexpr double kCount = 512 * 512;
  EXPECT_NEAR(sum / kCount, 0, 0.003);  // five standard deviations
  EXPECT_NEAR(squares / kCount, 0.25 / 3, 0.001);
}

// ---- RmsNorm -------------------------------------------------------------------------------------

TEST(RmsNorm, MatchesTheReferenceWithTheSameBitsEverywhere) {
  CpuTeam team(2);
  for (const int64_t hidden : {1, 15, 16, 17, 576, 1001}) {
    Random random(1);
    const std::vector<float> x = random.Floats(9 * hidden, 3);
    const std::vector<BFloat16> weight = random.Bf16(hidden);
    RmsNormArgs args;
    args.x = x.data();
    args.x_rows = args.rows = 9;
    args.weight = weight.data();
    args.hidden = hidden;
    args.epsilon = 1e-5f;
    std::vector<float> expected(9 * hidden), best(9 * hidden);
    args.out = expected.data();
    reference::RmsNorm(args);
    args.out = best.data();
    cpu::RmsNorm(args, team);
    EXPECT_TRUE(Near(best, expected, 1e-5f)) << hidden;
    for (const cpu::KernelTable* kernels : AllKernels()) {
      std::vector<float> out(9 * hidden);
      args.out = out.data();
      kernels->rms_norm(args, team);
      EXPECT_TRUE(SameBits(out, best)) << kernels->name << ", " << hidden;
    }
  }
}

TEST(RmsNorm, TakesTheRowsThatTheIndexNames) {
  CpuTeam team(2);
  Random random(2);
  const std::vector<float> x = random.Floats(5 * 20);
  const std::vector<BFloat16> weight = random.Bf16(20);
  RmsNormArgs args;
  args.x = x.data();
  args.x_rows = args.rows = 5;
  args.weight = weight.data();
  args.hidden = 20;
  std::vector<float> all(100), some(60);
  args.out = all.data();
  cpu::RmsNorm(args, team);
  const std::vector<int32_t> index = {4, 0, 4};
  args.rows = 3;
  args.row_index = DeviceTable(index);
  args.out = some.data();
  cpu::RmsNorm(args, team);
  for (int i = 0; i < 3; ++i) {
    EXPECT_TRUE(std::equal(some.begin() + i * 20, some.begin() + (i + 1) * 20,
                           all.begin() + index[i] * 20));
  }
}

// Gemma's norms: weights less 1, and what is normalised added to the residual stream.
TEST(RmsNorm, AddsTheWeightsOffsetAndAccumulates) {
  CpuTeam team(2);
  Random random(12);
  for (const int64_t hidden : {1, 15, 64, 100, 1000}) {
    const std::vector<float> x = random.Floats(5 * hidden, 3), before = random.Floats(5 * hidden);
    const std::vector<BFloat16> weight = random.Bf16(hidden);
    for (const bool accumulate : {false, true}) {
      RmsNormArgs args;
      args.x = x.data();
      args.x_rows = args.rows = 5;
      args.weight = weight.data();
      args.hidden = hidden;
      args.epsilon = 1e-5f;
      args.weight_offset = 1;
      args.accumulate = accumulate;
      std::vector<float> expected = before, first;
      args.out = expected.data();
      reference::RmsNorm(args);
      for (const cpu::KernelTable* kernels : AllKernels()) {
        std::vector<float> out = before;
        args.out = out.data();
        kernels->rms_norm(args, team);
        EXPECT_TRUE(Near(out, expected, 1e-5f)) << kernels->name << ", " << hidden;
        if (first.empty()) first = out;
        EXPECT_TRUE(SameBits(out, first)) << kernels->name;
      }
    }
  }
}

// ---- SoftCap -------------------------------------------------------------------------------------

TEST(SoftCap, MatchesTheReferenceWithTheSameBitsEverywhere) {
  CpuTeam team(2);
  Random random(13);
  for (const int64_t width : {1, 15, 16, 50, 333}) {
    std::vector<float> x = random.Floats(3 * width, 20);
    x[0] = -1e30f;
    x.back() = 1e30f;
    std::vector<float> expected = x, first;
    reference::SoftCap({expected.data(), 3, width, 30});
    for (const cpu::KernelTable* kernels : AllKernels()) {
      std::vector<float> capped = x;
      kernels->soft_cap({capped.data(), 3, width, 30}, team);
      EXPECT_TRUE(Near(capped, expected, 1e-5f)) << kernels->name << ", " << width;
      if (first.empty()) first = capped;
      EXPECT_TRUE(SameBits(capped, first)) << kernels->name;
    }
  }
  std::vector<float> nan = {kNan};
  cpu::SoftCap({nan.data(), 1, 1, 30}, team);
  EXPECT_TRUE(std::isnan(nan[0]));
}

// ---- SwiGlu --------------------------------------------------------------------------------------

TEST(SwiGlu, MatchesTheReferenceWithTheSameBitsEverywhere) {
  CpuTeam team(2);
  for (const int64_t width : {1, 15, 16, 17, 1536}) {
    Random random(3);
    std::vector<float> gate_up = random.Floats(7 * 2 * width, 4);
    std::vector<float> expected(7 * width), best(7 * width);
    reference::SwiGlu({gate_up.data(), expected.data(), 7, width});
    cpu::SwiGlu({gate_up.data(), best.data(), 7, width}, team);
    EXPECT_TRUE(Near(best, expected, 5e-5f)) << width;
    for (const cpu::KernelTable* kernels : AllKernels()) {
      std::vector<float> out(7 * width);
      kernels->swiglu({gate_up.data(), out.data(), 7, width}, team);
      EXPECT_TRUE(SameBits(out, best)) << kernels->name << ", " << width;
    }
  }
}

TEST(SwiGlu, WithGeluMatchesTheReferenceWithTheSameBitsEverywhere) {
  CpuTeam team(2);
  Random random(14);
  for (const int64_t width : {1, 15, 16, 50, 333}) {
    std::vector<float> gate_up = random.Floats(7 * 2 * width, 3);
    gate_up[0] = -200;
    std::vector<float> expected(7 * width), first;
    SwiGluArgs args{gate_up.data(), expected.data(), 7, width, GateActivation::kGeluTanh};
    reference::SwiGlu(args);
    for (const cpu::KernelTable* kernels : AllKernels()) {
      std::vector<float> out(7 * width, kNan);
      args.out = out.data();
      kernels->swiglu(args, team);
      EXPECT_TRUE(Near(out, expected, 1e-5f)) << kernels->name << ", " << width;
      if (first.empty()) first = out;
      EXPECT_TRUE(SameBits(out, first)) << kernels->name;
    }
  }
}

TEST(SwiGlu, IsFiniteForGatesOfAnySize) {
  CpuTeam team(1);
  const std::vector<float> gates = {-1e30f, -200, -89, -88, -87, 0, 87, 89, 200, 1e30f};
  for (const float gate : gates) {
    const std::vector<float> gate_up = {gate, 1.0f};
    float out = kNan, expected = kNan;
    cpu::SwiGlu({gate_up.data(), &out, 1, 1}, team);
    reference::SwiGlu({gate_up.data(), &expected, 1, 1});
    // Below -88 the result is taken as that of -88, which is under 1e-36 in size.
    EXPECT_NEAR(out, expected, std::max(1e-30f, 1e-6f * std::abs(expected))) << gate;
  }
}

// ---- Embed ---------------------------------------------------------------------------------------

TEST(Embed, TakesIdsFromTheRowsAndFromTheLastTokens) {
  CpuTeam team(2);
  const int64_t vocab = 70, hidden = 37;
  Random random(4);
  const std::vector<BFloat16> table = random.Bf16(vocab * hidden);
  std::vector<BFloat16> packed(PackedWeightBytes(vocab, hidden) / 2);
  cpu::PackWeightRows(table.data(), 0, vocab, vocab, hidden, packed.data());
  const std::vector<EmbedRow> rows = {{5, 0}, {69, 0}, {-1, 2}, {-1, 0}};
  const std::vector<int32_t> last = {33, 1, 64};
  const std::vector<int64_t> ids = {5, 69, 64, 33};
  for (const cpu::KernelTable* kernels : AllKernels()) {
    std::vector<float> out(4 * hidden, kNan);
    EmbedArgs args;
    args.table = {packed.data(), vocab, hidden};
    args.rows = DeviceTable(rows);
    args.last_tokens = last.data();
    args.num_slots = 3;
    args.out = out.data();
    kernels->embed(args, team);
    for (int row = 0; row < 4; ++row) {
      for (int64_t i = 0; i < hidden; ++i) {
        ASSERT_EQ(out[row * hidden + i], ToFloat(table[ids[row] * hidden + i]));
      }
    }
    std::vector<float> expected(4 * hidden);
    for (const float scale : {1.0f, 8.0f, 7.3f}) {
      args.scale = scale;
      args.out = out.data();
      kernels->embed(args, team);
      args.out = expected.data();
      reference::Embed(args);
      EXPECT_TRUE(SameBits(out, expected)) << scale;
      EXPECT_EQ(out[3], ToFloat(table[5 * hidden + 3]) * scale);
    }
  }
}

// ---- The types -----------------------------------------------------------------------------------

TEST(BFloat16, RoundsToTheNearestEven) {
  EXPECT_EQ(ToBFloat16(1.0f).bits, 0x3f80);
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-8f).bits, 0x3f80);            // a tie, down to even
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-7f + 0x1p-8f).bits, 0x3f82);  // a tie, up to even
  EXPECT_EQ(ToBFloat16(1.0f + 0x1p-8f + 0x1p-20f).bits, 0x3f81);
  EXPECT_EQ(ToBFloat16(-0.0f).bits, 0x8000);
  EXPECT_EQ(ToBFloat16(3.4e38f).bits, 0x7f80);  // past the largest: infinity
  EXPECT_TRUE(std::isnan(ToFloat(ToBFloat16(kNan))));
  EXPECT_EQ(ToFloat(ToBFloat16(-kInfinity)), -kInfinity);
}

TEST(Exp, IsWithinTwoUlp) {
  // Through attention it is tested to the bit on all instruction sets; here is its accuracy.
  CpuTeam team(1);
  double worst = 0;
  for (float x = -86.0f; x < 0; x += 0.00037f) {
    // silu(g) / g = 1 / (1 + exp(-g)): for g = x the exponential of -x.
    const std::vector<float> gate_up = {x, 1.0f};
    float out;
    cpu::SwiGlu({gate_up.data(), &out, 1, 1}, team);
    const double expected = x / (1 + std::exp(-static_cast<double>(x)));
    worst = std::max(worst, std::abs(out - expected) / std::abs(expected));
  }
  EXPECT_LT(worst, 2 * 0x1p-23 + 2 * 0x1p-24);  // the exponential, then a sum and a quotient rounded
}

}  // namespace
}  // namespace headroom::kernels
