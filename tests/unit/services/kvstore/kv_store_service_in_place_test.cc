// What a store serves in place, as its peers see it: plans, mailboxes, and answers over the segment's keys.
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/segment/mailbox.h"
#include "common/segment/mapped_segment.h"
#include "tests/unit/services/kvstore/kv_store_service_test_util.h"

namespace headroom::kvstore {
namespace {

class KvStoreInPlaceTest : public KvStoreServiceTest {};

v1::Plan PlanOf(int layers, v1::Lane lane) {
  v1::Plan plan;
  plan.set_version(1);
  for (int layer = 0; layer < layers; ++layer) {
    v1::LaneRange* const range = plan.add_layers()->add_ranges();
    range->set_lane(v1::LANE_FETCHED);
    range->set_kv_head_end(2);
  }
  if (layers > 0) plan.mutable_layers(layers - 1)->mutable_ranges(0)->set_lane(lane);
  return plan;
}

TEST_F(KvStoreInPlaceTest, PlansWithKeysInPlaceAreRefusedWhereNobodyAttends) {
  BindSmall();
  EXPECT_TRUE(peer_->Prepare(PlanOf(2, v1::LANE_FETCHED)).ok());
  EXPECT_TRUE(peer_->Prepare(PlanOf(2, v1::LANE_RESIDENT)).ok());
  const absl::Status status = peer_->Prepare(PlanOf(2, v1::LANE_IN_PLACE));
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ReasonOf(status), "IN_PLACE_NOT_SERVED");
  EXPECT_NE(status.message().find("--attend-threads"), std::string::npos) << status;
}

TEST_F(KvStoreInPlaceTest, PlansAreCheckedWhoeverAttends) {
  for (const int threads : {0, 1}) {
    RestartWithThreads(threads);
    EXPECT_EQ(ReasonOf(peer_->Prepare(PlanOf(2, v1::LANE_FETCHED))),
              threads == 0 ? "NO_MODEL_BOUND" : "") << "the second store finds it bound";
    BindSmall();
    EXPECT_TRUE(peer_->Prepare(PlanOf(2, v1::LANE_FETCHED)).ok());
    EXPECT_EQ(peer_->Prepare(PlanOf(2, v1::LANE_IN_PLACE)).ok(), threads == 1);
    EXPECT_EQ(FieldOf(peer_->Prepare(PlanOf(2, v1::LANE_UNSPECIFIED))), "plan.layers[1].ranges");
    EXPECT_EQ(FieldOf(peer_->Prepare(PlanOf(2, static_cast<v1::Lane>(77)))),
              "plan.layers[1].ranges");
    EXPECT_EQ(FieldOf(peer_->Prepare(PlanOf(1, v1::LANE_FETCHED))), "plan.layers");
    EXPECT_EQ(FieldOf(peer_->Prepare(PlanOf(3, v1::LANE_IN_PLACE))), "plan.layers");
    EXPECT_EQ(FieldOf(peer_->Prepare(PlanOf(0, v1::LANE_FETCHED))), "plan.layers");
  }
}

// A worker's end of a mailbox, made for the store as it tells of itself.
std::unique_ptr<Mailbox> MailboxFor(const v1::GetStoreInfoResponse& info, uint64_t serial,
                                    const KvGeometry& geometry = kSmallGeometry) {
  MailboxShape shape;
  shape.generation = info.generation();
  shape.geometry = geometry;
  shape.num_q_heads = 2 * geometry.num_kv_heads;
  shape.num_slots = 1;
  shape.tables_per_slot = 1;
  shape.max_rows = 2;
  shape.table_bytes = 1024;
  return Must(Mailbox::Create(info.segment_dir(), MailboxFile(info.generation(), serial), shape));
}

// Rings for one row at position 64 against the 64 keys of the run's extent, in layer 1 of 2.
void PostOneBlock(Mailbox& mailbox, uint64_t count, const v1::ExtentRun& run) {
  MailboxTableHeader header = {};
  header.num_items = header.num_spans = 1;
  header.items_offset = sizeof(header) + 2 * sizeof(MailboxLayer);
  header.spans_offset = header.items_offset + sizeof(MailboxItem);
  const MailboxLayer layers[2] = {{0, 0}, {0, 1}};
  MailboxItem item = {};
  item.row_count = 1;
  item.first_pos = 64;
  item.kv_head_end = 2;
  item.span_count = 1;
  const MailboxSpan span = {run.extents(1).data_offset(), 0, 64, 64};
  uint8_t* const table = mailbox.table(0, 0);
  std::memcpy(table, &header, sizeof(header));
  std::memcpy(table + sizeof(header), layers, sizeof(layers));
  std::memcpy(table + header.items_offset, &item, sizeof(item));
  std::memcpy(table + header.spans_offset, &span, sizeof(span));
  MailboxPost post = {};
  post.step = 7;
  post.layer = 1;
  post.rows = 1;
  post.scale = 0.125f;
  mailbox.slot(0).post = post;
  RingPosted(mailbox.header(), mailbox.slot(0), count);
}

TEST_F(KvStoreInPlaceTest, AMailboxIsServedOverTheKeysOfTheSegment) {
  RestartWithThreads(2);
  BindSmall();
  v1::GetStoreInfoResponse info = Must(peer_->Info());
  EXPECT_EQ(info.attend_threads(), 2);
  EXPECT_TRUE(info.has_in_place());
  EXPECT_EQ(info.in_place().posts(), 0u);
  const v1::ExtentRun run = Must(peer_->Allocate(1, 0, 64));
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(info, 1);
  EXPECT_EQ(mailbox->header().attached, 0u);
  const absl::Status attached = peer_->Attach(MailboxFile(info.generation(), 1));
  ASSERT_TRUE(attached.ok()) << attached;
  EXPECT_EQ(mailbox->header().attached, info.generation());
  // All values are 1.5, so that whatever the scores are the sum is 1.5 times the weights'.
  const std::unique_ptr<MappedSegment> mapped = Must(MappedSegment::Open(
      info.segment_dir(), BindingOf(kSmallGeometry, 0x0a), info.generation()));
  const KvLayout layout{64, 64};
  for (int head = 0; head < 2; ++head) {
    for (int64_t i = 0; i < 64 * 64; ++i) {
      const uint16_t value = 0x3fc0;
      std::memcpy(mapped->data() + run.extents(1).data_offset() + layout.ValueOffset(head, 0) +
                      2 * i,
                  &value, sizeof(value));
    }
  }
  PostOneBlock(*mailbox, 1, run);
  ASSERT_TRUE(AwaitAnswered(mailbox->header(), mailbox->slot(0), 1, absl::Seconds(60)));
  EXPECT_EQ(mailbox->slot(0).answer.code, 0u);
  EXPECT_EQ(mailbox->slot(0).answer.generation, info.generation());
  EXPECT_EQ(mailbox->slot(0).answer.step, 7u);
  for (int head = 0; head < 4; ++head) {
    const float* const open = mailbox->partials(0) + head * 132 + 66;
    EXPECT_NEAR(open[65], 64, 1e-3) << "64 keys that all score 0";
    for (int j = 0; j < 64; ++j) EXPECT_NEAR(open[j], 96, 1e-3);
  }
  info = Must(peer_->Info());
  EXPECT_EQ(info.in_place().posts(), 1u);
  EXPECT_EQ(info.in_place().refused(), 0u);
  EXPECT_EQ(info.in_place().late_partials(), 0u);
  EXPECT_EQ(info.in_place().bytes(), uint64_t{2 * 64 * 2 * 64 * 2});
  EXPECT_GT(info.in_place().busy_ns(), 0u);

  v1::ExtentRun outside = run;
  outside.mutable_extents(1)->set_data_offset(kHostBytes);
  PostOneBlock(*mailbox, 2, outside);
  ASSERT_TRUE(AwaitAnswered(mailbox->header(), mailbox->slot(0), 2, absl::Seconds(60)));
  EXPECT_NE(mailbox->slot(0).answer.code, 0u);
  mailbox->header().retired.store(1);
  PostOneBlock(*mailbox, 3, run);
  for (int i = 0; i < 6000 && Must(peer_->Info()).in_place().late_partials() == 0; ++i) {
    absl::SleepFor(absl::Milliseconds(5));
  }
  info = Must(peer_->Info());
  EXPECT_EQ(info.in_place().posts(), 1u);
  EXPECT_EQ(info.in_place().refused(), 1u);
  EXPECT_EQ(info.in_place().late_partials(), 1u);
  EXPECT_EQ(mailbox->slot(0).answered, 2u);
}

TEST_F(KvStoreInPlaceTest, MailboxesAreRefusedWhereNobodyAttends) {
  const auto refused = [this] {
    const absl::Status status = peer_->Attach("mailbox-1-1");
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    return ReasonOf(status);
  };
  EXPECT_EQ(refused(), "IN_PLACE_NOT_SERVED");
  BindSmall();
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(Must(peer_->Info()), 1);
  EXPECT_EQ(refused(), "IN_PLACE_NOT_SERVED");
  EXPECT_EQ(mailbox->header().attached, 0u);
}

TEST_F(KvStoreInPlaceTest, MailboxesAreRefusedBeforeAModelIsBound) {
  RestartWithThreads(1);
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(Must(peer_->Info()), 1);
  const absl::Status status = peer_->Attach(MailboxFile(server_->generation(), 1));
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ReasonOf(status), "NO_MODEL_BOUND");
  EXPECT_EQ(mailbox->header().attached, 0u);
}

