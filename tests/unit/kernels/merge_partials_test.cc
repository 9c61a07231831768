#include "kernels/merge_partials.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "gtest/gtest.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

struct MergeShape {
  int32_t num_kv_heads = 2;
  int32_t group = 3;
  int32_t head_dim = 64;
  int64_t rows = 5;

  int32_t num_q_heads() const { return num_kv_heads * group; }
  int64_t state_floats() const { return AttentionStateFloats(head_dim); }
  int64_t num_states() const { return rows * num_q_heads(); }
};

// Which of a state's two parts hold keys.
enum FilledParts { kNothing = 0, kFinished = 1, kOpen = 2, kBoth = 3 };

// A state {R, U} whose parts hold keys as `filled` says; the others are the empty part.
void WriteState(Random& random, int filled, int32_t head_dim, float* state) {
  for (int part = 0; part < 2; ++part) {
    float* const at = state + part * (head_dim + 2);
    const bool empty = (filled & (1 << part)) == 0;
    const float l = empty ? 0 : 0.5f + static_cast<float>(random.Below(60));
    for (int32_t j = 0; j < head_dim; ++j) at[j] = empty ? 0 : l * random.Normal();
    at[head_dim] = empty ? -kInfinity : 5 * random.Normal();
    at[head_dim + 1] = l;
  }
}

// Rows of a batch with states of their own and partial ones from elsewhere. What no item names is
// NaN, so that it shows if it is read, or changes if it is written.
struct MergeBatch {
  explicit MergeBatch(const MergeShape& the_shape)
      : shape(the_shape),
        partials(shape.num_states() * shape.state_floats(), kNan),
        state(shape.num_states() * shape.state_floats(), kNan),
        out(shape.num_states() * shape.head_dim, kNan) {}

  // All states of an item; those that a reset overwrites stay NaN.
  void Add(Random& random, const MergeItem& item, int partial_filled, int state_filled) {
    items.push_back(item);
    ForEachState(item, [&](int64_t at) {
      WriteState(random, partial_filled, shape.head_dim, &partials[at * shape.state_floats()]);
      if (item.reset != 0) return;
      WriteState(random, state_filled, shape.head_dim, &state[at * shape.state_floats()]);
    });
  }
  template <typename Fn>
  void ForEachState(const MergeItem& item, Fn&& fn) const {
    for (int64_t row = item.row_begin; row < item.row_begin + item.row_count; ++row) {
      for (int32_t head = item.kv_head_begin * shape.group; head < item.kv_head_end * shape.group;
           ++head) {
        fn(row * shape.num_q_heads() + head);
      }
    }
  }
  MergePartialsArgs Args() {
    MergePartialsArgs args;
    args.partials = partials.data();
    args.state = state.data();
    args.out = out.data();
    args.rows = shape.rows;
    args.items = DeviceTable(items);
    args.num_q_heads = shape.num_q_heads();
    args.num_kv_heads = shape.num_kv_heads;
    args.head_dim = shape.head_dim;
    return args;
  }
  std::vector<float> StateAt(int64_t at) const {
    const auto begin = state.begin() + at * shape.state_floats();
    return std::vector<float>(begin, begin + shape.state_floats());
  }
  std::vector<float> PartialAt(int64_t at) const {
    const auto begin = partials.begin() + at * shape.state_floats();
    return std::vector<float>(begin, begin + shape.state_floats());
  }
  std::vector<float> OutAt(int64_t at) const {
    const auto begin = out.begin() + at * shape.head_dim;
    return std::vector<float>(begin, begin + shape.head_dim);
  }

  MergeShape shape;
  std::vector<float> partials, state, out;
  std::vector<MergeItem> items;
};

MergeItem Item(int32_t row, int32_t rows, int32_t head_begin, int32_t head_end, int reset,
               int finish) {
  MergeItem item;
  item.row_begin = row;
  item.row_count = rows;
  item.kv_head_begin = head_begin;
  item.kv_head_end = head_end;
  item.reset = reset;
  item.finish = finish;
  return item;
}

