// The descriptors of a segment's index as an earlier store has left them: what Recover() keeps does
// not contradict itself, and the index works afterwards. The first byte says whether checksums are
// made right, so that what lies behind them is tried too.
#include <vector>

#include "services/kvstore/extent_index.h"
#include "tests/fuzz/fuzz.h"

using headroom::ExtentDescriptor;
using headroom::KvGeometry;
using headroom::fuzz::Input;
using headroom::fuzz::Require;
using headroom::kvstore::ExtentIndex;

namespace {

constexpr size_t kDescriptors = 24;
constexpr int64_t kDataBytes = int64_t{1} << 21;

void Check(const ExtentIndex& index, const std::vector<ExtentDescriptor>& descriptors) {
  for (const auto& [id, sequence] : index.sequences()) {
    for (const auto& run : sequence.runs) {
      for (const auto& extent : run.extents) {
        const ExtentDescriptor& descriptor = descriptors[extent.extent_id];
        Require(descriptor.commit == CommitWordOf(descriptor), "what is kept has its checksum");
        if (extent.vacated()) continue;
        Require(extent.data_offset >= 0 && extent.data_offset % 64 == 0 &&
                    extent.data_offset + static_cast<int64_t>(descriptor.bytes) <= kDataBytes,
                "and lies within the data");
      }
    }
  }
  const std::string wrong = index.CheckInvariants();
  Require(wrong.empty(), wrong);
  Require(index.used_bytes() <= index.capacity_bytes(), "no more is used than there is");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  const uint8_t repairs = input.Take<uint8_t>();
  std::vector<ExtentDescriptor> descriptors(kDescriptors);
  input.TakeBytes(descriptors.data(), kDescriptors * sizeof(ExtentDescriptor));
  for (ExtentDescriptor& descriptor : descriptors) {
    if (repairs & 1) {
      descriptor.sealed = headroom::SealedWord(static_cast<uint32_t>(descriptor.sealed));
    }
    if ((repairs & 2) && descriptor.commit != 0) descriptor.commit = CommitWordOf(descriptor);
    if ((repairs & 4) && descriptor.vacated != 0) descriptor.vacated = descriptor.commit;
  }
  KvGeometry geometry;
  geometry.num_layers = 2;
  geometry.num_kv_heads = 2;
  geometry.head_dim = 64;
  ExtentIndex index(descriptors, geometry);
  index.AddRange(0, kDataBytes);
  const auto report = index.Recover();
  Require(report.kept_extents == index.used_extents(), "the report counts what is kept");
  Check(index, descriptors);
  while (input.left() > 0) {
    const uint64_t sequence = 1 + input.Take<uint8_t>() % 4;
    const int64_t tokens = input.Take<int16_t>();
    switch (input.Take<uint8_t>() % 4) {
      case 0: {
        const auto at = index.sequences().find(sequence);
        const int64_t end = at == index.sequences().end() ? 0 : at->second.capacity_tokens();
        (void)index.AllocateRun(sequence, end, tokens);
        break;
      }
      case 1: {
        headroom::kvstore::SealedCount count = {sequence, tokens, {}};
        if (tokens & 64) count.kept_from = {tokens / 128 * 64, input.Take<int16_t>()};
        (void)index.CommitSealed({&count, 1});
        break;
      }
      case 2:
        (void)index.Truncate(sequence, tokens);
        break;
      case 3:
        index.Release(sequence);
        break;
    }
    Check(index, descriptors);
  }
  return 0;
}
