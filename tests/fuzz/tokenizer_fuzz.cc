// A tokenizer.json: what is accepted encodes and decodes, with ids that it knows.
#include <string>
#include <vector>

#include "common/text/tokenizer.h"
#include "common/text/utf8.h"
#include "tests/fuzz/fuzz.h"

using headroom::Tokenizer;
using headroom::fuzz::Require;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view json(reinterpret_cast<const char*>(data), size);
  const auto tokenizer = Tokenizer::FromJson(json, "tokenizer.json", {});
  if (!tokenizer.ok()) {
    Require(absl::IsInvalidArgument(tokenizer.status()), tokenizer.status().ToString());
    return 0;
  }
  std::vector<int32_t> all;
  const int64_t vocab = std::min<int64_t>((*tokenizer)->vocab_size(), 300);
  for (int32_t id = 0; id < vocab; ++id) {
    (void)(*tokenizer)->TokenText(id);
    (void)(*tokenizer)->TokenBytes(id);
    all.push_back(id);
  }
  for (const absl::string_view text : {"", " a ab \xC3\xA9\n<s>", "aaaaaaaa"}) {
    const auto ids = (*tokenizer)->Encode(text);
    if (!ids.ok()) continue;  // a vocabulary may lack what the text needs
    for (const int32_t id : *ids) Require(id >= 0, "an id");
    (void)(*tokenizer)->Decode(*ids);
  }
  const auto text = (*tokenizer)->Decode(all);
  if (text.ok()) Require(headroom::CheckUtf8(*text, "text").ok(), "text is UTF-8");
  return 0;
}