// Two states of the same keys: the parts' maxima to the bit, sums within rounding.
void ExpectStatesNear(const std::vector<float>& a, const std::vector<float>& b, int32_t head_dim) {
  for (int part = 0; part < 2; ++part) {
    const auto begin = part * (head_dim + 2);
    EXPECT_EQ(a[begin + head_dim], b[begin + head_dim]);
    const float l = b[begin + head_dim + 1];
    for (int32_t j = 0; j < head_dim; ++j) ASSERT_NEAR(a[begin + j], b[begin + j], 4e-6f * l);
    EXPECT_NEAR(a[begin + head_dim + 1], l, 1e-6f * l);
  }
}

// The batch after each instruction set's kernel against the reference and against each other.
void ExpectMatchesReference(const MergeBatch& batch) {
  MergeBatch expected = batch;
  reference::MergePartials(expected.Args());
  MergeBatch best = batch;
  CpuTeam team(2);
  BestKernels().merge_partials(best.Args(), team);
  EXPECT_TRUE(SameBits(best.partials, batch.partials));
  for (const MergeItem& item : batch.items) {
    batch.ForEachState(item, [&](int64_t at) {
      if (item.finish != 0) {  // the state is not used after that
        EXPECT_TRUE(Near(best.OutAt(at), expected.OutAt(at), 2e-5f));
        return;
      }
      ExpectStatesNear(best.StateAt(at), expected.StateAt(at), batch.shape.head_dim);
      EXPECT_TRUE(SameBits(best.OutAt(at), batch.OutAt(at))) << "it is not to finish";
    });
  }
  // What no item names.
  std::vector<bool> named(batch.shape.num_states());
  for (const MergeItem& item : batch.items) {
    batch.ForEachState(item, [&](int64_t at) { named[at] = true; });
  }
  for (int64_t at = 0; at < batch.shape.num_states(); ++at) {
    if (named[at]) continue;
    EXPECT_TRUE(SameBits(best.StateAt(at), batch.StateAt(at))) << at;
    EXPECT_TRUE(SameBits(best.OutAt(at), batch.OutAt(at))) << at;
  }
  for (const cpu::KernelTable* kernels : AllKernels()) {
    for (const int threads : {1, 3}) {
      CpuTeam other(threads);
      MergeBatch again = batch;
      kernels->merge_partials(again.Args(), other);
      EXPECT_TRUE(SameBits(again.state, best.state)) << kernels->name << ", " << threads;
      EXPECT_TRUE(SameBits(again.out, best.out)) << kernels->name << ", " << threads;
    }
  }
}

TEST(MergePartials, MatchesTheReferenceWithTheSameBitsEverywhere) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 3, 5}) {
      for (const int reset : {0, 1}) {
        for (const int finish : {0, 1}) {
          for (int filled = 0; filled < 16; ++filled) {
            const int partial = filled % 4, state = filled / 4;
            // Rows see their own keys: nothing is finished that has none.
            if (finish != 0 && partial == kNothing && (reset != 0 || state == kNothing)) continue;
            SCOPED_TRACE(::testing::Message()
                         << "head_dim " << head_dim << ", group " << group << ", reset " << reset
                         << ", finish " << finish << ", partial " << partial << ", state "
                         << state);
            Random random(100 * head_dim + 10 * group + filled);
            MergeBatch batch({2, group, head_dim, 3});
            batch.Add(random, Item(0, 3, 0, 2, reset, finish), partial, state);
            ExpectMatchesReference(batch);
            if (::testing::Test::HasFailure()) return;
          }
        }
      }
    }
  }
}

TEST(MergePartials, ItemsTakeTheirRowsAndHeadsOnly) {
  Random random(5);
  const MergeShape shape = {3, 3, 64, 11};
  for (int round = 0; round < 60; ++round) {
    MergeBatch batch(shape);
    for (int32_t row = 0; row < shape.rows;) {
      const auto rows = static_cast<int32_t>(
          std::min<int64_t>(1 + random.Below(4), shape.rows - row));
      for (int32_t head = 0; head < shape.num_kv_heads;) {
        const auto heads =
            static_cast<int32_t>(1 + random.Below(shape.num_kv_heads - head));
        if (random.Below(3) > 0) {
          batch.Add(random,
                    Item(row, rows, head, head + heads, random.Below(2) != 0, random.Below(2) != 0),
                    static_cast<int>(1 + random.Below(3)), static_cast<int>(random.Below(4)));
        }
        head += heads;
      }
      row += rows;
    }
    std::reverse(batch.items.begin(), batch.items.end());  // in any order
    ExpectMatchesReference(batch);
    ASSERT_FALSE(::testing::Test::HasFailure()) << "round " << round;
  }
}

