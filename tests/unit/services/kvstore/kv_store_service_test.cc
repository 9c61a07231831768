// The store's contract as its peers see it: over a socket, and by the files that it leaves.
#include "services/kvstore/kv_store_service.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/errors.h"
#include "common/segment/mapped_segment.h"
#include "services/kvstore/kv_store_server.h"
#include "tests/unit/services/kvstore/kv_store_service_test_util.h"

extern char** environ;

namespace headroom::kvstore {
namespace {

TEST_F(KvStoreServiceTest, TellsWhatItIsBeforeAndAfterBinding) {
  v1::GetStoreInfoResponse info = Must(peer_->Info());
  EXPECT_EQ(info.generation(), server_->generation());
  EXPECT_EQ(info.segment_dir(), dir_.File("segment"));
  EXPECT_EQ(info.format_version(), kSegmentFormatVersion);
  EXPECT_EQ(info.max_extents(), 64u);
  EXPECT_EQ(info.attend_threads(), 0);
  EXPECT_TRUE(info.has_attend_threads());
  EXPECT_FALSE(info.has_in_place());
  EXPECT_FALSE(info.has_geometry());
  EXPECT_FALSE(info.has_fingerprint());
  BindSmall();
  info = Must(peer_->Info());
  EXPECT_EQ(info.geometry().num_layers(), 2);
  EXPECT_EQ(info.geometry().num_kv_heads(), 2);
  EXPECT_EQ(info.geometry().head_dim(), 64);
  EXPECT_EQ(info.fingerprint().value(), kModelA);
  EXPECT_EQ(info.capacity_bytes(), static_cast<uint64_t>(kHostBytes));
}

TEST_F(KvStoreServiceTest, ARunHasAnExtentOfEachLayerAndIsGivenAgainWhenAskedAgain) {
  BindSmall();
  const v1::ExtentRun run = Must(peer_->Allocate(5, 0, 128));
  ASSERT_EQ(run.extents_size(), 2);
  EXPECT_EQ(run.first_pos(), 0);
  EXPECT_EQ(run.capacity_tokens(), 128);
  EXPECT_EQ(run.extents(0).layer(), 0);
  EXPECT_EQ(run.extents(1).layer(), 1);
  EXPECT_NE(run.extents(0).data_offset(), run.extents(1).data_offset());
  EXPECT_EQ(Must(peer_->Allocate(5, 0, 128)).SerializeAsString(), run.SerializeAsString());
  EXPECT_EQ(Must(peer_->Info()).used_extents(), 2u);
}

// Their caller gave them up, and has gone on.
TEST_F(KvStoreServiceTest, CallsThatComeLateAreNotCarriedOut) {
  const auto as = [&](uint64_t caller, uint64_t number) -> KvStorePeer& {
    peer_->order.emplace();
    peer_->order->set_caller(caller);
    peer_->order->set_number(number);
    return *peer_;
  };
  as(7, 1);
  BindSmall();
  Must(as(7, 2).Allocate(1, 0, 128));
  Must(as(7, 4).Allocate(1, 128, 128));
  const auto overtaken = [](const absl::Status& status) {
    EXPECT_EQ(status.code(), absl::StatusCode::kAborted) << status;
    EXPECT_EQ(ReasonOf(status), "CALL_OVERTAKEN");
  };
  for (const uint64_t late : {1, 3, 4}) {
    overtaken(as(7, late).Bind(kSmallGeometry, kModelA).status());
    overtaken(as(7, late).Truncate(1, 64).status());
    overtaken(as(7, late).Allocate(1, 256, 64).status());
    overtaken(as(7, late).Commit(1, 64));
    overtaken(as(7, late).Release({1}).status());
  }
  v1::ListSequencesRequest list;
  *list.mutable_order() = *peer_->order;
  overtaken(peer_->List(list).status());
  peer_->order.reset();
  EXPECT_EQ(Must(peer_->Info()).used_extents(), 4u);
  EXPECT_EQ(Must(peer_->List()).sequences(0).sealed_tokens(), 0);
  // Another coordinator, whose model is not that of the keys: it gets nothing, and takes nothing away.
  EXPECT_EQ(ReasonOf(as(8, 1).Bind(kSmallGeometry, kModelB).status()), "OTHER_MODEL");
  Must(as(7, 5).Allocate(1, 256, 64));
  // One whose model is, and whose calls begin anew.
  as(9, 1);
  BindSmall();
  overtaken(as(7, 6).Truncate(1, 64).status());
  EXPECT_EQ(Must(as(9, 2).Truncate(1, 64)), 4);
}

TEST_F(KvStoreServiceTest, RunsThatNoSequenceCanHaveAreRefusedByField) {
  BindSmall();
  EXPECT_EQ(FieldOf(peer_->Allocate(0, 0, 64).status()), "sequence_id");
  for (const int64_t capacity : {int64_t{0}, int64_t{-64}, int64_t{63}, int64_t{65}, int64_t{192},
                                 INT64_MAX, INT64_MIN, int64_t{1} << 40}) {
    EXPECT_EQ(FieldOf(peer_->Allocate(1, 0, capacity).status()), "capacity_tokens") << capacity;
  }
  for (const int64_t first : {int64_t{-64}, int64_t{1}, INT64_MAX, INT64_MIN}) {
    EXPECT_EQ(FieldOf(peer_->Allocate(1, first, 64).status()), "first_pos") << first;
  }
  Must(peer_->Allocate(1, 0, 64));
  const absl::Status hole = peer_->Allocate(1, 128, 64).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(hole)) << hole;
  EXPECT_EQ(ReasonOf(hole), "RUN_DOES_NOT_FOLLOW");
  EXPECT_EQ(Must(peer_->Info()).used_extents(), 2u);
}

TEST_F(KvStoreServiceTest, AFullStoreSaysSoWithTheNumbersAndAllocatesNothing) {
  Must(peer_->Bind(kSmallGeometry, kModelA));
  // 32 KiB a block and layer: 512 tokens in two layers take 512 KiB.
  for (uint64_t id = 1; id <= 7; ++id) Must(peer_->Allocate(id, 0, 512));
  const v1::GetStoreInfoResponse before = Must(peer_->Info());
  EXPECT_EQ(before.used_bytes(), 7u << 19);
  const absl::Status status = peer_->Allocate(8, 0, 1024).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(ReasonOf(status), "SEGMENT_FULL");
  EXPECT_EQ(status.message(),
            "no room for 2 extents of 524288 bytes: 3670016 of 4194304 bytes and 14 of 64 extents "
            "are in use");
  EXPECT_EQ(Must(peer_->Info()).used_bytes(), before.used_bytes());
  EXPECT_EQ(Must(peer_->List()).sequences_size(), 7);
  Must(peer_->Allocate(8, 0, 512));
  EXPECT_EQ(Must(peer_->Release({1, 2})), 4);
  Must(peer_->Allocate(9, 0, 1024));
}

TEST_F(KvStoreServiceTest, AStoreOutOfDescriptorsSaysSoToo) {
  BindSmall();
  for (uint64_t id = 1; id <= 32; ++id) Must(peer_->Allocate(id, 0, 64));
  const absl::Status status = peer_->Allocate(33, 0, 64).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find("64 of 64 extents"), std::string::npos) << status;
}

