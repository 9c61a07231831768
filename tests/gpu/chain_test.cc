// Chains on the GPU: several operations as one kernel, with the bits of one after the other.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom {
namespace {

using namespace kernels;  // NOLINT: every name here is a kernel's

// A layer's products as services/worker/model/decoder.cc chains them, of odd shapes.
struct LayerShape {
  int64_t rows, hidden, intermediate;
  int32_t num_q_heads, num_kv_heads, head_dim;
  bool bias = false, head_norms = false, post_norms = false;
  int64_t qkv_width() const { return int64_t{num_q_heads + 2 * num_kv_heads} * head_dim; }
};
std::string Name(const LayerShape& s) {
  return absl::StrCat(s.rows, " rows, hidden ", s.hidden, ", MLP ", s.intermediate, ", heads ", s.num_q_heads,
                      " and ", s.num_kv_heads, " of ", s.head_dim, s.bias ? ", bias" : "",
                      s.head_norms ? ", head norms" : "", s.post_norms ? ", post norms" : "");
}

class ChainTest : public GpuTest {
 protected:
  // What a layer writes, and what chains write it.
  struct Layer {
    std::vector<ChainOp> input;   // norm, q, k and v, rotation
    std::vector<ChainOp> output;  // output projection, norm, MLP
    float *x, *qkv;
    BFloat16* attention;
    uint8_t* tails;
    int64_t tail_bytes;
  };

  // Drawing every weight of the larger ones would take most of the test's time.
  PackedWeight Weight(int64_t n, int64_t k, Random& random) {
    const std::vector<BFloat16> drawn = random.Bf16(99991, 0.05f);
    std::vector<BFloat16> rows(static_cast<size_t>(n * k));
    for (size_t i = 0; i < rows.size(); ++i) rows[i] = drawn[i % drawn.size()];
    uint8_t* const packed = gpu_.Take(device_.PackedBytes(n, k));
    EXPECT_OK(device_.LoadWeightRows(rows.data(), 0, n, n, k, packed));
    return {reinterpret_cast<const BFloat16*>(packed), n, k};
  }
  RmsNormArgs Norm(const float* x, Activations out, const LayerShape& s, Random& random) {
    RmsNormArgs norm;
    norm.x = x;
    norm.x_rows = norm.rows = s.rows;
    norm.weight = gpu_.Put(random.Bf16(s.hidden));
    norm.out = out;
    norm.hidden = s.hidden;
    norm.epsilon = 1e-5f;
    return norm;
  }
  GemmArgs Product(Activations a, PackedWeight w, Activations c, const LayerShape& s) {
    GemmArgs gemm;
    gemm.a = a;
    gemm.a_stride = w.k;
    gemm.w = w;
    gemm.c = c;
    gemm.c_stride = w.n;
    gemm.m = s.rows;
    return gemm;
  }
  void AddProduct(std::vector<ChainOp>& to, Activations a, PackedWeight w, const LayerShape& s, float* x,
                  float* projected, Random& random) {
    GemmArgs product = Product(a, w, s.post_norms ? projected : x, s);
    product.accumulate = !s.post_norms;
    to.push_back(product);
    if (!s.post_norms) return;
    RmsNormArgs norm = Norm(projected, x, s, random);
    norm.accumulate = true;
    to.push_back(norm);
  }

