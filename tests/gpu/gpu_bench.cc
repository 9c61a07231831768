// How fast the CUDA kernels are in Llama-3-8B's shapes, beside what the card can move in the same
// run: gpu_bench [copies|gemm|chain|decode|sdpa|prefill|small]. No model is needed: contents are random, but not
// zero.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tests/gpu/gpu_test_util.h"
#include "tests/gpu/require.h"
#include "tests/gpu/sdpa_bench.h"

namespace headroom {
namespace {

using kernels::BFloat16;

constexpr int64_t kHidden = 4096, kIntermediate = 14336, kVocab = 128256;
constexpr int32_t kQHeads = 32, kKvHeads = 8, kHeadDim = 128;
constexpr int64_t kQkvWidth = (kQHeads + 2 * kKvHeads) * kHeadDim;
constexpr int64_t kScratchFloats = int64_t{4} << 20;  // of a decode step: no more than kWideFloats
constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kMostRows = 8192;  // of an attention
constexpr kernels::WideShape kHeads = {kMostRows, kQHeads, kKvHeads, kHeadDim, 0, true};
constexpr int64_t kWideFloats = kernels::WideAttendScratchFloats(kHeads);

class Bench {
 public:
  Bench() {
    DeviceOptions options;
    options.kind = "cuda";
    options.memory_bytes = int64_t{14} << 30;
    auto device = CreateDevice(options);
    Require(device.status());
    device_ = *std::move(device);
    stream_ = device_->CreateStream("compute").value();
    event_ = device_->CreateEvent().value();
    std::printf("%s\n", std::string(device_->name()).c_str());
  }

  // All of it, or the part of this name.
  void Run(const std::string& part) {
    const struct {
      const char* name;
      void (Bench::*run)();
    } parts[] = {{"copies", &Bench::Copies},
                 {"gemm", &Bench::Gemms},
                 {"chain", &Bench::Chains},
                 {"decode", &Bench::Decodes},
                 {"sdpa", &Bench::Sdpas},
                 {"prefill", &Bench::Prefills},
                 {"small", &Bench::Small}};
    for (const auto& [name, run] : parts) {
      if (part.empty() || part == name) (this->*run)();
    }
  }

 private:
  uint8_t* Take(int64_t bytes) {
    auto memory = device_->Allocate(bytes, "bench");
    Require(memory.status());
    return *memory;
  }
  // bfloat16 or float32 in (-1, 1), one MiB over and over.
  template <typename T>
  T* Random(int64_t count) {
    std::vector<T> values(kMiB / sizeof(T));
    std::mt19937 random(1);
    for (T& value : values) {
      const float number = static_cast<float>(random()) * 0x1p-31f - 1.0f;
      if constexpr (sizeof(T) == 2) {
        value = kernels::ToBFloat16(number);
      } else {
        value = number;
      }
    }
    const int64_t bytes = count * static_cast<int64_t>(sizeof(T));
    uint8_t* const data = Take(bytes);
    for (int64_t at = 0; at < bytes; at += kMiB) {
      Require(device_->Upload(data + at, values.data(), std::min(kMiB, bytes - at)));
    }
    return reinterpret_cast<T*>(data);
  }

  // Microseconds of one of `work`'s runs; run(i) enqueues the i-th.
  double Time(const std::function<absl::Status(int)>& run) {
    const auto seconds = [&](int runs) {
      const auto begin = std::chrono::steady_clock::now();
      for (int i = 0; i < runs; ++i) Require(run(i));
      Require(device_->Record(stream_, event_));
      Require(device_->Synchronize(event_, absl::Minutes(1)));
      return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    };
    seconds(2);
    const int runs = static_cast<int>(std::clamp(0.1 / (seconds(2) / 2), 3.0, 200.0));
    double best = 1e9;
    for (int repeat = 0; repeat < 3; ++repeat) best = std::min(best, seconds(runs) / runs);
    return best * 1e6;
  }

  void Copies() {
    const int64_t bytes = 512 * kMiB;
    uint8_t* const a = Take(bytes);
    uint8_t* const b = Take(bytes);
    HostMemory host(bytes);
    std::fill_n(host.data(), bytes, 1);
    Require(device_->RegisterHost(host.data(), bytes));
    const auto copy = [&](uint8_t* to, const uint8_t* from, int64_t piece) {
      return Time([&, piece](int i) {
        CopyArgs args;
        args.dst = to + i * piece % bytes;
        args.src = from + i * piece % bytes;
        args.width_bytes = args.dst_pitch_bytes = args.src_pitch_bytes = piece;
        return device_->Copy(stream_, args);
      });
    };
    std::printf("device copy, read + written: %.0f GB/s\n", 2e-3 * bytes / copy(a, b, bytes));
    for (const int64_t piece : {kMiB, 16 * kMiB}) {
      std::printf("host to device, %d MiB pieces: %.1f GB/s\n", static_cast<int>(piece / kMiB),
                  1e-3 * piece / copy(a, host.data(), piece));
    }
    Require(device_->UnregisterHost(host.data()));
  }

