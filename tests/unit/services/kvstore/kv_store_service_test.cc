// The store's contract as its peers see it: over a socket, and by the files that it leaves.
#include "services/kvstore/kv_store_service.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "common/errors.h"
#include "common/grpc_status.h"
#include "common/segment/mailbox.h"
#include "common/segment/mapped_segment.h"
#include "services/kvstore/kv_store_server.h"
#include "tests/unit/services/kvstore/kvstore_test_util.h"

extern char** environ;

namespace headroom::kvstore {
namespace {

constexpr int64_t kHostBytes = 4 << 20;

std::string AddressIn(const TempSegmentDir& dir) { return absl::StrCat("unix:", dir.path(), "/s"); }

KvStoreOptions OptionsFor(const TempSegmentDir& dir, int attend_threads = 0) {
  KvStoreOptions options;
  options.attend_threads = attend_threads;
  options.listen_address = AddressIn(dir);
  options.segment_dir = dir.File("segment");
  options.host_memory_bytes = kHostBytes;
  options.max_extents = 64;
  return options;
}

// A store's RPCs as its coordinator calls them.
class Peer {
 public:
  explicit Peer(const std::string& address)
      : stub_(v1::KvStoreService::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))) {}

  absl::StatusOr<v1::GetStoreInfoResponse> Info() {
    return Call<v1::GetStoreInfoResponse>(&v1::KvStoreService::Stub::GetStoreInfo,
                                          v1::GetStoreInfoRequest());
  }
  absl::StatusOr<v1::BindModelResponse> Bind(const KvGeometry& geometry,
                                             const std::string& fingerprint,
                                             bool allow_clean = false) {
    v1::BindModelRequest request;
    request.mutable_geometry()->set_num_layers(geometry.num_layers);
    request.mutable_geometry()->set_num_kv_heads(geometry.num_kv_heads);
    request.mutable_geometry()->set_head_dim(geometry.head_dim);
    request.mutable_fingerprint()->set_value(fingerprint);
    request.set_allow_clean(allow_clean);
    return Call<v1::BindModelResponse>(&v1::KvStoreService::Stub::BindModel, request);
  }
  absl::StatusOr<v1::ExtentRun> Allocate(uint64_t id, int64_t first_pos, int64_t capacity) {
    v1::AllocateRunRequest request;
    request.set_sequence_id(id);
    request.set_first_pos(first_pos);
    request.set_capacity_tokens(capacity);
    auto response =
        Call<v1::AllocateRunResponse>(&v1::KvStoreService::Stub::AllocateRun, request);
    if (!response.ok()) return response.status();
    return response->run();
  }
  absl::Status Commit(uint64_t id, int64_t sealed_tokens) {
    v1::CommitSealedRequest request;
    request.add_sequences()->set_sequence_id(id);
    request.mutable_sequences(0)->set_sealed_tokens(sealed_tokens);
    return Call<v1::CommitSealedResponse>(&v1::KvStoreService::Stub::CommitSealed, request)
        .status();
  }
  absl::StatusOr<int64_t> Truncate(const v1::TruncateSequenceRequest& request) {
    auto response =
        Call<v1::TruncateSequenceResponse>(&v1::KvStoreService::Stub::TruncateSequence, request);
    if (!response.ok()) return response.status();
    return int64_t{response->released_extents()};
  }
  absl::StatusOr<int64_t> Truncate(uint64_t id, int64_t tokens) {
    v1::TruncateSequenceRequest request;
    request.set_sequence_id(id);
    request.set_tokens(tokens);
    return Truncate(request);
  }
  absl::StatusOr<int64_t> Release(const std::vector<uint64_t>& ids) {
    v1::ReleaseSequencesRequest request;
    request.mutable_sequence_ids()->Add(ids.begin(), ids.end());
    auto response =
        Call<v1::ReleaseSequencesResponse>(&v1::KvStoreService::Stub::ReleaseSequences, request);
    if (!response.ok()) return response.status();
    return int64_t{response->released_extents()};
  }
  absl::StatusOr<v1::ListSequencesResponse> List(const v1::ListSequencesRequest& request = {}) {
    return Call<v1::ListSequencesResponse>(&v1::KvStoreService::Stub::ListSequences, request);
  }
  absl::Status Prepare(const v1::Plan& plan) {
    v1::PrepareStorePlanRequest request;
    *request.mutable_plan() = plan;
    return Call<v1::PrepareStorePlanResponse>(&v1::KvStoreService::Stub::PrepareStorePlan, request)
        .status();
  }
  absl::Status Attach(const std::string& mailbox_file) {
    v1::AttachMailboxRequest request;
    request.set_mailbox_file(mailbox_file);
    return Call<v1::AttachMailboxResponse>(&v1::KvStoreService::Stub::AttachMailbox, request)
        .status();
  }

