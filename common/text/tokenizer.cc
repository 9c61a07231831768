#include "common/text/tokenizer.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/status.h"
#include "common/text/abi_buffer.h"
#include "common/text/model_file.h"
#include "common/text/utf8.h"

namespace headroom {
namespace {

constexpr int64_t kMaxTokenizerBytes = int64_t{128} << 20;  // Gemma 3's has 33 MB
constexpr int64_t kMaxConfigBytes = int64_t{1} << 20;
constexpr size_t kMaxEosIds = 64;

absl::StatusOr<int32_t> EosId(const Json& id, const std::string& path) {
  if (!id.is_int() || id.as_int() < 0 || id.as_int() > INT32_MAX) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": 'eos_token_id' is ", Brief(id),
                     ", expected a token id or a list of them"));
  }
  return static_cast<int32_t>(id.as_int());
}

// NOT_FOUND if the file or the member is missing.
absl::StatusOr<std::vector<int32_t>> EosIdsFromFile(const std::string& path) {
  HEADROOM_ASSIGN_OR_RETURN(const std::string text, ReadModelFile(path, kMaxConfigBytes));
  absl::StatusOr<Json> json = Json::Parse(text, kMaxConfigBytes);
  if (!json.ok()) return Annotate(json.status(), path);
  if (!json->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": expected a JSON object"));
  }
  const Json* found = json->Find("eos_token_id");
  if (found == nullptr) return absl::NotFoundError(absl::StrCat(path, ": no 'eos_token_id'"));

  const Json::Array one = {*found};
  const Json::Array& list = found->is_array() ? found->as_array() : one;
  if (list.size() > kMaxEosIds) {
    return absl::InvalidArgumentError(absl::StrCat(
        path, ": 'eos_token_id' has ", list.size(), " ids, at most ", kMaxEosIds, " are used"));
  }
  std::vector<int32_t> ids;
  for (const Json& element : list) {
    HEADROOM_ASSIGN_OR_RETURN(const int32_t id, EosId(element, path));
    ids.push_back(id);
  }
  return ids;
}

absl::StatusOr<std::vector<int32_t>> EosIdsFromModelDir(const std::string& model_dir) {
  for (const char* name : {"generation_config.json", "config.json"}) {
    absl::StatusOr<std::vector<int32_t>> ids =
        EosIdsFromFile(absl::StrCat(model_dir, "/", name));
    if (!absl::IsNotFound(ids.status())) return ids;
  }
  return std::vector<int32_t>();
}

}  // namespace

void Tokenizer::Freer::operator()(HeadroomTextTokenizer* tokenizer) const {
  headroom_text_tokenizer_free(tokenizer);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromModelDir(const std::string& model_dir) {
  const std::string path = absl::StrCat(model_dir, "/tokenizer.json");
  HEADROOM_ASSIGN_OR_RETURN(const std::string json, ReadModelFile(path, kMaxTokenizerBytes));
  HEADROOM_ASSIGN_OR_RETURN(std::vector<int32_t> eos_ids, EosIdsFromModelDir(model_dir));
  return FromJson(json, path, std::move(eos_ids));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::FromJson(absl::string_view json,
                                                               absl::string_view name,
                                                               std::vector<int32_t> eos_ids) {
  std::unique_ptr<Tokenizer> made(new Tokenizer);
  HeadroomTextTokenizer* tokenizer = nullptr;
  AbiBuffer error;
  HEADROOM_RETURN_IF_ERROR(error.ToFileStatus(
      headroom_text_tokenizer_new(AbiBytes(json), json.size(), &tokenizer, error.out()), name));
  made->tokenizer_.reset(tokenizer);
  if (absl::Status status = made->ReadVocabulary(); !status.ok()) return Annotate(status, name);
  for (const int32_t id : eos_ids) {
    if (made->Find(id) == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": has no token of id ", id, ", the model's 'eos_token_id'"));
    }
  }
  made->eos_ids_ = std::move(eos_ids);
  return made;
}

