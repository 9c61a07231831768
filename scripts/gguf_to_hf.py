#!/usr/bin/env python3
"""Turns a GGUF file (llama architecture, byte-level BPE) into a Hugging Face model folder.

Quantised weights are expanded to BF16, so the folder holds what the GGUF model computes with, not
the weights it was quantised from. The output depends on the input only, byte for byte.

usage: gguf_to_hf.py IN.gguf OUT_DIR
"""

import argparse
import json
import struct
import sys
from pathlib import Path

import numpy as np
from gguf import GGUFReader, dequantize

LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
MODEL_TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
# What comes before the byte-level split, by the name GGUF gives the pre-tokenizer.
PRE_TOKENIZERS = {"smollm": [{"type": "Digits", "individual_digits": True}]}
# gguf's token type of tokens that are matched whole, such as <|im_start|>.
CONTROL_TOKEN = 3


class ConversionError(Exception):
    """The file is not one this converter knows."""


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader):
        self._fields = reader.fields

    def __getitem__(self, key: str):
        if key not in self._fields:
            raise ConversionError(f"no field {key}")
        return self._fields[key].contents()


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 to the upper halves of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def to_half_rotation(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorders rows of a q or k projection [num_heads * d, hidden].

    GGUF keeps the two halves of a rotated pair next to each other (0, d/2, 1, d/2 + 1, ...);
    Hugging Face keeps the first halves of all pairs, then the second.
    """
    pairs = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, pairs, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def convert_tensors(reader: GGUFReader, num_q_heads: int, num_kv_heads: int) -> dict[str, np.ndarray]:
    """All weights as BF16 bits, under their Hugging Face names."""
    tensors = {}
    for tensor in reader.tensors:
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if tensor.name in MODEL_TENSORS:
            name = MODEL_TENSORS[tensor.name]
        elif len(parts) == 4 and parts[0] == "blk" and parts[2] in LAYER_TENSORS and parts[3] == "weight":
            name = f"model.layers.{parts[1]}.{LAYER_TENSORS[parts[2]]}.weight"
            if parts[2] == "attn_q":
                weight = to_half_rotation(weight, num_q_heads)
            elif parts[2] == "attn_k":
                weight = to_half_rotation(weight, num_kv_heads)
        else:
            raise ConversionError(f"unknown tensor {tensor.name}")
        tensors[name] = to_bf16(weight)
    return tensors


def write_safetensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        size = tensors[name].nbytes
        header[name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)))
        file.write(encoded)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name]).tobytes())


def special_ids(metadata: Metadata) -> dict[str, int]:
    return {
        f"{short}_token_id": metadata[f"tokenizer.ggml.{long}_token_id"]
        for short, long in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }


def model_config(metadata: Metadata, tied: bool) -> dict:
    hidden_size = metadata["llama.embedding_length"]
    num_q_heads = metadata["llama.attention.head_count"]
    head_dim = hidden_size // num_q_heads
    if metadata["llama.rope.dimension_count"] != head_dim:
        raise ConversionError("RoPE over a part of the head is not known here")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_q_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": head_dim,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "max_position_embeddings": metadata["llama.context_length"],
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        # GGUF keeps a float32 (9.999999747e-06); this is the number it was made from.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **special_ids(metadata),
    }


def tokenizer(metadata: Metadata) -> dict:
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata["tokenizer.ggml.token_type"]
    pre_name = metadata["tokenizer.ggml.pre"]
    if metadata["tokenizer.ggml.model"] != "gpt2" or pre_name not in PRE_TOKENIZERS:
        raise ConversionError(f"unknown tokenizer {metadata['tokenizer.ggml.model']}/{pre_name}")
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {
            "id": token_id,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token_id, (token, kind) in enumerate(zip(tokens, types))
        if kind == CONTROL_TOKEN
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[pre_name] + [byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: token_id for token_id, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
        },
    }


def tokenizer_config(metadata: Metadata) -> dict:
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = special_ids(metadata)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[ids["pad_token_id"]],
        "unk_token": tokens[0],
        "model_max_length": metadata["llama.context_length"],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
    }


def write_json(path: Path, content: dict, indent: int | None = None) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=indent), encoding="utf-8")


def convert(source: Path, target: Path) -> None:
    reader = GGUFReader(source)
    metadata = Metadata(reader)
    if metadata["general.architecture"] != "llama":
        raise ConversionError(f"architecture {metadata['general.architecture']}, not llama")
    tensors = convert_tensors(
        reader, metadata["llama.attention.head_count"], metadata["llama.attention.head_count_kv"]
    )
    target.mkdir(parents=True, exist_ok=True)
    write_safetensors(target / "model.safetensors", tensors)
    write_json(target / "config.json", model_config(metadata, "lm_head.weight" not in tensors), indent=1)
    write_json(target / "generation_config.json", special_ids(metadata))
    write_json(target / "tokenizer.json", tokenizer(metadata))
    write_json(target / "tokenizer_config.json", tokenizer_config(metadata), indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", type=Path, metavar="IN.gguf")
    parser.add_argument("target", type=Path, metavar="OUT_DIR")
    args = parser.parse_args()
    try:
        convert(args.source, args.target)
    except (ConversionError, OSError) as error:
        print(f"gguf_to_hf: {args.source}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
