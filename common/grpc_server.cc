#include "common/grpc_server.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/text_format.h>
#include <grpc/support/log.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "common/log.h"
#include "common/status.h"

namespace headroom {
namespace {

// A program that links the plugin has it in every server that it builds, asked for or not.
class WithoutReflection : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    const auto reflects = [](const auto& plugin) {
      return dynamic_cast<grpc::reflection::ProtoServerReflectionPlugin*>(plugin.get()) != nullptr;
    };
    plugins->erase(std::remove_if(plugins->begin(), plugins->end(), reflects), plugins->end());
  }
};

// grpc.health.v1 as it is published. gRPC answers it without protobuf: reflection lists the service and
// cannot describe it, and grpcurl calls nothing that is not described.
constexpr char kHealthFile[] = R"pb(
  name: "grpc/health/v1/health.proto" package: "grpc.health.v1" syntax: "proto3"
  message_type {
    name: "HealthCheckRequest"
    field { name: "service" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING json_name: "service" }
  }
  message_type {
    name: "HealthCheckResponse"
    field {
      name: "status" number: 1 label: LABEL_OPTIONAL type: TYPE_ENUM json_name: "status"
      type_name: ".grpc.health.v1.HealthCheckResponse.ServingStatus"
    }
    enum_type {
      name: "ServingStatus"
      value { name: "UNKNOWN" number: 0 }
      value { name: "SERVING" number: 1 }
      value { name: "NOT_SERVING" number: 2 }
      value { name: "SERVICE_UNKNOWN" number: 3 }
    }
  }
  service {
    name: "Health"
    method {
      name: "Check"
      input_type: ".grpc.health.v1.HealthCheckRequest"
      output_type: ".grpc.health.v1.HealthCheckResponse"
    }
    method {
      name: "Watch"
      input_type: ".grpc.health.v1.HealthCheckRequest"
      output_type: ".grpc.health.v1.HealthCheckResponse"
      server_streaming: true
    }
  }
)pb";

// Once for the process: reflection looks where generated code registers.
void DescribeHealth() {
  static const std::string* const file = [] {
    google::protobuf::FileDescriptorProto proto;
    google::protobuf::TextFormat::ParseFromString(kHealthFile, &proto);
    auto* const bytes = new std::string(proto.SerializeAsString());
    google::protobuf::DescriptorPool::InternalAddGeneratedFile(bytes->data(),
                                                               static_cast<int>(bytes->size()));
    return bytes;
  }();
  (void)file;
}

// While one lives what gRPC logs on its thread is kept for the error, and not logged; of other threads,
// and later, it is a warning.
class GrpcErrors {
 public:
  GrpcErrors() {
    gpr_set_log_function(&Take);
    if (gpr_should_log(GPR_LOG_SEVERITY_ERROR) == 0) {  // GRPC_VERBOSITY=NONE: it would not say why, either
      silent_.store(true);
      gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
    }
    kept_ = &last_;
  }
  ~GrpcErrors() { kept_ = nullptr; }
  GrpcErrors(const GrpcErrors&) = delete;
  GrpcErrors& operator=(const GrpcErrors&) = delete;

  // Why a call of this thread failed.
  std::string reason() const { return GrpcReason(last_); }

 private:
  static void Take(gpr_log_func_args* said) {
    if (kept_ != nullptr) {
      *kept_ = said->message;
    } else if (!silent_.load()) {
      LogWarning(absl::StrCat("gRPC: ", said->message));
    }
  }

  static inline std::atomic<bool> silent_{false};
  static inline thread_local std::string* kept_ = nullptr;
  std::string last_;
};

}  // namespace

std::string GrpcReason(absl::string_view message) {
  constexpr absl::string_view kSystemError = "os_error:\"";
  const size_t at = message.rfind(kSystemError);
  if (at != absl::string_view::npos) {
    message.remove_prefix(at + kSystemError.size());
    return std::string(message.substr(0, message.find('"')));
  }
  absl::ConsumePrefix(&message, "UNKNOWN:");
  return std::string(message.substr(0, message.find(" {")));
}

absl::Status CheckMaxMessageBytes(int64_t bytes) {
  if (bytes >= 1024 && bytes <= INT32_MAX) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--max-message-bytes ", bytes, ", expected 1024 to ", INT32_MAX));
}

absl::StatusOr<std::unique_ptr<grpc::Server>> ListenGrpc(
    grpc::Service* service, const std::string& address,
    const std::shared_ptr<grpc::ServerCredentials>& credentials, int64_t max_message_bytes,
    Reflection reflection, std::string* listened) {
  grpc::ServerBuilder builder;
  if (reflection == Reflection::kNo) {
    builder.SetOption(std::make_unique<WithoutReflection>());
  } else {
    DescribeHealth();
  }
  int port = 0;
  builder.AddListeningPort(address, credentials, &port);
  builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(static_cast<int>(max_message_bytes));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5'000);
  // Two servers on one port would take turns; the second is a mistake.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  const GrpcErrors errors;
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen on ", address, ": ", errors.reason()));
  }
  *listened = address;
  const size_t colon = address.rfind(':');
  if (port > 0 && !absl::StartsWith(address, "unix:") && colon != std::string::npos) {
    *listened = absl::StrCat(address.substr(0, colon), ":", port);
  }
  return server;
}

absl::Status PeerServer::Listen(grpc::Service* service, const std::string& address,
                                const std::shared_ptr<grpc::ServerCredentials>& credentials,
                                int64_t max_message_bytes) {
  grpc::EnableDefaultHealthCheckService(true);
  HEADROOM_ASSIGN_OR_RETURN(server_, ListenGrpc(service, address, credentials, max_message_bytes,
                                                Reflection::kNo, &listen_address_));
  server_->GetHealthCheckService()->SetServingStatus("", true);
  server_->GetHealthCheckService()->SetServingStatus(name_, true);
  return absl::OkStatus();
}

void PeerServer::Shutdown() {
  if (shut_down_.exchange(true) || server_ == nullptr) return;
  server_->GetHealthCheckService()->Shutdown();
  server_->Shutdown(std::chrono::system_clock::now() + shutdown_grace_);
}

}  // namespace headroom
