#include "kernels/attention.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/tile_attention.h"
#include "tests/unit/kernels/kernel_test_util.h"

namespace headroom::kernels {
namespace {

// ---- A sequence and places to keep its keys in ---------------------------------------------------

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
    q = random.Floats(tokens * shape.num_q_heads() * shape.head_dim, 1.5f);
    k = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim, 1.5f);
    v = random.Bf16(tokens * shape.num_kv_heads * shape.head_dim);
  }
  Shape shape;
  int64_t tokens;
  std::vector<float> q;      // [token][q_head][d]
  std::vector<BFloat16> k;   // [token][kv_head][d]
  std::vector<BFloat16> v;
};

// Memory of one run of positions; what no key of the sequence fills is NaN.
class Place {
 public:
  // Positions [first, first + count), row 0 being `origin`.
  Place(const Sequence& sequence, int64_t first, int64_t count, int64_t origin, int32_t capacity,
        int32_t head_begin, int32_t head_end)
      : bytes_(KvLayout{capacity, sequence.shape.head_dim}.BytesFor(head_end - head_begin)) {
    const int32_t d = sequence.shape.head_dim;
    for (size_t i = 0; i < bytes_.size(); i += 2) {
      bytes_[i] = 0xc0;
      bytes_[i + 1] = 0x7f;
    }
    span_.base = bytes_.data();
    span_.origin_pos = origin;
    span_.first_pos = first;
    span_.count = static_cast<int32_t>(count);
    span_.capacity = capacity;
    span_.kv_head_begin = head_begin;
    span_.kv_head_end = head_end;
    const KvLayout layout{capacity, d};
    for (int64_t pos = first; pos < first + count; ++pos) {
      const int64_t row = (pos - origin) % capacity;
      for (int32_t head = head_begin; head < head_end; ++head) {
        const int64_t from = (pos * sequence.shape.num_kv_heads + head) * d;
        std::memcpy(&bytes_[layout.KeyOffset(head - head_begin, row)], &sequence.k[from], d * 2);
        std::memcpy(&bytes_[layout.ValueOffset(head - head_begin, row)], &sequence.v[from], d * 2);
      }
    }
  }
  const KvSpan& span() const { return span_; }

 private:
  std::vector<uint8_t> bytes_;
  KvSpan span_;
};

// Launches on rows of one batch. Each Launch() adds up; the results are in state() and out().
class Batch {
 public:
  Batch(const Shape& shape, int64_t rows)
      : shape_(shape),
        q_(rows * shape.num_q_heads() * shape.head_dim, kNan),
        state_(rows * shape.num_q_heads() * AttentionStateFloats(shape.head_dim), kNan),
        out_(rows * shape.num_q_heads() * shape.head_dim, kNan),
        scratch_(kMinAttendScratchFloats, kNan),
        rows_(rows) {}

  // Rows [row_begin, row_begin + rows) become positions [first_pos, first_pos + rows) of `sequence`.
  void SetRows(const Sequence& sequence, int64_t row_begin, int64_t first_pos, int64_t rows) {
    const int64_t width = shape_.num_q_heads() * shape_.head_dim;
    std::copy_n(sequence.q.begin() + first_pos * width, rows * width, q_.begin() + row_begin * width);
  }

  // An item of the next launch: rows at first_pos against the positions that `places` hold.
  void Add(int64_t row_begin, int64_t rows, int64_t first_pos, bool reset, bool finish,
           const std::vector<const Place*>& places, int32_t head_begin = 0, int32_t head_end = -1) {
    AttendItem item;
    item.row_begin = static_cast<int32_t>(row_begin);
    item.row_count = static_cast<int32_t>(rows);
    item.first_pos = first_pos;
    item.kv_head_begin = head_begin;
    item.kv_head_end = head_end < 0 ? shape_.num_kv_heads : head_end;
    item.span_begin = static_cast<int32_t>(spans_.size());
    item.span_count = static_cast<int32_t>(places.size());
    item.reset = reset;
    item.finish = finish;
    for (const Place* place : places) spans_.push_back(place->span());
    items_.push_back(item);
  }

  void AddSpan(int64_t row_begin, int64_t rows, int64_t first_pos, bool reset, bool finish,
               const KvSpan& span) {
    Add(row_begin, rows, first_pos, reset, finish, {});
    spans_.push_back(span);
    items_.back().span_count = 1;
  }

