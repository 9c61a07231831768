#!/usr/bin/env python3
"""Writes tests/unit/common/text/family_vectors.json and built_tokenizers.json: what Python's tokenizers
makes of 10,000 random texts with the tokenizers of several families, and of published vectors.
tokenizer_families_test.cc draws the same texts and compares.

Needs tokenizers (0.23.3), the model of scripts/fetch_model, the folder of scripts/fetch_tokenizers and
PyPI's llama-cpp-python 0.3.36 (the sdist), whose llama.cpp (MIT) has ids of some 47 texts for each of
many vocabularies; tests need the JSON and the two folders.
usage: make_family_vectors.py MODEL_DIR TOKENIZERS_DIR LLAMA_CPP_PYTHON.tar.gz

Texts are drawn by splitmix64 (Draw below, and in the test). Of 100 texts the SHA-256 is kept, 16 digits
of it: of their ids, of the text that those give, and of the text of random ids.

The families whose tokenizers are not to be had are built: small ones of the same make, trained on
the license's text (built_tokenizers.json).
"""
import hashlib
import json
import pathlib
import sys
import tarfile

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[3]
BATCHES, BATCH = 100, 100

# ---------------------------------------------------------------- random texts and ids

M64 = (1 << 64) - 1
SPACES = [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u3000", "\u2028"]
WORDS = ["the", " and", " I'm", "don't", "WE'LL", "2024", " 12345", "def f(x):", "://", "\u2581", "Hello",
         " world", "<s>", "</s>", "<unk>", "<bos>", "<0x0A>", "<|im_start|>", "<|im_end|>",
         "<|endoftext|>", "<|eot_id|>", "<start_of_turn>", "[INST]", "</"]
JOINERS = [0x200D, 0xFE0F, 0x0301, 0x0308, 0x1F3FB]


class Draw:
    """splitmix64."""

    def __init__(self, seed):
        self.state = seed

    def below(self, limit):
        self.state = (self.state + 0x9E3779B97F4A7C15) & M64
        z = self.state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
        return (z ^ (z >> 31)) % limit


def piece(draw):
    kind = draw.below(10)
    if kind <= 1:
        return chr(0x20 + draw.below(0x5F))
    if kind == 2:
        return SPACES[draw.below(len(SPACES))]
    if kind == 3:
        return WORDS[draw.below(len(WORDS))]
    if kind == 4:
        return chr(0xA0 + draw.below(0x760))  # Latin to Thaana
    if kind == 5:
        return chr(0x900 + draw.below(0x700))  # Devanagari to Georgian
    if kind == 6:
        return chr(0x4E00 + draw.below(0x5200))
    if kind == 7:
        return chr(0xAC00 + draw.below(0x2BA4))
    if kind == 8:
        return chr(JOINERS[draw.below(len(JOINERS))] if draw.below(2) else 0x1F300 + draw.below(0x300))
    code = draw.below(0x110000)
    return chr(0xFFFD if 0xD800 <= code < 0xE000 else code)


def text_of(draw):
    return "".join(piece(draw) for _ in range(1 + draw.below(24)))


# ---------------------------------------------------------------- built tokenizers

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPLIT = {  # as in the families' own files
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
              r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
             r"\s*[\r\n]+|\s+(?!\S)|\s+",
}


def trained(pre_tokenizer, specials, alphabet, merges, **options):
    """A BPE model of `specials`, `alphabet` and what the license's text makes of `merges` merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    trainer = trainers.BpeTrainer(vocab_size=len(specials) + len(alphabet) + merges, show_progress=False,
                                  special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train([str(ROOT / "LICENSE")], trainer)
    return tokenizer


def byte_level(name, normalizer, ignore_merges):
    split = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(SPLIT[name]), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot_id|>"]
    tokenizer = trained(split, specials, pre_tokenizers.ByteLevel.alphabet(), 300,
                        ignore_merges=ignore_merges)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentencepiece_like(bos, family):
    """As converters write sentencepiece's BPE with byte fallback."""
    specials = ["<unk>", bos, "</s>"] + BYTES
    tokenizer = trained(pre_tokenizers.Metaspace(prepend_scheme="always"), specials, ["\u2581"], 400,
                        unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    # The bytes are plain tokens there: a text that spells one is not that token.
    file = json.loads(tokenizer.to_str())
    file["added_tokens"] = file["added_tokens"][:3]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    replace = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if family == "gemma2":
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif family == "llama2":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"),
                                                     normalizers.Replace(" ", "\u2581")])
        tokenizer.pre_tokenizer = None
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        replace + ([] if family == "gemma2" else [decoders.Strip(" ", 1, 0)]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, 1)])
    return tokenizer


