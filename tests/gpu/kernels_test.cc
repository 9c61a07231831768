// Each CUDA kernel but attention and the draw of a token against the plain reference, on odd shapes.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {
namespace {

using namespace kernels;  // NOLINT: every name here is a kernel's

class KernelTest : public GpuTest {};

// ---- FillRandom
// ----------------------------------------------------------------------------------------

TEST_F(KernelTest, FillRandomHasTheBitsOfTheReferenceRowMajor) {
  const int64_t shapes[][2] = {{1, 1}, {1, 7}, {31, 5}, {32, 64}, {33, 3}, {70, 130}, {1000, 513}};
  for (const auto& [n, k] : shapes) {
    FillRandomArgs args;
    args.n = n;
    args.k = k;
    args.seed = 1234567890123456789u + static_cast<uint64_t>(n);
    args.scale = 0.37f;
    const int64_t padded = PackedWeightBytes(n, k) / 2;
    std::vector<BFloat16> packed(static_cast<size_t>(padded));
    args.out = packed.data();
    reference::FillRandom(args);
    ASSERT_EQ(device_.PackedBytes(n, k), padded * 2);
    args.out = gpu_.Take<BFloat16>(padded);
    ASSERT_OK(device_.FillRandom(args));
    const std::vector<BFloat16> out = gpu_.Fetch(args.out, padded);
    int64_t wrong = 0;
    for (int64_t row = 0; row < padded / k; ++row) {
      for (int64_t column = 0; column < k; ++column) {
        wrong += out[row * k + column].bits != packed[PackedWeightIndex(k, row, column)].bits;
      }
    }
    EXPECT_EQ(wrong, 0) << n << " x " << k;
    gpu_.Reset();
  }
}

TEST_F(KernelTest, FillRandomStaysInTheArena) {
  FillRandomArgs args;
  std::vector<BFloat16> elsewhere(1024);
  args.out = elsewhere.data();
  args.n = args.k = 32;
  EXPECT_EQ(device_.FillRandom(args).code(), absl::StatusCode::kInternal);
}

// ---- Elementwise
// -----------------------------------------------------------------------------------------

TEST_F(KernelTest, EmbedTakesTokensFromTheTableAndFromTheLastStep) {
  Random random(3);
  for (const int64_t hidden : {1, 64, 576, 1001}) {
    const int64_t vocab = 67;
    const std::vector<BFloat16> table = random.Bf16(vocab * hidden);
    const std::vector<EmbedRow> rows = {{0, 0}, {66, 0}, {-1, 2}, {5, 1}, {-1, 0}};
    const std::vector<int32_t> last = {9, 8, 66};
    EmbedArgs args;
    uint8_t* const packed = gpu_.Take(device_.PackedBytes(vocab, hidden));
    ASSERT_OK(device_.LoadWeightRows(table.data(), 0, vocab, vocab, hidden, packed));
    args.table = {reinterpret_cast<const BFloat16*>(packed), vocab, hidden};
    args.rows = gpu_.PutTable(rows);
    args.last_tokens = gpu_.Put(last);
    args.num_slots = 3;
    args.out = gpu_.Take<float>(5 * hidden);
    const auto out = After(device_.Embed(gpu_.stream(), args), args.out, 5 * hidden);
    const int64_t ids[] = {0, 66, 66, 5, 9};
    for (int64_t i = 0; i < 5 * hidden; ++i) {
      ASSERT_EQ(out[i], ToFloat(table[ids[i / hidden] * hidden + i % hidden])) << i;
    }
    gpu_.Reset();
  }
}

TEST_F(KernelTest, RmsNormMatchesTheReference) {
  Random random(4);
  for (const int64_t hidden : {1, 31, 64, 257, 576, 4096, 5120}) {
    for (const int variant : {0, 1, 2, 3}) {
      const bool indexed = variant % 2 != 0;
      const ElementType type = variant < 2 ? ElementType::kFloat32 : ElementType::kBFloat16;
      RmsNormArgs args;
      args.x_rows = 5;
      args.rows = indexed ? 3 : 5;
      args.hidden = hidden;
      args.epsilon = 1e-5f;
      const std::vector<float> x = random.Floats(5 * hidden, 3);
      const std::vector<BFloat16> weight = random.Bf16(hidden);
      const std::vector<int32_t> index = {4, 0, 4};
      std::vector<float> expected(args.rows * hidden);
      RmsNormArgs on_host = args;
      on_host.x = x.data();
      on_host.weight = weight.data();
      on_host.out = expected.data();
      if (indexed) on_host.row_index = DeviceTable(index);
      reference::RmsNorm(on_host);
      args.x = gpu_.Put(x);
      args.weight = gpu_.Put(weight);
      args.out = gpu_.TakeActivations(args.rows * hidden, type);
      if (indexed) args.row_index = gpu_.PutTable(index);
      EXPECT_OK(device_.RmsNorm(gpu_.stream(), args));
      EXPECT_TRUE(Near(gpu_.FetchActivations(args.out, args.rows * hidden), expected,
                       type == ElementType::kFloat32 ? 1e-5f : 4e-2f))
          << hidden;
      gpu_.Reset();
    }
  }
}

TEST_F(KernelTest, SwiGluMatchesTheReference) {
  Random random(5);
  for (const int64_t width : {1, 255, 256, 1536}) {
    for (const int64_t rows : {1, 3, 130}) {
      const std::vector<float> gate_up = random.Floats(rows * 2 * width, 4);
      std::vector<float> expected(rows * width);
      reference::SwiGlu({gate_up.data(), expected.data(), rows, width});
      float* const out = gpu_.Take<float>(rows * width);
      const SwiGluArgs args{gpu_.Put(gate_up), out, rows, width};
      EXPECT_TRUE(Near(After(device_.SwiGlu(gpu_.stream(), args), out, rows * width), expected,
                       2e-5f));
      const std::vector<BFloat16> rounded = random.Bf16(rows * 2 * width);
      SwiGluArgs narrow{rounded.data(), expected.data(), rows, width};
      reference::SwiGlu(narrow);
      narrow.gate_up = gpu_.Put(rounded);
      narrow.out = gpu_.TakeActivations(rows * width, ElementType::kBFloat16);
      EXPECT_OK(device_.SwiGlu(gpu_.stream(), narrow));
      EXPECT_TRUE(Near(gpu_.FetchActivations(narrow.out, rows * width), expected, 6e-2f));
      gpu_.Reset();
    }
  }
}

// ---- RoPE and rows of keys and values
// --------------------------------------------------------------------

TEST_F(KernelTest, RopeTableMatchesTheReferenceFarOut) {
  for (const int32_t d : {64, 128, 256}) {
    std::vector<int64_t> positions = {0, 1, 63, 4095, 131071, 1000000};
    std::vector<float> frequencies(d / 2);
    for (int32_t i = 0; i < d / 2; ++i) frequencies[i] = std::pow(10000.0f, -2.0f * i / d);
    std::vector<float> expected(positions.size() * d);
    RopeTableArgs args;
    args.head_dim = d;
    args.positions = DeviceTable(positions);
    args.inverse_frequency = frequencies.data();
    args.cos_sin = expected.data();
    reference::RopeTable(args);
    const auto count = static_cast<int64_t>(expected.size());
    args.positions = gpu_.PutTable(positions);
    args.inverse_frequency = gpu_.Put(frequencies);
    args.cos_sin = gpu_.Take<float>(count);
    EXPECT_TRUE(
        Near(After(device_.RopeTable(gpu_.stream(), args), args.cos_sin, count), expected, 1e-7f));
    gpu_.Reset();
  }
}

TEST_F(KernelTest, RopeAppendRoundsAsTheReferenceAlsoRoundTheTail) {
  Random random(6);
  for (const int32_t d : {64, 128, 256}) {
    RopeAppendArgs args;
    args.num_q_heads = 6;
    args.num_kv_heads = 2;
    args.head_dim = d;
    args.rows = 33;
    const int64_t width = 10 * d;
    const std::vector<float> qkv = random.Floats(args.rows * width);
    const std::vector<float> cos_sin = random.Floats(args.rows * d);
    // 30 positions around the end of a tail; three of another sequence, into a chunk buffer.
    const int64_t bytes = KvLayout{kTailTokens, d}.BytesFor(2);
    std::vector<uint8_t> memory(static_cast<size_t>(2 * bytes), 0xff);
    uint8_t* const there = gpu_.Put(memory);
    const auto items = [&](uint8_t* base) {
      std::vector<AppendItem> list(2);
      list[0].row_begin = 0;
      list[0].target = {base, 0, 500, 30, static_cast<int32_t>(kTailTokens), 0, 2};
      list[1].row_begin = 30;
      list[1].target = {base + bytes, 64, 70, 3, 64, 0, 2};
      return list;
    };
    std::vector<float> expected = qkv;
    const std::vector<AppendItem> host_items = items(memory.data());
    RopeAppendArgs on_host = args;
    on_host.qkv = expected.data();
    on_host.cos_sin = cos_sin.data();
    on_host.items = DeviceTable(host_items);
    reference::RopeAppend(on_host);

    const std::vector<AppendItem> gpu_items = items(there);
    args.qkv = gpu_.Put(qkv);
    args.cos_sin = gpu_.Put(cos_sin);
    args.items = gpu_.PutTable(gpu_items);
    const auto turned = After(device_.RopeAppend(gpu_.stream(), args), args.qkv, args.rows * width);
    EXPECT_TRUE(SameBits(turned, expected)) << d;
    EXPECT_EQ(gpu_.Fetch(there, 2 * bytes), memory) << d;
    gpu_.Reset();
  }
}

// Gemma's: weights less 1, what is normalised added to the residual stream, scaled embeddings, capped
// logits.
TEST_F(KernelTest, NormsAddTheirOffsetAndAccumulate) {
  Random random(9);
  for (const int64_t hidden : {15, 64, 1000, 3584, 9001}) {
    const std::vector<float> x = random.Floats(3 * hidden, 3), before = random.Floats(3 * hidden);
    const std::vector<BFloat16> weight = random.Bf16(hidden);
    for (const bool accumulate : {false, true}) {
      RmsNormArgs args;
      args.x_rows = args.rows = 3;
      args.hidden = hidden;
      args.epsilon = 1e-5f;
      args.weight_offset = 1;
      args.accumulate = accumulate;
      std::vector<float> expected = before;
      args.x = x.data();
      args.weight = weight.data();
      args.out = expected.data();
      reference::RmsNorm(args);
      float* const out = gpu_.Put(before);
      args.x = gpu_.Put(x);
      args.weight = gpu_.Put(weight);
      args.out = out;
      const auto got = After(device_.RmsNorm(gpu_.stream(), args), out, 3 * hidden);
      EXPECT_TRUE(Near(got, expected, 1e-5f)) << hidden << ", accumulate " << accumulate;
      gpu_.Reset();
    }
  }
}

TEST_F(KernelTest, SoftCapAndGeluMatchTheReference) {
  Random random(10);
  for (const int64_t width : {1, 15, 16, 333, 4096}) {
    std::vector<float> x = random.Floats(3 * width, 20);
    x[0] = -1e30f;
    std::vector<float> expected = x;
    reference::SoftCap({expected.data(), 3, width, 30});
    float* const there = gpu_.Put(x);
    const auto capped =
        After(device_.SoftCap(gpu_.stream(), {there, 3, width, 30}), there, 3 * width);
    EXPECT_TRUE(Near(capped, expected, 1e-5f)) << width;

    std::vector<float> gate_up = random.Floats(3 * 2 * width, 3);
    gate_up[0] = -200;
    std::vector<float> activated(static_cast<size_t>(3 * width));
    SwiGluArgs args{gate_up.data(), activated.data(), 3, width, GateActivation::kGeluTanh};
    reference::SwiGlu(args);
    float* const out = gpu_.Take<float>(3 * width);
    args.gate_up = gpu_.Put(gate_up);
    args.out = out;
    EXPECT_TRUE(Near(After(device_.SwiGlu(gpu_.stream(), args), out, 3 * width), activated, 1e-5f))
        << width;
    gpu_.Reset();
  }
}

TEST_F(KernelTest, RopeAppendAddsTheBiasAndNormalisesEachHead) {
  Random random(8);
  // Few positions, of which a block has some heads, and many.
  for (const auto& [d, rows] : {std::pair<int32_t, int32_t>{64, 5}, {128, 5}, {256, 5}, {64, 300}}) {
    for (const bool has_bias : {true, false}) {
      for (const bool has_norm : {true, false}) {
        RopeAppendArgs args;
        args.num_q_heads = 21;  // more heads than warps, and no multiple of them
        args.num_kv_heads = 3;
        args.head_dim = d;
        args.rows = rows;
        args.norm_epsilon = 1e-3f;
        const int64_t width = 27 * d;
        const std::vector<float> qkv = random.Floats(args.rows * width, 2);
        const std::vector<float> cos_sin = random.Floats(args.rows * d);
        const std::vector<BFloat16> bias = random.Bf16(width), q_norm = random.Bf16(d),
                                    k_norm = random.Bf16(d);
        std::vector<uint8_t> memory(static_cast<size_t>(KvLayout{320, d}.BytesFor(3)), 0);
        uint8_t* const there = gpu_.Put(memory);
        const auto items = [count = rows](uint8_t* base) {
          return std::vector<AppendItem>{{0, {base, 64, 70, count, 320, 0, 3}}};
        };
        std::vector<float> expected = qkv;
        const std::vector<AppendItem> host_items = items(memory.data());
        RopeAppendArgs on_host = args;
        on_host.qkv = expected.data();
        on_host.cos_sin = cos_sin.data();
        on_host.items = DeviceTable(host_items);
        if (has_bias) on_host.bias = bias.data();
        if (has_norm) on_host.q_norm = q_norm.data();
        if (has_norm) on_host.k_norm = k_norm.data();
        reference::RopeAppend(on_host);

        const std::vector<AppendItem> gpu_items = items(there);
        args.qkv = gpu_.Put(qkv);
        args.cos_sin = gpu_.Put(cos_sin);
        args.items = gpu_.PutTable(gpu_items);
        if (has_bias) args.bias = gpu_.Put(bias);
        if (has_norm) args.q_norm = gpu_.Put(q_norm);
        if (has_norm) args.k_norm = gpu_.Put(k_norm);
        const auto got =
            After(device_.RopeAppend(gpu_.stream(), args), args.qkv, args.rows * width);
        for (size_t i = 0; i < got.size(); ++i) {
          ASSERT_NEAR(got[i], expected[i], 1e-5 + 1e-5 * std::abs(expected[i])) << d << ", " << i;
        }
        const std::vector<uint8_t> appended = gpu_.Fetch(there, static_cast<int64_t>(memory.size()));
        for (size_t i = 0; i < memory.size() / 2; ++i) {
          const float wanted = ToFloat(reinterpret_cast<const BFloat16*>(memory.data())[i]);
          const float is = ToFloat(reinterpret_cast<const BFloat16*>(appended.data())[i]);
          ASSERT_NEAR(is, wanted, 1e-4 + 0x1p-7 * std::abs(wanted)) << d << ", " << i;
        }
        gpu_.Reset();
      }
    }
  }
}

TEST_F(KernelTest, CopyKvRowsSealsToHostMemoryAndToResidentCopies) {
  Random random(7);
  for (const int32_t d : {64, 128, 256}) {
    const int64_t tail_bytes = KvLayout{kTailTokens, d}.BytesFor(3);
    const int64_t extent_bytes = KvLayout{512, d}.BytesFor(3);
    std::vector<uint8_t> tail(static_cast<size_t>(tail_bytes));
    for (uint8_t& byte : tail) byte = static_cast<uint8_t>(random.Below(256));
    HostMemory extent(extent_bytes);
    ASSERT_OK(device_.RegisterHost(extent.data(), extent_bytes));
    std::vector<uint8_t> expected(static_cast<size_t>(extent_bytes), 0);
    std::vector<uint8_t> resident(static_cast<size_t>(KvLayout{512, d}.BytesFor(1)), 0xff);
    uint8_t* const there = gpu_.Put(tail);
    uint8_t* const copy = gpu_.Put(resident);
    // Positions 448 to 640 lie around the end of the tail; 77 of one head go to a resident copy.
    const auto items = [&](uint8_t* from, uint8_t* to, uint8_t* resident_copy) {
      const KvSpan source = {from, 0, 400, 256, static_cast<int32_t>(kTailTokens), 0, 3};
      std::vector<CopyKvItem> list(2);
      list[0] = {source, {to, 384, 448, 192, 512, 0, 3}};
      list[1] = {source, {resident_copy, 384, 501, 77, 512, 1, 2}};
      return list;
    };
    const auto host_items = items(tail.data(), expected.data(), resident.data());
    CopyKvRowsArgs args;
    args.head_dim = d;
    args.items = DeviceTable(host_items);
    reference::CopyKvRows(args);
    const auto gpu_items = items(there, extent.data(), copy);
    args.items = gpu_.PutTable(gpu_items);
    OpAccount account;
    ASSERT_OK(device_.CopyKvRows(gpu_.stream(), args, &account));
    EXPECT_EQ(gpu_.Fetch(copy, static_cast<int64_t>(resident.size())), resident) << d;
    EXPECT_EQ(std::memcmp(extent.data(), expected.data(), expected.size()), 0) << d;
    EXPECT_EQ(account.bytes.load(), (192 * 3 + 77) * 2 * d * 2);
    EXPECT_GT(account.busy_ns.load(), 0);
    EXPECT_OK(device_.UnregisterHost(extent.data()));
    gpu_.Reset();
  }
}

// A chunk's heads 1 and 2 to extents: two long items with a short one between them.
TEST_F(KernelTest, CopyKvRowsMovesLongRunsByCopyEngines) {
  Random random(17);
  for (const int32_t d : {64, 128}) {
    constexpr int32_t kChunk = 4096, kRows = 1024;
    const int64_t extent_bytes = KvLayout{kRows, d}.BytesFor(2);
    std::vector<uint8_t> chunk(static_cast<size_t>(KvLayout{kChunk, d}.BytesFor(3)));
    for (uint8_t& byte : chunk) byte = static_cast<uint8_t>(random.Below(256));
    HostMemory extents(3 * extent_bytes);
    ASSERT_OK(device_.RegisterHost(extents.data(), 3 * extent_bytes));
    std::vector<uint8_t> expected(static_cast<size_t>(3 * extent_bytes), 0);
    std::memset(extents.data(), 0, expected.size());
    const auto items = [&](uint8_t* from, uint8_t* to) {
      const KvSpan source = {from, 2048, 2048, 3000, kChunk, 0, 3};
      return std::vector<CopyKvItem>{
          {source, {to, 2048, 2048, kRows, kRows, 1, 3}},
          {source, {to + extent_bytes, 3072, 3136, 64, kRows, 1, 3}},
          {source, {to + 2 * extent_bytes, 4096, 4100, 900 + 20 * (d / 128), kRows, 1, 3}}};
    };
    const auto host_items = items(chunk.data(), expected.data());
    CopyKvRowsArgs args;
    args.head_dim = d;
    args.max_blocks = kHostCopyBlocks;
    args.items = DeviceTable(host_items);
    reference::CopyKvRows(args);
    uint8_t* const there = gpu_.Put(chunk);
    const auto gpu_items = items(there, extents.data());
    args.items = gpu_.PutTable(gpu_items);
    OpAccount account;
    ASSERT_OK(device_.CopyKvRows(gpu_.stream(), args, &account));
    EXPECT_EQ(gpu_.Fetch(there, static_cast<int64_t>(chunk.size())), chunk) << d;  // and waits
    EXPECT_EQ(std::memcmp(extents.data(), expected.data(), expected.size()), 0) << d;
    EXPECT_EQ(account.bytes.load(), (kRows + 64 + 900 + 20 * (d / 128)) * 2 * 2 * d * 2);
    EXPECT_OK(device_.UnregisterHost(extents.data()));
    gpu_.Reset();
  }
}

}  // namespace
}  // namespace headroom
