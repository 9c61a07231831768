#include "services/kvstore/kv_store_server.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/grpc_security.h"
#include "common/grpc_server.h"
#include "common/log.h"
#include "common/status.h"
#include "services/kvstore/kv_store_service.h"

namespace headroom::kvstore {
namespace {

constexpr char kServiceName[] = "headroom.v1.KvStoreService";
constexpr int64_t kBytesPerExtent = 64 << 10;
constexpr int64_t kFewestExtents = 4096;
constexpr int64_t kMostExtents = int64_t{1} << 26;
constexpr int kMostAttendThreads = 1024;
// Calls take microseconds; this is for those that a peer does not read the answer of.
constexpr std::chrono::seconds kShutdownGrace{2};

class Server : public KvStoreServer {
 public:
  Server(std::unique_ptr<KvStore> store, int attend_threads,
         std::unique_ptr<ServerSecurity> security)
      : store_(std::move(store)),
        pool_(attend_threads == 0 ? nullptr
                                  : std::make_unique<AttendPool>(
                                        store_->data(), [this] { return store_->ready_bytes(); },
                                        attend_threads)),
        service_(store_.get(), pool_.get()),
        security_(std::move(security)) {}

  absl::Status Listen(const KvStoreOptions& options) {
    HEADROOM_RETURN_IF_ERROR(server_.Listen(&service_, options.listen_address,
                                            security_->credentials(), options.max_message_bytes));
    LogInfo(absl::StrCat("kvstore serves on ", listen_address()));
    return absl::OkStatus();
  }

  std::string listen_address() const override { return server_.listen_address(); }
  uint64_t generation() const override { return store_->Facts().generation; }
  void Shutdown() override { server_.Shutdown(); }
  void Wait() override { server_.Wait(); }

 private:
  const std::unique_ptr<KvStore> store_;
  const std::unique_ptr<AttendPool> pool_;
  KvStoreService service_;
  const std::unique_ptr<ServerSecurity> security_;
  PeerServer server_{kServiceName, kShutdownGrace};  // last: its calls use the others
};

absl::Status CheckOptions(const KvStoreOptions& options) {
  if (options.listen_address.empty()) {
    return absl::InvalidArgumentError("the listen address is empty");
  }
  HEADROOM_RETURN_IF_ERROR(CheckMaxMessageBytes(options.max_message_bytes));
  if (options.attend_threads < KvStoreOptions::kAllProcessors ||
      options.attend_threads > kMostAttendThreads) {
    return absl::InvalidArgumentError(absl::StrCat("--attend-threads ", options.attend_threads,
                                                   ", expected 0 to ", kMostAttendThreads));
  }
  return absl::OkStatus();
}

SegmentOptions SegmentOptionsOf(const KvStoreOptions& options) {
  SegmentOptions segment;
  segment.dir = options.segment_dir;
  segment.data_bytes = options.host_memory_bytes;
  segment.max_extents = options.max_extents != 0
                            ? options.max_extents
                            : std::clamp(options.host_memory_bytes / kBytesPerExtent,
                                         kFewestExtents, kMostExtents);
  segment.generation = options.generation;
  return segment;
}

}  // namespace

absl::StatusOr<std::unique_ptr<KvStoreServer>> StartKvStore(const KvStoreOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  const int threads = options.attend_threads == KvStoreOptions::kAllProcessors
                          ? static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))
                          : options.attend_threads;
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<ServerSecurity> security,
                            ServerSecurity::LoadPeer(options.peer_tls));
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<KvStore> store, KvStore::Open(SegmentOptionsOf(options)));
  auto server = std::make_unique<Server>(std::move(store), threads, std::move(security));
  HEADROOM_RETURN_IF_ERROR(server->Listen(options));
  return server;
}

absl::Status CheckKvStore(const KvStoreOptions& options) {
  HEADROOM_RETURN_IF_ERROR(CheckOptions(options));
  HEADROOM_RETURN_IF_ERROR(CheckSegmentOptions(SegmentOptionsOf(options)));
  return ServerSecurity::LoadPeer(options.peer_tls).status();
}

}  // namespace headroom::kvstore