def built():
    made = {"llama3_like": byte_level("llama3", None, True),
            "qwen2_like": byte_level("qwen2", normalizers.NFC(), False),
            "llama2_like": sentencepiece_like("<s>", "llama2"),
            "mistral_like": sentencepiece_like("<s>", "mistral"),
            "gemma2_like": sentencepiece_like("<bos>", "gemma2")}
    return {name: json.loads(tokenizer.to_str()) for name, tokenizer in made.items()}


# ---------------------------------------------------------------- vectors

def digests(tokenizer):
    draw = Draw(20261129)
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
    kinds = {"encoded": [], "decoded": [], "decoded_ids": []}
    for _ in range(BATCHES):
        sums = {kind: hashlib.sha256() for kind in kinds}
        for i in range(BATCH):
            text = text_of(draw)
            ids = tokenizer.encode(text, add_special_tokens=i % 2 == 1).ids
            sums["encoded"].update(b"".join(id.to_bytes(4, "little") for id in ids) + b"\xff" * 4)
            back = tokenizer.decode(ids, skip_special_tokens=i // 2 % 2 == 1)
            sums["decoded"].update(back.encode() + b"\xff")
            drawn = [draw.below(vocab_size) for _ in range(1 + draw.below(20))]
            text = tokenizer.decode(drawn, skip_special_tokens=i // 2 % 2 == 1)
            sums["decoded_ids"].update(text.encode() + b"\xff")
        for kind, total in sums.items():
            kinds[kind].append(total.hexdigest()[:16])
    return {"vocab_size": vocab_size, **kinds}


def published(sdist, vocabulary):
    """Texts and ids of a vocabulary of llama.cpp's tests."""
    def read(suffix):
        name = next(n for n in sdist.getnames() if n.endswith(f"/ggml-vocab-{vocabulary}.gguf.{suffix}"))
        return sdist.extractfile(name).read().decode()
    texts = read("inp").split("\n__ggml_vocab_test__\n")
    return [[text, [int(id) for id in ids.split()]]
            for text, ids in zip(texts, read("out").split("\n"))]


# name, folder, the vocabulary of the published vectors
FETCHED = [("llama3", "llama-bpe"), ("qwen3", "qwen2"), ("gemma3", "gemma-4"), ("mistral", None)]


def main():
    model, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    sdist = tarfile.open(sys.argv[3])
    made = built()
    texts = {"smollm2": (model / "tokenizer.json").read_text("utf-8")}
    texts |= {name: (folder / name / "tokenizer.json").read_text("utf-8") for name, _ in FETCHED}
    texts |= {name: json.dumps(file) for name, file in made.items()}
    vectors = {name: digests(tokenizers.Tokenizer.from_str(text)) for name, text in texts.items()}
    for name, vocabulary in FETCHED:
        if vocabulary is None:
            continue
        vectors[name]["published"] = published(sdist, vocabulary)
        tokenizer = tokenizers.Tokenizer.from_str(texts[name])
        for text, ids in vectors[name]["published"]:
            assert tokenizer.encode(text, add_special_tokens=False).ids == ids, (name, text)
    for path, content in (("family_vectors.json", {"made_with": f"tokenizers {tokenizers.__version__}",
                                                   "tokenizers": vectors}),
                          ("built_tokenizers.json", made)):
        (HERE / path).write_text(json.dumps(content, separators=(",", ":")).replace("},", "},\n") + "\n")


if __name__ == "__main__":
    main()
