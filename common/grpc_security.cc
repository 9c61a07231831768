#include "common/grpc_security.h"

#include <fcntl.h>
#include <grpcpp/security/auth_metadata_processor.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/bio.h>
#include <openssl/crypto.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/sha.h>
#include <openssl/x509.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/fd.h"
#include "common/file_watch.h"
#include "common/log.h"
#include "common/mutex.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr int64_t kMostFileBytes = 1 << 20;
constexpr absl::Duration kWatchInterval = absl::Seconds(1);
constexpr unsigned kGrpcInterval = 1;  // seconds
constexpr size_t kLeastTokenBytes = 16;
constexpr size_t kMostTokenBytes = 4096;

absl::Status Wrong(const SecurityFile& file, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat("--", file.flag, " ", file.path, ": ", what));
}

absl::StatusOr<std::string> ReadSmallFile(const SecurityFile& file) {
  const Fd fd(open(file.path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return Wrong(file, std::strerror(errno));
  std::string contents;
  char buffer[4096];
  for (;;) {
    const ssize_t bytes = read(fd.get(), buffer, sizeof(buffer));
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes < 0) return Wrong(file, std::strerror(errno));
    if (bytes == 0) return contents;
    contents.append(buffer, static_cast<size_t>(bytes));
    if (static_cast<int64_t>(contents.size()) > kMostFileBytes) {
      return Wrong(file, absl::StrCat("has more than ", kMostFileBytes, " bytes"));
    }
  }
}

// ---------------------------------------------------------------- certificates

template <auto kFree>
struct Freer {
  template <typename T>
  void operator()(T* object) const {
    kFree(object);
  }
};
using Bio = std::unique_ptr<BIO, Freer<BIO_free>>;
using Certificate = std::unique_ptr<X509, Freer<X509_free>>;
using Key = std::unique_ptr<EVP_PKEY, Freer<EVP_PKEY_free>>;

Bio BioOf(const std::string& pem) {
  return Bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

absl::StatusOr<Certificate> FirstCertificate(const SecurityFile& file, const std::string& pem) {
  Certificate certificate(PEM_read_bio_X509(BioOf(pem).get(), nullptr, nullptr, nullptr));
  ERR_clear_error();
  if (certificate == nullptr) return Wrong(file, "holds no certificate in PEM");
  return certificate;
}

// A passphrase is nobody's to ask for here.
int NoPassphrase(char*, int, int, void*) { return 0; }

absl::Status CheckKey(const TlsFiles& files, const X509& certificate, const std::string& pem) {
  const Key key(PEM_read_bio_PrivateKey(BioOf(pem).get(), nullptr, NoPassphrase, nullptr));
  ERR_clear_error();
  if (key == nullptr) return Wrong(files.key, "holds no unencrypted private key in PEM");
  const bool match = X509_check_private_key(&certificate, key.get()) == 1;
  ERR_clear_error();
  if (match) return absl::OkStatus();
  return Wrong(files.key, absl::StrCat("is not the key of --", files.certificate.flag, " ",
                                       files.certificate.path));
}

struct TlsContents {
  std::string certificate;
  std::string key;
  std::string ca;
};

absl::StatusOr<TlsContents> ReadTls(const TlsFiles& files) {
  TlsContents contents;
  if (files.certificate.path.empty() != files.key.path.empty()) {
    const auto& [there, missing] = files.key.path.empty()
                                       ? std::tie(files.certificate, files.key)
                                       : std::tie(files.key, files.certificate);
    return Wrong(there, absl::StrCat("--", missing.flag, " is missing"));
  }
  if (!files.certificate.path.empty()) {
    HEADROOM_ASSIGN_OR_RETURN(contents.certificate, ReadSmallFile(files.certificate));
    HEADROOM_ASSIGN_OR_RETURN(contents.key, ReadSmallFile(files.key));
    HEADROOM_ASSIGN_OR_RETURN(const Certificate certificate,
                              FirstCertificate(files.certificate, contents.certificate));
    HEADROOM_RETURN_IF_ERROR(CheckKey(files, *certificate, contents.key));
    if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) < 0) {
      LogWarning(absl::StrCat("--", files.certificate.flag, " ", files.certificate.path,
                              ": the certificate has expired"));
    }
  }
  if (!files.ca.path.empty()) {
    HEADROOM_ASSIGN_OR_RETURN(contents.ca, ReadSmallFile(files.ca));
    HEADROOM_RETURN_IF_ERROR(FirstCertificate(files.ca, contents.ca).status());
  }
  return contents;
}

