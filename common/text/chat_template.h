// The model's chat template: messages to the text that the model was trained on.
#ifndef HEADROOM_COMMON_TEXT_CHAT_TEMPLATE_H_
#define HEADROOM_COMMON_TEXT_CHAT_TEMPLATE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

struct HeadroomTextTemplate;

namespace headroom {

struct ChatMessage {
  std::string role;  // "system", "user", "assistant", or what the template knows
  std::string content;
};

// Renders as transformers' apply_chat_template() does. Its output spells the special tokens,
// beginning of sequence included: encode it with Tokenizer::Special::kWithout. Text in messages that
// spells a special token becomes one, too, as it does there.
//
// Every method is const and can be called by any number of threads at a time.
class ChatTemplate {
 public:
  // By name: bos_token, eos_token, pad_token and so on, as the template refers to them.
  using SpecialTokens = std::vector<std::pair<std::string, std::string>>;

  // Reads chat_template.jinja, else `chat_template` of tokenizer_config.json (of several templates
  // "default"), and the special tokens' texts from tokenizer_config.json, else
  // special_tokens_map.json. Errors name the file. NOT_FOUND: the model has no chat template;
  // INVALID_ARGUMENT: a file or the template cannot be used.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> FromModelDir(const std::string& model_dir);
  // From the template's source (at most 128 KiB); errors begin with `name`.
  static absl::StatusOr<std::unique_ptr<ChatTemplate>> FromSource(absl::string_view source,
                                                                  absl::string_view name,
                                                                  SpecialTokens special_tokens);

  ChatTemplate(const ChatTemplate&) = delete;
  ChatTemplate& operator=(const ChatTemplate&) = delete;

  // add_generation_prompt: ends with the opening of the assistant's turn. `now` is for templates that
  // tell the date. INVALID_ARGUMENT: not UTF-8 (names message, field and byte), what the template
  // itself refuses (say roles that do not alternate: its own words), and a template that runs too
  // long.
  absl::StatusOr<std::string> Render(absl::Span<const ChatMessage> messages,
                                     bool add_generation_prompt,
                                     absl::Time now = absl::Now()) const;

 private:
  struct Freer {
    void operator()(HeadroomTextTemplate* chat_template) const;
  };

  ChatTemplate() = default;

  // Constant after construction.
  std::unique_ptr<HeadroomTextTemplate, Freer> template_;
  SpecialTokens special_tokens_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_CHAT_TEMPLATE_H_