  void Gemms() {
    const struct {
      const char* name;
      int64_t n, k;
    } layers[] = {{"qkv", kQkvWidth, kHidden},
                  {"output", kHidden, kHidden},
                  {"gate_up", 2 * kIntermediate, kHidden},
                  {"down", kHidden, kIntermediate},
                  {"lm_head", kVocab, kHidden}};
    const int64_t most_rows = 4096;
    BFloat16* const a = Random<BFloat16>(most_rows * kIntermediate);
    float* const c = reinterpret_cast<float*>(Take(most_rows * 2 * kIntermediate * 4));
    for (const auto& layer : layers) {
      // Several copies, so that the weights come from memory and not from the cache.
      const int64_t packed = device_->PackedBytes(layer.n, layer.k);
      const int copies = static_cast<int>(std::clamp<int64_t>(200 * kMiB / packed, 1, 8));
      std::vector<const BFloat16*> weights;
      for (int i = 0; i < copies; ++i) weights.push_back(Random<BFloat16>(packed / 2));
      std::printf("gemm %-8s", layer.name);
      for (const int64_t rows : {1, 16, 64, 512, 4096}) {
        if (layer.n == kVocab && rows > 256) continue;
        kernels::GemmArgs args;
        args.a = a;
        args.a_stride = layer.k;
        args.w = {nullptr, layer.n, layer.k};
        args.c = c;
        args.c_stride = layer.n;
        args.m = rows;
        const double us = Time([&](int i) {
          args.w.data = weights[static_cast<size_t>(i) % weights.size()];
          return device_->Gemm(stream_, args);
        });
        const double flops = 2.0 * static_cast<double>(rows * layer.n * layer.k);
        std::printf(" | %d rows %.1f us, %.0f GB/s, %.1f TFLOP/s", static_cast<int>(rows), us,
                    1e-3 * packed / us, 1e-6 * flops / us);
      }
      std::printf("\n");
    }
  }

  // A layer's products between two attentions, chained and one by one.
  void Chains() {
    constexpr int kLayers = 4;  // so that the weights come from memory
    BFloat16* const a = Random<BFloat16>(64 * kHidden);
    float* const x = Random<float>(64 * kHidden);
    auto* const qkv = reinterpret_cast<float*>(Take(64 * kQkvWidth * 4));
    auto* const normed = reinterpret_cast<BFloat16*>(Take(64 * kHidden * 2));
    auto* const gate_up = reinterpret_cast<BFloat16*>(Take(64 * 2 * kIntermediate * 2));
    auto* const activated = reinterpret_cast<BFloat16*>(Take(64 * kIntermediate * 2));
    const BFloat16* const norm_weight = Random<BFloat16>(kHidden);
    const int64_t shapes[][2] = {
        {kHidden, kHidden}, {2 * kIntermediate, kHidden}, {kHidden, kIntermediate}, {kQkvWidth, kHidden}};
    const BFloat16* weights[kLayers][4];
    int64_t bytes = 0;
    for (int layer = 0; layer < kLayers; ++layer) {
      bytes = 0;
      for (int i = 0; i < 4; ++i) {
        const int64_t packed = device_->PackedBytes(shapes[i][0], shapes[i][1]);
        weights[layer][i] = Random<BFloat16>(packed / 2);
        bytes += packed;
      }
    }
    for (const int64_t rows : {1, 2, 4, 8, 9, 16, 32}) {
      std::vector<kernels::ChainOp> layers[kLayers];
      for (int layer = 0; layer < kLayers; ++layer) {
        const auto product = [&](int i, const BFloat16* in, kernels::Activations out) {
          kernels::GemmArgs gemm;
          gemm.a = in;
          gemm.a_stride = shapes[i][1];
          gemm.w = {weights[layer][i], shapes[i][0], shapes[i][1]};
          gemm.c = out;
          gemm.c_stride = shapes[i][0];
          gemm.m = rows;
          gemm.accumulate = out.data == x;
          return gemm;
        };
        kernels::RmsNormArgs norm;
        norm.x = x;
        norm.x_rows = norm.rows = rows;
        norm.weight = norm_weight;
        norm.out = normed;
        norm.hidden = kHidden;
        norm.epsilon = 1e-5f;
        kernels::GatedGemmArgs gated;
        gated.gemm = product(1, normed, gate_up);
        gated.swiglu = {gate_up, activated, rows, kIntermediate};
        layers[layer] = {product(0, a, x),         norm, gated,
                         product(2, activated, x), norm, product(3, normed, qkv)};
      }
      const auto time = [&](size_t at_once) {
        return Time([&](int i) {
          const absl::Span<const kernels::ChainOp> ops = layers[i % kLayers];
          for (size_t at = 0; at < ops.size(); at += at_once) {
            if (absl::Status status = device_->Chain(stream_, ops.subspan(at, at_once)); !status.ok()) {
              return status;
            }
          }
          return absl::OkStatus();
        });
      };
      const double chained = time(6), in_two = time(4), alone = time(1);
      std::printf("a layer's products, %d rows: %.1f us, %.0f GB/s; in two chains %.1f us; one by one %.1f\n",
                  static_cast<int>(rows), chained, 1e-3 * static_cast<double>(bytes) / chained, in_two,
                  alone);
    }
  }

