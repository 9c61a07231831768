// The C interface of the Rust library in common/text/rust (src/lib.rs is its other side; the two
// files change together). Only common/text includes this.
//
// Functions return a HeadroomTextCode. What they produce, or the text of their error, is put into a
// HeadroomTextBuffer that the caller frees with headroom_text_buffer_free() in either case. No panic
// leaves the library. Tokenizers and templates do not change after they have been made: any number of
// threads may use one at a time. Numbers inside buffers are in the machine's byte order, unaligned.
// Pointers to no elements may be null.
#ifndef HEADROOM_COMMON_TEXT_TEXT_ABI_H_
#define HEADROOM_COMMON_TEXT_TEXT_ABI_H_

#include <cstddef>
#include <cstdint>

extern "C" {

enum HeadroomTextCode : int32_t {
  kHeadroomTextOk = 0,
  kHeadroomTextInvalid = 1,   // the input is wrong; the buffer says how
  kHeadroomTextPanicked = 2,  // the library is wrong; the buffer says where
};

struct HeadroomTextBuffer {
  uint8_t* data;
  size_t size;
};

struct HeadroomTextTokenizer;
struct HeadroomTextTemplate;

// A tokenizer from the bytes of a tokenizer.json. `tokenizer` is null unless OK.
int32_t headroom_text_tokenizer_new(const uint8_t* json, size_t size,
                                    HeadroomTextTokenizer** tokenizer, HeadroomTextBuffer* error);
void headroom_text_tokenizer_free(HeadroomTextTokenizer* tokenizer);

// One record per id from 0 to the largest: flags (1 byte), size of the spelling (4 bytes), size of
// the bytes (4 bytes), the spelling (UTF-8), the bytes.
enum HeadroomTextTokenFlags : uint8_t {
  kHeadroomTextPresent = 1,   // the id is some token's
  kHeadroomTextSpecial = 2,   // decoding may leave it out
  kHeadroomTextHasBytes = 4,  // it stands for its bytes, wherever it is
};
int32_t headroom_text_vocabulary(const HeadroomTextTokenizer* tokenizer, HeadroomTextBuffer* out);

// The ids (4 bytes each) of a UTF-8 text.
int32_t headroom_text_encode(const HeadroomTextTokenizer* tokenizer, const uint8_t* text,
                             size_t size, bool add_special_tokens, HeadroomTextBuffer* out);

// The text of ids; an id that is no token's has none.
int32_t headroom_text_decode(const HeadroomTextTokenizer* tokenizer, const uint32_t* ids,
                             size_t num_ids, bool skip_special_tokens, HeadroomTextBuffer* out);

// A template from its UTF-8 source. `chat_template` is null unless OK.
int32_t headroom_text_template_new(const uint8_t* source, size_t size,
                                   HeadroomTextTemplate** chat_template, HeadroomTextBuffer* error);
void headroom_text_template_free(HeadroomTextTemplate* chat_template);

// The text for `context`, a JSON object of the template's variables.
int32_t headroom_text_template_render(const HeadroomTextTemplate* chat_template,
                                      const uint8_t* context, size_t size,
                                      int64_t now_unix_seconds, HeadroomTextBuffer* out);

void headroom_text_buffer_free(HeadroomTextBuffer buffer);

}  // extern "C"

#endif  // HEADROOM_COMMON_TEXT_TEXT_ABI_H_