  AttendArgs Args() {
    AttendArgs args;
    args.q = q_.data();
    args.q_stride = shape_.num_q_heads() * shape_.head_dim;
    args.state = state_.data();
    args.out = out_.data();
    args.rows = rows_;
    args.items = DeviceTable(items_);
    args.spans = DeviceTable(spans_);
    args.scratch = scratch_.data();
    args.scratch_floats = static_cast<int64_t>(scratch_.size());
    args.scale = 1 / std::sqrt(static_cast<float>(shape_.head_dim));
    args.num_q_heads = shape_.num_q_heads();
    args.num_kv_heads = shape_.num_kv_heads;
    args.head_dim = shape_.head_dim;
    args.window = window;
    args.soft_cap = soft_cap;
    return args;
  }
  int64_t window = 0;
  float soft_cap = 0;

  void Launch(const cpu::KernelTable& kernels, CpuTeam& team) { Launch(kernels.attend, team); }
  void Launch(void (*attend)(const AttendArgs&, CpuTeam&), CpuTeam& team) {
    attend(Args(), team);
    items_.clear();
    spans_.clear();
  }
  void LaunchReference() { reference::Attend(Args()); }

  const std::vector<float>& out() const { return out_; }
  const std::vector<float>& state() const { return state_; }

 private:
  Shape shape_;
  std::vector<float> q_, state_, out_, scratch_;
  int64_t rows_;
  std::vector<AttendItem> items_;
  std::vector<KvSpan> spans_;
};

// The keys [0, tokens) in one place, somewhat larger.
Place Whole(const Sequence& sequence, int64_t tokens) {
  return Place(sequence, 0, tokens, 0, static_cast<int32_t>(CeilToBlock(tokens) + 64), 0,
               sequence.shape.num_kv_heads);
}

// One launch of the last `rows` rows of the first `tokens` tokens.
std::vector<float> Plain(const Sequence& sequence, int64_t tokens, int64_t rows,
                         const cpu::KernelTable& kernels, CpuTeam& team) {
  const Place place = Whole(sequence, tokens);
  Batch batch(sequence.shape, rows);
  batch.SetRows(sequence, 0, tokens - rows, rows);
  batch.Add(0, rows, tokens - rows, true, true, {&place});
  batch.Launch(kernels, team);
  return batch.out();
}

// ---- Against the reference -----------------------------------------------------------------------

void ExpectMatchesReference(const Sequence& sequence, int64_t tokens, int64_t rows) {
  SCOPED_TRACE(::testing::Message() << "group " << sequence.shape.group << ", head_dim "
                                    << sequence.shape.head_dim << ", " << rows << " rows, "
                                    << tokens << " tokens");
  CpuTeam team(2);
  const Place place = Whole(sequence, tokens);
  Batch oracle(sequence.shape, rows);
  oracle.SetRows(sequence, 0, tokens - rows, rows);
  oracle.Add(0, rows, tokens - rows, true, true, {&place});
  oracle.LaunchReference();
  const std::vector<float> out = Plain(sequence, tokens, rows, BestKernels(), team);
  // Scores have a standard deviation near 2.3, so that few keys carry each result of size 1.
  EXPECT_TRUE(Near(out, oracle.out(), 2e-5f));
}

TEST(Attend, MatchesTheReferenceAtEveryGqaRatioAndLength) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 2, 3, 4, 5, 8}) {
      const Sequence sequence({2, group, head_dim}, 1001, 7 * head_dim + group);
      for (const int64_t tokens : {1, 2, 63, 64, 65, 255, 256, 257, 1001}) {
        for (const int64_t rows : {1, 3}) {
          if (rows <= tokens) ExpectMatchesReference(sequence, tokens, rows);
        }
      }
    }
  }
}

TEST(Attend, MatchesTheReferenceWithManyRows) {
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 3, 8}) {
      const Sequence sequence({2, group, head_dim}, 330, 11 * head_dim + group);
      ExpectMatchesReference(sequence, 65, 65);
      ExpectMatchesReference(sequence, 330, 70);
    }
  }
  ExpectMatchesReference(Sequence({3, 3, 64}, 700, 5), 700, 257);
}

std::vector<std::unique_ptr<Place>> CutPlaces(const Sequence& sequence, int64_t tokens,
                                              std::vector<int64_t> cuts);

// ---- With a window and a soft cap ----------------------------------------------------------------