TEST_F(KvStoreServiceTest, WhatIsSealedIsInTheFileAtOnce) {
  BindSmall();
  const v1::ExtentRun first = Must(peer_->Allocate(1, 0, 128));
  const v1::ExtentRun second = Must(peer_->Allocate(1, 128, 64));
  EXPECT_EQ(SealedInFile(first), (std::vector<int64_t>{0, 0}));
  ASSERT_TRUE(peer_->Commit(1, 64).ok());
  EXPECT_EQ(SealedInFile(first), (std::vector<int64_t>{64, 64}));
  EXPECT_EQ(SealedInFile(second), (std::vector<int64_t>{0, 0}));
  ASSERT_TRUE(peer_->Commit(1, 192).ok());
  EXPECT_EQ(SealedInFile(first), (std::vector<int64_t>{128, 128}));
  EXPECT_EQ(SealedInFile(second), (std::vector<int64_t>{64, 64}));
  ASSERT_TRUE(peer_->Commit(1, 64).ok()) << "late, and no news";
  EXPECT_EQ(SealedInFile(second), (std::vector<int64_t>{64, 64}));
  EXPECT_EQ(Must(peer_->List()).sequences(0).sealed_tokens(), 192);
}

TEST_F(KvStoreServiceTest, SealedCountsThatCannotBeAreRefusedForAll) {
  BindSmall();
  Must(peer_->Allocate(1, 0, 64));
  const absl::Status unknown = peer_->Commit(2, 64);
  EXPECT_TRUE(absl::IsNotFound(unknown));
  EXPECT_EQ(ReasonOf(unknown), "SEQUENCE_UNKNOWN");
  for (const int64_t tokens : {int64_t{128}, int64_t{1}, int64_t{-64}, INT64_MAX, INT64_MIN}) {
    EXPECT_EQ(FieldOf(peer_->Commit(1, tokens)), "sequences[0].sealed_tokens") << tokens;
  }
  EXPECT_EQ(Must(peer_->List()).sequences(0).sealed_tokens(), 0);
}

