//! A Hugging Face tokenizer (tokenizer.json), and its vocabulary as bytes.

use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Model, Tokenizer};

/// More ids than any model has (the largest vocabularies are near 262,144).
const MAX_VOCABULARY: usize = 1 << 24;

/// Flags of a vocabulary record.
const PRESENT: u8 = 1;
const SPECIAL: u8 = 2;
const HAS_BYTES: u8 = 4;

pub struct TextTokenizer {
    tokenizer: Tokenizer,
}

/// What a token's bytes are, which depends on the decoder.
enum BytesOf {
    /// Each character of a token stands for a byte; a text is the bytes of its tokens in a row.
    ByteLevel,
    /// Tokens spelled <0xE2> are a byte, others are text.
    ByteFallback,
    Nothing,
}

impl TextTokenizer {
    pub fn new(json: &[u8]) -> Result<TextTokenizer, String> {
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(|error| error.to_string())?;
        // Left in the file by whoever trained with them; a prompt is never cut or filled up silently.
        tokenizer.with_truncation(None).map_err(|error| error.to_string())?;
        tokenizer.with_padding(None);
        Ok(TextTokenizer { tokenizer })
    }

    /// The ids as native 32-bit integers.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u8>, String> {
        let encoding = self
            .tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|error| error.to_string())?;
        Ok(encoding.get_ids().iter().flat_map(|id| id.to_ne_bytes()).collect())
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<Vec<u8>, String> {
        self.tokenizer
            .decode(ids, skip_special_tokens)
            .map(String::into_bytes)
            .map_err(|error| error.to_string())
    }

    /// One record per id from 0 to the largest: flags (1 byte), size of the spelling and size of the
    /// bytes (native 32-bit integers), the spelling, the bytes.
    pub fn vocabulary(&self) -> Result<Vec<u8>, String> {
        let largest = self.tokenizer.get_vocab(true).into_values().max();
        let count = largest.map_or(0, |id| id as usize + 1);
        if count > MAX_VOCABULARY {
            return Err(format!("token id {}, at most {} are read", count - 1, MAX_VOCABULARY));
        }
        let bytes_of = self.bytes_of();
        let mut out = Vec::with_capacity(count * 24);
        for id in 0..count as u32 {
            self.write_record(id, &bytes_of, &mut out);
        }
        Ok(out)
    }

    fn write_record(&self, id: u32, bytes_of: &BytesOf, out: &mut Vec<u8>) {
        let added = self.tokenizer.get_added_vocabulary();
        // The spelling that decode() works on.
        let spelling =
            added.simple_id_to_token(id).or_else(|| self.tokenizer.get_model().id_to_token(id));
        let bytes = spelling.as_deref().and_then(|spelling| token_bytes(spelling, bytes_of));
        let mut flags = 0;
        if let Some(spelling) = &spelling {
            flags |= PRESENT;
            if added.is_special_token(spelling) {
                flags |= SPECIAL;
            }
        }
        if bytes.is_some() {
            flags |= HAS_BYTES;
        }
        let spelling = spelling.unwrap_or_default();
        let bytes = bytes.unwrap_or_default();
        out.push(flags);
        out.extend((spelling.len() as u32).to_ne_bytes());
        out.extend((bytes.len() as u32).to_ne_bytes());
        out.extend(spelling.as_bytes());
        out.extend(bytes);
    }

    fn bytes_of(&self) -> BytesOf {
        match self.tokenizer.get_decoder() {
            Some(DecoderWrapper::ByteLevel(_)) => BytesOf::ByteLevel,
            Some(DecoderWrapper::ByteFallback(_)) => BytesOf::ByteFallback,
            Some(DecoderWrapper::Sequence(sequence)) => match sequence.get_decoders() {
                [DecoderWrapper::ByteLevel(_)] => BytesOf::ByteLevel,
                decoders
                    if decoders.iter().any(|d| matches!(d, DecoderWrapper::ByteFallback(_))) =>
                {
                    BytesOf::ByteFallback
                }
                _ => BytesOf::Nothing,
            },
            _ => BytesOf::Nothing,
        }
    }
}

fn token_bytes(spelling: &str, bytes_of: &BytesOf) -> Option<Vec<u8>> {
    match bytes_of {
        // A token with a character that stands for no byte (an added token, say with a space) is text.
        BytesOf::ByteLevel => Some(
            spelling
                .chars()
                .map(byte_of_char)
                .collect::<Option<Vec<u8>>>()
                .unwrap_or_else(|| spelling.as_bytes().to_vec()),
        ),
        BytesOf::ByteFallback => {
            let hex = spelling.strip_prefix("<0x")?.strip_suffix('>')?;
            if hex.len() != 2 {
                return None;
            }
            u8::from_str_radix(hex, 16).ok().map(|byte| vec![byte])
        }
        BytesOf::Nothing => None,
    }
}

/// GPT-2's alphabet: printable Latin-1 characters stand for themselves, the 68 other bytes, in order,
/// for the characters from U+0100 on.
fn byte_of_char(c: char) -> Option<u8> {
    let code = c as u32;
    match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => Some(code as u8),
        0x100..=0x120 => Some((code - 0x100) as u8),
        0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8),
        0x143 => Some(0xAD),
        _ => None,
    }
}