// Contents behind a path, replaced as a whole: gRPC only takes what changes from files, and from the
// user's own it would also take half of a pair, or garbage, and refuse everybody from then on.
class MemoryFile {
 public:
  absl::Status Set(const std::string& contents) {
    Fd fresh(memfd_create("headroom-tls", MFD_CLOEXEC));
    if (!fresh.valid()) return absl::InternalError(absl::StrCat("memfd: ", std::strerror(errno)));
    for (size_t done = 0; done < contents.size();) {
      const ssize_t bytes = write(fresh.get(), contents.data() + done, contents.size() - done);
      if (bytes < 0 && errno != EINTR) {
        return absl::InternalError(absl::StrCat("memfd: ", std::strerror(errno)));
      }
      if (bytes > 0) done += static_cast<size_t>(bytes);
    }
    if (!fd_.valid()) {
      fd_ = std::move(fresh);
    } else if (dup3(fresh.get(), fd_.get(), O_CLOEXEC) < 0) {
      return absl::InternalError(absl::StrCat("dup3: ", std::strerror(errno)));
    }
    return absl::OkStatus();
  }
  // "" before Set().
  std::string path() const {
    return fd_.valid() ? absl::StrCat("/proc/self/fd/", fd_.get()) : std::string();
  }

 private:
  Fd fd_;
};

class ReloadedIdentity : public TlsIdentity {
 public:
  explicit ReloadedIdentity(const TlsFiles& files)
      : files_(files), watch_({files.certificate.path, files.key.path, files.ca.path}) {}

  absl::Status Begin() {
    HEADROOM_RETURN_IF_ERROR(Reload());
    provider_ = std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
        pair_.path(), pair_.path(), ca_.path(), kGrpcInterval);
    watch_.Start(kWatchInterval, [this] {
      if (const absl::Status status = Reload(); status.ok()) {
        LogInfo(absl::StrCat("--", files_.certificate.flag, " ", files_.certificate.path,
                             ": read again"));
      } else {
        LogWarning(absl::StrCat(status.message(), "; the certificate before it stays"));
      }
    });
    return absl::OkStatus();
  }

  std::shared_ptr<grpc::ServerCredentials> ServerCredentials() const override {
    grpc::experimental::TlsServerCredentialsOptions options(provider_);
    options.watch_identity_key_cert_pairs();
    if (!files_.ca.path.empty()) {
      options.watch_root_certs();
      options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    }
    return grpc::experimental::TlsServerCredentials(options);
  }

  std::shared_ptr<grpc::ChannelCredentials> ChannelCredentials() const override {
    grpc::experimental::TlsChannelCredentialsOptions options;
    options.set_certificate_provider(provider_);
    options.watch_identity_key_cert_pairs();
    options.watch_root_certs();
    return grpc::experimental::TlsCredentials(options);
  }

 private:
  absl::Status Reload() {
    HEADROOM_ASSIGN_OR_RETURN(const TlsContents contents, ReadTls(files_));
    // One file for both, so that one exchange replaces both.
    HEADROOM_RETURN_IF_ERROR(pair_.Set(absl::StrCat(contents.key, "\n", contents.certificate)));
    return contents.ca.empty() ? absl::OkStatus() : ca_.Set(contents.ca);
  }

  const TlsFiles files_;
  MemoryFile pair_;
  MemoryFile ca_;
  std::shared_ptr<grpc::experimental::CertificateProviderInterface> provider_;
  FileWatch watch_;  // last: its thread uses the above
};

// ---------------------------------------------------------------- tokens

