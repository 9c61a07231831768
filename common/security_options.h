// What a process is told about TLS, client certificates and tokens (common/grpc_security.h).
#ifndef HEADROOM_COMMON_SECURITY_OPTIONS_H_
#define HEADROOM_COMMON_SECURITY_OPTIONS_H_

#include <string>

namespace headroom {

// A file and the flag that named it, for errors. An empty path: none.
struct SecurityFile {
  std::string flag;
  std::string path;
};

struct TlsFiles {
  SecurityFile certificate;  // with the chain up to, but without, the root
  SecurityFile key;          // unencrypted
  SecurityFile ca;           // who must have signed the other side's
};

// Of coordinator, worker and kvstore towards each other.
inline TlsFiles PeerTlsFiles() {
  return {{"peer-cert", ""}, {"peer-key", ""}, {"peer-ca", ""}};
}

// How a server is protected. No certificate: not at all, for unix sockets and private networks.
struct ServerSecurityOptions {
  TlsFiles tls{{"tls-cert", ""}, {"tls-key", ""}, {"tls-client-ca", ""}};
  // One token a line, 16 to 4096 visible ASCII characters; lines that begin with # are comments. A call
  // must bring one of them ("authorization: Bearer TOKEN") or is UNAUTHENTICATED, health checks
  // excepted. Needs a certificate: in the clear a token is everybody's.
  SecurityFile tokens{"auth-token-file", ""};
};

// What a client knows of a server beside its address.
struct ClientSecurityOptions {
  bool tls = false;  // with the system's CAs, unless one is named
  // Certificate and key are the client's own, for a server that wants one.
  TlsFiles files{{"tls-cert", ""}, {"tls-key", ""}, {"tls-ca", ""}};
  std::string server_name;  // of the certificate, where it is not that of the address
  SecurityFile token{"auth-token-file", ""};  // the first token of the file
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_SECURITY_OPTIONS_H_
