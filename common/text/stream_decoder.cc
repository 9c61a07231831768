#include "common/text/stream_decoder.h"

#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/status.h"
#include "common/text/utf8.h"

namespace headroom {
namespace {

// A character has at most 4 bytes and a token at least one: text that still ends in U+FFFD after as
// many tokens will stay so.
constexpr size_t kMaxPending = 4;

}  // namespace

StreamDecoder::StreamDecoder(const Tokenizer* tokenizer, absl::Span<const int32_t> context,
                             Tokenizer::Special special)
    : tokenizer_(tokenizer), special_(special) {
  for (auto id = context.rbegin(); id != context.rend() && context_.empty(); ++id) {
    if (HasText(*id)) context_ = {*id};
  }
}

bool StreamDecoder::HasText(int32_t id) const {
  if (!tokenizer_->TokenText(id).has_value()) return false;
  return special_ == Tokenizer::Special::kWith || !tokenizer_->IsSpecial(id);
}

absl::StatusOr<std::string> StreamDecoder::Push(int32_t id) {
  if (id < 0) return absl::InvalidArgumentError(absl::StrCat("token id ", id, " is negative"));
  if (!HasText(id)) return std::string();
  const std::optional<absl::string_view> bytes = tokenizer_->TokenBytes(id);
  if (!bytes.has_value()) {
    std::string text = assembler_.Finish();
    HEADROOM_ASSIGN_OR_RETURN(const std::string more, PushDependent(id));
    return text + more;
  }
  HEADROOM_ASSIGN_OR_RETURN(std::string text, FlushPending());
  context_ = {id};
  return text + assembler_.Push(*bytes);
}

absl::StatusOr<std::string> StreamDecoder::Finish() {
  HEADROOM_ASSIGN_OR_RETURN(std::string text, FlushPending());
  return text + assembler_.Finish();
}

absl::StatusOr<std::string> StreamDecoder::PushDependent(int32_t id) {
  pending_.push_back(id);
  HEADROOM_ASSIGN_OR_RETURN(std::string text, PendingText());
  const bool incomplete = text.empty() || absl::EndsWith(text, kReplacementCharacter);
  if (incomplete && pending_.size() < kMaxPending) return std::string();
  context_ = std::exchange(pending_, {});
  return text;
}

absl::StatusOr<std::string> StreamDecoder::PendingText() const {
  std::vector<int32_t> ids = context_;
  ids.insert(ids.end(), pending_.begin(), pending_.end());
  HEADROOM_ASSIGN_OR_RETURN(const std::string before, tokenizer_->Decode(context_, special_));
  HEADROOM_ASSIGN_OR_RETURN(std::string all, tokenizer_->Decode(ids, special_));
  if (absl::StartsWith(all, before)) return all.substr(before.size());
  return tokenizer_->Decode(pending_, special_);  // the decoder rewrites what precedes
}

absl::StatusOr<std::string> StreamDecoder::FlushPending() {
  if (pending_.empty()) return std::string();
  HEADROOM_ASSIGN_OR_RETURN(std::string text, PendingText());
  context_ = std::exchange(pending_, {});
  return text;
}

}  // namespace headroom
