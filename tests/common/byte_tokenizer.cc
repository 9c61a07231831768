#include "tests/common/byte_tokenizer.h"

#include <array>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace headroom {
namespace {

using OrderedJson = nlohmann::ordered_json;

constexpr std::array<const char*, kByteTokenizerFirstByte> kSpecials = {
    "<|endoftext|>", "<|im_start|>", "<|im_end|>"};

constexpr char kChatTemplate[] =
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}";

// The printable character that stands for a byte in byte-level BPE (GPT-2's table), as UTF-8.
std::vector<std::string> ByteCharacters() {
  std::vector<std::string> characters;
  int next_substitute = 256;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int code_point = printable ? byte : next_substitute++;
    std::string utf8;
    if (code_point < 0x80) {
      utf8 += static_cast<char>(code_point);
    } else {
      utf8 += static_cast<char>(0xC0 | (code_point >> 6));
      utf8 += static_cast<char>(0x80 | (code_point & 0x3F));
    }
    characters.push_back(utf8);
  }
  return characters;
}

// The n-th of "aa", "ab", ..., "zz", "aaa", ... Its prefix without the last letter comes before it.
std::string LetterToken(int64_t n) {
  int64_t length = 2, count = 26 * 26;
  for (; n >= count; count *= 26, ++length) n -= count;
  std::string token(length, 'a');
  for (int64_t i = length - 1; i >= 0; --i, n /= 26) token[i] = static_cast<char>('a' + n % 26);
  return token;
}

OrderedJson BpeModel(int64_t vocab_size) {
  OrderedJson merges = OrderedJson::array();
  std::vector<std::pair<std::string, OrderedJson>> entries;
  int64_t id = 0;
  for (const char* special : kSpecials) entries.emplace_back(special, id++);
  for (const std::string& character : ByteCharacters()) entries.emplace_back(character, id++);
  for (int64_t n = 0; id < vocab_size; ++n) {
    const std::string token = LetterToken(n);
    entries.emplace_back(token, id++);
    merges.push_back({token.substr(0, token.size() - 1), token.substr(token.size() - 1)});
  }
  // ordered_json's operator[] searches linearly: the entries are handed over at once.
  OrderedJson vocab = OrderedJson::object_t(entries.begin(), entries.end());
  return {{"type", "BPE"},
          {"dropout", nullptr},
          {"unk_token", nullptr},
          {"continuing_subword_prefix", nullptr},
          {"end_of_word_suffix", nullptr},
          {"fuse_unk", false},
          {"byte_fallback", false},
          {"ignore_merges", false},
          {"vocab", std::move(vocab)},
          {"merges", std::move(merges)}};
}

OrderedJson Tokenizer(int64_t vocab_size) {
  OrderedJson added = OrderedJson::array();
  for (int64_t id = 0; id < kByteTokenizerFirstByte; ++id) {
    added.push_back({{"id", id},
                     {"content", kSpecials[id]},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", true}});
  }
  const OrderedJson byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", std::move(added)},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model", BpeModel(vocab_size)}};
}

absl::Status WriteFile(const std::string& path, const OrderedJson& json) {
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << json.dump(1) << '\n';
  file.close();
  if (!file) return absl::InternalError(absl::StrCat("cannot write ", path));
  return absl::OkStatus();
}

}  // namespace

absl::Status WriteByteTokenizer(int64_t vocab_size, int64_t max_tokens, const std::string& dir) {
  if (vocab_size < kByteTokenizerMinVocab) {
    return absl::InvalidArgumentError(absl::StrCat(
        "vocab_size ", vocab_size, ": a byte tokenizer needs ", kByteTokenizerMinVocab));
  }
  if (absl::Status status = WriteFile(dir + "/tokenizer.json", Tokenizer(vocab_size));
      !status.ok()) {
    return status;
  }
  return WriteFile(dir + "/tokenizer_config.json", {{"tokenizer_class", "PreTrainedTokenizerFast"},
                                                    {"bos_token", kSpecials[kByteTokenizerBos]},
                                                    {"eos_token", kSpecials[kByteTokenizerEos]},
                                                    {"pad_token", kSpecials[kByteTokenizerPad]},
                                                    {"model_max_length", max_tokens},
                                                    {"add_prefix_space", false},
                                                    {"clean_up_tokenization_spaces", false},
                                                    {"chat_template", kChatTemplate}});
}

}  // namespace headroom
