// Sessions keep keys and values between requests, in extents that can be looked at and damaged.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/kv_layout.h"
#include "common/segment_format.h"
#include "tests/system/test_env.h"

namespace headroom {
namespace {

constexpr KvGeometry kGeometry = {4, 4, 64};

std::vector<int32_t> Joined(std::vector<int32_t> a, const std::vector<int32_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

class Sessions : public testing::Test {
 protected:
  void SetUp() override { ASSERT_NO_FATAL_FAILURE(cluster_.AwaitServing()); }
  const TestClient& client() const { return cluster_.client(); }

  v1::Session Get(const std::string& session) const {
    v1::GetSessionRequest request;
    request.set_session_id(session);
    v1::GetSessionResponse response;
    const grpc::Status status =
        client().api().GetSession(TestClient::Context().get(), request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.session();
  }

  Cluster cluster_;
};

TEST_F(Sessions, ContinueFromTheLongestCommonPrefix) {
  const std::vector<int32_t> first = RandomPrompt(1, 500);
  const Generation begun = client().Generate(AskIn("s", first, 20, AllFetched()));
  ASSERT_TRUE(begun.status.ok()) << begun.status;
  EXPECT_EQ(begun.cached_tokens(), 0);
  const std::vector<int32_t> second = Joined(Joined(first, begun.ids()), RandomPrompt(2, 130));
  for (const Shares& shares : {AllFetched(), AllResident(), ResidentShare(0.5)}) {
    const Generation alone = client().Generate(AskIn("", second, 30, shares));
    const Generation continued = client().Generate(AskIn("s", second, 30, shares));
    EXPECT_EQ(Difference(continued, alone), "");
    EXPECT_EQ(alone.cached_tokens(), 0);
    EXPECT_GE(continued.cached_tokens(), 512) << "520 tokens less the last, in whole blocks";
    EXPECT_EQ(continued.cached_tokens() % kBlockTokens, 0);
    EXPECT_EQ(continued.finished.usage().prompt_tokens(), 650);
  }
  EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));
  EXPECT_FALSE(Get("s").busy());
  EXPECT_EQ(Get("s").tokens(), 680);
}

TEST_F(Sessions, DivergenceTruncates) {
  const std::vector<int32_t> first = RandomPrompt(3, 600);
  ASSERT_TRUE(client().Generate(AskIn("s", first, 5, AllFetched())).status.ok());
  std::vector<int32_t> second(first.begin(), first.begin() + 200);
  second = Joined(second, RandomPrompt(4, 150));
  const Generation alone = client().Generate(AskIn("", second, 30, AllFetched()));
  const Generation diverged = client().Generate(AskIn("s", second, 30, AllFetched()));
  EXPECT_EQ(diverged.cached_tokens(), 192);
  EXPECT_EQ(Difference(diverged, alone), "");
  EXPECT_EQ(Get("s").tokens(), 380);
  // The old continuation is gone.
  const Generation again = client().Generate(AskIn("s", first, 5, AllFetched()));
  EXPECT_EQ(again.cached_tokens(), 192);
  EXPECT_EQ(Difference(again, client().Generate(AskIn("", first, 5, AllFetched()))), "");
}

TEST_F(Sessions, ServeOneRequestAtATime) {
  v1::GenerateRequest endless = AskIn("s", RandomPrompt(5, 100), 8000, AllFetched());
  const auto context = TestClient::Context();
  const auto stream = client().api().Generate(context.get(), endless);
  v1::GenerateResponse event;
  while (stream->Read(&event) && !event.has_delta()) {
  }
  const absl::Status refused =
      client().Generate(AskIn("s", RandomPrompt(5, 100), 5, AllFetched())).status;
  EXPECT_TRUE(absl::IsFailedPrecondition(refused)) << refused;
  EXPECT_EQ(ReasonOf(refused), "SESSION_BUSY");
  context->TryCancel();
  EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));
  // What the cancelled request has sealed is the session's.
  const Generation after = client().Generate(AskIn("s", RandomPrompt(5, 100), 5, AllFetched()));
  EXPECT_TRUE(after.status.ok()) << after.status;
  EXPECT_EQ(after.cached_tokens(), 64);
}

