// The KV store as a process has it: a segment behind an address.
#ifndef HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVER_H_
#define HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "common/security_options.h"

namespace headroom::kvstore {

struct KvStoreOptions {
  // As gRPC names addresses: "unix:/path", "host:port". A port of 0 picks one.
  std::string listen_address;
  TlsFiles peer_tls = PeerTlsFiles();  // what the coordinator must show, and is shown
  // Folder of the segment's files, on a tmpfs; made with mode 0700 if it is not there.
  std::string segment_dir;
  // Bytes of keys and values. The index takes 64 bytes for each extent besides.
  int64_t host_memory_bytes = 0;
  // 0: one for each 64 KiB of host memory, at least 4,096: the index then takes a thousandth.
  int64_t max_extents = 0;
  // 0: a new one is drawn.
  uint64_t generation = 0;
  int64_t max_message_bytes = int64_t{10} << 20;
  // That attend to keys in place; 0: none are. kAllProcessors: as many as there are.
  static constexpr int kAllProcessors = -1;
  int attend_threads = kAllProcessors;
};

class KvStoreServer {
 public:
  virtual ~KvStoreServer() = default;

  // What the listen address came to, where a port was picked.
  virtual std::string listen_address() const = 0;
  virtual uint64_t generation() const = 0;

  // Ends calls and Wait(). The files stay: the next store on the folder takes them over.
  virtual void Shutdown() = 0;
  // Returns after Shutdown().
  virtual void Wait() = 0;
};

// Serves on return; health ("" and "headroom.v1.KvStoreService") says so. Memory beyond the first GiB
// is got in the background. INVALID_ARGUMENT: an option is wrong. ALREADY_EXISTS: another store holds
// the folder. RESOURCE_EXHAUSTED: there is not so much memory. UNAVAILABLE: the address cannot be
// listened on.
absl::StatusOr<std::unique_ptr<KvStoreServer>> StartKvStore(const KvStoreOptions& options);

// What can be found wrong without making anything: options and TLS files. Errors as above.
absl::Status CheckKvStore(const KvStoreOptions& options);

}  // namespace headroom::kvstore

#endif  // HEADROOM_SERVICES_KVSTORE_KV_STORE_SERVER_H_