  // Tables and memory of the items, in `items_` until the next layer is made.
  Layer Make(const LayerShape& s, uint32_t seed) {
    Random random(seed);
    Layer layer;
    const int64_t q_width = int64_t{s.num_q_heads} * s.head_dim;
    layer.x = gpu_.Put(random.Floats(s.rows * s.hidden));
    layer.attention = gpu_.Put(random.Bf16(s.rows * q_width));
    layer.qkv = gpu_.Take<float>(s.rows * s.qkv_width());
    float* const projected = gpu_.Take<float>(s.rows * s.hidden);
    const Activations normed = gpu_.TakeActivations(s.rows * s.hidden, ElementType::kBFloat16);
    const Activations gate_up = gpu_.TakeActivations(s.rows * 2 * s.intermediate, ElementType::kBFloat16);
    const Activations activated = gpu_.TakeActivations(s.rows * s.intermediate, ElementType::kBFloat16);

    layer.input.push_back(Norm(layer.x, normed, s, random));
    layer.input.push_back(Product(normed, Weight(s.qkv_width(), s.hidden, random), layer.qkv, s));
    RopeAppendArgs rope;
    rope.qkv = layer.qkv;
    if (s.bias) rope.bias = gpu_.Put(random.Bf16(s.qkv_width()));
    if (s.head_norms) {
      rope.q_norm = gpu_.Put(random.Bf16(s.head_dim));
      rope.k_norm = gpu_.Put(random.Bf16(s.head_dim));
      rope.norm_epsilon = 1e-6f;
    }
    rope.cos_sin = gpu_.Put(random.Floats(s.rows * s.head_dim));
    // Sequences of three rows and a shorter one, some around a tail's end.
    const int64_t bytes = KvLayout{kTailTokens, s.head_dim}.BytesFor(s.num_kv_heads);
    const int64_t sequences = (s.rows + 2) / 3;
    layer.tail_bytes = sequences * bytes;
    layer.tails = gpu_.Take(layer.tail_bytes);
    items_.clear();
    for (int64_t i = 0; i < sequences; ++i) {
      AppendItem item;
      item.row_begin = static_cast<int32_t>(3 * i);
      item.target = {layer.tails + i * bytes, 0, kTailTokens - 1 + 77 * i,
                     static_cast<int32_t>(std::min<int64_t>(3, s.rows - 3 * i)),
                     static_cast<int32_t>(kTailTokens), 0, s.num_kv_heads};
      items_.push_back(item);
    }
    rope.items = gpu_.PutTable(items_);
    rope.rows = s.rows;
    rope.num_q_heads = s.num_q_heads;
    rope.num_kv_heads = s.num_kv_heads;
    rope.head_dim = s.head_dim;
    layer.input.push_back(rope);

    AddProduct(layer.output, layer.attention, Weight(s.hidden, q_width, random), s, layer.x, projected,
               random);
    layer.output.push_back(Norm(layer.x, normed, s, random));
    GatedGemmArgs gated;
    gated.gemm = Product(normed, Weight(2 * s.intermediate, s.hidden, random), gate_up, s);
    gated.swiglu = {gate_up, activated, s.rows, s.intermediate,
                    s.post_norms ? GateActivation::kGeluTanh : GateActivation::kSilu};
    layer.output.push_back(gated);
    AddProduct(layer.output, activated, Weight(s.hidden, s.intermediate, random), s, layer.x, projected, random);
    return layer;
  }

  void RunAlone(const std::vector<ChainOp>& ops) {
    for (const ChainOp& op : ops) {
      if (const auto* norm = std::get_if<RmsNormArgs>(&op)) EXPECT_OK(device_.RmsNorm(gpu_.stream(), *norm));
      if (const auto* gemm = std::get_if<GemmArgs>(&op)) EXPECT_OK(device_.Gemm(gpu_.stream(), *gemm));
      if (const auto* gated = std::get_if<GatedGemmArgs>(&op)) {
        EXPECT_OK(device_.GatedGemm(gpu_.stream(), *gated));
      }
      if (const auto* rope = std::get_if<RopeAppendArgs>(&op)) {
        EXPECT_OK(device_.RopeAppend(gpu_.stream(), *rope));
      }
    }
  }
  // What a run leaves: x, q (of qkv keys and values need not stay), keys and values.
  std::vector<float> Result(const Layer& layer, const LayerShape& s) {
    std::vector<float> result = gpu_.Fetch(layer.x, s.rows * s.hidden);
    const std::vector<float> qkv = gpu_.Fetch(layer.qkv, s.rows * s.qkv_width());
    for (int64_t row = 0; row < s.rows; ++row) {
      const auto begin = qkv.begin() + row * s.qkv_width();
      result.insert(result.end(), begin, begin + int64_t{s.num_q_heads} * s.head_dim);
    }
    const std::vector<float> tails =
        gpu_.Fetch(reinterpret_cast<const float*>(layer.tails), layer.tail_bytes / 4);
    result.insert(result.end(), tails.begin(), tails.end());
    return result;
  }

