// Calls whose message does not parse, or is not worth it. gRPC ends the former with UNIMPLEMENTED and not a
// word; these handlers, around gRPC's own, say which field is wrong. Most often it is a text that is not
// UTF-8: protobuf refuses it while parsing, though clients in C++ send it.
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

// What is wrong with a message of more than `most` bytes: INVALID_ARGUMENT with the field that has most of
// them, of a message in a message its own, repeated ones counted together.
absl::Status WhyTooLong(const google::protobuf::Descriptor& type, absl::string_view bytes,
                        absl::string_view omitted, int64_t most);

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
  int64_t size() const { return bytes_ == nullptr ? 0 : grpc_byte_buffer_length(bytes_); }
  // Valid as long as this is; empty if there is no message.
  absl::string_view Text();
  // An empty message in the place of `message`, which is freed.
  static grpc_byte_buffer* Emptied(grpc_byte_buffer* message);

 private:
  grpc_byte_buffer* const bytes_;
  grpc_slice whole_ = grpc_empty_slice();
};

// The most bytes that a message which is taken can have; what is longer is not parsed. Null: no matter.
using MostBytes = std::function<int64_t()>;

template <typename Request, typename Response>
class CheckedUnaryHandler : public grpc::internal::MethodHandler {
 public:
  using Method = std::function<grpc::ServerUnaryReactor*(grpc::CallbackServerContext*, const Request*,
                                                         Response*)>;
  using Refuse =
      std::function<grpc::ServerUnaryReactor*(grpc::CallbackServerContext*, const absl::Status&)>;
  CheckedUnaryHandler(UnparsableRequests* unparsable, std::string omitted, MostBytes most_bytes,
                      Refuse refuse, Method method)
      : unparsable_(unparsable),
        omitted_(std::move(omitted)),
        most_bytes_(std::move(most_bytes)),
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
    const int64_t most = most_bytes_ == nullptr ? bytes.size() : most_bytes_();
    const bool parse = bytes.size() <= most;
    if (!parse) message = MessageBytes::Emptied(message);
    void* const parsed = handler_.Deserialize(call, message, status, handler_data);
    if (parse && parsed != nullptr) return parsed;
    // Holds what was parsed before, if anything; nobody reads it.
    Request* const partly = static_cast<grpc::MessageHolder<Request, Response>*>(*handler_data)->request();
    const google::protobuf::Descriptor& type = *Request::descriptor();
    unparsable_->Put(partly, parse ? WhyUnparsable(type, bytes.Text(), omitted_)
                                   : WhyTooLong(type, bytes.Text(), omitted_, most));
    *status = grpc::Status::OK;
    return partly;
  }

 private:
  UnparsableRequests* const unparsable_;
  const std::string omitted_;
  const MostBytes most_bytes_;
  grpc::internal::CallbackUnaryHandler<Request, Response> handler_;
};

template <typename Request, typename Response>
class CheckedServerStreamingHandler : public grpc::internal::MethodHandler {
 public:
  using Reactor = grpc::ServerWriteReactor<Response>;
  using Method = std::function<Reactor*(grpc::CallbackServerContext*, const Request*)>;
  using Refuse = std::function<Reactor*(grpc::CallbackServerContext*, const absl::Status&)>;
  CheckedServerStreamingHandler(UnparsableRequests* unparsable, MostBytes most_bytes, Refuse refuse,
                                Method method)
      : unparsable_(unparsable),
        most_bytes_(std::move(most_bytes)),
        handler_([unparsable, refuse = std::move(refuse), method = std::move(method)](
                     grpc::CallbackServerContext* context, const Request* request) {
          const std::optional<absl::Status> why = unparsable->Take(request);
          return why.has_value() ? refuse(context, *why) : method(context, request);
        }) {}

  void RunHandler(const HandlerParameter& parameter) final { handler_.RunHandler(parameter); }
  void* Deserialize(grpc_call* call, grpc_byte_buffer* message, grpc::Status* status,
                    void** handler_data) final {
    MessageBytes bytes(message);
    const google::protobuf::Descriptor& type = *Request::descriptor();
    const int64_t most = most_bytes_ == nullptr ? bytes.size() : most_bytes_();
    absl::Status why;
    if (bytes.size() > most) {
      why = WhyTooLong(type, bytes.Text(), "", most);
      message = MessageBytes::Emptied(message);
    } else {
      void* const parsed = handler_.Deserialize(call, message, status, handler_data);
      if (parsed != nullptr) return parsed;
      why = WhyUnparsable(type, bytes.Text(), "");
      message = MessageBytes::Emptied(nullptr);  // that message is gone
    }
    void* const empty = handler_.Deserialize(call, message, status, handler_data);
    unparsable_->Put(empty, std::move(why));
    return empty;
  }

 private:
  UnparsableRequests* const unparsable_;
  const MostBytes most_bytes_;
  grpc::internal::CallbackServerStreamingHandler<Request, Response> handler_;
};

}  // namespace headroom::coordinator

#endif  // HEADROOM_SERVICES_COORDINATOR_UNPARSABLE_SERVICE_H_