// The last `rows` of `tokens` tokens, launch by launch over places cut at `cuts`, from `first_key` on.
std::vector<float> Windowed(const Sequence& sequence, int64_t tokens, int64_t rows, int64_t window,
                            float soft_cap, void (*attend)(const AttendArgs&, CpuTeam&),
                            int64_t first_key = 0, const std::vector<int64_t>& cuts = {}) {
  CpuTeam team(2);
  Batch batch(sequence.shape, rows);
  batch.window = window;
  batch.soft_cap = soft_cap;
  batch.SetRows(sequence, 0, tokens - rows, rows);
  int64_t begin = first_key;
  std::vector<int64_t> ends = cuts;
  ends.push_back(tokens);
  for (const int64_t end : ends) {
    if (end <= begin) continue;
    // Rows before the first are there, and are NaN.
    const Place place(sequence, begin, end - begin, FloorToBlock(begin / 2),
                      static_cast<int32_t>(CeilToBlock(end)), 0, sequence.shape.num_kv_heads);
    batch.Add(0, rows, tokens - rows, begin == first_key, end == tokens, {&place});
    if (attend == nullptr) {
      batch.LaunchReference();
    } else {
      batch.Launch(attend, team);
    }
    begin = end;
  }
  return batch.out();
}

constexpr int64_t kWindows[] = {1, 40, 64, 65, 300, 5000};

TEST(Attend, MatchesTheReferenceWithAWindowAndASoftCap) {
  for (const int32_t head_dim : {64, 256}) {
    const Sequence sequence({2, 3, head_dim}, 700, 13 * head_dim);
    for (const int64_t window : kWindows) {
      for (const float soft_cap : {0.0f, 2.0f}) {
        for (const auto& [tokens, rows] : std::vector<std::pair<int64_t, int64_t>>{
                 {1, 1}, {65, 1}, {300, 3}, {513, 70}, {700, 300}}) {
          const auto wanted = Windowed(sequence, tokens, rows, window, soft_cap, nullptr);
          EXPECT_TRUE(Near(Windowed(sequence, tokens, rows, window, soft_cap,
                                    BestKernels().attend), wanted, 2e-5f))
              << "head_dim " << head_dim << ", window " << window
              << ", soft cap " << soft_cap << ", " << rows << " rows, " << tokens << " tokens";
        }
      }
    }
  }
}

// Where keys begin, how they are cut, whether rows come alone: a row's bits hang on what it sees.
TEST(Attend, WithAWindowARowHasTheSameBitsHoweverItIsComputed) {
  const Sequence sequence({2, 3, 64}, 700, 14);
  const int64_t width = sequence.shape.num_q_heads() * 64;
  for (const int64_t window : kWindows) {
    const auto whole = Windowed(sequence, 700, 300, window, 3.0f, BestKernels().attend);
    for (const cpu::KernelTable* kernels : AllAttention()) {
      for (const int64_t rows : {1, 40, 120}) {
        const int64_t first_key = FloorToBlock(FirstSeen(window, 700 - rows));
        const std::vector<float> wanted(whole.end() - rows * width, whole.end());
        for (const auto& cuts : std::vector<std::vector<int64_t>>{
                 {}, {448}, {192, 320, 576}}) {
          EXPECT_TRUE(SameBits(Windowed(sequence, 700, rows, window, 3.0f, kernels->attend,
                                        first_key, cuts), wanted))
              << kernels->name << ", window " << window << ", " << rows << " rows, "
              << cuts.size() << " cuts";
        }
      }
    }
  }
}

// ---- With bfloat16 products ----------------------------------------------------------------------

std::vector<const cpu::TileAttention*> AllTileAttention() {
  std::vector<const cpu::TileAttention*> all = {&cpu::kPortableTileAttention};
  if (cpu::HasAmx()) all.push_back(&cpu::kAmxAttention);
  return all;
}

// What the tests below mean on this processor.
TEST(TileAttention, IsTriedWithAmx) {
  if (!cpu::HasAmx()) GTEST_SKIP() << "no AMX here: only the portable tiles are tried";
  EXPECT_EQ(cpu::BestTileAttention(), &cpu::kAmxAttention);
  EXPECT_EQ(AllTileAttention().back(), &cpu::kAmxAttention);
}

// Queries that bfloat16 holds, times a scale that is a power of two where head_dim is not 128: what
// is left are the rounded weights.
TEST(TileAttention, IsTheReferenceToWithinTheRoundingOfItsFactors) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 3, 4}) {
      Sequence sequence({2, group, head_dim}, 340, 31 * head_dim + group);
      for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
      for (const auto& [tokens, rows] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {64, 1}, {65, 2}, {256, 1}, {257, 5}, {340, 1}, {340, 19}}) {
        const Place place = Whole(sequence, tokens);
        Batch oracle(sequence.shape, rows);
        oracle.SetRows(sequence, 0, tokens - rows, rows);
        oracle.Add(0, rows, tokens - rows, true, true, {&place});
        oracle.LaunchReference();
        for (const cpu::TileAttention* tiles : AllTileAttention()) {
          Batch batch(sequence.shape, rows);
          batch.SetRows(sequence, 0, tokens - rows, rows);
          batch.Add(0, rows, tokens - rows, true, true, {&place});
          batch.Launch(tiles->attend, team);
          EXPECT_TRUE(Near(batch.out(), oracle.out(), head_dim == 128 ? 4e-2f : 8e-3f))
              << tiles->name << ", group " << group << ", head_dim " << head_dim << ", " << rows
              << " rows, " << tokens << " tokens";
        }
      }
    }
  }
}