TEST_F(KvStoreServiceTest, TruncatingLowersWhatIsSealedAndFreesWholeRuns) {
  BindSmall();
  const v1::ExtentRun first = Must(peer_->Allocate(1, 0, 128));
  Must(peer_->Allocate(1, 128, 64));
  ASSERT_TRUE(peer_->Commit(1, 192).ok());
  EXPECT_EQ(Must(peer_->Truncate(1, 64)), 2) << "the second run; the first holds position 0";
  EXPECT_EQ(SealedInFile(first), (std::vector<int64_t>{64, 64}));
  v1::ListSequencesResponse list = Must(peer_->List());
  EXPECT_EQ(list.sequences(0).sealed_tokens(), 64);
  EXPECT_EQ(list.sequences(0).runs_size(), 1);
  // The way goes on from there.
  Must(peer_->Allocate(1, 128, 128));
  ASSERT_TRUE(peer_->Commit(1, 256).ok());
  EXPECT_EQ(Must(peer_->Truncate(1, 1024)), 0) << "more than there is changes nothing";
  Restart();
  list = Must(peer_->List());
  EXPECT_EQ(list.sequences(0).sealed_tokens(), 256);
  EXPECT_EQ(Must(peer_->Truncate(1, 0)), 4);
  EXPECT_EQ(Must(peer_->List()).sequences_size(), 0);
  EXPECT_TRUE(absl::IsNotFound(peer_->Truncate(1, 0).status()));
}

TEST_F(KvStoreServiceTest, TruncatingToNothingMustBeSaid) {
  BindSmall();
  Must(peer_->Allocate(1, 0, 64));
  v1::TruncateSequenceRequest request;
  request.set_sequence_id(1);
  EXPECT_EQ(FieldOf(peer_->Truncate(request).status()), "tokens");
  EXPECT_EQ(FieldOf(peer_->Truncate(1, 32).status()), "tokens");
  EXPECT_EQ(FieldOf(peer_->Truncate(1, -64).status()), "tokens");
  EXPECT_EQ(Must(peer_->List()).sequences_size(), 1);
}

// ---------------------------------------------------------------- models

