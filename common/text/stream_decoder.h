// Turns token ids that arrive one by one into text that is whole UTF-8 at every point.
#ifndef HEADROOM_COMMON_TEXT_STREAM_DECODER_H_
#define HEADROOM_COMMON_TEXT_STREAM_DECODER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "common/text/tokenizer.h"
#include "common/text/utf8.h"

namespace headroom {

// Byte-level tokenizers: the deltas and Finish() in a row are Decode() of all ids, byte for byte.
// Sentencepiece tokenizers, where a token's text depends on what precedes it: the same for whole
// characters. (In a row of byte tokens that is broken somewhere, Decode() replaces even its good
// characters, which a stream has already given out.)
//
// For one thread. Holds at most 4 tokens, 3 bytes and one token of context.
class StreamDecoder {
 public:
  // `context`: the prompt's ids, of which the last is kept. A sentencepiece tokenizer strips the
  // space in front of a text's first word; after a prompt the answer's first word keeps it, so prompt
  // and answer can be put together. Without context the answer is decoded as a text of its own.
  // REQUIRES: `tokenizer` outlives this
  explicit StreamDecoder(const Tokenizer* tokenizer,
                         absl::Span<const int32_t> context = {},
                         Tokenizer::Special special = Tokenizer::Special::kWithout);

  // The text that `id` adds; often empty where characters take several tokens. Special tokens have
  // none (Special::kWithout), nor have ids beyond the vocabulary. INVALID_ARGUMENT: a negative id.
  absl::StatusOr<std::string> Push(int32_t id);

  // What is held back, U+FFFD for an incomplete character. The stream has ended.
  absl::StatusOr<std::string> Finish();

 private:
  bool HasText(int32_t id) const;
  absl::StatusOr<std::string> PushDependent(int32_t id);
  // The text of pending_ after context_. May be empty or end inside a character.
  absl::StatusOr<std::string> PendingText() const;
  absl::StatusOr<std::string> FlushPending();

  const Tokenizer* const tokenizer_;
  const Tokenizer::Special special_;
  Utf8Assembler assembler_;         // of tokens that are bytes
  std::vector<int32_t> context_;    // the tokens before pending_ that its text can depend on
  std::vector<int32_t> pending_;    // tokens without bytes of their own, not given out yet
};

}  // namespace headroom

#endif  // HEADROOM_COMMON_TEXT_STREAM_DECODER_H_
