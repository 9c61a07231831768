// What becomes of new keys and values: RoPE, appended, moved on when they are sealed.
#include <algorithm>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/copy_kv_rows.h"
#include "kernels/rope.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

// ---- Rope ----------------------------------------------------------------------------------------

TEST(RopeTable, HoldsTheCosineAndSineOfTheFloat32Angle) {
  CpuTeam team(2);
  const std::vector<int64_t> positions = {0, 1, 63, 4095, 131071, 1048575};
  std::vector<float> inverse_frequency(32);
  for (int i = 0; i < 32; ++i) inverse_frequency[i] = std::pow(10000.0f, -2.0f * i / 64);
  std::vector<float> cos_sin(positions.size() * 64, kNan);
  const RopeTableArgs args = {DeviceTable(positions), inverse_frequency.data(), cos_sin.data(), 64};
  cpu::RopeTable(args, team);
  for (size_t row = 0; row < positions.size(); ++row) {
    for (int i = 0; i < 32; ++i) {
      const float angle = static_cast<float>(positions[row]) * inverse_frequency[i];
      const auto expected = static_cast<double>(angle);
      ASSERT_EQ(cos_sin[row * 64 + i], static_cast<float>(std::cos(expected)));
      ASSERT_EQ(cos_sin[row * 64 + 32 + i], static_cast<float>(std::sin(expected)));
    }
  }
  std::vector<float> expected(cos_sin.size());
  RopeTableArgs reference_args = args;
  reference_args.cos_sin = expected.data();
  reference::RopeTable(reference_args);
  EXPECT_TRUE(SameBits(cos_sin, expected));
}

constexpr uint8_t kUntouched = 0xa5;

// Two sequences' new rows: one into a chunk buffer, one into a tail that wraps.
struct Append {
  explicit Append(int32_t the_d) : d(the_d), chunk(bytes(64), kUntouched), tail(bytes(256), kUntouched) {
    Random random(5);
    qkv = random.Floats(rows * width(), 2);
    cos_sin.resize(rows * d);
    for (int64_t row = 0; row < rows; ++row) {
      for (int32_t i = 0; i < d / 2; ++i) {
        const float angle = random.Normal();
        cos_sin[row * d + i] = std::cos(angle);
        cos_sin[row * d + d / 2 + i] = std::sin(angle);
      }
    }
  }
  int64_t bytes(int64_t capacity) const { return KvLayout{capacity, d}.BytesFor(2); }
  int64_t width() const { return int64_t{10} * d; }

  template <typename Fn>
  void Run(Fn&& fn) {
    std::vector<AppendItem> items(2);
    items[0].row_begin = 0;
    items[0].target = {chunk.data(), 128, 130, 9, 64, 0, 2};
    items[1].row_begin = 9;
    items[1].target = {tail.data(), 0, 510, 4, 256, 0, 2};
    RopeAppendArgs args;
    args.qkv = qkv.data();
    args.cos_sin = cos_sin.data();
    args.items = DeviceTable(items);
    args.rows = rows;
    args.num_q_heads = 6;
    args.num_kv_heads = 2;
    args.head_dim = d;
    fn(args);
  }

  const int64_t rows = 13;
  int32_t d;
  std::vector<float> qkv, cos_sin;
  std::vector<uint8_t> chunk, tail;
};

TEST(RopeAppend, RotatesAndAppendsLikeTheReference) {
  CpuTeam team(2);
  for (const int32_t d : {64, 128, 256}) {
    Append expected(d);
    expected.Run([](const RopeAppendArgs& args) { reference::RopeAppend(args); });
    for (const cpu::KernelTable* kernels : AllKernels()) {
      Append actual(d);
      actual.Run([&](const RopeAppendArgs& args) { kernels->rope_append(args, team); });
      // K and V keep what was there before: only the q heads change.
      EXPECT_TRUE(SameBits(actual.qkv, expected.qkv)) << kernels->name;
      EXPECT_EQ(actual.chunk, expected.chunk) << kernels->name;
      EXPECT_EQ(actual.tail, expected.tail) << kernels->name;
    }
    // Position 512 of the tail is row 0; row 2 is no position's.
    const KvLayout layout{256, d};
    EXPECT_NE(expected.tail[layout.KeyOffset(1, 1)], kUntouched);
    EXPECT_EQ(expected.tail[layout.KeyOffset(1, 2)], kUntouched);
    EXPECT_EQ(expected.tail[layout.ValueOffset(0, 253)], kUntouched);
  }
}