TEST_F(KvStoreServiceTest, NothingIsKeptForNoModel) {
  EXPECT_EQ(ReasonOf(peer_->Allocate(1, 0, 64).status()), "NO_MODEL_BOUND");
  EXPECT_EQ(ReasonOf(peer_->Commit(1, 64)), "NO_MODEL_BOUND");
  EXPECT_EQ(ReasonOf(peer_->Truncate(1, 64).status()), "NO_MODEL_BOUND");
  EXPECT_EQ(ReasonOf(peer_->Release({1}).status()), "NO_MODEL_BOUND");
  EXPECT_EQ(ReasonOf(peer_->List().status()), "NO_MODEL_BOUND");
  EXPECT_EQ(ReasonOf(peer_->Prepare({})), "NO_MODEL_BOUND");
}

TEST_F(KvStoreServiceTest, AnotherModelsKeysAreNotGivenUpUnasked) {
  BindSmall();
  Must(peer_->Allocate(1, 0, 64));
  const absl::Status status = peer_->Bind(kSmallGeometry, kModelB).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ReasonOf(status), "OTHER_MODEL");
  EXPECT_NE(status.message().find("0a0a0a0a"), std::string::npos) << status;
  EXPECT_NE(status.message().find("0b0b0b0b"), std::string::npos) << status;
  EXPECT_EQ(Must(peer_->Bind(kSmallGeometry, kModelA)).kept_sequences(), 1u);
  EXPECT_EQ(Must(peer_->Bind(kSmallGeometry, kModelB, /*allow_clean=*/true)).kept_sequences(), 0u);
  EXPECT_EQ(Must(peer_->List()).sequences_size(), 0);
  EXPECT_EQ(Must(peer_->Info()).fingerprint().value(), kModelB);
  Restart();
  EXPECT_EQ(Must(peer_->Info()).fingerprint().value(), kModelB);
}

TEST_F(KvStoreServiceTest, BindingNeedsAFingerprintAndAGeometryThatCanBe) {
  for (const size_t bytes : {0, 15, 17, 100}) {
    EXPECT_EQ(FieldOf(peer_->Bind(kSmallGeometry, std::string(bytes, 'x')).status()),
              "fingerprint.value");
  }
  EXPECT_EQ(FieldOf(peer_->Bind({2, 0, 64}, kModelA).status()), "geometry");
  EXPECT_EQ(FieldOf(peer_->Bind({INT32_MAX, INT32_MAX, INT32_MAX}, kModelA).status()), "geometry");
  EXPECT_FALSE(Must(peer_->Info()).has_fingerprint());
}

// ---------------------------------------------------------------- restart

TEST_F(KvStoreServiceTest, ARestartedStoreServesWhatWasSealedUnderANewGeneration) {
  BindSmall();
  const v1::ExtentRun run = Must(peer_->Allocate(1, 0, 256));
  Must(peer_->Allocate(1, 256, 64));
  Must(peer_->Allocate(2, 0, 64));
  ASSERT_TRUE(peer_->Commit(1, 192).ok());
  const v1::GetStoreInfoResponse before = Must(peer_->Info());
  SegmentBinding binding = BindingOf(kSmallGeometry, 0x0a);
  const std::unique_ptr<MappedSegment> mapped =
      Must(MappedSegment::Open(before.segment_dir(), binding, before.generation()));
  std::memcpy(mapped->data() + run.extents(1).data_offset(), "keys", 4);
  const std::string listed = Must(peer_->List()).SerializeAsString();
  Restart();
  const v1::GetStoreInfoResponse after = Must(peer_->Info());
  EXPECT_GT(after.generation(), before.generation());
  EXPECT_EQ(after.used_bytes(), before.used_bytes());
  EXPECT_EQ(after.used_extents(), 6u);
  EXPECT_EQ(Must(peer_->List()).SerializeAsString(), listed);
  EXPECT_EQ(Must(peer_->Bind(kSmallGeometry, kModelA)).kept_sequences(), 2u);
  // A worker that still has the files mapped sees the new generation, and its bytes are the store's.
  EXPECT_EQ(mapped->current_generation(), after.generation());
  EXPECT_EQ(mapped->generation(), before.generation());
  const std::unique_ptr<MappedSegment> again =
      Must(MappedSegment::Open(after.segment_dir(), binding, after.generation()));
  EXPECT_EQ(std::memcmp(again->data() + run.extents(1).data_offset(), "keys", 4), 0);
  EXPECT_TRUE(absl::IsFailedPrecondition(
      MappedSegment::Open(after.segment_dir(), binding, before.generation()).status()));
}