  std::vector<AppendItem> items_;
};

// ------------------------------------------------------------------------------------------

TEST_F(ChainTest, HasTheBitsOfOneOperationAfterTheOther) {
  std::vector<LayerShape> shapes;
  for (const int64_t rows : {1, 2, 3, 7, 8, 9, 13, 16, 17, 33, 64}) {
    shapes.push_back({rows, 576, 1536, 9, 3, 64});
    shapes.push_back({rows, 1088, 192, 4, 1, 128, /*bias=*/true});
  }
  for (const int64_t rows : {1, 5, 16}) {
    shapes.push_back({rows, 64, 24, 2, 1, 64, false, /*head_norms=*/true});
    shapes.push_back({rows, 4096, 1000, 8, 2, 128});
    shapes.push_back({rows, 2304, 4608, 8, 4, 256, false, false, /*post_norms=*/true});
    shapes.push_back({rows, 8256, 520, 4, 2, 128, true, true, true});
    shapes.push_back({rows, 448, 1000, 3, 1, 80, true});
    // Of so many tiles that the product behind begins before all are done.
    shapes.push_back({rows, 256, 14336, 4, 1, 64});
    shapes.push_back({rows, 256, 7000, 4, 1, 64});
  }
  uint32_t seed = 1;
  for (const LayerShape& shape : shapes) {
    std::vector<float> expected;
    for (const bool chained : {false, true}) {
      Layer layer = Make(shape, seed);
      for (int layers = 0; layers < 3; ++layers) {  // one after the other, as in a step
        if (chained) {
          EXPECT_OK(device_.Chain(gpu_.stream(), layer.output));
          EXPECT_OK(device_.Chain(gpu_.stream(), layer.input));
        } else {
          RunAlone(layer.output);
          RunAlone(layer.input);
        }
      }
      const std::vector<float> result = Result(layer, shape);
      if (chained) {
        EXPECT_TRUE(SameBits(result, expected)) << Name(shape);
      } else {
        expected = result;
      }
      gpu_.Reset();
    }
    ++seed;
  }
}

// Blocks that do not wait for each other would show now and then, and so would copies that do not wait for loads:
// these weights stay in L2, from where copies come soonest.
TEST_F(ChainTest, HasTheSameBitsEachTime) {
  for (const int64_t rows : {1, 4, 16}) {
    const LayerShape shape = {rows, 1024, 8192, 8, 8, 64};
    const Layer layer = Make(shape, 5);
    const std::vector<float> x = gpu_.Fetch(layer.x, rows * shape.hidden);
    std::vector<ChainOp> all = layer.output;
    all.insert(all.end(), layer.input.begin(), layer.input.end());
    std::vector<float> first;
    for (int i = 0; i < 200; ++i) {
      EXPECT_OK(device_.Upload(reinterpret_cast<uint8_t*>(layer.x), x.data(),
                               static_cast<int64_t>(x.size() * sizeof(float))));
      EXPECT_OK(device_.Chain(gpu_.stream(), all));
      const std::vector<float> result = Result(layer, shape);
      if (i == 0) first = result;
      ASSERT_TRUE(SameBits(result, first)) << Name(shape) << ", run " << i;
    }
    gpu_.Reset();
  }
}

TEST_F(ChainTest, StaysInTheArena) {
  const LayerShape shape = {1, 64, 64, 1, 1, 64};
  Layer layer = Make(shape, 1);
  std::vector<float> elsewhere(64);
  std::get<RmsNormArgs>(layer.input[0]).x = elsewhere.data();
  const absl::Status refused = device_.Chain(gpu_.stream(), layer.input);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInternal) << refused;
}

}  // namespace
}  // namespace headroom