 private:
  static void SetDeadline(grpc::ClientContext& context) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    context.set_wait_for_ready(true);
  }
  template <typename Response, typename Method, typename Request>
  absl::StatusOr<Response> Call(Method method, const Request& request) {
    grpc::ClientContext context;
    SetDeadline(context);
    Response response;
    const absl::Status status =
        FromGrpcStatus(((*stub_).*method)(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }

  const std::unique_ptr<v1::KvStoreService::Stub> stub_;
};

const std::string kModelA(16, '\x0a');
const std::string kModelB(16, '\x0b');

class KvStoreServiceTest : public testing::Test {
 protected:
  KvStoreServiceTest() { Start(); }

  void Start(int attend_threads = 0) {
    server_ = Must(StartKvStore(OptionsFor(dir_, attend_threads)));
    peer_ = std::make_unique<Peer>(server_->listen_address());
  }
  // Instead of the one without threads that attend.
  void RestartWithThreads(int attend_threads) {
    server_.reset();
    Start(attend_threads);
  }
  void Restart() {
    server_.reset();
    Start();
  }
  void BindSmall() { Must(peer_->Bind(kSmallGeometry, kModelA)); }

  // The sealed word of each layer's descriptor, as the index file has it.
  std::vector<int64_t> SealedInFile(const v1::ExtentRun& run) {
    std::ifstream file(dir_.File("segment/index"), std::ios::binary);
    std::vector<int64_t> sealed;
    for (const v1::Extent& extent : run.extents()) {
      ExtentDescriptor descriptor;
      file.seekg(static_cast<std::streamoff>(IndexBytes(extent.extent_id())));
      file.read(reinterpret_cast<char*>(&descriptor), sizeof(descriptor));
      EXPECT_EQ(descriptor.commit, CommitWordOf(descriptor));
      EXPECT_EQ(descriptor.layer, static_cast<uint32_t>(extent.layer()));
      EXPECT_EQ(descriptor.data_offset, extent.data_offset());
      sealed.push_back(SealedTokens(descriptor.sealed).value_or(-1));
    }
    return sealed;
  }
  static std::string FieldOf(const absl::Status& status) {
    const std::vector<FieldViolation> violations = FieldViolationsOf(status);
    return violations.size() == 1 ? violations[0].field : std::string(status.ToString());
  }

  const TempSegmentDir dir_;
  std::unique_ptr<KvStoreServer> server_;
  std::unique_ptr<Peer> peer_;
};

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
  EXPECT_EQ(Must(Peer(server->listen_address()).Info()).attend_threads(),
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
    Peer peer(AddressIn(dir));
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
  Peer peer(server->listen_address());
  EXPECT_GT(server->generation(), generation);
  EXPECT_EQ(Must(peer.List()).SerializeAsString(), listed);
  EXPECT_EQ(Must(peer.Bind(kSmallGeometry, kModelA)).kept_sequences(), 2u);
}

// ---------------------------------------------------------------- in place

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

TEST_F(KvStoreServiceTest, PlansWithKeysInPlaceAreRefusedWhereNobodyAttends) {
  BindSmall();
  EXPECT_TRUE(peer_->Prepare(PlanOf(2, v1::LANE_FETCHED)).ok());
  EXPECT_TRUE(peer_->Prepare(PlanOf(2, v1::LANE_RESIDENT)).ok());
  const absl::Status status = peer_->Prepare(PlanOf(2, v1::LANE_IN_PLACE));
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ReasonOf(status), "IN_PLACE_NOT_SERVED");
  EXPECT_NE(status.message().find("--attend-threads"), std::string::npos) << status;
}

TEST_F(KvStoreServiceTest, PlansAreCheckedWhoeverAttends) {
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

TEST_F(KvStoreServiceTest, AMailboxIsServedOverTheKeysOfTheSegment) {
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

TEST_F(KvStoreServiceTest, MailboxesAreRefusedWhereNobodyAttends) {
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

TEST_F(KvStoreServiceTest, MailboxesAreRefusedBeforeAModelIsBound) {
  RestartWithThreads(1);
  const std::unique_ptr<Mailbox> mailbox = MailboxFor(Must(peer_->Info()), 1);
  const absl::Status status = peer_->Attach(MailboxFile(server_->generation(), 1));
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ReasonOf(status), "NO_MODEL_BOUND");
  EXPECT_EQ(mailbox->header().attached, 0u);
}

TEST_F(KvStoreServiceTest, MailboxesThatAreNotThisStoresAreRefused) {
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
TEST_F(KvStoreServiceTest, ARestartedStoreDoesNotTakeTheOldMailbox) {
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