TEST(TileAttention, SeesAWindowAndCapsItsScores) {
  Sequence sequence({2, 4, 64}, 700, 43);
  for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
  for (const int64_t window : kWindows) {
    for (const float soft_cap : {0.0f, 2.0f}) {
      for (const int64_t rows : {1, 7, 40}) {
        const auto wanted = Windowed(sequence, 700, rows, window, soft_cap, nullptr);
        const int64_t first_key = FloorToBlock(FirstSeen(window, 700 - rows));
        for (const cpu::TileAttention* tiles : AllTileAttention()) {
          EXPECT_TRUE(Near(Windowed(sequence, 700, rows, window, soft_cap, tiles->attend,
                                    first_key), wanted, 8e-3f))
              << tiles->name << ", window " << window << ", soft cap " << soft_cap << ", " << rows
              << " rows";
        }
      }
    }
  }
}

// The same roundings in another order of sums.
TEST(TileAttention, AgreesOnEveryInstructionSet) {
  CpuTeam team(2);
  const Sequence sequence({2, 4, 128}, 600, 41);
  for (const int64_t rows : {1, 3, 4, 8, 40}) {
    const Place place = Whole(sequence, 512);
    std::vector<float> expected;
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 512, rows);
      batch.Add(0, rows, 512, true, true, {&place});
      batch.Launch(tiles->attend, team);
      if (expected.empty()) expected = batch.out();
      EXPECT_TRUE(Near(batch.out(), expected, 4e-3f)) << tiles->name << ", " << rows << " rows";
    }
  }
}

// Up to 4 queries of a KV head, up to 16 and more are computed in different ways, of which the last sums
// in another order.
TEST(TileAttention, GivesARowTheSameBitsBesideOthers) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    const Sequence sequence({2, 4, head_dim}, 1500, 77 + head_dim);
    const Place place = Whole(sequence, 1400);
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      const auto first_of = [&](int64_t rows) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, 1450, rows);
        batch.Add(0, rows, 1450, true, true, {&place});
        batch.Launch(tiles->attend, team);
        const std::vector<float> out = batch.out();
        return std::vector<float>(out.begin(), out.begin() + 2 * 4 * head_dim);
      };
      for (const std::vector<int64_t>& rows : {std::vector<int64_t>{1, 2, 3, 4}, {5, 9, 36}}) {
        for (const int64_t count : rows) {
          EXPECT_TRUE(SameBits(first_of(count), first_of(rows[0])))
              << tiles->name << ", " << count << " rows, head_dim " << head_dim;
        }
      }
    }
  }
}

TEST(TileAttention, GoesOnFromAnOpenUnitAndHangsOnNoThread) {
  const Sequence sequence({2, 3, 64}, 2300, 25);
  for (const cpu::TileAttention* tiles : AllTileAttention()) {
    std::vector<float> expected;
    for (const int threads : {1, 2, 3}) {
      CpuTeam team(threads);
      for (const int64_t cut : {0, 64, 192, 256, 576, 1024, 1280, 2048}) {
        Batch batch(sequence.shape, 2);
        batch.SetRows(sequence, 0, 2298, 2);
        const auto places = CutPlaces(sequence, 2300, {cut});
        for (const auto& place : places) {
          batch.Add(0, 2, 2298, place == places.front(), place == places.back(), {place.get()});
          batch.Launch(tiles->attend, team);
        }
        if (expected.empty()) expected = batch.out();
        const bool whole = cut % 1024 == 0;
        EXPECT_TRUE(whole ? SameBits(batch.out(), expected)
                          : Near(batch.out(), expected, 8e-3f))
            << tiles->name << ", cut at " << cut << ", " << threads << " threads";
      }
    }
  }
}

