//! The C interface of the tokenizer and the chat template. Its other side is common/text/text_abi.h,
//! which states the contract; the two files change together.
//!
//! Every function catches panics, so none unwinds into C++. Nothing here is mutable after it has been
//! made: any number of threads may use one tokenizer or template at a time.

mod python_json;
mod template;
mod tokenizer;

use std::any::Any;
use std::panic::{catch_unwind, set_hook, AssertUnwindSafe};
use std::ptr::null_mut;
use std::slice;
use std::sync::Once;

use template::ChatTemplate;
use tokenizer::TextTokenizer;

const OK: i32 = 0;
const INVALID: i32 = 1;
const PANICKED: i32 = 2;

/// Bytes that this library allocated and only it can free.
#[repr(C)]
pub struct Buffer {
    data: *mut u8,
    size: usize,
}

impl Buffer {
    fn from_vec(bytes: Vec<u8>) -> Buffer {
        let bytes = Box::leak(bytes.into_boxed_slice());
        Buffer { data: bytes.as_mut_ptr(), size: bytes.len() }
    }
}

fn panic_text(payload: &(dyn Any + Send)) -> String {
    let text = match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(text), _) => text,
        (_, Some(text)) => text.as_str(),
        _ => "of unknown cause",
    };
    format!("panic in the text library: {text}")
}

/// The tokenizers crate cuts some spellings at byte positions, and such a text can be in an error.
fn whole_utf8(text: String) -> Vec<u8> {
    String::from_utf8_lossy(text.as_bytes()).into_owned().into_bytes()
}

/// Runs `body`, puts its bytes or the text of its error into `out`, and returns the code.
///
/// # Safety
/// `out` can be written.
unsafe fn at_border(out: *mut Buffer, body: impl FnOnce() -> Result<Vec<u8>, String>) -> i32 {
    // A wrong tokenizer.json can be a panic of the tokenizers crate. It is reported as an error, in one
    // line: without this it would be printed too, in several.
    static NO_PRINTING: Once = Once::new();
    NO_PRINTING.call_once(|| set_hook(Box::new(|_| {})));
    let (code, bytes) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(bytes)) => (OK, bytes),
        Ok(Err(error)) => (INVALID, whole_utf8(error)),
        Err(payload) => (PANICKED, whole_utf8(panic_text(&*payload))),
    };
    *out = Buffer::from_vec(bytes);
    code
}

/// # Safety
/// `size` elements can be read at `data`, which may be null if there are none.
unsafe fn elements<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        &[]
    } else {
        slice::from_raw_parts(data, size)
    }
}

/// # Safety
/// As elements().
unsafe fn text<'a>(data: *const u8, size: usize) -> Result<&'a str, String> {
    std::str::from_utf8(elements(data, size))
        .map_err(|error| format!("not UTF-8 at byte {}", error.valid_up_to()))
}

/// # Safety
/// `json` is readable, `tokenizer` and `error` are writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_tokenizer_new(
    json: *const u8,
    size: usize,
    tokenizer: *mut *mut TextTokenizer,
    error: *mut Buffer,
) -> i32 {
    *tokenizer = null_mut();
    at_border(error, || {
        *tokenizer = Box::into_raw(Box::new(TextTokenizer::new(elements(json, size))?));
        Ok(Vec::new())
    })
}

/// # Safety
/// `tokenizer` came from headroom_text_tokenizer_new() and is used no more; null is allowed.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_tokenizer_free(tokenizer: *mut TextTokenizer) {
    if !tokenizer.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(tokenizer))));
    }
}

/// # Safety
/// `tokenizer` is live, `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_vocabulary(
    tokenizer: *const TextTokenizer,
    out: *mut Buffer,
) -> i32 {
    at_border(out, || (*tokenizer).vocabulary())
}

/// # Safety
/// `tokenizer` is live, `input` is readable, `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_encode(
    tokenizer: *const TextTokenizer,
    input: *const u8,
    size: usize,
    add_special_tokens: bool,
    out: *mut Buffer,
) -> i32 {
    at_border(out, || (*tokenizer).encode(text(input, size)?, add_special_tokens))
}

/// # Safety
/// `tokenizer` is live, `ids` is readable, `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_decode(
    tokenizer: *const TextTokenizer,
    ids: *const u32,
    num_ids: usize,
    skip_special_tokens: bool,
    out: *mut Buffer,
) -> i32 {
    at_border(out, || (*tokenizer).decode(elements(ids, num_ids), skip_special_tokens))
}

/// # Safety
/// `source` is readable, `template` and `error` are writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_template_new(
    source: *const u8,
    size: usize,
    template: *mut *mut ChatTemplate,
    error: *mut Buffer,
) -> i32 {
    *template = null_mut();
    at_border(error, || {
        *template = Box::into_raw(Box::new(ChatTemplate::new(text(source, size)?)?));
        Ok(Vec::new())
    })
}

/// # Safety
/// `template` came from headroom_text_template_new() and is used no more; null is allowed.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_template_free(template: *mut ChatTemplate) {
    if !template.is_null() {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(Box::from_raw(template))));
    }
}

/// # Safety
/// `template` is live, `context` is readable, `out` is writable.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_template_render(
    template: *const ChatTemplate,
    context: *const u8,
    size: usize,
    now_unix_seconds: i64,
    out: *mut Buffer,
) -> i32 {
    at_border(out, || (*template).render(text(context, size)?, now_unix_seconds))
}

/// # Safety
/// `buffer` was written by one of the functions above and is used no more.
#[no_mangle]
pub unsafe extern "C" fn headroom_text_buffer_free(buffer: Buffer) {
    if !buffer.data.is_null() {
        let bytes = std::ptr::slice_from_raw_parts_mut(buffer.data, buffer.size);
        drop(Box::from_raw(bytes));
    }
}