absl::StatusOr<std::vector<std::string>> ReadTokens(const SecurityFile& file) {
  HEADROOM_ASSIGN_OR_RETURN(const std::string contents, ReadSmallFile(file));
  std::vector<std::string> tokens;
  int line_number = 0;
  for (absl::string_view line : absl::StrSplit(contents, '\n')) {
    ++line_number;
    line = absl::StripTrailingAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    const bool visible =
        std::all_of(line.begin(), line.end(), [](char c) { return c > ' ' && c < 127; });
    if (line.size() < kLeastTokenBytes || line.size() > kMostTokenBytes || !visible) {
      return Wrong(file, absl::StrCat("line ", line_number, ": expected a token of ",
                                      kLeastTokenBytes, " to ", kMostTokenBytes,
                                      " visible ASCII characters"));
    }
    tokens.emplace_back(line);
  }
  if (tokens.empty()) return Wrong(file, "holds no token");
  return tokens;
}

using Digest = std::array<unsigned char, SHA256_DIGEST_LENGTH>;

Digest DigestOf(absl::string_view text) {
  Digest digest;
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest.data());
  return digest;
}

class TokenCheck : public grpc::AuthMetadataProcessor {
 public:
  explicit TokenCheck(const SecurityFile& file) : file_(file), watch_({file.path}) {}

  absl::Status Begin() {
    HEADROOM_RETURN_IF_ERROR(Reload());
    watch_.Start(kWatchInterval, [this] {
      if (const absl::Status status = Reload(); !status.ok()) {
        LogWarning(absl::StrCat(status.message(), "; the tokens before it stay"));
      }
    });
    return absl::OkStatus();
  }

  bool IsBlocking() const override { return false; }

  grpc::Status Process(const InputMetadata& metadata, grpc::AuthContext*, OutputMetadata* consumed,
                       OutputMetadata*) override {
    const auto path = metadata.find(":path");
    // Probes carry no tokens, and learn nothing.
    if (path != metadata.end() && path->second.starts_with("/grpc.health.v1.Health/")) {
      return grpc::Status::OK;
    }
    const auto header = metadata.find("authorization");
    if (header == metadata.end()) {
      return grpc::Status(grpc::StatusCode::UNAUTHENTICATED,
                          "this server wants 'authorization: Bearer TOKEN'");
    }
    absl::string_view value(header->second.data(), header->second.size());
    consumed->emplace("authorization", std::string(value));
    if (absl::StartsWithIgnoreCase(value, "bearer ") && Known(value.substr(7))) {
      return grpc::Status::OK;
    }
    return grpc::Status(grpc::StatusCode::UNAUTHENTICATED, "the bearer token is not a known one");
  }

 private:
  // In a time that does not depend on how much of a token is right, or which.
  bool Known(absl::string_view token) const {
    const Digest digest = DigestOf(token);
    MutexLock lock(&mutex_);
    int known = 0;
    for (const Digest& each : digests_) {
      known |= CRYPTO_memcmp(each.data(), digest.data(), digest.size()) == 0 ? 1 : 0;
    }
    return known != 0;
  }

  absl::Status Reload() {
    HEADROOM_ASSIGN_OR_RETURN(const std::vector<std::string> tokens, ReadTokens(file_));
    std::vector<Digest> digests;
    for (const std::string& token : tokens) digests.push_back(DigestOf(token));
    MutexLock lock(&mutex_);
    digests_ = std::move(digests);
    return absl::OkStatus();
  }

  const SecurityFile file_;
  mutable Mutex mutex_;
  std::vector<Digest> digests_ ABSL_GUARDED_BY(mutex_);
  FileWatch watch_;  // last: its thread uses the above
};

// ---------------------------------------------------------------- servers

// Peers that trust nobody in particular trust everybody.
absl::Status CheckAllOrNone(const TlsFiles& files) {
  const SecurityFile* const all[] = {&files.certificate, &files.key, &files.ca};
  for (const SecurityFile* there : all) {
    for (const SecurityFile* missing : all) {
      if (!there->path.empty() && missing->path.empty()) {
        return Wrong(*there, absl::StrCat("--", missing->flag, " is missing"));
      }
    }
  }
  return absl::OkStatus();
}