  // Microseconds of the rows at the end of `keys` keys, all in one place; of several sequences in one
  // launch, one for each number of keys.
  double Attend(int64_t rows, const std::vector<int64_t>& keys, int64_t scratch_floats,
                int64_t window = 0) {
    if (q_ == nullptr) {
      const int64_t queries = kMostRows * kQHeads;
      q_ = Random<float>(queries * kHeadDim);
      state_ = reinterpret_cast<float*>(
          Take(queries * kernels::AttentionStateFloats(kHeadDim) * 4));
      out_ = reinterpret_cast<float*>(Take(queries * kHeadDim * 4));
      scratch_ = reinterpret_cast<float*>(Take(kWideFloats * 4));
      keys_ = Random<BFloat16>(131072 * kKvHeads * kHeadDim * 2);
      tables_ = Take(4096);
    }
    std::vector<kernels::KvSpan> spans;
    std::vector<kernels::AttendItem> items;
    for (const int64_t its_keys : keys) {
      kernels::AttendItem item;
      item.row_begin = static_cast<int32_t>(rows * static_cast<int64_t>(items.size()));
      item.row_count = static_cast<int32_t>(rows);
      item.first_pos = its_keys - rows;
      item.kv_head_end = kKvHeads;
      item.span_begin = static_cast<int32_t>(spans.size());
      item.span_count = item.reset = item.finish = 1;
      items.push_back(item);
      spans.push_back({reinterpret_cast<uint8_t*>(keys_), 0, 0, static_cast<int32_t>(its_keys),
                       static_cast<int32_t>(its_keys), 0, kKvHeads});
    }
    Require(device_->Upload(tables_, spans.data(),
                            static_cast<int64_t>(spans.size() * sizeof(spans[0]))));
    Require(device_->Upload(tables_ + 1024, items.data(),
                            static_cast<int64_t>(items.size() * sizeof(items[0]))));
    kernels::AttendArgs args;
    args.q = q_;
    args.q_stride = kQHeads * kHeadDim;
    args.state = state_;
    args.out = out_;
    const auto count = static_cast<int32_t>(items.size());
    args.rows = rows * count;
    args.items = {reinterpret_cast<kernels::AttendItem*>(tables_ + 1024), items.data(), count};
    args.spans = {reinterpret_cast<kernels::KvSpan*>(tables_), spans.data(), count};
    args.scratch = scratch_;
    args.scratch_floats = scratch_floats;
    args.scale = 0.088f;
    args.num_q_heads = kQHeads;
    args.num_kv_heads = kKvHeads;
    args.head_dim = kHeadDim;
    args.window = window;
    return Time([&](int) { return device_->Attend(stream_, args); });
  }

