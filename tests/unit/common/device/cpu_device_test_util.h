// A CPU device for tests, with streams, registered memory and a mailbox.
#ifndef HEADROOM_TESTS_UNIT_COMMON_DEVICE_CPU_DEVICE_TEST_UTIL_H_
#define HEADROOM_TESTS_UNIT_COMMON_DEVICE_CPU_DEVICE_TEST_UTIL_H_

#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "common/device/cpu/cpu_device.h"
#include "common/segment/mailbox.h"

namespace headroom {

inline constexpr int64_t kArenaBytes = 1 << 20;
inline constexpr int64_t kHostBytes = 64 << 10;
inline constexpr absl::Duration kSoon = absl::Seconds(60);

#define ASSERT_OK(expression)                                \
  do {                                                       \
    const absl::Status assert_ok_status = (expression);      \
    ASSERT_TRUE(assert_ok_status.ok()) << assert_ok_status;  \
  } while (false)
#define EXPECT_OK(expression)                                \
  do {                                                       \
    const absl::Status expect_ok_status = (expression);      \
    EXPECT_TRUE(expect_ok_status.ok()) << expect_ok_status;  \
  } while (false)

template <typename T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    ADD_FAILURE() << value.status();
    std::abort();
  }
  return *std::move(value);
}

inline CopyArgs Plain(void* dst, const void* src, int64_t bytes) {
  return {.dst = dst, .dst_pitch_bytes = bytes, .src = src, .src_pitch_bytes = bytes,
          .width_bytes = bytes};
}

inline bool Says(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  return status.code() == code && std::string(status.message()).find(part) != std::string::npos;
}

inline std::unique_ptr<Device> MakeDevice(int64_t arena_bytes = kArenaBytes,
                                   std::optional<uint64_t> delay_seed = std::nullopt) {
  CpuDeviceOptions options;
  options.arena_bytes = arena_bytes;
  options.compute_threads = 2;
  options.delay_seed = delay_seed;
  return Must(CreateCpuDevice(options));
}

// A device with two streams and registered host memory: numbers 0, 1, 2 ... to copy from, zeros to
// copy to, a mailbox, and another one whose answer holds a stream back until it comes.
class CpuDeviceTest : public testing::Test {
 protected:
  CpuDeviceTest() : device_(MakeDevice()) {
    std::iota(from_.begin(), from_.end(), uint32_t{0});
    EXPECT_OK(device_->RegisterHost(from_.data(), kHostBytes));
    EXPECT_OK(device_->RegisterHost(to_.data(), kHostBytes));
    EXPECT_OK(device_->RegisterHost(&words_, sizeof(words_)));
    compute_ = Must(device_->CreateStream("compute"));
    copy_ = Must(device_->CreateStream("copy"));
  }
  ~CpuDeviceTest() override { Open(); }

  // Later work of `stream` waits for Open().
  void HoldBack(StreamId stream) {
    ASSERT_OK(device_->AwaitPartials(stream, {.mailbox = &words_.gate_header,
                                              .slot = &words_.gate,
                                              .count = 1,
                                              .deadline_us = absl::ToInt64Microseconds(kSoon),
                                              .status = &words_.gate_status}));
  }
  void Open() { RingAnswered(words_.gate, 1); }

  // Records an event at the end of `stream` and waits for it.
  void Drain(StreamId stream) {
    const EventId event = Must(device_->CreateEvent());
    ASSERT_OK(device_->Record(stream, event));
    ASSERT_OK(device_->Synchronize(event, kSoon));
  }
  // Whether the event fires in a time in which an unordered one would have.
  bool StaysPending(EventId event) {
    absl::SleepFor(absl::Milliseconds(30));
    return !device_->Done(event);
  }

  // A wait for `count` answers, of which the last must bear the tag that Answer() gives it.
  kernels::AwaitPartialsArgs Await(uint64_t count, absl::Duration deadline = kSoon) {
    kernels::AwaitPartialsArgs args;
    args.mailbox = &words_.header;
    args.slot = &words_.slot;
    args.count = count;
    args.generation = 3;
    args.step = 5;
    args.attempt = 7;
    args.layer = 11;
    args.deadline_us = absl::ToInt64Microseconds(deadline);
    args.status = &words_.status;
    return args;
  }
  // As a store answers; `lie` changes what the answer says.
  void Answer(uint64_t count, const std::function<void(MailboxAnswer&)>& lie = nullptr) {
    MailboxAnswer answer = {};
    answer.generation = 3;
    answer.step = 5;
    answer.attempt = 7;
    answer.layer = 11;
    if (lie) lie(answer);
    words_.slot.answer = answer;
    RingAnswered(words_.slot, count);
  }
  // A mailbox as it is when it has been made.
  void ResetMailbox() {
    words_.slot.posted.store(0);
    words_.slot.answered.store(0);
    words_.header.retired.store(0);
    words_.status.store(0);
  }

  struct Words {
    MailboxHeader gate_header = {};
    MailboxSlot gate = {};
    MailboxHeader header = {};
    MailboxSlot slot = {};
    std::atomic<uint32_t> gate_status{0};
    std::atomic<uint32_t> status{0};
    std::atomic<uint32_t> other_status{0};
  };
  Words words_;
  std::vector<uint32_t> from_ = std::vector<uint32_t>(kHostBytes / sizeof(uint32_t));
  std::vector<uint32_t> to_ = std::vector<uint32_t>(kHostBytes / sizeof(uint32_t));
  std::unique_ptr<Device> device_;
  StreamId compute_;
  StreamId copy_;
};

}  // namespace headroom

#endif  // HEADROOM_TESTS_UNIT_COMMON_DEVICE_CPU_DEVICE_TEST_UTIL_H_
