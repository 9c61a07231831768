#include "common/device/cpu/streaming_copy.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace headroom {
namespace {

// Around what is copied in one go, in lines and in pieces, at every alignment of the target.
TEST(StreamingCopy, CopiesWhatItIsGivenAndNothingElse) {
  constexpr int64_t kRoom = (64 << 10) + 512;
  std::vector<uint8_t> from(kRoom);
  for (int64_t i = 0; i < kRoom; ++i) from[i] = static_cast<uint8_t>(i * 7 + i / 256);
  for (const int64_t bytes : {0, 1, 63, 4096, 16383, 16384, 16385, 16639, 20000, 65536}) {
    for (const int64_t at : {0, 1, 31, 32, 63, 64, 127}) {
      SCOPED_TRACE(testing::Message() << bytes << " bytes to " << at);
      std::vector<uint8_t> to(kRoom, 0xa5);
      const int64_t source = (at * 3) % 128;
      StreamingCopy(to.data() + at, from.data() + source, bytes);
      std::vector<uint8_t> expected(kRoom, 0xa5);
      std::copy(from.begin() + source, from.begin() + source + bytes, expected.begin() + at);
      ASSERT_EQ(to, expected);
    }
  }
}

}  // namespace
}  // namespace headroom
