#include "tests/common/worker_harness.h"

#include <stdlib.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/device/device_factory.h"
#include "common/segment_format.h"
#include "common/status.h"

namespace headroom {
namespace {

constexpr absl::Duration kStepTimeout = absl::Minutes(1);

// On a GPU host the same tests run on the GPU.
std::string TestDevice() {
  const char* const kind = std::getenv("HEADROOM_TEST_DEVICE");
  return kind != nullptr ? kind : "cpu";
}

}  // namespace

bool OnGpu() { return ChooseDevice(TestDevice()) != "cpu"; }

absl::StatusOr<std::unique_ptr<RandomModelFolder>> RandomModelFolder::Create(
    const RandomModelSpec& spec) {
  std::string path = (std::filesystem::temp_directory_path() / "headroom-model-XXXXXX").string();
  if (mkdtemp(path.data()) == nullptr) {
    return absl::InternalError(absl::StrCat("no temporary folder ", path));
  }
  auto folder = std::unique_ptr<RandomModelFolder>(new RandomModelFolder(path));
  HEADROOM_RETURN_IF_ERROR(WriteRandomModel(spec, path));
  return folder;
}

RandomModelFolder::~RandomModelFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

RandomModelSpec SmallModel(int64_t q_heads, int64_t kv_heads, int64_t head_dim) {
  RandomModelSpec spec;
  spec.num_layers = 3;
  spec.hidden_size = 96;
  spec.num_q_heads = q_heads;
  spec.num_kv_heads = kv_heads;
  spec.head_dim = head_dim;
  spec.intermediate_size = 136;
  spec.vocab_size = 211;
  return spec;
}

// ---------------------------------------------------------------- plans

Plan WholeHeadPlan(uint64_t version, const KvGeometry& geometry, const LaneOfHead& lane) {
  Plan plan;
  plan.version = version;
  plan.layers.resize(geometry.num_layers);
  for (int32_t layer = 0; layer < geometry.num_layers; ++layer) {
    for (int32_t head = 0; head < geometry.num_kv_heads; ++head) {
      plan.layers[layer].push_back({lane(layer, head), head, head + 1});
    }
  }
  return plan;
}

Plan ResidentPlan(uint64_t version, const KvGeometry& geometry) {
  return WholeHeadPlan(version, geometry, [](int32_t, int32_t) { return Lane::kResident; });
}

Plan FetchedPlan(uint64_t version, const KvGeometry& geometry) {
  return WholeHeadPlan(version, geometry, [](int32_t, int32_t) { return Lane::kFetched; });
}

Plan InPlacePlan(uint64_t version, const KvGeometry& geometry) {
  return WholeHeadPlan(version, geometry, [](int32_t, int32_t) { return Lane::kInPlace; });
}

Plan SplitHeadPlan(uint64_t version, const KvGeometry& geometry, int32_t kv_head, int64_t border,
                   Lane below, Lane above) {
  Plan plan = WholeHeadPlan(version, geometry, [&](int32_t, int32_t head) {
    return head < kv_head ? Lane::kResident : head > kv_head ? Lane::kFetched : below;
  });
  for (std::vector<LaneRange>& ranges : plan.layers) {
    ranges[kv_head].end_pos = border;
    LaneRange rest = ranges[kv_head];
    rest.lane = above;
    rest.first_pos = border;
    rest.end_pos = std::numeric_limits<int64_t>::max();
    ranges.push_back(rest);
  }
  return plan;
}

// ---------------------------------------------------------------- construction

absl::StatusOr<std::unique_ptr<WorkerHarness>> WorkerHarness::Create(
    const std::string& model_dir, const WorkerHarnessOptions& options) {
  auto harness = std::unique_ptr<WorkerHarness>(new WorkerHarness());
  WorkerHarness& h = *harness;
  HEADROOM_ASSIGN_OR_RETURN(h.config_, ReadModelConfig(model_dir));
  DeviceOptions device;
  device.kind = TestDevice();
  device.memory_bytes = options.budget_bytes;
  device.compute_threads = options.compute_threads;
  device.delay_seed = options.delay_seed;
  HEADROOM_ASSIGN_OR_RETURN(h.device_, CreateDevice(device));
  if (options.wrap_device) h.device_ = options.wrap_device(std::move(h.device_));
  // As the worker does: a CUDA device of 512 MiB and more has 32 MiB less, cuBLASLt's workspace.
  HEADROOM_ASSIGN_OR_RETURN(
      h.budget_, DivideBudget(h.config_, WeightBytes(h.config_, *h.device_),
                              h.device_->arena_use().free_bytes(), options.chunk_limit_tokens,
                              options.max_context_tokens, h.device_->product_type()));
  if (options.ring_bytes > 0) {
    if (options.ring_bytes > h.budget_.ring_bytes) {
      return absl::InvalidArgumentError("the ring cannot be larger than the budget's");
    }
    h.budget_.ring_bytes = options.ring_bytes;
    h.budget_.max_tile_bytes = options.ring_bytes / kNumContexts / 2;
  }
  if (options.kv_pool_bytes > 0) {
    if (options.kv_pool_bytes > h.budget_.kv_pool_bytes) {
      return absl::InvalidArgumentError("the KV pool cannot be larger than the budget's");
    }
    h.budget_.kv_pool_bytes = options.kv_pool_bytes;
  }
  HEADROOM_ASSIGN_OR_RETURN(h.weights_,
                            LoadWeights(model_dir, h.config_, *h.device_, [](double) {}));
  StepExecutorOptions executor;
  executor.max_sequences = options.max_sequences;
  executor.step_timeout = kStepTimeout;
  executor.in_place_deadline = options.in_place_deadline;
  HEADROOM_ASSIGN_OR_RETURN(
      h.executor_,
      StepExecutor::Create(*h.device_, h.config_, h.weights_, h.budget_, executor,
                           [&h](std::unique_ptr<Step> step) {
                             MutexLock lock(&h.mutex_);
                             h.done_.push_back(std::move(step));
                             h.ended_.SignalAll();
                           }));
  h.segment_.resize(options.segment_bytes);
  HEADROOM_RETURN_IF_ERROR(h.device_->RegisterHost(h.segment_.data(), options.segment_bytes));
  HEADROOM_RETURN_IF_ERROR(
      h.executor_->AttachSegment({h.segment_.data(), options.segment_bytes}));
  if (options.attend_threads > 0) {
    HEADROOM_RETURN_IF_ERROR(h.OpenInPlace(options.attend_threads, options.attend_as_for_gpu));
  }
  return harness;
}

// The device may still read the segment.
WorkerHarness::~WorkerHarness() {
  executor_.reset();
  device_.reset();
  pool_.reset();
  std::error_code ignored;
  if (!mailbox_dir_.empty()) std::filesystem::remove_all(mailbox_dir_, ignored);
}

absl::Status WorkerHarness::OpenInPlace(int attend_threads, bool as_for_gpu) {
  if (mailbox_dir_.empty()) {
    mailbox_dir_ = "/dev/shm/headroom-mailbox-XXXXXX";  // a GPU registers no file of a disk
    if (mkdtemp(mailbox_dir_.data()) == nullptr) return absl::InternalError("no temporary folder");
  }
  MailboxShape shape =
      MailboxShapeOf(config_, budget_, device_->name() == "cpu" && !as_for_gpu);
  shape.generation = ++mailboxes_;
  HEADROOM_ASSIGN_OR_RETURN(mailbox_,
                            Mailbox::Create(mailbox_dir_, MailboxFile(mailboxes_, 1), shape));
  const kernels::cpu::TileAttention* tiles = kernels::cpu::BestTileAttention();
  if (as_for_gpu && tiles == nullptr) tiles = &kernels::cpu::kPortableTileAttention;
  pool_ = std::make_unique<kvstore::AttendPool>(
      segment_.data(), [this] { return static_cast<int64_t>(segment_.size()); }, attend_threads,
      kvstore::AttendPool::Patience(), tiles);
  // One mapping for both ends, so that ThreadSanitizer sees what orders them.
  pool_->Attach(mailbox_);
  return executor_->SetMailbox(mailbox_);
}

// ---------------------------------------------------------------- steps by hand

absl::Status WorkerHarness::Submit(std::unique_ptr<Step> step) {
  if (step->number == 0) step->number = next_step_number_++;
  return executor_->Submit(std::move(step));
}

std::unique_ptr<Step> WorkerHarness::Await() {
  MutexLock lock(&mutex_);
  const absl::Time deadline = absl::Now() + kStepTimeout;
  while (done_.empty()) {
    if (absl::Now() > deadline) return nullptr;
    ended_.WaitFor(&mutex_, absl::Seconds(1));
  }
  return done_.pop_front();
}

std::unique_ptr<Step> WorkerHarness::RunStep(std::unique_ptr<Step> step) {
  auto result = std::make_unique<Step>();
  result->result.status = Submit(std::move(step));
  if (!result->result.status.ok()) return result;
  result->result.status = absl::DeadlineExceededError("a step did not end");
  std::unique_ptr<Step> ended = Await();
  return ended == nullptr ? std::move(result) : std::move(ended);
}

Run WorkerHarness::NewRun(int64_t first_pos, int64_t capacity_tokens) {
  struct Run run;
  run.first_pos = first_pos;
  run.capacity_tokens = capacity_tokens;
  const int64_t bytes = capacity_tokens * geometry().BytesPerTokenPerLayer();
  for (int32_t layer = 0; layer < config_.num_layers; ++layer) {
    run.data_offsets.push_back(segment_used_);
    segment_used_ += bytes;
  }
  return run;
}

uint8_t* WorkerHarness::ExtentRow(const struct Run& run, int32_t layer, int32_t kv_head,
                                  int64_t pos, int part) {
  const KvLayout layout{run.capacity_tokens, config_.head_dim};
  const int64_t row = pos - run.first_pos;
  return segment_.data() + run.data_offsets[layer] +
         (part == 0 ? layout.KeyOffset(kv_head, row) : layout.ValueOffset(kv_head, row));
}

// ---------------------------------------------------------------- the coordinator's part

struct WorkerHarness::Progress {
  const TestRequest* request = nullptr;
  uint64_t id = 0;
  int64_t end_pos = 0;   // positions to compute
  int64_t next_pos = 0;  // of the next piece
  int64_t tail_begin = 0;
  int64_t returned_pos = 0;      // of the pieces that have returned
  int64_t confirmed_tokens = 0;  // sealed by steps that have returned
  int chunks_in_flight = 0;
  int in_flight = 0;
  bool taking_back = false;  // a step of it was discarded, and another is still in flight
  bool taken_back = false;   // its next piece goes out again
  bool open = false;
  TestOutput output;

