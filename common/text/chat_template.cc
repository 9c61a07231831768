#include "common/text/chat_template.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "common/json.h"
#include "common/status.h"
#include "common/text/abi_buffer.h"
#include "common/text/model_file.h"
#include "common/text/utf8.h"

namespace headroom {
namespace {

// tokenizer_config.json lists every added token in older models: Llama 3's has 51 KB, others 1 MB.
constexpr int64_t kMaxTokenizerConfigBytes = int64_t{16} << 20;
constexpr int64_t kMaxTemplateBytes = int64_t{128} << 10;  // the longest of today have 30 KB

// The file's JSON object, or an empty one if there is no such file.
absl::StatusOr<Json> ReadConfig(const std::string& path) {
  absl::StatusOr<std::string> text = ReadModelFile(path, kMaxTokenizerConfigBytes);
  if (absl::IsNotFound(text.status())) return Json(Json::Object());
  if (!text.ok()) return text.status();
  absl::StatusOr<Json> json = Json::Parse(*text, kMaxTokenizerConfigBytes);
  if (!json.ok()) return Annotate(json.status(), path);
  if (!json->is_object()) return absl::InvalidArgumentError(absl::StrCat(path, ": no object"));
  return json;
}

// Every member "..._token" of `config` that is a text, or an object whose `content` is one.
void AddSpecialTokens(const Json& config, ChatTemplate::SpecialTokens& tokens) {
  for (const auto& [name, value] : config.as_object()) {
    const auto has_name = [&name = name](const auto& token) { return token.first == name; };
    if (!absl::EndsWith(name, "_token") || std::any_of(tokens.begin(), tokens.end(), has_name)) {
      continue;
    }
    const Json* text = value.is_object() ? value.Find("content") : &value;
    if (text != nullptr && text->is_string()) tokens.emplace_back(name, text->as_string());
  }
}

// The source from tokenizer_config.json: a text, or a list of named ones. NOT_FOUND if it has none.
absl::StatusOr<std::string> SourceFromConfig(const Json& config, const std::string& path) {
  const Json* found = config.Find("chat_template");
  if (found != nullptr && found->is_string()) return found->as_string();
  if (found != nullptr && found->is_array()) {
    for (const Json& named : found->as_array()) {
      const Json* name = named.Find("name");
      const Json* source = named.Find("template");
      if (name != nullptr && name->is_string() && name->as_string() == "default" &&
          source != nullptr && source->is_string()) {
        return source->as_string();
      }
    }
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": 'chat_template' lists no template named 'default'"));
  }
  if (found != nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": 'chat_template' is neither a text nor a list"));
  }
  return absl::NotFoundError(absl::StrCat(path, ": the model has no chat template"));
}

Json ToJson(absl::Span<const ChatMessage> messages) {
  Json::Array array;
  array.reserve(messages.size());
  for (const ChatMessage& message : messages) {
    array.push_back(Json(Json::Object{{"role", message.role}, {"content", message.content}}));
  }
  return Json(std::move(array));
}

}  // namespace

void ChatTemplate::Freer::operator()(HeadroomTextTemplate* chat_template) const {
  headroom_text_template_free(chat_template);
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::FromModelDir(
    const std::string& model_dir) {
  const std::string config_path = absl::StrCat(model_dir, "/tokenizer_config.json");
  HEADROOM_ASSIGN_OR_RETURN(const Json config, ReadConfig(config_path));
  HEADROOM_ASSIGN_OR_RETURN(const Json map,
                            ReadConfig(absl::StrCat(model_dir, "/special_tokens_map.json")));
  SpecialTokens special_tokens;
  AddSpecialTokens(config, special_tokens);
  AddSpecialTokens(map, special_tokens);

  const std::string source_path = absl::StrCat(model_dir, "/chat_template.jinja");
  absl::StatusOr<std::string> source = ReadModelFile(source_path, kMaxTemplateBytes);
  if (source.ok()) return FromSource(*source, source_path, std::move(special_tokens));
  if (!absl::IsNotFound(source.status())) return source.status();
  HEADROOM_ASSIGN_OR_RETURN(const std::string from_config, SourceFromConfig(config, config_path));
  return FromSource(from_config, config_path, std::move(special_tokens));
}

absl::StatusOr<std::unique_ptr<ChatTemplate>> ChatTemplate::FromSource(
    absl::string_view source, absl::string_view name, SpecialTokens special_tokens) {
  if (static_cast<int64_t>(source.size()) > kMaxTemplateBytes) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": the chat template has ", source.size(),
                                                   " bytes, at most ", kMaxTemplateBytes,
                                                   " are used"));
  }
  std::unique_ptr<ChatTemplate> made(new ChatTemplate);
  HeadroomTextTemplate* chat_template = nullptr;
  AbiBuffer error;
  HEADROOM_RETURN_IF_ERROR(error.ToFileStatus(
      headroom_text_template_new(AbiBytes(source), source.size(), &chat_template, error.out()),
      name));
  made->template_.reset(chat_template);
  made->special_tokens_ = std::move(special_tokens);
  return made;
}

absl::StatusOr<std::string> ChatTemplate::Render(absl::Span<const ChatMessage> messages,
                                                 bool add_generation_prompt,
                                                 absl::Time now) const {
  for (size_t i = 0; i < messages.size(); ++i) {
    HEADROOM_RETURN_IF_ERROR(CheckUtf8(messages[i].role, absl::StrCat("messages[", i, "].role")));
    HEADROOM_RETURN_IF_ERROR(
        CheckUtf8(messages[i].content, absl::StrCat("messages[", i, "].content")));
  }
  // tools and documents are none, not undefined: templates test them with `is not none`.
  Json::Object context = {{"messages", ToJson(messages)},
                          {"add_generation_prompt", add_generation_prompt},
                          {"tools", nullptr},
                          {"documents", nullptr}};
  for (const auto& [name, text] : special_tokens_) context.emplace_back(name, text);
  const std::string json = Json(std::move(context)).Dump();
  AbiBuffer text;
  HEADROOM_RETURN_IF_ERROR(text.ToStatus(headroom_text_template_render(
      template_.get(), AbiBytes(json), json.size(), absl::ToUnixSeconds(now), text.out())));
  return std::string(text.view());
}

}  // namespace headroom