// As a worker does of what its store has attended to.
TEST(TileAttention, LeavesStatesThatOtherKernelsGoOnFrom) {
  CpuTeam team(2);
  Sequence sequence({2, 3, 64}, 2300, 26);
  for (float& q : sequence.q) q = ToFloat(ToBFloat16(q));
  const Place whole = Whole(sequence, 2300);
  for (const int64_t rows : {1, 2, 9}) {
    const int64_t first = 2300 - rows;
    Batch oracle(sequence.shape, rows);
    oracle.SetRows(sequence, 0, first, rows);
    oracle.Add(0, rows, first, true, true, {&whole});
    oracle.LaunchReference();
    for (const cpu::TileAttention* tiles : AllTileAttention()) {
      for (const int64_t cut : {64, 192, 256, 320, 512, 768, 960, 1024, 1088, 1280, 2048, 2240}) {
        Batch batch(sequence.shape, rows);
        batch.SetRows(sequence, 0, first, rows);
        const auto places = CutPlaces(sequence, 2300, {cut});
        batch.Add(0, rows, first, true, false, {places[0].get()});
        batch.Launch(tiles->attend, team);
        batch.Add(0, rows, first, false, true, {places[1].get()});
        batch.Launch(&cpu::Attend, team);
        EXPECT_TRUE(Near(batch.out(), oracle.out(), 8e-3f))
            << tiles->name << ", cut at " << cut << ", " << rows << " rows";
      }
    }
  }
}

// ---- The same bits -------------------------------------------------------------------------------

TEST(Attend, GivesTheSameBitsOnEveryInstructionSet) {
  CpuTeam team(2);
  for (const int32_t head_dim : {64, 128, 256}) {
    const Sequence sequence({2, 3, head_dim}, 300, 21);
    for (const int64_t rows : {1, 2, 5, 100}) {
      const std::vector<float> expected = Plain(sequence, 300, rows, BestKernels(), team);
      for (const cpu::KernelTable* kernels : AllAttention()) {
        EXPECT_TRUE(SameBits(Plain(sequence, 300, rows, *kernels, team), expected))
            << kernels->name << ", " << rows << " rows";
      }
    }
  }
}

// Where a block ends, and as many queries as one pass may take.
TEST(Attend, GivesTheSameBitsAtEveryLengthOfABlock) {
  CpuTeam team(1);
  for (const int32_t head_dim : {64, 128, 256}) {
    for (const int32_t group : {1, 2, 4, 6, 7}) {
      const Sequence sequence({1, group, head_dim}, 200, head_dim + group);
      for (const int64_t tokens : {1, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 97, 129, 200}) {
        const std::vector<float> expected = Plain(sequence, tokens, 1, cpu::kPortableKernels, team);
        for (const cpu::KernelTable* kernels : AllAttention()) {
          EXPECT_TRUE(SameBits(Plain(sequence, tokens, 1, *kernels, team), expected))
              << kernels->name << ", head_dim " << head_dim << ", group " << group << ", "
              << tokens << " tokens";
        }
      }
    }
  }
}

TEST(Attend, GivesTheSameBitsWithOneThreadAndSeveral) {
  const Sequence sequence({3, 3, 64}, 1500, 22);
  CpuTeam one(1);
  for (const int64_t rows : {1, 2, 20, 33, 64, 90, 200}) {
    const std::vector<float> expected = Plain(sequence, 1500, rows, BestKernels(), one);
    for (const int size : {2, 3}) {
      CpuTeam team(size);
      EXPECT_TRUE(SameBits(Plain(sequence, 1500, rows, BestKernels(), team), expected))
          << rows << " rows, " << size << " threads";
    }
  }
}

// Rows alone take the decode form, rows together the prefill form; and a row alone has no key after
// its own, where in the batch the keys of later rows lie in its last block.
TEST(Attend, ARowAloneHasTheBitsOfTheRowInAChunk) {
  CpuTeam team(2);
  for (const int32_t group : {1, 3, 4, 8}) {
    for (const int32_t head_dim : {64, 128, 256}) {
      const Sequence sequence({2, group, head_dim}, 600, 23);
      const std::vector<float> together = Plain(sequence, 600, 300, BestKernels(), team);
      const int64_t width = sequence.shape.num_q_heads() * head_dim;
      for (const int64_t pos : {300, 319, 320, 383, 511, 512, 513, 599}) {
        const std::vector<float> alone = Plain(sequence, pos + 1, 1, BestKernels(), team);
        const auto begin = together.begin() + (pos - 300) * width;
        EXPECT_TRUE(SameBits(alone, std::vector<float>(begin, begin + width)))
            << "group " << group << ", head_dim " << head_dim << ", position " << pos;
      }
    }
  }
}

