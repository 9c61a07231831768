// Calls whose message does not parse. gRPC ends them with UNIMPLEMENTED and not a word; these handlers,
// around gRPC's own, say which field is wrong. Most often it is a text that is not UTF-8: protobuf
// refuses it while parsing, though clients in C++ send it.
#ifndef HEADROOM_SERVICES_COORDINATOR_UNPARSABLE_SERVICE_H_
#define HEADROOM_SERVICES_COORDINATOR_UNPARSABLE_SERVICE_H_

#include <google/protobuf/descriptor.h>
#include <grpc/byte_buffer.h>
#include <grpc/slice.h>
#include <grpcpp/grpcpp.h>

#include <functional>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "common/mutex.h"

namespace headroom::coordinator {

// What is wrong with `bytes`, which do not parse as a `type`: INVALID_ARGUMENT, with the field that is
// no UTF-8 if there is one. `omitted`: what is left out of field names, as "request." of a request in
// a request.
absl::Status WhyUnparsable(const google::protobuf::Descriptor& type, absl::string_view bytes,
                           absl::string_view omitted);

// From a handler's Deserialize() to its method, which gRPC calls with the same pointer.
class UnparsableRequests {
 public:
  void Put(const void* request, absl::Status why);
  std::optional<absl::Status> Take(const void* request);

 private:
  Mutex mutex_;
  std::unordered_map<const void*, absl::Status> why_ ABSL_GUARDED_BY(mutex_);
};

// Another reference to a call's message: parsing frees the first. There is none where the client went
// before it sent one.
class MessageBytes {
 public:
  explicit MessageBytes(grpc_byte_buffer* message)
      : bytes_(message == nullptr ? nullptr : grpc_byte_buffer_copy(message)) {}
  ~MessageBytes();
  MessageBytes(const MessageBytes&) = delete;
  MessageBytes& operator=(const MessageBytes&) = delete;
  // Valid as long as this is; empty if there is no message.
  absl::string_view Text();

 private:
  grpc_byte_buffer* const bytes_;
  grpc_slice whole_ = grpc_empty_slice();
};

template <typename Request, typename Response>
class CheckedUnaryHandler : public grpc::internal::MethodHandler {
 public:
  using Method = std::function<grpc::ServerUnaryReactor*(grpc::CallbackServerContext*, const Request*,
                                                         Response*)>;
  using Refuse =
      std::function<grpc::ServerUnaryReactor*(grpc::CallbackServerContext*, const absl::Status&)>;
  CheckedUnaryHandler(UnparsableRequests* unparsable, std::string omitted, Refuse refuse, Method method)
      : unparsable_(unparsable),
        omitted_(std::move(omitted)),
        handler_([unparsable, refuse = std::move(refuse), method = std::move(method)](
                     grpc::CallbackServerContext* context, const Request* request,
                     Response* response) {
          const std::optional<absl::Status> why = unparsable->Take(request);
          return why.has_value() ? refuse(context, *why) : method(context, request, response);
        }) {}

  void RunHandler(const HandlerParameter& parameter) final { handler_.RunHandler(parameter); }
  void* Deserialize(grpc_call* call, grpc_byte_buffer* message, grpc::Status* status,
                    void** handler_data) final {
    MessageBytes bytes(message);
    void* const parsed = handler_.Deserialize(call, message, status, handler_data);
    if (parsed != nullptr) return parsed;
    // Holds what was parsed before; nobody reads it.
    Request* const partly = static_cast<grpc::MessageHolder<Request, Response>*>(*handler_data)->request();
    unparsable_->Put(partly, WhyUnparsable(*Request::descriptor(), bytes.Text(), omitted_));
    *status = grpc::Status::OK;
    return partly;
  }

 private:
  UnparsableRequests* const unparsable_;
  const std::string omitted_;
  grpc::internal::CallbackUnaryHandler<Request, Response> handler_;
};

template <typename Request, typename Response>
class CheckedServerStreamingHandler : public grpc::internal::MethodHandler {
 public:
  using Reactor = grpc::ServerWriteReactor<Response>;
  using Method = std::function<Reactor*(grpc::CallbackServerContext*, const Request*)>;
  using Refuse = std::function<Reactor*(grpc::CallbackServerContext*, const absl::Status&)>;
  CheckedServerStreamingHandler(UnparsableRequests* unparsable, Refuse refuse, Method method)
      : unparsable_(unparsable),
        handler_([unparsable, refuse = std::move(refuse), method = std::move(method)](
                     grpc::CallbackServerContext* context, const Request* request) {
          const std::optional<absl::Status> why = unparsable->Take(request);
          return why.has_value() ? refuse(context, *why) : method(context, request);
        }) {}

  void RunHandler(const HandlerParameter& parameter) final { handler_.RunHandler(parameter); }
  void* Deserialize(grpc_call* call, grpc_byte_buffer* message, grpc::Status* status,
                    void** handler_data) final {
    MessageBytes bytes(message);
    void* const parsed = handler_.Deserialize(call, message, status, handler_data);
    if (parsed != nullptr) return parsed;
    // That message is gone: an empty one in its place.
    void* const empty =
        handler_.Deserialize(call, grpc_raw_byte_buffer_create(nullptr, 0), status, handler_data);
    unparsable_->Put(empty, WhyUnparsable(*Request::descriptor(), bytes.Text(), ""));
    return empty;
  }

 private:
  UnparsableRequests* const unparsable_;
  grpc::internal::CallbackServerStreamingHandler<Request, Response> handler_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_UNPARSABLE_SERVICE_H_
