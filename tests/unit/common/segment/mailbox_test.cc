// How a mailbox is made and mapped, and where its parts lie.
#include "common/segment/mailbox.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/segment_format.h"
#include "kernels/attention.h"
#include "tests/unit/common/segment/mailbox_fixture.h"

namespace headroom {
namespace {

TEST_F(MailboxTest, WhatOneSideWritesTheOtherReads) {
  const std::unique_ptr<Mailbox> made = Create(SmallShape());
  ASSERT_NE(made, nullptr);
  const auto opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.status();
  const MailboxShape& shape = (*opened)->shape();
  EXPECT_EQ(shape.generation, kGeneration);
  EXPECT_EQ(shape.incarnation, 77u);
  EXPECT_TRUE(shape.geometry == SmallShape().geometry);
  EXPECT_EQ(shape.num_q_heads, 6);
  EXPECT_EQ(shape.num_slots, 2u);
  EXPECT_EQ(shape.tables_per_slot, 2u);
  EXPECT_EQ(shape.max_rows, 3u);
  EXPECT_EQ(shape.table_bytes, 1024);
  EXPECT_TRUE(shape.poster_wakes);
  EXPECT_EQ((*opened)->bytes(), made->bytes());
  EXPECT_EQ(made->header().attached, 0u);
  (*opened)->header().attached.store(kGeneration);
  EXPECT_EQ(made->header().attached, kGeneration);
  for (uint32_t slot = 0; slot < 2; ++slot) {
    EXPECT_EQ((*opened)->slot(slot).posted, 0u);
    made->slot(slot).post.step = 100 + slot;
    made->queries(slot)[0] = 1.5f + static_cast<float>(slot);
    (*opened)->partials(slot)[0] = 2.5f + static_cast<float>(slot);
    for (uint32_t table = 0; table < 2; ++table) {
      made->table(slot, table)[0] = static_cast<uint8_t>(10 * slot + table + 1);
    }
  }
  for (uint32_t slot = 0; slot < 2; ++slot) {
    EXPECT_EQ((*opened)->slot(slot).post.step, 100 + slot);
    EXPECT_EQ((*opened)->queries(slot)[0], 1.5f + static_cast<float>(slot));
    EXPECT_EQ(made->partials(slot)[0], 2.5f + static_cast<float>(slot));
    for (uint32_t table = 0; table < 2; ++table) {
      EXPECT_EQ((*opened)->table(slot, table)[0], 10 * slot + table + 1);
    }
  }
}

TEST_F(MailboxTest, APosterThatWakesNobodySaysSo) {
  MailboxShape shape = SmallShape();
  shape.poster_wakes = false;
  ASSERT_NE(Create(shape), nullptr);
  const auto opened = Open();
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_FALSE((*opened)->shape().poster_wakes);
}

TEST_F(MailboxTest, ThePlacesOfASlotLieApartAndInsideTheFile) {
  for (const uint32_t rows : {1u, 3u, 64u}) {
    for (const int64_t table_bytes : {int64_t{128}, int64_t{4096}, int64_t{5056}}) {
      MailboxShape shape = SmallShape();
      shape.max_rows = rows;
      shape.table_bytes = table_bytes;
      const std::unique_ptr<Mailbox> mailbox = Create(shape);
      ASSERT_NE(mailbox, nullptr);
      struct Place {
        int64_t begin, bytes;
      };
      std::vector<Place> places = {{0, sizeof(MailboxHeader)}};
      const auto add = [&](const void* at, int64_t bytes) {
        places.push_back({static_cast<const uint8_t*>(at) - mailbox->data(), bytes});
      };
      for (uint32_t slot = 0; slot < shape.num_slots; ++slot) {
        add(&mailbox->slot(slot), sizeof(MailboxSlot));
        for (uint32_t table = 0; table < shape.tables_per_slot; ++table) {
          add(mailbox->table(slot, table), table_bytes);
        }
        add(mailbox->queries(slot), rows * 6 * 64 * 4);
        add(mailbox->partials(slot), rows * 6 * kernels::AttentionStateFloats(64) * 4);
        // A device may copy to them in whole pages' worth of alignment.
        EXPECT_EQ((mailbox->queries(slot) - reinterpret_cast<float*>(mailbox->data())) % 1024, 0);
        EXPECT_EQ((mailbox->partials(slot) - reinterpret_cast<float*>(mailbox->data())) % 1024, 0);
      }
      std::sort(places.begin(), places.end(),
                [](const Place& a, const Place& b) { return a.begin < b.begin; });
      for (size_t i = 1; i < places.size(); ++i) {
        EXPECT_LE(places[i - 1].begin + places[i - 1].bytes, places[i].begin);
      }
      EXPECT_LE(places.back().begin + places.back().bytes, mailbox->bytes());
      EXPECT_EQ(static_cast<int64_t>(std::filesystem::file_size(Path(kName))), mailbox->bytes());
      std::memset(mailbox->data() + sizeof(MailboxHeader), 0xab,
                  mailbox->bytes() - sizeof(MailboxHeader));
    }
  }
}

TEST_F(MailboxTest, OnlyItsUserMayReadIt) {
  const mode_t before = umask(0);
  ASSERT_NE(Create(SmallShape()), nullptr);
  umask(before);
  struct stat stat = {};
  ASSERT_EQ(::stat(Path(kName).c_str(), &stat), 0);
  EXPECT_EQ(stat.st_mode & 07777, 0600u);
}

TEST_F(MailboxTest, MakingOneUnlinksTheOthersAndNothingElse) {
  for (const char* const name :
       {"index", "data", "mailbo", "xmailbox-1-1", "mailbox-1-1", "mailbox-41-1", "mailbox-junk"}) {
    std::ofstream(Path(name)) << "old";
  }
  std::filesystem::create_directory(Path("mailbox-folder"));
  ASSERT_NE(Create(SmallShape()), nullptr);
  EXPECT_FALSE(Exists("mailbox-1-1"));
  EXPECT_FALSE(Exists("mailbox-junk"));
  for (const char* const name : {"index", "data", "mailbo", "xmailbox-1-1", "mailbox-folder"}) {
    EXPECT_TRUE(Exists(name)) << name;
  }
  EXPECT_TRUE(Open().ok()) << "not the old file of that name";
}

TEST_F(MailboxTest, OneThatIsUnlinkedStaysMapped) {
  const std::unique_ptr<Mailbox> old = Create(SmallShape());
  ASSERT_NE(old, nullptr);
  ASSERT_TRUE(Mailbox::Create(dir_, "mailbox-41-2", SmallShape()).ok());
  EXPECT_FALSE(Exists(kName));
  std::memset(old->data() + sizeof(MailboxHeader), 1, old->bytes() - sizeof(MailboxHeader));
  EXPECT_EQ(CodeOfOpen(), absl::StatusCode::kNotFound);
}

TEST_F(MailboxTest, OneWithoutANameIsLikeAnyOtherToItsProcess) {
  const auto first = Mailbox::CreateUnnamed(SmallShape());
  const auto second = Mailbox::CreateUnnamed(SmallShape());
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ((*first)->bytes(), SmallShape().file_bytes());
  EXPECT_EQ((*first)->shape().max_rows, 3u);
  RingPosted((*first)->header(), (*first)->slot(1), 4);
  EXPECT_EQ((*first)->slot(1).posted, 4u);
  EXPECT_EQ((*second)->slot(1).posted, 0u);
  EXPECT_TRUE(std::filesystem::is_empty(dir_));
}

TEST_F(MailboxTest, AFolderWithoutRoomSaysSoAndKeepsNoFile) {
  MailboxShape shape = SmallShape();
  shape.table_bytes = int64_t{1} << 44;
  const absl::Status status = Mailbox::Create(dir_, kName, shape).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find(absl::StrCat(shape.file_bytes())), std::string::npos) << status;
  EXPECT_NE(status.message().find("--segment-dir"), std::string::npos) << status;
  EXPECT_FALSE(Exists(kName));
}

TEST_F(MailboxTest, AFolderThatIsNotThereIsNotMade) {
  EXPECT_TRUE(absl::IsNotFound(Mailbox::Create(dir_ + "/none", kName, SmallShape()).status()));
  EXPECT_TRUE(absl::IsNotFound(
      Mailbox::Open(dir_ + "/none", kName, SmallShape().geometry, kGeneration).status()));
}

}  // namespace
}  // namespace headroom