TEST(MergePartials, AResetIsACopyToTheBit) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (int filled = kNothing; filled <= kBoth; ++filled) {
      for (const cpu::KernelTable* kernels : AllKernels()) {
        Random random(8 + filled);
        MergeBatch batch({2, 5, head_dim, 4});
        batch.Add(random, Item(0, 4, 0, 2, 1, 0), filled, kNothing);
        // Zeros of both signs and numbers of any size are numbers like others.
        batch.partials[0] = -0.0f;
        batch.partials[1] = 1e-42f;
        batch.partials[2] = -3e38f;
        kernels->merge_partials(batch.Args(), team);
        EXPECT_TRUE(SameBits(batch.state, batch.partials)) << kernels->name;
      }
    }
  }
}

// The empty state is the identity on either side, exactly.
TEST(MergePartials, AnEmptySideChangesNothing) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const cpu::KernelTable* kernels : AllKernels()) {
      for (int filled = kNothing; filled <= kBoth; ++filled) {
        Random random(9 + filled);
        MergeBatch batch({2, 3, head_dim, 4});
        batch.Add(random, Item(0, 4, 0, 2, 0, 0), kNothing, filled);
        const std::vector<float> before = batch.state;
        kernels->merge_partials(batch.Args(), team);
        EXPECT_TRUE(SameBits(batch.state, before)) << kernels->name << ", state " << filled;
      }
      // The partial's one part becomes the state's finished one; what is open stays.
      for (const int filled : {kFinished, kOpen}) {
        Random random(10 + filled);
        MergeBatch batch({2, 3, head_dim, 4});
        batch.Add(random, Item(0, 4, 0, 2, 0, 0), filled, kOpen);
        const MergeBatch before = batch;
        kernels->merge_partials(batch.Args(), team);
        const int32_t part = head_dim + 2;
        before.ForEachState(before.items[0], [&](int64_t at) {
          const std::vector<float> partial = before.PartialAt(at), state = batch.StateAt(at);
          const auto from = partial.begin() + (filled == kFinished ? 0 : part);
          EXPECT_TRUE(SameBits({state.begin(), state.begin() + part}, {from, from + part}));
          const std::vector<float> open = before.StateAt(at);
          EXPECT_TRUE(SameBits({state.begin() + part, state.end()},
                               {open.begin() + part, open.end()}));
        });
      }
    }
  }
}

// Maxima so far apart that one side's weight is 0, or that exp() of a maximum would overflow.
TEST(MergePartials, SidesOfVeryDifferentScoresKeepTheLarger) {
  CpuTeam team(1);
  constexpr int32_t kHeadDim = 64;
  for (const cpu::KernelTable* kernels : AllKernels()) {
    for (const float apart : {-1000.0f, 1000.0f}) {
      Random random(11);
      MergeBatch batch({1, 1, kHeadDim, 1});
      batch.Add(random, Item(0, 1, 0, 1, 0, 1), kFinished, kFinished);
      batch.state[kHeadDim] = 500 + apart;
      batch.partials[kHeadDim] = 500;
      const std::vector<float> larger = apart > 0 ? batch.StateAt(0) : batch.PartialAt(0);
      kernels->merge_partials(batch.Args(), team);
      std::vector<float> expected(kHeadDim);
      for (int32_t j = 0; j < kHeadDim; ++j) expected[j] = larger[j] / larger[kHeadDim + 1];
      EXPECT_TRUE(Near(batch.out, expected, 1e-6f)) << kernels->name;
    }
  }
}

