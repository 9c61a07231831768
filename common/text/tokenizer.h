// Text to token ids and back, as the model's tokenizer.json says.
#ifndef HEADROOM_COMMON_TEXT_TOKENIZER_H_
#define HEADROOM_COMMON_TEXT_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

struct HeadroomTextTokenizer;

namespace headroom {

// Every method is const and can be called by any number of threads at a time.
class Tokenizer {
 public:
  enum class Special {
    kWithout,  // Encode: nothing is put around the text. Decode: special tokens have no text
    kWith,     // Encode: what the tokenizer puts around a text (Llama: BOS). Decode: their spelling
  };

  // Larger texts and lists are INVALID_ARGUMENT (a token has at least one byte of text behind it, and
  // costs about 100 bytes while it is made).
  static constexpr int64_t kMaxTextBytes = int64_t{64} << 20;
  static constexpr int64_t kMaxIds = int64_t{64} << 20;

  // Reads tokenizer.json (at most 128 MiB), and the end-of-sequence ids from generation_config.json,
  // else config.json. Errors name the file: NOT_FOUND if there is no tokenizer.json,
  // INVALID_ARGUMENT if a file cannot be used.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromModelDir(const std::string& model_dir);
  // From the text of a tokenizer.json; errors begin with `name`. INVALID_ARGUMENT also if an id of
  // `eos_ids` is not below vocab_size().
  static absl::StatusOr<std::unique_ptr<Tokenizer>> FromJson(absl::string_view json,
                                                             absl::string_view name,
                                                             std::vector<int32_t> eos_ids);

  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // The ids of a text. Special tokens that the text spells are recognised: a chat template's output
  // relies on it. INVALID_ARGUMENT: not UTF-8 (names the byte), too long.
  absl::StatusOr<std::vector<int32_t>> Encode(absl::string_view text,
                                              Special special = Special::kWith) const;

  // The text of ids; whole UTF-8, with U+FFFD for what is none. An id from vocab_size() on, or in a
  // gap, has no text: models pad their embeddings and may draw such an id. INVALID_ARGUMENT: a negative
  // id, too many.
  absl::StatusOr<std::string> Decode(absl::Span<const int32_t> ids,
                                     Special special = Special::kWithout) const;

  // 1 + the largest id, added tokens included. A model may have more rows (padding), never fewer.
  int64_t vocab_size() const { return static_cast<int64_t>(tokens_.size()); }

  // Of a token's text, as the vocabulary spells it.
  int64_t longest_token_bytes() const { return longest_token_bytes_; }

  // The ids that end a text; may be empty.
  const std::vector<int32_t>& eos_ids() const { return eos_ids_; }
  bool IsEos(int32_t id) const;

  // How the vocabulary spells the token ("\u0120the" for " the" where tokens are byte-level; Decode()
  // gives readable text), or nothing if the id is no token's. Lives as long as the tokenizer.
  std::optional<absl::string_view> TokenText(int32_t id) const;

  // Whether Decode() leaves the token out with Special::kWithout.
  bool IsSpecial(int32_t id) const;

  // The bytes that the token stands for wherever it is (any token of a byte-level tokenizer, <0xE2> of
  // a sentencepiece one), or nothing where its text depends on its neighbours. They may be part of a
  // character. Lives as long as the tokenizer.
  std::optional<absl::string_view> TokenBytes(int32_t id) const;

 private:
  struct Freer {
    void operator()(HeadroomTextTokenizer* tokenizer) const;
  };
  // A token's spelling and bytes, side by side in arena_.
  struct Token {
    uint32_t offset = 0;
    uint32_t spelling_size = 0;
    uint32_t bytes_size = 0;
    uint8_t flags = 0;
  };

  Tokenizer() = default;
  absl::Status ReadVocabulary();
  // nullptr if the id is no token's.
  const Token* Find(int32_t id) const;
  absl::string_view Slice(uint32_t offset, uint32_t size) const;

  // Constant after construction.
  std::unique_ptr<HeadroomTextTokenizer, Freer> tokenizer_;
  std::string arena_;
  std::vector<Token> tokens_;  // by id
  int64_t longest_token_bytes_ = 0;
  std::vector<int32_t> eos_ids_;
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_TOKENIZER_H_
