// The subcommands that need no server.
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "common/device/device_factory.h"
#include "services/headroom/bench/bench.h"
#include "services/headroom/bench/geometries.h"
#include "services/headroom/commands.h"
#include "services/headroom/exit_code.h"
#include "services/headroom/plan.h"

namespace headroom::cli {

int PlanCommand(const std::vector<std::string>& args) {
  PlanOptions options;
  Flags flags("headroom plan",
              "Which keys would be attended where, what that takes of device and host memory, and "
              "what will not fit; and how long a step would take, from steps measured here. Serves "
              "nothing.",
              "Exit codes: 0 if all fits, 1 if something does not, 2 for wrong usage.");
  AddPlanFlags(flags, &options);
  if (const auto code = ParseOrExit("plan", args, flags)) return *code;
  if (options.model_dir.empty()) return MissingFlag("plan", "model");
  if (options.context_tokens == 0) return MissingFlag("plan", "context");
  if (options.gpu_memory_bytes == 0) return MissingFlag("plan", "gpu-memory");
  if (options.host_memory_bytes == 0) return MissingFlag("plan", "host-memory");
  options.product_type = ProductTypeOf(ChooseDevice(options.device));
  const absl::StatusOr<PlanReport> report = MakePlan(options, [](const PlanOptions& what) {
    BenchOptions bench;
    bench.model_dir = what.model_dir;
    bench.device = what.device;
    bench.threads = what.threads;
    bench.gpu_memory_bytes = what.gpu_memory_bytes;
    return MeasureLaneCosts(bench);
  });
  if (!report.ok()) {
    PrintError("plan", flags.sources().Explain(report.status()));
    return absl::IsResourceExhausted(report.status()) ? kExitFailed : kExitUsage;
  }
  const std::string text =
      options.json ? PlanAsJson(*report).Dump(2) + "\n" : PlanAsText(*report);
  std::fwrite(text.data(), 1, text.size(), stdout);
  return report->fits() ? kExitOk : kExitFailed;
}

int BenchCommand(const std::vector<std::string>& args) {
  BenchOptions options;
  Flags flags("headroom bench",
              "Measures prefill and decode of a model in this process, beside what the machine can "
              "do (GEMM, attention, reads, copies), measured in the same run.");
  flags.Group("What to measure");
  flags.Text("model", "DIR", &options.model_dir, "Folder of the model.");
  flags.Text("random-weights", "FILE", &options.random_weights,
             "Instead of --model: a config.json, whose weights are drawn on the device.");
  flags.Choice("geometry", GeometryNames(), &options.geometry,
               "Instead of --model: a published model's shape and options, with such weights.");
  flags.TextList("work", "ITEM", &options.work,
                 "prefill:CONTEXT[:LANE], beside:CONTEXT[:LANE] (the tokens of another sequence while "
                 "that context is prefilled), decode:CONTEXT[:LANE][:BATCH] or question:CONTEXT[:LANE] "
                 "(30 tokens behind a context), LANE resident or fetched, of the last two also in-place, "
                 "auto, or shares as --placement has them. May be given several times. Default: the "
                 "items of --set.");
  flags.Text("set", "NAME", &options.set,
             "A named set of items: default, prefill, decode; quick, 128k and million for a GPU; or "
             "plan, which sets what the planner predicts for --gpu-memory against what is measured.");
  flags.Integer("seed", &options.seed, 0, int64_t{1} << 62,
                "Draws random weights and one context of the set plan.");
  flags.Integer("repeat", &options.repeat, kMinBenchRepeats, kMaxBenchRepeats,
                "Measurements of each item; those of the set million are measured once.");
  flags.Integer("stop-after", &options.stop_after_seconds, 0, kMaxBenchStopAfterSeconds,
                "Seconds after the start from which on no chunk of a prefill begins. What came until "
                "then is reported, as cut off.",
                "never");
  flags.Group("Device");
  flags.Choice("device", {"auto", "cpu", "cuda"}, &options.device, "What computes.");
  flags.Integer("threads", &options.threads, 0, 1024,
                "Threads of the CPU device, and those that read and attend in host memory.",
                "as many as may run");
  flags.Bytes("gpu-memory", &options.gpu_memory_bytes,
              "Device memory for everything but, on cuda, up to 1.75 GiB that measure the machine.",
              "what is free less 1 GiB on cuda, weights and 2 GiB on cpu");
  flags.Integer("chunk-tokens", &options.chunk_tokens, 0, kMaxChunkTokens,
                "Longest chunk of a prefill, beside what the memory allows.",
                "8192 on cuda, 1024 on cpu");
  flags.Group("Output");
  flags.Text("json", "FILE", &options.json_path, "Writes one JSON object a line into this file.");
  flags.Text("trace", "FILE", &options.trace_path,
             "Appends what runs when on the device's streams, for ui.perfetto.dev. Operations are timed "
             "one by one for it, which costs time.");
  if (const auto code = ParseOrExit("bench", args, flags)) return *code;
  return RunBench(options, flags.sources());
}

}  // namespace headroom::cli