TEST(MergePartials, WithoutItemsThereIsNothingToDo) {
  CpuTeam team(2);
  for (const cpu::KernelTable* kernels : AllKernels()) {
    MergeBatch batch({2, 3, 64, 4});
    const MergeBatch before = batch;
    kernels->merge_partials(batch.Args(), team);
    EXPECT_TRUE(SameBits(batch.state, before.state));
    EXPECT_TRUE(SameBits(batch.out, before.out));
  }
}

// ---- With attention -----------------------------------------------------------------------------

// Rows of one sequence, and its keys in one extent.
class MergedSequence {
 public:
  MergedSequence(const MergeShape& shape, int64_t tokens, uint32_t seed)
      : shape_(shape), tokens_(tokens) {
    Random random(seed);
    q_ = random.Floats(shape.num_states() * shape.head_dim, 1.5f);
    const auto capacity = static_cast<int32_t>(CeilToBlock(tokens));
    kv_ = random.Bf16(KvLayout{capacity, shape.head_dim}.BytesFor(shape.num_kv_heads) / 2);
    span_.base = reinterpret_cast<uint8_t*>(kv_.data());
    span_.count = static_cast<int32_t>(tokens);
    span_.capacity = capacity;
    span_.kv_head_end = shape.num_kv_heads;
  }

  // Attends to the keys [begin, end).
  void Attend(int64_t begin, int64_t end, bool reset, std::vector<float>& state, float* out,
              CpuTeam& team) const {
    KvSpan span = span_;
    span.first_pos = begin;
    span.count = static_cast<int32_t>(end - begin);
    AttendItem item;
    item.row_count = static_cast<int32_t>(shape_.rows);
    item.first_pos = tokens_ - shape_.rows;
    item.kv_head_end = shape_.num_kv_heads;
    item.span_count = 1;
    item.reset = reset;
    item.finish = out != nullptr;
    const std::vector<AttendItem> items = {item};
    const std::vector<KvSpan> spans = {span};
    std::vector<float> scratch(kMinAttendScratchFloats);
    AttendArgs args;
    args.q = q_.data();
    args.q_stride = shape_.num_q_heads() * shape_.head_dim;
    args.state = state.data();
    args.out = out;
    args.rows = shape_.rows;
    args.items = DeviceTable(items);
    args.spans = DeviceTable(spans);
    args.scratch = scratch.data();
    args.scratch_floats = kMinAttendScratchFloats;
    args.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    args.num_q_heads = shape_.num_q_heads();
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    BestKernels().attend(args, team);
  }

 private:
  MergeShape shape_;
  int64_t tokens_;
  std::vector<float> q_;
  std::vector<BFloat16> kv_;
  KvSpan span_;
};

TEST(MergePartials, AttentionGoesOnFromPartialsToTheBitAndTakesEarlierKeysWithinRounding) {
  constexpr int64_t kTokens = 700;
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128}) {
    for (const int64_t rows : {1, 40}) {
      const MergeShape shape = {2, 3, head_dim, rows};
      const MergedSequence sequence(shape, kTokens, 31);
      MergeBatch whole(shape);
      sequence.Attend(0, kTokens, true, whole.state, whole.out.data(), team);
      for (const int64_t cut : {64, 192, 256, 320, 512, 640}) {
        MergeBatch after(shape);
        sequence.Attend(0, cut, true, after.partials, nullptr, team);
        after.items = {Item(0, static_cast<int32_t>(rows), 0, 2, 1, 0)};
        BestKernels().merge_partials(after.Args(), team);
        sequence.Attend(cut, kTokens, false, after.state, after.out.data(), team);
        EXPECT_TRUE(SameBits(after.out, whole.out)) << "cut at " << cut << ", " << rows << " rows";

        MergeBatch before(shape);
        sequence.Attend(0, cut, true, before.partials, nullptr, team);
        sequence.Attend(cut, kTokens, true, before.state, nullptr, team);
        before.items = {Item(0, static_cast<int32_t>(rows), 0, 2, 0, 1)};
        BestKernels().merge_partials(before.Args(), team);
        EXPECT_TRUE(Near(before.out, whole.out, 2e-6f)) << "cut at " << cut << ", " << rows;
      }
    }
  }
}

}  // namespace
}  // namespace headroom::kernels