TEST(Attend, ChunksOfAnySizeGiveTheBitsOfTheWholePrompt) {
  CpuTeam team(2);
  const Sequence sequence({3, 3, 64}, 450, 24);
  const std::vector<float> whole = Plain(sequence, 450, 450, BestKernels(), team);
  const int64_t width = 9 * 64;
  for (const int64_t chunk : {7, 64, 100}) {
    for (int64_t first = 0; first < 450; first += chunk) {
      const int64_t rows = std::min<int64_t>(chunk, 450 - first);
      const std::vector<float> part = Plain(sequence, first + rows, rows, BestKernels(), team);
      ASSERT_TRUE(SameBits(part, std::vector<float>(whole.begin() + first * width,
                                                    whole.begin() + (first + rows) * width)))
          << "chunk of " << chunk << " at " << first;
    }
  }
}

// The keys of [0, tokens) cut at `cuts` (multiples of 64), each part in a place of its own kind.
std::vector<std::unique_ptr<Place>> CutPlaces(const Sequence& sequence, int64_t tokens,
                                              std::vector<int64_t> cuts) {
  std::vector<std::unique_ptr<Place>> places;
  const int32_t heads = sequence.shape.num_kv_heads;
  cuts.push_back(tokens);
  int64_t first = 0;
  for (const int64_t end : cuts) {
    const int64_t count = end - first;
    if (count <= 0) continue;
    const int kind = static_cast<int>(places.size() % 3);
    if (kind == 0 || count > kTailTokens) {  // an extent
      places.push_back(std::make_unique<Place>(sequence, first, count, first,
                                               static_cast<int32_t>(CeilToBlock(count)), 0, heads));
    } else if (kind == 1) {  // a tail: a ring of 256 rows that wraps
      places.push_back(std::make_unique<Place>(sequence, first, count, 0,
                                               static_cast<int32_t>(kTailTokens), 0, heads));
    } else {  // a longer extent that began earlier
      const int64_t origin = std::max<int64_t>(0, first - 128);
      places.push_back(std::make_unique<Place>(
          sequence, first, count, origin, static_cast<int32_t>(CeilToBlock(end - origin) + 64), 0,
          heads));
    }
    first = end;
  }
  return places;
}

std::vector<std::vector<int64_t>> SomeCuts() {
  return {{64},       {128},           {192},           {256},      {320},
          {64, 128},  {256, 512},      {192, 320, 576}, {448, 640}, {64, 192, 256, 384, 512, 640},
          {512, 640}, {128, 256, 704}, {576, 640, 704}};
}

TEST(Attend, SpansCutAtAnyBlockBorderGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 761, 25);
  for (const int64_t rows : {1, 2, 61, 200}) {
    const std::vector<float> expected = Plain(sequence, 761, rows, BestKernels(), team);
    for (const std::vector<int64_t>& cuts : SomeCuts()) {
      const auto places = CutPlaces(sequence, 761, cuts);
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 761 - rows, rows);
      std::vector<const Place*> pointers;
      for (const auto& place : places) pointers.push_back(place.get());
      batch.Add(0, rows, 761 - rows, true, true, pointers);
      batch.Launch(BestKernels(), team);
      EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows, first cut " << cuts[0];
    }
  }
}

TEST(Attend, LaunchesSplitAtAnyBlockBorderGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 761, 26);
  for (const int64_t rows : {1, 2, 61, 200, 761}) {
    const std::vector<float> expected = Plain(sequence, 761, rows, BestKernels(), team);
    for (const std::vector<int64_t>& cuts : SomeCuts()) {
      const auto places = CutPlaces(sequence, 761, cuts);
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 761 - rows, rows);
      for (size_t i = 0; i < places.size(); ++i) {
        batch.Add(0, rows, 761 - rows, i == 0, i + 1 == places.size(), {places[i].get()});
        batch.Launch(BestKernels(), team);
      }
      EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows, first cut " << cuts[0];
    }
  }
}

// Each KV head (or run of heads) may come in launches of its own, in any order, with other cuts.
TEST(Attend, HeadsInLaunchesOfTheirOwnGiveTheSameBits) {
  CpuTeam team(2);
  const Sequence sequence({5, 2, 64}, 500, 27);
  for (const int64_t rows : {1, 50, 120}) {
    const std::vector<float> expected = Plain(sequence, 500, rows, BestKernels(), team);
    const Place low(sequence, 0, 320, 0, 512, 0, 5);
    const Place high(sequence, 320, 180, 320, 192, 0, 5);
    const Place fetched(sequence, 0, 320, 0, 320, 2, 4);  // heads 2 and 3 only
    Batch batch(sequence.shape, rows);
    batch.SetRows(sequence, 0, 500 - rows, rows);
    batch.Add(0, rows, 500 - rows, true, false, {&low}, 0, 2);
    batch.Add(0, rows, 500 - rows, true, false, {&low}, 4, 5);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, true, false, {&fetched}, 3, 4);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, true, false, {&fetched}, 2, 3);
    batch.Launch(BestKernels(), team);
    batch.Add(0, rows, 500 - rows, false, true, {&high});
    batch.Launch(BestKernels(), team);
    EXPECT_TRUE(SameBits(batch.out(), expected)) << rows << " rows";
  }
}