TEST(RopeAppend, AddsTheBiasAndNormalisesEachHeadFirst) {
  CpuTeam team(2);
  for (const int32_t d : {64, 128, 256}) {
    Random random(7);
    const std::vector<BFloat16> bias = random.Bf16(10 * d), q_norm = random.Bf16(d),
                                k_norm = random.Bf16(d);
    Append plain(d);
    plain.Run([](const RopeAppendArgs& args) { reference::RopeAppend(args); });
    for (const bool has_bias : {true, false}) {
      for (const bool has_norm : {true, false}) {
        const auto with = [&](RopeAppendArgs args) {
          if (has_bias) args.bias = bias.data();
          if (has_norm) args.q_norm = q_norm.data();
          if (has_norm) args.k_norm = k_norm.data();
          args.norm_epsilon = 1e-3f;
          return args;
        };
        Append expected(d);
        expected.Run([&](const RopeAppendArgs& args) { reference::RopeAppend(with(args)); });
        EXPECT_EQ(expected.chunk == plain.chunk, !has_bias && !has_norm);
        std::vector<float> first;
        for (const cpu::KernelTable* kernels : AllKernels()) {
          Append actual(d);
          actual.Run([&](const RopeAppendArgs& args) { kernels->rope_append(with(args), team); });
          for (size_t i = 0; i < actual.qkv.size(); ++i) {
            ASSERT_NEAR(actual.qkv[i], expected.qkv[i], 1e-5 + 1e-5 * std::abs(expected.qkv[i]));
          }
          if (first.empty()) first = actual.qkv;
          EXPECT_TRUE(SameBits(actual.qkv, first)) << kernels->name;
          // What is appended is rounded to bfloat16, half a unit of 2^-8 away at most.
          const auto values = [d](int64_t capacity, const uint8_t* from) {
            std::vector<float> all;
            for (int64_t i = 0; i < KvLayout{capacity, d}.BytesFor(2) / 2; ++i) {
              all.push_back(ToFloat(reinterpret_cast<const BFloat16*>(from)[i]));
            }
            return all;
          };
          const auto got = values(64, actual.chunk.data());
          const auto wanted = values(64, expected.chunk.data());
          for (size_t i = 0; i < got.size(); ++i) {
            ASSERT_NEAR(got[i], wanted[i], 1e-4 + 0x1p-7 * std::abs(wanted[i])) << i;
          }
        }
      }
    }
  }
}

// By hand: a bias that makes all of a head 3, whose norm is 1 in the mean square, times the weight.
TEST(RopeAppend, TheNormIsOfOneHeadAfterTheBias) {
  CpuTeam team(1);
  Append append(64);
  std::fill(append.qkv.begin(), append.qkv.end(), 1.0f);
  for (int64_t i = 0; i < append.rows * 64; ++i) append.cos_sin[i] = i % 64 < 32 ? 1.0f : 0.0f;
  const std::vector<BFloat16> bias(640, ToBFloat16(2)), q_norm(64, ToBFloat16(0.5f)),
      k_norm(64, ToBFloat16(4));
  append.Run([&](RopeAppendArgs args) {
    args.bias = bias.data();
    args.q_norm = q_norm.data();
    args.k_norm = k_norm.data();
    cpu::RopeAppend(args, team);
  });
  EXPECT_NEAR(append.qkv[0], 0.5, 1e-6);
  const KvLayout layout{64, 64};
  const auto at = [&](int64_t offset) {
    return ToFloat(*reinterpret_cast<const BFloat16*>(append.chunk.data() + offset));
  };
  EXPECT_EQ(at(layout.KeyOffset(1, 2)), 4);
  EXPECT_EQ(at(layout.ValueOffset(1, 2)), 3);  // no norm
}

TEST(RopeAppend, APairKeepsItsLength) {
  CpuTeam team(1);
  Append append(64);
  const std::vector<float> before = append.qkv;
  append.Run([&](const RopeAppendArgs& args) { cpu::RopeAppend(args, team); });
  for (int64_t row = 0; row < append.rows; ++row) {
    for (int i = 0; i < 32; ++i) {
      const int64_t at = row * append.width() + 3 * 64 + i;
      EXPECT_NEAR(std::hypot(append.qkv[at], append.qkv[at + 32]),
                  std::hypot(before[at], before[at + 32]), 1e-5);
    }
  }
}

// ---- CopyKvRows ----------------------------------------------------------------------------------

TEST(CopyKvRows, MovesExactlyTheRowsOfTheTarget) {
  CpuTeam team(2);
  const int32_t d = 64;
  Random random(6);
  const int64_t tail_bytes = KvLayout{256, d}.BytesFor(3);
  std::vector<uint8_t> tail(tail_bytes);
  for (uint8_t& byte : tail) byte = static_cast<uint8_t>(random.Below(256));
  const int64_t extent_bytes = KvLayout{128, d}.BytesFor(3);
  const auto run = [&](auto&& fn) {
    std::vector<uint8_t> extent(extent_bytes, kUntouched), ring(tail_bytes, kUntouched);
    std::vector<CopyKvItem> items(2);
    // Sealing: positions 192..255 and on, of a tail that holds 100..355, to an extent from 192 on.
    items[0].from = {tail.data(), 0, 100, 256, 256, 0, 3};
    items[0].to = {extent.data(), 192, 192, 100, 128, 0, 3};
    // Some heads, from the middle of an extent-like run to a ring that wraps.
    items[1].from = {tail.data(), 1000, 1000, 256, 256, 0, 3};
    items[1].to = {ring.data() + KvLayout{256, d}.HeadBytes(), 0, 1010, 30, 256, 1, 2};
    CopyKvRowsArgs args;
    args.items = DeviceTable(items);
    args.head_dim = d;
    fn(args);
    extent.insert(extent.end(), ring.begin(), ring.end());
    return extent;
  };
  const std::vector<uint8_t> expected =
      run([](const CopyKvRowsArgs& args) { reference::CopyKvRows(args); });
  EXPECT_NE(expected, std::vector<uint8_t>(expected.size(), kUntouched));
  for (const cpu::KernelTable* kernels : AllKernels()) {
    EXPECT_EQ(run([&](const CopyKvRowsArgs& args) { kernels->copy_kv_rows(args, team); }), expected)
        << kernels->name;
  }
}

}  // namespace
}  // namespace headroom::kernels
