// A small tokenizer for random models, in the files that Hugging Face models carry, so that a model
// without a vocabulary of its own can be served through the full stack with text.
#ifndef HEADROOM_TESTS_COMMON_BYTE_TOKENIZER_H_
#define HEADROOM_TESTS_COMMON_BYTE_TOKENIZER_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace headroom {

// The ids, laid out as SmolLM2's: three specials, then one id per byte value, then merges of lower
// case letters ("aa", "ab", ..., "zz", "aaa", ...) up to the vocabulary's end, so that every id
// decodes and encoding has merges to do.
inline constexpr int64_t kByteTokenizerPad = 0;  // <|endoftext|>
inline constexpr int64_t kByteTokenizerBos = 1;  // <|im_start|>
inline constexpr int64_t kByteTokenizerEos = 2;  // <|im_end|>
inline constexpr int64_t kByteTokenizerFirstByte = 3;
inline constexpr int64_t kByteTokenizerMinVocab = kByteTokenizerFirstByte + 256;

// Writes tokenizer.json and tokenizer_config.json (ChatML template) into the folder `dir`.
// Errors: INVALID_ARGUMENT (vocab_size below kByteTokenizerMinVocab), INTERNAL (cannot write).
absl::Status WriteByteTokenizer(int64_t vocab_size, int64_t max_tokens, const std::string& dir);

}  // namespace headroom

#endif  // HEADROOM_TESTS_COMMON_BYTE_TOKENIZER_H_