TEST(Attend, ASequenceInARaggedBatchHasTheBitsOfTheSequenceAlone) {
  CpuTeam team(2);
  const Shape shape{3, 3, 64};
  const std::vector<int64_t> tokens = {1, 300, 77, 1100, 64};
  const std::vector<int64_t> rows = {1, 130, 1, 40, 64};
  std::vector<Sequence> sequences;
  std::vector<Place> places;
  int64_t total = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    sequences.emplace_back(shape, tokens[i], static_cast<uint32_t>(30 + i));
    places.push_back(Whole(sequences[i], tokens[i]));
    total += rows[i];
  }
  Batch batch(shape, total);
  for (size_t i = 0, row = 0; i < tokens.size(); row += rows[i++]) {
    batch.SetRows(sequences[i], row, tokens[i] - rows[i], rows[i]);
    batch.Add(row, rows[i], tokens[i] - rows[i], true, true, {&places[i]});
  }
  batch.Launch(BestKernels(), team);
  const int64_t width = shape.num_q_heads() * shape.head_dim;
  for (size_t i = 0, row = 0; i < tokens.size(); row += rows[i++]) {
    const auto begin = batch.out().begin() + row * width;
    EXPECT_TRUE(SameBits(std::vector<float>(begin, begin + rows[i] * width),
                         Plain(sequences[i], tokens[i], rows[i], BestKernels(), team)))
        << "sequence " << i;
  }
}

// The states, too: a launch may be followed by one that divides its work the other way.
TEST(Attend, BothFormsLeaveTheSameState) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 700, 28);
  const int64_t width = sequence.shape.num_q_heads() * AttentionStateFloats(64);
  for (const int64_t end : {64, 256, 300, 512, 700}) {
    const Place place(sequence, 0, end, 0, 704, 0, 2);
    Batch together(sequence.shape, 300);
    together.SetRows(sequence, 0, 150, 300);
    together.Add(0, 300, 150, true, false, {&place});
    together.Launch(BestKernels(), team);
    for (const int64_t row : {0, 105, 106, 150, 299}) {
      Batch alone(sequence.shape, 1);
      alone.SetRows(sequence, 0, 150 + row, 1);
      alone.Add(0, 1, 150 + row, true, false, {&place});
      alone.Launch(BestKernels(), team);
      const auto begin = together.state().begin() + row * width;
      EXPECT_TRUE(SameBits(alone.state(), std::vector<float>(begin, begin + width)))
          << "keys to " << end << ", row " << row;
    }
  }
}

TEST(Attend, GoesInPassesWhereTheScratchIsSmall) {
  CpuTeam team(2);
  // 32 rows x 8 heads x 258 floats a unit: 3 units fill the least scratch of 2^18 floats.
  const Sequence sequence({1, 8, 256}, 1700, 29);
  const std::vector<float> together = Plain(sequence, 1700, 32, BestKernels(), team);
  const std::vector<float> alone = Plain(sequence, 1700, 1, BestKernels(), team);
  EXPECT_TRUE(SameBits(alone, std::vector<float>(together.end() - 8 * 256, together.end())));
}

// ---- What is not a key ---------------------------------------------------------------------------

// Every place above is NaN where no key lies. Here the keys that a row must not see are NaN as well.
TEST(Attend, KeysAfterARowLeaveNoTrace) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 200, 31);
  Sequence poisoned = sequence;
  const int64_t kv_width = 2 * 64;
  for (int64_t i = 150 * kv_width; i < 200 * kv_width; ++i) {
    poisoned.k[i] = ToBFloat16(kNan);
    poisoned.v[i] = ToBFloat16(i % 2 == 0 ? kNan : kInfinity);
  }
  const int64_t width = 6 * 64;
  for (const int64_t first : {0, 149}) {  // the prefill form and the decode form
    const std::vector<float> clean = Plain(sequence, 200, 200 - first, BestKernels(), team);
    const std::vector<float> out = Plain(poisoned, 200, 200 - first, BestKernels(), team);
    const int64_t seen = (150 - first) * width;
    EXPECT_TRUE(SameBits(std::vector<float>(out.begin(), out.begin() + seen),
                         std::vector<float>(clean.begin(), clean.begin() + seen)));
    EXPECT_TRUE(std::isnan(out[seen]));
  }
}