TEST_F(KvStoreInPlaceTest, MailboxesThatAreNotThisStoresAreRefused) {
  RestartWithThreads(1);
  BindSmall();
  const v1::GetStoreInfoResponse info = Must(peer_->Info());
  const std::string name = MailboxFile(info.generation(), 1);
  EXPECT_TRUE(absl::IsNotFound(peer_->Attach(name)));
  for (const std::string& wrong :
       {std::string(), std::string("index"), std::string("data"), absl::StrCat("../segment/", name),
        absl::StrCat(info.segment_dir(), "/", name), absl::StrCat("mailbox-/../", name)}) {
    EXPECT_TRUE(absl::IsInvalidArgument(peer_->Attach(wrong))) << wrong;
  }
  {
    const std::unique_ptr<Mailbox> mailbox = MailboxFor(info, 1, {2, 3, 64});
    EXPECT_TRUE(absl::IsFailedPrecondition(peer_->Attach(name))) << "another geometry";
    EXPECT_EQ(mailbox->header().attached, 0u);
  }
  {
    v1::GetStoreInfoResponse earlier = info;
    earlier.set_generation(info.generation() - 1);
    const std::unique_ptr<Mailbox> mailbox = MailboxFor(earlier, 1);
    EXPECT_TRUE(absl::IsFailedPrecondition(peer_->Attach(MailboxFile(info.generation() - 1, 1))))
        << "another generation";
    EXPECT_EQ(mailbox->header().attached, 0u);
  }
  std::ofstream(absl::StrCat(info.segment_dir(), "/mailbox-junk")) << "junk";
  EXPECT_TRUE(absl::IsDataLoss(peer_->Attach("mailbox-junk")));
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(info, 1);
  EXPECT_TRUE(peer_->Attach(name).ok());
  EXPECT_EQ(mailbox->header().attached, info.generation());
}

// A mailbox of the store before is of no use to the next, and its worker sees that nobody looks.
TEST_F(KvStoreInPlaceTest, ARestartedStoreDoesNotTakeTheOldMailbox) {
  RestartWithThreads(1);
  BindSmall();
  const v1::GetStoreInfoResponse before = Must(peer_->Info());
  const std::unique_ptr<Mailbox> old = MailboxFor(before, 1);
  ASSERT_TRUE(peer_->Attach(MailboxFile(before.generation(), 1)).ok());
  RestartWithThreads(1);
  BindSmall();
  EXPECT_TRUE(
      absl::IsFailedPrecondition(peer_->Attach(MailboxFile(before.generation(), 1))));
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(Must(peer_->Info()), 1);
  EXPECT_TRUE(peer_->Attach(MailboxFile(server_->generation(), 1)).ok());
  EXPECT_EQ(mailbox->header().attached, server_->generation());
}

}  // namespace
}  // namespace headroom::kvstore