TEST_F(KvStoreServiceTest, ARunThatIsHalfWrittenIsFreedByTheNextStore) {
  BindSmall();
  Must(peer_->Allocate(1, 0, 64));
  const v1::ExtentRun half = Must(peer_->Allocate(1, 64, 64));
  ASSERT_TRUE(peer_->Commit(1, 128).ok());
  server_.reset();
  // What a store leaves that dies before the second layer's commit word.
  const int fd = open(dir_.File("segment/index").c_str(), O_WRONLY);
  const uint64_t free_word = 0;
  ASSERT_EQ(pwrite(fd, &free_word, sizeof(free_word), IndexBytes(half.extents(1).extent_id())), 8);
  close(fd);
  Start();
  const v1::ListSequencesResponse list = Must(peer_->List());
  ASSERT_EQ(list.sequences_size(), 1);
  EXPECT_EQ(list.sequences(0).sealed_tokens(), 64);
  EXPECT_EQ(list.sequences(0).runs_size(), 1);
  EXPECT_EQ(Must(peer_->Info()).used_extents(), 2u);
  Must(peer_->Allocate(1, 64, 64));
}

TEST_F(KvStoreServiceTest, ASecondStoreOnTheFolderDoesNotStart) {
  KvStoreOptions options = OptionsFor(dir_);
  options.listen_address += "2";
  const absl::Status status = StartKvStore(options).status();
  EXPECT_TRUE(absl::IsAlreadyExists(status)) << status;
  EXPECT_EQ(ReasonOf(status), "SEGMENT_IN_USE");
  EXPECT_TRUE(peer_->Info().ok());
}

TEST(KvStoreServer, WrongOptionsAreRefused) {
  const TempSegmentDir dir;
  KvStoreOptions options = OptionsFor(dir);
  options.listen_address = "";
  EXPECT_TRUE(absl::IsInvalidArgument(StartKvStore(options).status()));
  options = OptionsFor(dir);
  options.max_message_bytes = 100;
  EXPECT_TRUE(absl::IsInvalidArgument(StartKvStore(options).status()));
  options = OptionsFor(dir);
  options.host_memory_bytes = 1000;
  EXPECT_TRUE(absl::IsInvalidArgument(StartKvStore(options).status()));
  options = OptionsFor(dir);
  options.listen_address = absl::StrCat("unix:", dir.path(), "/no/such/folder/s");
  EXPECT_TRUE(absl::IsUnavailable(StartKvStore(options).status()));
  options = OptionsFor(dir);
  options.host_memory_bytes = int64_t{1} << 45;
  const absl::Status status = StartKvStore(options).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_NE(status.message().find("--host-memory"), std::string::npos) << status;
  for (const int threads : {-2, 1025, INT32_MAX, INT32_MIN}) {
    const absl::Status refused = StartKvStore(OptionsFor(dir, threads)).status();
    EXPECT_TRUE(absl::IsInvalidArgument(refused)) << refused;
    EXPECT_NE(refused.message().find("--attend-threads"), std::string::npos) << refused;
  }
}

TEST(KvStoreServer, EveryProcessorAttendsWhereNothingIsSaid) {
  const TempSegmentDir dir;
  KvStoreOptions options = OptionsFor(dir);
  options.attend_threads = KvStoreOptions().attend_threads;
  const std::unique_ptr<KvStoreServer> server = Must(StartKvStore(options));
  EXPECT_EQ(Must(KvStorePeer(server->listen_address()).Info()).attend_threads(),
            static_cast<int>(std::thread::hardware_concurrency()));
}