class LoadedSecurity : public ServerSecurity {
 public:
  LoadedSecurity(std::unique_ptr<TlsIdentity> identity,
                 std::shared_ptr<grpc::ServerCredentials> credentials)
      : identity_(std::move(identity)), credentials_(std::move(credentials)) {}
  std::shared_ptr<grpc::ServerCredentials> credentials() const override { return credentials_; }

 private:
  const std::unique_ptr<TlsIdentity> identity_;
  const std::shared_ptr<grpc::ServerCredentials> credentials_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TlsIdentity>> TlsIdentity::Load(const TlsFiles& files) {
  auto identity = std::make_unique<ReloadedIdentity>(files);
  HEADROOM_RETURN_IF_ERROR(identity->Begin());
  return identity;
}

absl::StatusOr<std::unique_ptr<TlsIdentity>> TlsIdentity::LoadPeer(const TlsFiles& files) {
  HEADROOM_RETURN_IF_ERROR(CheckAllOrNone(files));
  if (files.certificate.path.empty()) return nullptr;
  return Load(files);
}

absl::StatusOr<std::unique_ptr<ServerSecurity>> ServerSecurity::LoadPeer(const TlsFiles& files) {
  HEADROOM_RETURN_IF_ERROR(CheckAllOrNone(files));
  ServerSecurityOptions options;
  options.tls = files;
  return Load(options);
}

absl::StatusOr<std::unique_ptr<ServerSecurity>> ServerSecurity::Load(
    const ServerSecurityOptions& options) {
  if (options.tls.certificate.path.empty() && options.tls.key.path.empty()) {
    for (const SecurityFile* file : {&options.tls.ca, &options.tokens}) {
      if (!file->path.empty()) {
        return Wrong(*file, absl::StrCat("needs --", options.tls.certificate.flag));
      }
    }
    return std::make_unique<LoadedSecurity>(nullptr, grpc::InsecureServerCredentials());
  }
  HEADROOM_ASSIGN_OR_RETURN(std::unique_ptr<TlsIdentity> identity, TlsIdentity::Load(options.tls));
  std::shared_ptr<grpc::ServerCredentials> credentials = identity->ServerCredentials();
  if (!options.tokens.path.empty()) {
    auto tokens = std::make_shared<TokenCheck>(options.tokens);
    HEADROOM_RETURN_IF_ERROR(tokens->Begin());
    credentials->SetAuthMetadataProcessor(std::move(tokens));
  }
  return std::make_unique<LoadedSecurity>(std::move(identity), std::move(credentials));
}

// ---------------------------------------------------------------- clients

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const ClientSecurityOptions& options) {
  const bool tls = options.tls || !options.files.ca.path.empty() ||
                   !options.files.certificate.path.empty() || !options.files.key.path.empty();
  if (!tls) {
    const std::string needs = absl::StrCat("needs --tls or --", options.files.ca.flag);
    if (!options.token.path.empty()) {
      return Wrong(options.token, needs + ": in the clear it would be everybody's");
    }
    if (!options.server_name.empty()) {
      return absl::InvalidArgumentError("--tls-server-name " + needs);
    }
    return grpc::InsecureChannelCredentials();
  }
  HEADROOM_ASSIGN_OR_RETURN(TlsContents contents, ReadTls(options.files));
  grpc::SslCredentialsOptions ssl;
  ssl.pem_root_certs = std::move(contents.ca);
  ssl.pem_cert_chain = std::move(contents.certificate);
  ssl.pem_private_key = std::move(contents.key);
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::SslCredentials(ssl);
  if (options.token.path.empty()) return credentials;
  HEADROOM_ASSIGN_OR_RETURN(const std::vector<std::string> tokens, ReadTokens(options.token));
  return grpc::CompositeChannelCredentials(credentials, grpc::AccessTokenCredentials(tokens[0]));
}

}  // namespace headroom
