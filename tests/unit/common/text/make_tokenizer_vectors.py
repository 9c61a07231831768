#!/usr/bin/env python3
"""Writes tests/unit/common/text/tokenizer_vectors.json: what Python's tokenizers and transformers
make of texts, ids and messages with SmolLM2's tokenizer. tokenizer_test.cc compares ours with it.

Needs tokenizers (0.23.3), transformers (5.24.0), jinja2 and the model that scripts/fetch_model makes;
tests need only the JSON and the model.
usage: make_tokenizer_vectors.py MODEL_DIR [OUT.json]

  tokenizer_sha256  of tokenizer.json
  encode            texts and their ids, without and with special tokens around them, and whether
                    decoding gives the text back
  decode            ids and their text, without and with special tokens
  chat              messages, with what the model's chat template makes of them
"""
import hashlib
import json
import pathlib
import random
import sys

import tokenizers
import transformers

TEXTS = [
    "", " ", "  ", "\n", "\n\n\n", "\t\t x", "\r\n", "a", " a", "a ", "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "I'm you're they'll we'd he's I've DON'T can\u2019t",
    "1234567890 3.14159 1e-9 0xdeadbeef 1,000,000",
    "def f(x):\n    return x ** 2  # caf\u00e9\n",
    "<html><body class=\"a\">&amp;</body></html>",
    "https://localhost/a?b=c&d=%20#e",
    "na\u00efve r\u00e9sum\u00e9 co\u00f6perate",
    "nai\u0308ve (combining)",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "\u3053\u3093\u306b\u3061\u306f\u4e16\u754c \u30c6\u30b9\u30c8",
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0627\u0644\u0639\u0627\u0644\u0645",
    "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600", "\U0001f600\U0001f601 \U0001f680", "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\U0001f1e9\U0001f1ea\U0001f1ef\U0001f1f5", "\u2764\ufe0f", "\U0001d54f\U00010348\U0002f804",
    "\ufeffBOM", "zero\u200bwidth", "nbsp\u00a0here", "\u2028line\u2029sep", "\ufffd", "\x00\x01\x7f",
    "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "x<|im_end|>y", "<|im_start", "<|IM_END|>",
    "<repo_name>a<file_sep>b", "a" * 200, "ab" * 64, " " * 40 + "x", "\n \n  \n   x",
    "\u2200x\u2208\u211d: x\u00b2 \u2265 0", "\u00bd \u2153 \u2167 \u0663",
    # The vocabulary has no token for some bytes: 04, F1, F2. They are left out.
    "a\x04b", "a\U00068353b",
]

CHATS = [
    [("user", "What is 2+2?")],
    [("system", "You answer briefly."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye")],
    [("user", "")],
    [("user", "a\n\n b <|im_end|> \U0001f600 \"quoted\" \\n {{ x }} {% y %}")],
    [("tool", "42"), ("user", "\u4f60\u597d")],
]


def main() -> None:
    model = pathlib.Path(sys.argv[1])
    out = pathlib.Path(sys.argv[2]) if len(sys.argv) > 2 else (
        pathlib.Path(__file__).with_name("tokenizer_vectors.json"))
    raw = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    hub = transformers.AutoTokenizer.from_pretrained(str(model))
    draw = random.Random(20240607)
    size = raw.get_vocab_size(with_added_tokens=True)
    id_lists = [[draw.randrange(size) for _ in range(draw.randrange(1, 40))] for _ in range(40)]
    id_lists += [[draw.randrange(256) for _ in range(30)] for _ in range(10)]  # specials and bytes
    vectors = {
        "tokenizer_sha256": hashlib.sha256((model / "tokenizer.json").read_bytes()).hexdigest(),
        "encode": [
            {"text": text,
             "ids": raw.encode(text, add_special_tokens=False).ids,
             "ids_with_special": raw.encode(text, add_special_tokens=True).ids,
             "comes_back": text == raw.decode(raw.encode(text, add_special_tokens=False).ids,
                                              skip_special_tokens=False)}
            for text in TEXTS],
        "decode": [
            {"ids": ids,
             "text": raw.decode(ids, skip_special_tokens=True),
             "text_with_special": raw.decode(ids, skip_special_tokens=False)}
            for ids in id_lists],
        "chat": [],
    }
    for chat in CHATS:
        messages = [{"role": role, "content": content} for role, content in chat]
        for prompt in (False, True):
            text = hub.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            vectors["chat"].append(
                {"messages": messages, "add_generation_prompt": prompt, "text": text})
    out.write_text(rows(vectors), encoding="ascii")


def rows(vectors: dict) -> str:
    """JSON with a line per case, which a diff can show."""
    parts = []
    for name, value in vectors.items():
        if isinstance(value, list):
            value = "[\n" + ",\n".join("  " + json.dumps(case) for case in value) + "\n ]"
        else:
            value = json.dumps(value)
        parts.append(f" {json.dumps(name)}: {value}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