  void Decodes() {
    for (const int64_t keys : {1024, 8192, 32768, 131072}) {
      const double us = Attend(1, {keys}, kScratchFloats);
      std::printf("attention, 1 row on %d keys: %.1f us, %.0f GB/s\n", static_cast<int>(keys), us,
                  1e-3 * static_cast<double>(keys * kKvHeads * kHeadDim * 4) / us);
    }
    std::vector<int64_t> ragged(16, 1024);
    ragged[0] = 131072;
    std::printf("attention, 1 row on 131072 keys beside 15 on 1024: %.1f us\n",
                Attend(1, ragged, kScratchFloats));
  }
  // Our own kernels, and cuDNN's plans with all that is around them.
  void Prefills() {
    const auto prefill = [this](const char* by, int64_t rows, int64_t keys, int64_t floats,
                                int64_t window = 0) {
      const double us = Attend(rows, {keys}, floats, window);
      const double seen = static_cast<double>(keys) - static_cast<double>(rows) / 2;
      const double pairs = static_cast<double>(rows) *
                           (window == 0 ? seen : std::min(seen, static_cast<double>(window)));
      std::printf("attention by %s, %d rows on %d keys, window %d: %.0f us, %.1f TFLOP/s\n", by,
                  static_cast<int>(rows), static_cast<int>(keys), static_cast<int>(window), us,
                  4e-6 * pairs * kQHeads * kHeadDim / us);
    };
    constexpr int64_t kWindows[] = {512, 1024, 2048, 4096, 5000};
    for (const int64_t keys : {4096, 32768}) {
      prefill("our kernels", 4096, keys, kernels::kMinAttendScratchFloats);
    }
    for (const int64_t window : kWindows) {
      prefill("our kernels", 8192, 32768, kernels::kMinAttendScratchFloats, window);
    }
    const auto begin = std::chrono::steady_clock::now();
    if (const absl::Status ready = device_->PrepareWideAttend(kHeads, scratch_, kWideFloats);
        !ready.ok()) {
      std::printf("attention by cuDNN: %s\n", ready.ToString().c_str());
      return;
    }
    std::printf("attention by cuDNN: %d plans in %.2f s\n",
                static_cast<int>(device_->wide_attend_use().plans_built),
                std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    for (const int64_t rows : {256, 1024, 4096, 8192}) {
      for (const int64_t past : {0, 24576, 122880}) {
        prefill("cuDNN", rows, rows + past, kWideFloats);
      }
    }
    for (const int64_t window : kWindows) prefill("cuDNN", 8192, 32768, kWideFloats, window);
  }

  // The plans of the families' heads.
  void Sdpas() {
    constexpr kernels::WideShape kFamilies[] = {{8192, 32, 8, 128},       // Llama-3-8B, Mistral-7B
                                                {8192, 32, 32, 128},      // Llama-2-7B
                                                {8192, 28, 4, 128},       // Qwen2-7B
                                                {8192, 16, 8, 256, 50}};  // Gemma-2-9B
    int64_t floats = 0;
    for (const auto& shape : kFamilies) {
      floats = std::max(floats, kernels::WideAttendScratchFloats(shape));
    }
    uint8_t* const scratch = Take(floats * 4);
    for (const auto& shape : kFamilies) BenchSdpa(shape, scratch);
  }

  void Small() {
    Attend(1, {1024}, kScratchFloats);  // whose buffers it uses
    kernels::RmsNormArgs norm;
    norm.x = q_;
    norm.x_rows = norm.rows = 1;
    norm.weight = keys_;
    norm.out = out_;
    norm.hidden = kHidden;
    norm.epsilon = 1e-5f;
    std::printf("norm of 1 row, one after the other: %.2f us\n",
                Time([&](int) { return device_->RmsNorm(stream_, norm); }));
    const struct {
      const char* name;
      float temperature, top_p;
      int32_t top_k, top_logprobs;
    } ways[] = {{"greedy", 0, 1, 0, 0},
                {"of all", 1, 1, 0, 0},
                {"top-p", 1, 0.9f, 0, 0},
                {"top-k and top-p", 1, 0.9f, 50, 0},
                {"greedy with 20 log-probabilities", 0, 1, 0, 20}};
    for (const auto& way : ways) {
      kernels::SampleRow row;
      row.temperature = way.temperature;
      row.top_p = way.top_p;
      row.top_k = way.top_k;
      row.num_top_logprobs = way.top_logprobs;
      const std::vector<kernels::SampleRow> rows = {row};
      Require(device_->Upload(tables_, rows.data(), sizeof(row)));
      kernels::SampleArgs sample;
      sample.logits = q_;
      sample.rows = {reinterpret_cast<kernels::SampleRow*>(tables_), rows.data(), 1};
      sample.results = reinterpret_cast<kernels::SampleResult*>(tables_ + 2048);
      sample.num_results = 1;
      sample.last_tokens = reinterpret_cast<int32_t*>(tables_ + 3072);
      sample.num_slots = 1;
      sample.vocab = kVocab;
      sample.scratch = scratch_;
      std::printf("sampling 1 row, %s: %.1f us\n", way.name,
                  Time([&](int) { return device_->Sample(stream_, sample); }));
    }
  }

  std::unique_ptr<Device> device_;
  StreamId stream_;
  EventId event_;
  float *q_ = nullptr, *state_ = nullptr, *out_ = nullptr, *scratch_ = nullptr;
  BFloat16* keys_ = nullptr;
  uint8_t* tables_ = nullptr;
};

}  // namespace
}  // namespace headroom

int main(int argc, char** argv) { headroom::Bench().Run(argc > 1 ? argv[1] : ""); }