absl::Status Tokenizer::ReadVocabulary() {
  AbiBuffer records;
  HEADROOM_RETURN_IF_ERROR(
      records.ToFileStatus(headroom_text_vocabulary(tokenizer_.get(), records.out()), "vocabulary"));
  absl::string_view rest = records.view();
  if (rest.size() > UINT32_MAX) return absl::InvalidArgumentError("vocabulary beyond 4 GiB");
  arena_.reserve(rest.size());
  while (!rest.empty()) {
    Token token{.offset = static_cast<uint32_t>(arena_.size())};
    token.flags = static_cast<uint8_t>(rest[0]);
    std::memcpy(&token.spelling_size, rest.data() + 1, 4);
    std::memcpy(&token.bytes_size, rest.data() + 5, 4);
    const size_t size = size_t{token.spelling_size} + token.bytes_size;
    arena_.append(rest.data() + 9, size);
    rest.remove_prefix(9 + size);
    tokens_.push_back(token);
    longest_token_bytes_ = std::max<int64_t>(longest_token_bytes_, token.spelling_size);
  }
  arena_.shrink_to_fit();
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(absl::string_view text,
                                                       Special special) const {
  if (static_cast<int64_t>(text.size()) > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("text has ", text.size(), " bytes, at most ", kMaxTextBytes, " are encoded"));
  }
  HEADROOM_RETURN_IF_ERROR(CheckUtf8(text, "text"));
  AbiBuffer buffer;
  HEADROOM_RETURN_IF_ERROR(buffer.ToStatus(
      headroom_text_encode(tokenizer_.get(), AbiBytes(text), text.size(),
                           special == Special::kWith, buffer.out())));
  // The vocabulary's ids are below 2^24 (ReadVocabulary), so they fit.
  std::vector<int32_t> ids(buffer.view().size() / sizeof(int32_t));
  if (!ids.empty()) std::memcpy(ids.data(), buffer.view().data(), buffer.view().size());
  return ids;
}

absl::StatusOr<std::string> Tokenizer::Decode(absl::Span<const int32_t> ids,
                                              Special special) const {
  if (static_cast<int64_t>(ids.size()) > kMaxIds) {
    return absl::InvalidArgumentError(
        absl::StrCat(ids.size(), " token ids, at most ", kMaxIds, " are decoded"));
  }
  const auto negative = std::find_if(ids.begin(), ids.end(), [](int32_t id) { return id < 0; });
  if (negative != ids.end()) {
    return absl::InvalidArgumentError(absl::StrCat("token id ", *negative, " at position ",
                                                   negative - ids.begin(), " is negative"));
  }
  AbiBuffer buffer;
  HEADROOM_RETURN_IF_ERROR(buffer.ToStatus(headroom_text_decode(
      tokenizer_.get(), reinterpret_cast<const uint32_t*>(ids.data()), ids.size(),
      special == Special::kWithout, buffer.out())));
  return std::string(buffer.view());
}

bool Tokenizer::IsEos(int32_t id) const {
  return std::find(eos_ids_.begin(), eos_ids_.end(), id) != eos_ids_.end();
}

std::optional<absl::string_view> Tokenizer::TokenText(int32_t id) const {
  const Token* token = Find(id);
  if (token == nullptr) return std::nullopt;
  return Slice(token->offset, token->spelling_size);
}

bool Tokenizer::IsSpecial(int32_t id) const {
  const Token* token = Find(id);
  return token != nullptr && (token->flags & kHeadroomTextSpecial) != 0;
}

std::optional<absl::string_view> Tokenizer::TokenBytes(int32_t id) const {
  const Token* token = Find(id);
  if (token == nullptr || (token->flags & kHeadroomTextHasBytes) == 0) return std::nullopt;
  return Slice(token->offset + token->spelling_size, token->bytes_size);
}

const Tokenizer::Token* Tokenizer::Find(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return nullptr;
  const Token* token = &tokens_[static_cast<size_t>(id)];
  return (token->flags & kHeadroomTextPresent) != 0 ? token : nullptr;
}

absl::string_view Tokenizer::Slice(uint32_t offset, uint32_t size) const {
  return absl::string_view(arena_).substr(offset, size);
}

}  // namespace headroom