  int64_t capacity() const {
    return output.runs.empty() ? 0
                               : output.runs.back().first_pos + output.runs.back().capacity_tokens;
  }
  int64_t prompt_tokens() const { return static_cast<int64_t>(request->prompt.size()); }
  // New tokens of the next piece, or 0.
  int64_t NextTokens() const {
    if (next_pos >= end_pos) return 0;
    return next_pos < prompt_tokens()
               ? std::min(request->chunk_tokens, prompt_tokens() - next_pos)
               : 1;
  }
};

namespace {

int64_t SealedToName(SealedRule rule, int64_t first, int64_t count, int64_t tail_begin,
                     int64_t confirmed) {
  const int64_t whole = FloorToBlock(first);
  const int64_t end = count > 1 ? first + 1 : first + count;
  const int64_t beyond_tail = CeilToBlock(std::max<int64_t>(0, end - kTailTokens));
  const int64_t least = std::min(whole, std::max(tail_begin, beyond_tail));
  switch (rule) {
    case SealedRule::kAtOnce:
      return whole;
    case SealedRule::kLeast:
      return least;
    case SealedRule::kCoordinator:
      break;
  }
  if (count > 1) return whole;
  return std::max(least, std::min(confirmed, whole - kBlockTokens));
}

}  // namespace

void WorkerHarness::AddPiece(Progress& p, Step& step, const RunOptions& options) {
  StepSequence piece;
  const int64_t count = std::min(p.NextTokens(), budget_.max_chunk_tokens);
  piece.sequence_id = p.id;
  piece.first_pos = p.next_pos;
  const int64_t end = p.next_pos + count;
  for (int64_t pos = p.next_pos; pos < std::min(end, p.prompt_tokens()); ++pos) {
    piece.token_ids.push_back(p.request->prompt[pos]);
    if (p.request->score && pos + 1 < p.prompt_tokens()) {
      piece.score_token_ids.push_back(p.request->prompt[pos + 1]);
    }
  }
  if (p.taken_back && p.next_pos >= p.prompt_tokens()) {
    // What was drawn last on the device was drawn by a step that was discarded.
    piece.token_ids.push_back(p.output.drawn[p.next_pos - p.prompt_tokens()].token_id);
  }
  p.taken_back = false;
  piece.draw = end >= p.prompt_tokens() && p.request->num_draws > 0;
  piece.sampling.temperature = p.request->temperature;
  piece.sampling.seed = p.request->seed;
  piece.sampling.repetition_penalty = p.request->repetition_penalty;
  piece.sampling.frequency_penalty = p.request->frequency_penalty;
  piece.known_tokens = p.prompt_tokens() + static_cast<int64_t>(p.output.drawn.size());
  piece.num_top_logprobs = p.request->num_top_logprobs;
  piece.sealed_tokens =
      SealedToName(options.sealed, p.next_pos, count, p.tail_begin, p.confirmed_tokens);
  std::vector<struct Run> granted;
  while (p.capacity() < FloorToBlock(end)) {
    const int64_t tokens = std::min(
        p.request->max_run_tokens,
        NextExtentTokens(geometry(), p.capacity(), FloorToBlock(end) - p.capacity()));
    granted.push_back(NewRun(p.capacity(), tokens));
    p.output.runs.push_back(granted.back());
  }
  if (!p.open) {
    step.open.push_back({p.id, p.output.runs, p.request->sealed_tokens, p.request->history});
    p.open = true;
  } else {
    for (struct Run& run : granted) step.grants.push_back({p.id, std::move(run)});
  }
  if (end - piece.sealed_tokens > kTailTokens) p.tail_begin = FloorToBlock(end);
  if (count > 1) ++p.chunks_in_flight;
  ++p.in_flight;
  p.next_pos = end;
  step.sequences.push_back(std::move(piece));
}

std::unique_ptr<Step> WorkerHarness::ComposeStep(bool chunk, std::vector<Progress>& all,
                                                 const RunOptions& options) {
  std::vector<Progress*> now;
  std::vector<Progress*> behind_chunks;
  for (Progress& p : all) {
    const int64_t count = p.NextTokens();
    if (count == 0 || (count > 1) != chunk || p.taking_back) continue;
    if (&p != &all[0] && options.first_draws_alone > 0 &&
        static_cast<int>(all[0].output.drawn.size()) < options.first_draws_alone) {
      continue;
    }
    (!chunk && p.chunks_in_flight > 0 ? behind_chunks : now).push_back(&p);
    if (chunk && !options.chunks_together) break;
  }
  if (now.empty() && behind_chunks.size() == 1) now = behind_chunks;
  if (now.empty()) return nullptr;
  auto step = std::make_unique<Step>();
  step->number = next_step_number_++;
  step->plan_version =
      options.plan_cycle.empty()
          ? options.plan_version
          : options.plan_cycle[steps_composed_++ % options.plan_cycle.size()];
  int64_t rows = 0;
  for (Progress* p : now) {
    rows += CeilToBlock(std::min(p->NextTokens(), budget_.max_chunk_tokens));
    if (chunk && !step->sequences.empty() && rows > budget_.max_chunk_tokens) break;
    AddPiece(*p, *step, options);
  }
  return step;
}

absl::Status WorkerHarness::Receive(std::unique_ptr<Step> step, std::vector<Progress>& all) {
  if (step->result.retry) {
    ++retries_;
    for (const StepSequence& piece : step->sequences) {
      Progress& p = *std::find_if(all.begin(), all.end(),
                                  [&](const Progress& q) { return q.id == piece.sequence_id; });
      p.next_pos = std::min(p.next_pos, piece.first_pos);
      p.taking_back = --p.in_flight > 0;
      p.taken_back = true;
      if (piece.num_tokens() > 1) --p.chunks_in_flight;
    }
    return absl::OkStatus();
  }
  HEADROOM_RETURN_IF_ERROR(
      Annotate(step->result.status, absl::StrCat("step ", step->number)));
  StepRecord record;
  record.plan_version = step->plan_version;
  size_t at = 0;
  for (const StepSequence& piece : step->sequences) {
    Progress& p = *std::find_if(all.begin(), all.end(),
                                [&](const Progress& q) { return q.id == piece.sequence_id; });
    if (piece.first_pos != p.returned_pos) {
      return absl::InternalError(absl::StrCat("sequence ", p.id, ": position ", piece.first_pos,
                                              " is answered before ", p.returned_pos));
    }
    p.returned_pos = piece.end_pos();
    --p.in_flight;
    const auto& tokens = step->result.tokens;
    if (tokens.size() < at + piece.num_results()) return absl::InternalError("too few results");
    for (size_t i = 0; i < piece.score_token_ids.size(); ++i) {
      p.output.scored.push_back(tokens[at++]);
    }
    if (piece.draw) p.output.drawn.push_back(tokens[at++]);
    p.confirmed_tokens = std::max(p.confirmed_tokens, FloorToBlock(piece.end_pos()));
    if (piece.num_tokens() > 1) --p.chunks_in_flight;
    record.runs[p.id] = p.output.runs;
  }
  if (at != step->result.tokens.size()) return absl::InternalError("too many results");
  record.sequences = std::move(step->sequences);
  record.result = std::move(step->result);
  records_.push_back(std::move(record));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TestOutput>> WorkerHarness::Run(const std::vector<TestRequest>& requests,
                                                           const RunOptions& options) {
  records_.clear();
  steps_composed_ = 0;
  retries_ = 0;
  int steps_ended = 0;
  std::vector<Progress> all;
  for (const TestRequest& request : requests) {
    Progress p;
    p.request = &request;
    p.id = NewSequenceId();
    p.next_pos = p.returned_pos = p.tail_begin = p.confirmed_tokens = request.sealed_tokens;
    p.end_pos = static_cast<int64_t>(request.prompt.size()) +
                std::max(0, request.num_draws - 1);
    p.output.runs = request.runs;
    all.push_back(std::move(p));
  }
  int in_flight[2] = {0, 0};
  absl::Status failure;
  for (;;) {
    if (options.on_step) options.on_step(steps_ended);
    for (bool sent = failure.ok(); sent;) {
      sent = false;
      for (const bool chunk : {false, true}) {
        if (in_flight[chunk] >= options.depth) continue;
        std::unique_ptr<Step> step = ComposeStep(chunk, all, options);
        if (step == nullptr) continue;
        HEADROOM_RETURN_IF_ERROR(executor_->Submit(std::move(step)));
        ++in_flight[chunk];
        sent = true;
      }
    }
    if (in_flight[0] + in_flight[1] == 0) break;
    std::unique_ptr<Step> step = Await();
    if (step == nullptr) return absl::DeadlineExceededError("a step did not end");
    --in_flight[step->has_chunk()];
    ++steps_ended;
    if (failure.ok()) failure = Receive(std::move(step), all);
  }
  auto close = std::make_unique<Step>();
  for (const Progress& p : all) {
    if (p.open) close->close.push_back(p.id);
  }
  const std::unique_ptr<Step> closed = RunStep(std::move(close));
  if (failure.ok()) failure = closed->result.status;
  if (!failure.ok()) return failure;
  std::vector<TestOutput> outputs;
  for (Progress& p : all) {
    if (p.next_pos < p.end_pos) return absl::InternalError("a sequence has not ended");
    p.output.sealed_tokens = FloorToBlock(p.end_pos);
    outputs.push_back(std::move(p.output));
  }
  return outputs;
}

absl::StatusOr<TestOutput> WorkerHarness::RunOne(const TestRequest& request,
                                                 const RunOptions& options) {
  HEADROOM_ASSIGN_OR_RETURN(std::vector<TestOutput> outputs, Run({request}, options));
  return std::move(outputs[0]);
}

// ---------------------------------------------------------------- helpers

std::vector<int32_t> RandomTokens(uint64_t seed, int64_t count, int64_t vocab) {
  // A linear congruential generator (Knuth's MMIX constants), its upper bits.
  std::vector<int32_t> tokens;
  for (int64_t i = 0; i < count; ++i) {
    seed = seed * 6364136223846793005ull + 1442695040888963407ull;
    tokens.push_back(static_cast<int32_t>((seed >> 33) % static_cast<uint64_t>(vocab)));
  }
  return tokens;
}

std::string Difference(const std::vector<kernels::SampleResult>& a,
                       const std::vector<kernels::SampleResult>& b) {
  if (a.size() != b.size()) return absl::StrCat(a.size(), " and ", b.size(), " results");
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i].token_id != b[i].token_id) {
      return absl::StrCat("result ", i, ": tokens ", a[i].token_id, " and ", b[i].token_id);
    }
    if (std::memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)) != 0) {
      return absl::StrCat("result ", i, ": log-probabilities ", a[i].logprob, " and ",
                          b[i].logprob, ", apart by ", a[i].logprob - b[i].logprob);
    }
    if (a[i].num_top != b[i].num_top ||
        std::memcmp(a[i].top_ids, b[i].top_ids, a[i].num_top * sizeof(int32_t)) != 0 ||
        std::memcmp(a[i].top_logprobs, b[i].top_logprobs, a[i].num_top * sizeof(float)) != 0) {
      return absl::StrCat("result ", i, ": the likeliest tokens differ");
    }
  }
  return "";
}

std::string Difference(const TestOutput& a, const TestOutput& b) {
  if (std::string scored = Difference(a.scored, b.scored); !scored.empty()) {
    return absl::StrCat("scored ", scored);
  }
  if (std::string drawn = Difference(a.drawn, b.drawn); !drawn.empty()) {
    return absl::StrCat("drawn ", drawn);
  }
  return "";
}

}  // namespace headroom
