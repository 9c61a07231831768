#include "services/worker/in_place_lane.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/status.h"

namespace headroom {

MailboxShape MailboxShapeOf(const ModelConfig& config, const DeviceBudget& budget,
                            bool poster_wakes) {
  MailboxShape shape;
  shape.geometry = config.kv_geometry();
  shape.num_q_heads = config.num_q_heads;
  shape.num_slots = kNumContexts;
  shape.tables_per_slot = kStepsInFlight;
  shape.max_rows = static_cast<uint32_t>(kMaxInPlaceRows);
  // The device's tables of a step list the same keys in larger entries.
  shape.table_bytes = (budget.table_bytes + 63) / 64 * 64;
  shape.poster_wakes = poster_wakes;
  return shape;
}

int32_t HeadsInPlace(int64_t queries, int64_t fast_queries, int32_t heads, int32_t layer) {
  if (queries <= fast_queries) return heads;
  constexpr double kRateOverFetched = 2;
  const double slower = static_cast<double>(queries) / static_cast<double>(fast_queries);
  const double share = (1 + kRateOverFetched) / (slower + kRateOverFetched);
  const auto upto = [&](int32_t layers) { return std::floor(share * heads * layers); };
  return static_cast<int32_t>(upto(layer + 1) - upto(layer));
}

InPlaceLane::InPlaceLane(Device& device, const ModelConfig& config, absl::Duration deadline)
    : device_(device), config_(config), deadline_(deadline) {
  layers_.reserve(config.num_layers);
  items_.reserve(4096);
  spans_.reserve(16384);
}

InPlaceLane::~InPlaceLane() { SetMailbox(nullptr).IgnoreError(); }

absl::Status InPlaceLane::SetMailbox(std::shared_ptr<Mailbox> mailbox) {
  if (mailbox_ != nullptr) {
    mailbox_->header().retired.store(1);
    HEADROOM_RETURN_IF_ERROR(device_.UnregisterHost(mailbox_->data()));
    mailbox_ = nullptr;
  }
  if (mailbox == nullptr) return absl::OkStatus();
  HEADROOM_RETURN_IF_ERROR(device_.RegisterHost(mailbox->data(), mailbox->bytes()));
  mailbox_ = std::move(mailbox);
  posts_.assign(mailbox_->shape().num_slots, 0);
  tables_in_use_.assign(mailbox_->shape().num_slots, 0);
  return absl::OkStatus();
}

bool InPlaceLane::ready() const {
  return mailbox_ != nullptr &&
         mailbox_->header().attached.load(std::memory_order_acquire) ==
             mailbox_->shape().generation &&
         mailbox_->header().retired.load(std::memory_order_acquire) == 0;
}

void InPlaceLane::BeginTable(uint32_t slot, uint32_t table) {
  slot_ = slot;
  tables_in_use_[slot] = table;
  layers_.clear();
  items_.clear();
  spans_.clear();
}

void InPlaceLane::BeginLayer() {
  layers_.push_back({static_cast<uint32_t>(items_.size()), 0});
}

void InPlaceLane::AddItem(const MailboxItem& item, const std::vector<MailboxSpan>& spans) {
  items_.push_back(item);
  items_.back().span_begin = static_cast<uint32_t>(spans_.size());
  items_.back().span_count = static_cast<uint32_t>(spans.size());
  spans_.insert(spans_.end(), spans.begin(), spans.end());
  ++layers_.back().item_count;
}

absl::Status InPlaceLane::EndTable() {
  if (items_.empty()) return absl::OkStatus();
  const size_t layer_bytes = layers_.size() * sizeof(MailboxLayer);
  const size_t item_bytes = items_.size() * sizeof(MailboxItem);
  const size_t span_bytes = spans_.size() * sizeof(MailboxSpan);
  MailboxTableHeader header = {};
  header.num_items = static_cast<uint32_t>(items_.size());
  header.num_spans = static_cast<uint32_t>(spans_.size());
  const size_t items_at = sizeof(header) + layer_bytes;
  const size_t spans_at = items_at + item_bytes;
  if (spans_at + span_bytes > static_cast<size_t>(mailbox_->shape().table_bytes)) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the step's table of keys in place takes ", spans_at + span_bytes, " bytes, ",
                     mailbox_->shape().table_bytes,
                     " were set aside for it: raise --max-context-tokens"));
  }
  header.items_offset = static_cast<uint32_t>(items_at);
  header.spans_offset = static_cast<uint32_t>(spans_at);
  uint8_t* const to = mailbox_->table(slot_, tables_in_use_[slot_]);
  std::memcpy(to, &header, sizeof(header));
  std::memcpy(to + sizeof(header), layers_.data(), layer_bytes);
  std::memcpy(to + items_at, items_.data(), item_bytes);
  std::memcpy(to + spans_at, spans_.data(), span_bytes);
  WakeStore(mailbox_->header());
  return absl::OkStatus();
}

const MailboxTotals* InPlaceLane::totals(uint32_t slot, uint32_t table) const {
  return reinterpret_cast<const MailboxTotals*>(mailbox_->table(slot, table));
}

absl::Status InPlaceLane::Post(StreamId stream, uint32_t slot, const Step& step, int32_t layer,
                               const kernels::AttendArgs& args) {
  kernels::PostQueriesArgs post;
  post.q = args.q;
  post.q_stride = args.q_stride;
  post.rows = args.rows;
  post.row_floats = mailbox_->shape().query_floats();
  post.queries = mailbox_->queries(slot);
  post.mailbox = &mailbox_->header();
  post.slot = &mailbox_->slot(slot);
  post.post.step = step.number;
  post.post.attempt = step.attempt;
  post.post.layer = static_cast<uint32_t>(layer);
  post.post.table = tables_in_use_[slot];
  post.post.rows = static_cast<uint32_t>(args.rows);
  post.post.scale = args.scale;
  post.post.soft_cap = args.soft_cap;
  post.post.window = args.window;
  post.count = ++posts_[slot];
  return device_.PostQueries(stream, post);
}

absl::Status InPlaceLane::Await(StreamId stream, uint32_t slot, const Step& step, int32_t layer,
                                std::atomic<uint32_t>* status, OpAccount* waited) {
  kernels::AwaitPartialsArgs await;
  await.mailbox = &mailbox_->header();
  await.slot = &mailbox_->slot(slot);
  await.count = posts_[slot];
  await.generation = mailbox_->shape().generation;
  await.step = step.number;
  await.attempt = step.attempt;
  await.layer = static_cast<uint32_t>(layer);
  await.deadline_us = absl::ToInt64Microseconds(deadline_);
  await.status = status;
  return device_.AwaitPartials(stream, await, waited);
}

}  // namespace headroom