// Runs a store until it is killed; started by the test below as a process of its own.
constexpr char kStoreDirVariable[] = "HEADROOM_TEST_STORE_DIR";
TEST(DISABLED_StoreProcess, Serve) {
  const char* const dir = getenv(kStoreDirVariable);
  ASSERT_NE(dir, nullptr);
  KvStoreOptions options;
  options.listen_address = absl::StrCat("unix:", dir, "/s");
  options.segment_dir = absl::StrCat(dir, "/segment");
  options.host_memory_bytes = kHostBytes;
  options.max_extents = 64;
  const std::unique_ptr<KvStoreServer> server = Must(StartKvStore(options));
  alarm(60);  // nobody else may be left to kill it
  server->Wait();
}

pid_t SpawnStore(const TempSegmentDir& dir) {
  setenv(kStoreDirVariable, dir.path().c_str(), 1);
  std::string program = "/proc/self/exe", filter = "--gtest_filter=DISABLED_StoreProcess.Serve",
              also = "--gtest_also_run_disabled_tests";
  char* const arguments[] = {program.data(), filter.data(), also.data(), nullptr};
  pid_t child = -1;
  EXPECT_EQ(posix_spawn(&child, program.c_str(), nullptr, nullptr, arguments, environ), 0);
  return child;
}

TEST(KilledStore, ItsSealedExtentsAreServedByTheNext) {
  const TempSegmentDir dir;
  std::string listed;
  uint64_t generation = 0;
  {
    const pid_t child = SpawnStore(dir);
    KvStorePeer peer(AddressIn(dir));
    Must(peer.Bind(kSmallGeometry, kModelA));
    Must(peer.Allocate(1, 0, 256));
    ASSERT_TRUE(peer.Commit(1, 256).ok());
    Must(peer.Allocate(2, 0, 64));
    listed = Must(peer.List()).SerializeAsString();
    generation = Must(peer.Info()).generation();
    ASSERT_EQ(kill(child, SIGKILL), 0);
    waitpid(child, nullptr, 0);
  }
  const std::unique_ptr<KvStoreServer> server = Must(StartKvStore(OptionsFor(dir)));
  KvStorePeer peer(server->listen_address());
  EXPECT_GT(server->generation(), generation);
  EXPECT_EQ(Must(peer.List()).SerializeAsString(), listed);
  EXPECT_EQ(Must(peer.Bind(kSmallGeometry, kModelA)).kept_sequences(), 2u);
}

// ---------------------------------------------------------------- lists

TEST_F(KvStoreServiceTest, ListsComeInPages) {
  BindSmall();
  for (uint64_t id = 1; id <= 5; ++id) Must(peer_->Allocate(id * 10, 0, 64));
  v1::ListSequencesRequest request;
  request.set_page_size(2);
  std::vector<uint64_t> ids;
  bool more = true;
  for (int page = 0; more; ++page) {
    ASSERT_LT(page, 5);
    const v1::ListSequencesResponse list = Must(peer_->List(request));
    EXPECT_LE(list.sequences_size(), 2);
    for (const v1::StoredSequence& sequence : list.sequences()) {
      ids.push_back(sequence.sequence_id());
      request.set_after_sequence_id(sequence.sequence_id());
    }
    more = list.more();
  }
  EXPECT_EQ(ids, (std::vector<uint64_t>{10, 20, 30, 40, 50}));
  for (const int32_t size : {0, -1, 1001, INT32_MAX}) {
    request.set_page_size(size);
    EXPECT_EQ(FieldOf(peer_->List(request).status()), "page_size") << size;
  }
}

}  // namespace
}  // namespace headroom::kvstore
