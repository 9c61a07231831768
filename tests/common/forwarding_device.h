// A device that passes everything on to another: tests override what they want to see or spoil.
#ifndef HEADROOM_TESTS_COMMON_FORWARDING_DEVICE_H_
#define HEADROOM_TESTS_COMMON_FORWARDING_DEVICE_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "common/device/device.h"

namespace headroom {

class ForwardingDevice : public Device {
 public:
  explicit ForwardingDevice(std::unique_ptr<Device> device) : device_(std::move(device)) {}

  absl::string_view name() const override { return device_->name(); }
  absl::StatusOr<uint8_t*> Allocate(int64_t bytes, absl::string_view what) override {
    return device_->Allocate(bytes, what);
  }
  ArenaUse arena_use() const override { return device_->arena_use(); }
  absl::Status RegisterHost(void* data, int64_t bytes) override {
    return device_->RegisterHost(data, bytes);
  }
  absl::Status UnregisterHost(void* data) override { return device_->UnregisterHost(data); }
  absl::Status GatedGemm(StreamId stream, const kernels::GatedGemmArgs& args) override {
    return device_->GatedGemm(stream, args);
  }
  kernels::ElementType product_type() const override { return device_->product_type(); }
  absl::Status PrepareGemm(int64_t n, int64_t k) override { return device_->PrepareGemm(n, k); }
  int64_t PackedBytes(int64_t n, int64_t k) const override { return device_->PackedBytes(n, k); }
  absl::Status LoadWeightRows(const kernels::BFloat16* rows_data, int64_t row_begin, int64_t rows,
                              int64_t n, int64_t k, uint8_t* packed) override {
    return device_->LoadWeightRows(rows_data, row_begin, rows, n, k, packed);
  }
  absl::Status FillRandom(const kernels::FillRandomArgs& args) override {
    return device_->FillRandom(args);
  }
  absl::Status Upload(uint8_t* dst, const void* src, int64_t bytes) override {
    return device_->Upload(dst, src, bytes);
  }
  absl::StatusOr<StreamId> CreateStream(absl::string_view name) override {
    return device_->CreateStream(name);
  }
  absl::StatusOr<EventId> CreateEvent() override { return device_->CreateEvent(); }
  absl::Status Record(StreamId stream, EventId event) override {
    return device_->Record(stream, event);
  }
  absl::Status Wait(StreamId stream, EventId event, OpAccount* account) override {
    return device_->Wait(stream, event, account);
  }
  absl::Status Synchronize(EventId event, absl::Duration timeout) override {
    return device_->Synchronize(event, timeout);
  }
  bool Done(EventId event) override { return device_->Done(event); }
  absl::Status Copy(StreamId stream, const CopyArgs& args, OpAccount* account) override {
    return device_->Copy(stream, args, account);
  }
  absl::Status PostQueries(StreamId stream, const kernels::PostQueriesArgs& args) override {
    return device_->PostQueries(stream, args);
  }
  absl::Status MergePartials(StreamId stream, const kernels::MergePartialsArgs& args) override {
    return device_->MergePartials(stream, args);
  }
  absl::Status AwaitPartials(StreamId stream, const kernels::AwaitPartialsArgs& args,
                             OpAccount* account) override {
    return device_->AwaitPartials(stream, args, account);
  }
  absl::Status Embed(StreamId stream, const kernels::EmbedArgs& args) override {
    return device_->Embed(stream, args);
  }
  absl::Status RmsNorm(StreamId stream, const kernels::RmsNormArgs& args) override {
    return device_->RmsNorm(stream, args);
  }
  absl::Status Gemm(StreamId stream, const kernels::GemmArgs& args) override {
    return device_->Gemm(stream, args);
  }
  absl::Status SwiGlu(StreamId stream, const kernels::SwiGluArgs& args) override {
    return device_->SwiGlu(stream, args);
  }
  absl::Status RopeTable(StreamId stream, const kernels::RopeTableArgs& args) override {
    return device_->RopeTable(stream, args);
  }
  absl::Status RopeAppend(StreamId stream, const kernels::RopeAppendArgs& args) override {
    return device_->RopeAppend(stream, args);
  }
  absl::Status Chain(StreamId stream, absl::Span<const kernels::ChainOp> ops) override {
    return device_->Chain(stream, ops);
  }
  absl::Status PrepareWideAttend(const kernels::WideShape& shape, float* scratch,
                                 int64_t scratch_floats) override {
    return device_->PrepareWideAttend(shape, scratch, scratch_floats);
  }
  WideAttendUse wide_attend_use() const override { return device_->wide_attend_use(); }
  int64_t plans_built() const override { return device_->plans_built(); }
  absl::Status Attend(StreamId stream, const kernels::AttendArgs& args,
                      OpAccount* account) override {
    return device_->Attend(stream, args, account);
  }
  absl::Status CopyKvRows(StreamId stream, const kernels::CopyKvRowsArgs& args,
                          OpAccount* account) override {
    return device_->CopyKvRows(stream, args, account);
  }
  absl::Status SoftCap(StreamId stream, const kernels::SoftCapArgs& args) override {
    return device_->SoftCap(stream, args);
  }
  absl::Status Sample(StreamId stream, const kernels::SampleArgs& args) override {
    return device_->Sample(stream, args);
  }
  absl::Status BeginRecording(StreamId stream) override { return device_->BeginRecording(stream); }
  absl::StatusOr<RecordingId> EndRecording(StreamId stream) override {
    return device_->EndRecording(stream);
  }
  absl::Status Replay(StreamId stream, RecordingId recording) override {
    return device_->Replay(stream, recording);
  }
  absl::Status status() const override { return device_->status(); }

 private:
  const std::unique_ptr<Device> device_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_FORWARDING_DEVICE_H_
