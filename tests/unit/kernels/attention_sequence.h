// Sequences with random q, K and V, for tests of attention on any device.
#ifndef HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_SEQUENCE_H_
#define HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_SEQUENCE_H_

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {

struct Shape {
  int32_t num_kv_heads = 2;
  int32_t group = 3;
  int32_t head_dim = 64;

  int32_t num_q_heads() const { return num_kv_heads * group; }
};

// One sequence's q, K and V at positions [0, tokens).
struct Sequence {
  Sequence(const Shape& the_shape, int64_t the_tokens, uint32_t seed)
      : shape(the_shape), tokens(the_tokens) {
    Random random(seed);
    q = random.Floats(tokens * q_width(), 1.5f);
    k = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim, 1.5f);
    v = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim);
  }
  int64_t q_width() const { return int64_t{shape.num_q_heads()} * shape.head_dim; }

  Shape shape;
  int64_t tokens;
  std::vector<float> q;     // [token][q_head][d]
  std::vector<BFloat16> k;  // [token][kv_head][d]
  std::vector<BFloat16> v;
};

}  // namespace headroom::kernels

#endif  // HEADROOM_TESTS_UNIT_KERNELS_ATTENTION_SEQUENCE_H_