// 96 of 128 rows of K and of V, each 4 pages long: the fourth page of both cannot be read.
TEST(Attend, ReadsNoRowPastTheCount) {
  constexpr int64_t kPage = 4096;
  ASSERT_EQ(sysconf(_SC_PAGESIZE), kPage);
  void* const memory =
      mmap(nullptr, 8 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  const Sequence sequence({1, 3, 64}, 96, 36);
  const Place place(sequence, 0, 96, 0, 128, 0, 1);
  std::memcpy(memory, place.span().base, 8 * kPage);
  KvSpan span = place.span();
  span.base = static_cast<uint8_t*>(memory);
  ASSERT_EQ(mprotect(span.base + 3 * kPage, kPage, PROT_NONE), 0);
  ASSERT_EQ(mprotect(span.base + 7 * kPage, kPage, PROT_NONE), 0);
  CpuTeam team(1);
  for (const cpu::KernelTable* kernels : AllAttention()) {
    for (const int64_t rows : {1, 30, 96}) {
      Batch batch(sequence.shape, rows);
      batch.SetRows(sequence, 0, 96 - rows, rows);
      batch.AddSpan(0, rows, 96 - rows, true, true, span);
      batch.Launch(*kernels, team);
      EXPECT_TRUE(SameBits(batch.out(), Plain(sequence, 96, rows, *kernels, team)));
    }
  }
  munmap(memory, 8 * kPage);
}

TEST(Attend, ANanInAVisibleKeyReachesTheOutput) {
  CpuTeam team(2);
  for (const cpu::KernelTable* kernels : AllAttention()) {
    for (const int64_t rows : {1, 40}) {
      Sequence sequence({1, 3, 64}, 100, 32);
      sequence.k[17 * 64 + 5] = ToBFloat16(kNan);
      const std::vector<float> out = Plain(sequence, 100, rows, *kernels, team);
      EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }))
          << kernels->name << ", " << rows << " rows";
    }
  }
}

TEST(Attend, AnItemWithoutKeysResetsAndFinishes) {
  CpuTeam team(2);
  const Sequence sequence({2, 3, 64}, 100, 33);
  const Place place = Whole(sequence, 100);
  Batch batch(sequence.shape, 1);
  batch.SetRows(sequence, 0, 99, 1);
  batch.Add(0, 1, 99, true, false, {});
  batch.Launch(BestKernels(), team);
  batch.Add(0, 1, 99, false, false, {&place});
  batch.Launch(BestKernels(), team);
  batch.Add(0, 1, 99, false, true, {});
  batch.Launch(BestKernels(), team);
  EXPECT_TRUE(SameBits(batch.out(), Plain(sequence, 100, 1, BestKernels(), team)));
}

TEST(Attend, LargeScoresDoNotOverflow) {
  CpuTeam team(2);
  Sequence sequence({1, 1, 64}, 130, 34);
  for (float& x : sequence.q) x *= 400;
  const std::vector<float> out = Plain(sequence, 130, 130, BestKernels(), team);
  EXPECT_TRUE(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }));
}

TEST(Attend, DeclaresEveryByteThatItReadsOfASpan) {
  const Sequence sequence({3, 1, 64}, 300, 35);
  const Place tail(sequence, 200, 100, 0, 256, 0, 3);  // rows 200..255 and 0..43
  std::vector<AttendItem> items(1);
  items[0].row_count = 1;
  items[0].kv_head_begin = 1;
  items[0].kv_head_end = 2;
  items[0].span_count = 1;
  const std::vector<KvSpan> spans = {tail.span()};
  AttendArgs args;
  args.rows = 1;
  args.num_q_heads = args.num_kv_heads = 3;
  args.head_dim = 64;
  args.items = {items.data(), items.data(), 1};
  args.spans = {spans.data(), spans.data(), 1};
  std::vector<std::pair<int64_t, int64_t>> runs;
  ForEachRange(args, [&](const void* p, int64_t bytes, Access access) {
    const int64_t offset = static_cast<const uint8_t*>(p) - spans[0].base;
    if (access == Access::kRead && offset >= 0 && offset < 3 * 2 * 256 * 128) {
      runs.emplace_back(offset, bytes);
    }
  });
  const int64_t head = 2 * 256 * 128;
  const std::vector<std::pair<int64_t, int64_t>> expected = {{head + 200 * 128, 56 * 128},
                                                             {head + 456 * 128, 56 * 128},
                                                             {head, 44 * 128},
                                                             {head + 256 * 128, 44 * 128}};
  EXPECT_EQ(runs, expected);
}

}  // namespace
}  // namespace headroom::kernels