TEST_F(Sessions, GiveTheirMemoryBackWhenDeleted) {
  ASSERT_TRUE(client().Generate(AskIn("a", RandomPrompt(6, 300), 5, AllFetched())).status.ok());
  ASSERT_TRUE(client().Generate(AskIn("b", RandomPrompt(7, 300), 5, AllFetched())).status.ok());
  v1::ListSessionsResponse listed;
  ASSERT_TRUE(client()
                  .api()
                  .ListSessions(TestClient::Context().get(), v1::ListSessionsRequest(), &listed)
                  .ok());
  EXPECT_EQ(listed.sessions_size(), 2);
  // 256 tokens were sealed; the rest of them never fills a block.
  EXPECT_GE(Get("a").host_bytes(), 256 * kTestTokenBytes);
  // The load's figures are the store's of the last second.
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] {
    return client().Load().host_used_bytes() >= 2 * 256 * kTestTokenBytes;
  })) << client().Load().host_used_bytes();
  for (const char* session : {"a", "b"}) {
    v1::DeleteSessionRequest request;
    request.set_session_id(session);
    v1::DeleteSessionResponse deleted;
    EXPECT_TRUE(client().api().DeleteSession(TestClient::Context().get(), request, &deleted).ok());
  }
  // A session whose request has just ended goes once the worker has let go of its sequence.
  EXPECT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] {
    const v1::GetLoadResponse load = client().Load();
    return load.host_used_bytes() == 0 && load.sessions() == 0;
  })) << client().Load().ShortDebugString();
}

// ---------------------------------------------------------------- the extents are what is read

// The segment's files as a bystander reads them.
class SegmentFiles {
 public:
  explicit SegmentFiles(const std::string& dir) : data_path_(absl::StrCat(dir, "/", kDataFile)) {
    std::ifstream file(absl::StrCat(dir, "/", kIndexFile), std::ios::binary);
    index_.assign(std::istreambuf_iterator<char>(file), {});
    IndexHeader header;
    if (index_.size() < sizeof header) return;
    std::memcpy(&header, index_.data(), sizeof header);
    for (uint32_t i = 0; i < header.max_extents; ++i) {
      ExtentDescriptor extent;
      std::memcpy(&extent, index_.data() + header.header_bytes + i * sizeof extent, sizeof extent);
      if (extent.commit != 0) extents_.push_back(extent);
    }
  }
  const std::vector<ExtentDescriptor>& extents() const { return extents_; }

  // Turns the sign of every value of some heads' V rows of positions [0, 64), in all layers. Returns
  // how many extents that was.
  int Negate(const std::set<std::pair<int32_t, int32_t>>& layer_heads) const {
    const int fd = open(data_path_.c_str(), O_RDWR | O_CLOEXEC);
    int changed = 0;
    for (const ExtentDescriptor& extent : extents_) {
      if (extent.first_pos != 0 || SealedTokens(extent.sealed).value_or(0) < 64) continue;
      ++changed;
      const KvLayout layout{extent.capacity_tokens, kGeometry.head_dim};
      for (int32_t head = 0; head < kGeometry.num_kv_heads; ++head) {
        if (layer_heads.count({static_cast<int32_t>(extent.layer), head}) == 0) continue;
        std::string rows(static_cast<size_t>(64 * layout.RowBytes()), '\0');
        const auto at = static_cast<off_t>(extent.data_offset) + layout.ValueOffset(head, 0);
        EXPECT_EQ(pread(fd, rows.data(), rows.size(), at), static_cast<ssize_t>(rows.size()));
        for (size_t i = 1; i < rows.size(); i += 2) rows[i] = static_cast<char>(rows[i] ^ 0x80);
        EXPECT_EQ(pwrite(fd, rows.data(), rows.size(), at), static_cast<ssize_t>(rows.size()));
      }
    }
    close(fd);
    return changed;
  }

 private:
  const std::string data_path_;
  std::string index_;
  std::vector<ExtentDescriptor> extents_;
};

// All (layer, KV head) that the plan in force attends in `lane`.
std::set<std::pair<int32_t, int32_t>> HeadsInLane(const v1::Plan& plan, v1::Lane lane) {
  std::set<std::pair<int32_t, int32_t>> heads;
  for (int32_t layer = 0; layer < plan.layers_size(); ++layer) {
    for (const v1::LaneRange& range : plan.layers(layer).ranges()) {
      if (range.lane() != lane) continue;
      for (int32_t head = range.kv_head_begin(); head < range.kv_head_end(); ++head) {
        heads.insert({layer, head});
      }
    }
  }
  return heads;
}

