// Types shared by the operations' interfaces: element types, tables of ragged work, and the memory
// ranges an operation declares.
//
// Conventions of every operation in this folder
// - `FooArgs` is trivially copyable: it is stored by value in a stream's queue, so nothing is
//   allocated while a step runs. All pointers are device memory (inside the arena) except where a
//   comment says otherwise.
// - `void ForEachRange(const FooArgs&, f)` calls f(pointer, bytes, Access) for every range that the
//   operation reads or writes. The device checks them at launch, and ThreadSanitizer builds touch
//   them when the operation runs, so that a missing event is a reported race.
// - cpu::Foo(args, team) is the CPU kernel, reference::Foo(args) the plain oracle that it is tested
//   against, cuda::LaunchFoo(args, stream) the GPU launcher.
// - Activations are float32, row-major, rows contiguous unless a stride is named; those next to a matrix
//   product may be bfloat16 (Activations); weights and KV are bfloat16. On the CPU every row's result
//   is independent of the other rows in the batch and of the number of threads, to the bit.
#ifndef HEADROOM_KERNELS_TYPES_H_
#define HEADROOM_KERNELS_TYPES_H_

#include <cstdint>
#include <cstring>

#include "common/kv_layout.h"

namespace headroom::kernels {

// A bfloat16 by its bits: the upper half of the float32 with the same sign and exponent.
struct BFloat16 {
  uint16_t bits = 0;
};
static_assert(sizeof(BFloat16) == 2);

inline float ToFloat(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

// Rounds to nearest even; a NaN stays a (quiet) NaN.
inline BFloat16 ToBFloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

enum class Access { kRead, kWrite, kReadWrite };

enum class ElementType : int32_t { kFloat32, kBFloat16 };

inline constexpr int64_t ElementBytes(ElementType type) {
  return type == ElementType::kFloat32 ? 4 : 2;
}

// Activations that go into a matrix product or come from one, of the type that the device multiplies
// (Device::product_type()): float32 on the CPU, bfloat16 on tensor cores. A pointer converts to
// activations of its type; what an operation only reads it says.
struct Activations {
  void* data = nullptr;
  ElementType type = ElementType::kFloat32;

  Activations() = default;
  HEADROOM_HOST_DEVICE Activations(const float* floats) : data(const_cast<float*>(floats)) {}
  HEADROOM_HOST_DEVICE Activations(const BFloat16* bfloats)
      : data(const_cast<BFloat16*>(bfloats)), type(ElementType::kBFloat16) {}
  HEADROOM_HOST_DEVICE Activations(void* elements, ElementType its_type) : data(elements), type(its_type) {}

  // The activations from element `count` on.
  Activations operator+(int64_t count) const {
    return {static_cast<uint8_t*>(data) + Bytes(count), type};
  }
  Activations& operator+=(int64_t count) { return *this = *this + count; }
  int64_t Bytes(int64_t count) const { return count * ElementBytes(type); }
  // REQUIRES: that type.
  HEADROOM_HOST_DEVICE float* floats() const { return static_cast<float*>(data); }
  HEADROOM_HOST_DEVICE BFloat16* bfloats() const { return static_cast<BFloat16*>(data); }

  // Element `i`, widened; rounded to nearest even when set.
  float Get(int64_t i) const {
    return type == ElementType::kFloat32 ? floats()[i] : ToFloat(bfloats()[i]);
  }
  void Set(int64_t i, float value) const {
    if (type == ElementType::kFloat32) {
      floats()[i] = value;
    } else {
      bfloats()[i] = ToBFloat16(value);
    }
  }
};

// A table that the host built for one step. `device` is the copy in the arena that kernels read;
// `host` is the buffer it was uploaded from, valid and unchanged until the operation has run: launch
// checks read it, kernels never do.
template <typename T>
struct Table {
  const T* device = nullptr;
  const T* host = nullptr;
  int32_t count = 0;
};

// A run of consecutive positions of some KV heads that lie together: (part of) an extent, a resident
// copy, a tile, a tail or the chunk's own keys.
//   key row of (kv_head, pos): base + KvLayout{capacity, head_dim}.KeyOffset(
//       kv_head - kv_head_begin, (pos - origin_pos) % capacity)
// A tail is a ring (origin 0, capacity kTailTokens); everywhere else positions stay below
// origin_pos + capacity and the modulo changes nothing.
struct KvSpan {
  uint8_t* base = nullptr;  // head kv_head_begin; arena, or (as a sealing target) a mapped extent
  int64_t origin_pos = 0;   // the position of row 0
  int64_t first_pos = 0;    // the span covers [first_pos, first_pos + count)
  int32_t count = 0;
  int32_t capacity = 0;  // rows of K, and of V, per head
  int32_t kv_head_begin = 0;
  int32_t kv_head_end = 0;
};

// Bytes of one head of a span, and the span's whole extent in memory from `base`.
inline int64_t SpanHeadBytes(const KvSpan& span, int32_t head_dim) {
  return KvLayout{span.capacity, head_dim}.HeadBytes();
}

// Calls f(pointer, bytes) for the K and V rows that `span` covers (a ring may give two runs each).
template <typename F>
void ForEachSpanRun(const KvSpan& span, int32_t head_dim, F&& f) {
  const KvLayout layout{span.capacity, head_dim};
  const int64_t first_row = (span.first_pos - span.origin_pos) % span.capacity;
  const int64_t run = first_row + span.count <= span.capacity ? span.count
                                                             : span.capacity - first_row;
  for (int32_t head = 0; head < span.kv_head_end - span.kv_head_begin; ++head) {
    f(span.base + layout.KeyOffset(head, first_row), run * layout.RowBytes());
    f(span.base + layout.ValueOffset(head, first_row), run * layout.RowBytes());
    if (run == span.count) continue;
    f(span.base + layout.KeyOffset(head, 0), (span.count - run) * layout.RowBytes());
    f(span.base + layout.ValueOffset(head, 0), (span.count - run) * layout.RowBytes());
  }
}

}  // namespace headroom::kernels

#endif  // HEADROOM_KERNELS_TYPES_H_