TEST_F(Sessions, ReadTheSealedExtentsOfTheDataFile) {
  const std::vector<int32_t> first = RandomPrompt(8, 500);
  const std::vector<int32_t> second = Joined(first, RandomPrompt(9, 100));
  ASSERT_TRUE(client().Generate(AskIn("s", first, 5, AllFetched())).status.ok());
  const Generation expected = client().Generate(AskIn("", second, 30, AllFetched()));
  ASSERT_TRUE(WaitUntil(Patience(absl::Seconds(10)), [&] {  // the store frees the other sequence
    const size_t extents = SegmentFiles(cluster_.segment_dir()).extents().size();
    return extents > 0 && extents <= 12;
  }));
  std::set<std::pair<int32_t, int32_t>> all;
  for (int32_t layer = 0; layer < 4; ++layer) {
    for (int32_t head = 0; head < 4; ++head) all.insert({layer, head});
  }
  EXPECT_EQ(SegmentFiles(cluster_.segment_dir()).Negate(all), 4) << "an extent for each layer";
  const Generation damaged = client().Generate(AskIn("s", second, 30, AllFetched()));
  EXPECT_GE(damaged.cached_tokens(), 448);
  EXPECT_NE(damaged.ids(), expected.ids());
}

// The device's copies of resident heads are another place than the extents: what is damaged while a
// request runs shows in exactly the heads that are fetched.
TEST_F(Sessions, OnlyFetchedHeadsReadExtentsWhileARequestRuns) {
  const std::vector<int32_t> prompt = RandomPrompt(10, 500);
  const Generation expected = client().Generate(AskIn("", prompt, 400, AllFetched()));
  ASSERT_TRUE(expected.status.ok()) << expected.status;
  const auto damaged_in = [&](v1::Lane lane, const Shares& shares) {
    EXPECT_TRUE(client().AwaitIdle(absl::Seconds(10)));
    return client().Generate(AskIn("", prompt, 400, shares), [&](int tokens) {
      if (tokens != 20) return;
      const std::set<std::pair<int32_t, int32_t>> heads =
          HeadsInLane(client().Status().plan(), lane);
      EXPECT_EQ(heads.empty(), shares.size() == 1 && shares[0].first != lane);
      EXPECT_GE(SegmentFiles(cluster_.segment_dir()).Negate(heads), 4);
    });
  };
  EXPECT_EQ(Difference(damaged_in(v1::LANE_RESIDENT, AllResident()), expected), "");
  EXPECT_EQ(Difference(damaged_in(v1::LANE_RESIDENT, ResidentShare(0.5)), expected), "");
  EXPECT_NE(damaged_in(v1::LANE_FETCHED, ResidentShare(0.5)).ids(), expected.ids());
  EXPECT_NE(damaged_in(v1::LANE_FETCHED, AllFetched()).ids(), expected.ids());
}

// Bytes are counted where they move: they are the geometry's, to the byte.
TEST_F(Sessions, LaneBytesAreGeometryTimesTokens) {
  constexpr int64_t kPrompt = 500;
  constexpr int32_t kAnswer = 100;
  const std::vector<int32_t> prompt = RandomPrompt(11, kPrompt);
  // Every decode step reads the keys of all positions up to its own, in one lane or the other.
  int64_t keys_read = 0;
  for (int64_t pos = kPrompt; pos < kPrompt + kAnswer - 1; ++pos) keys_read += pos + 1;
  for (const double resident : {1.0, 0.0, 0.5}) {
    const Generation generation =
        client().Generate(AskIn("", prompt, kAnswer, ResidentShare(resident)));
    ASSERT_TRUE(generation.status.ok()) << generation.status;
    int64_t bytes[2] = {};
    for (const v1::LaneUse& use : generation.finished.explanation().decode_lanes()) {
      if (use.lane() == v1::LANE_RESIDENT) bytes[0] = use.bytes();
      if (use.lane() == v1::LANE_FETCHED) bytes[1] = use.bytes();
    }
    EXPECT_EQ(bytes[0] + bytes[1], keys_read * kTestTokenBytes) << resident;
    // What is fetched are whole blocks, of the heads that are not resident.
    EXPECT_EQ(bytes[1] % (kBlockTokens * kTestTokenBytes / 4), 0);
    if (resident == 1) {
      EXPECT_EQ(bytes[1], 0);
    } else {  // all but the tail of at most 256 tokens
      EXPECT_GE(bytes[1], static_cast<int64_t>((1 - resident) * kTestTokenBytes) *
                              (keys_read - kAnswer * 256));
    }
    EXPECT_LE(generation.finished.explanation().peak_bytes(),
              generation.finished.explanation().budget_bytes());
  }
}

}  // namespace
}  // namespace headroom
