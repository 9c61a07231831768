#!/usr/bin/env python3
"""Writes tests/golden/data/: logits of random tiny models as transformers computes them in float32.

Needs numpy, torch (2.6.0), transformers (4.57.1) and safetensors; tests need none of them.
usage: make_goldens.py [--only NAME] [--out DIR]        computes, checks and writes the goldens
       make_goldens.py --write-model NAME DIR           only writes that golden's model folder

The weights are not stored: random_model.{h,cc} draws the same bytes (proven by a SHA-256 of
model.safetensors in each sidecar). A golden is refused unless it can tell right from wrong:
  - its logits have a standard deviation of at least 2 at every length,
  - a plain decoder written out below agrees with transformers,
  - KV rounded to bfloat16, as served, stays within half the tolerance, and transformers' own
    bfloat16 run within all of it, so that a bfloat16 device is held to the same goldens,
  - each wrong variant of that plain decoder moves the logits by 5 times the tolerance's mean; a wrong
    block of 64 keys does so when it is wrong in every layer, and in any one layer alone it moves
    them by more than the tolerance, as does a window that is a token too long or too short.
data/NAME.json holds the model's spec, the sum, and the numbers above; data/NAME.safetensors holds
tokens.LENGTH and positions.LENGTH (int32) and logits.LENGTH (float32 [positions][vocab]).
"""
import argparse
import hashlib
import json
import math
import os
import struct
import tempfile

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from torch.nn.functional import gelu, silu

LENGTHS = (1, 2, 63, 64, 65, 1000)
MEAN_TOLERANCE, MAX_TOLERANCE = 0.02, 0.2  # times the standard deviation of the logits
MIN_STD = 2.0
MOVED = 5 * MEAN_TOLERANCE  # by a wrong variant, mean error over the standard deviation
BLOCK = 64

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LLAMA32 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 128}
SHORT = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 2.0,
         "original_max_position_embeddings": 32}


def gains(layers):
    """Attention outweighs the embedding and the MLP. Scores of std q x k near 2: peaked enough to
    show one wrong block, not so peaked that bfloat16 drowns it."""
    q = 1.35 if layers == 2 else 1.4
    return {"embed": 2.5, "q": q, "k": q, "v": 1.0, "o": 3.0, "gate": 1.0, "up": 1.0, "down": 0.6,
            "lm_head": 2.5}


LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2 = (f"{name}ForCausalLM" for name in (
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2"))
MODEL_TYPES = {LLAMA: "llama", MISTRAL: "mistral", QWEN2: "qwen2", QWEN3: "qwen3", GEMMA2: "gemma2"}


# Of config.json, as they stand in a spec.
OPTIONS = ("attn_logit_softcapping", "final_logit_softcapping", "max_window_layers",
           "query_pre_attn_scalar", "sliding_window", "use_sliding_window")


def family(architecture, base, more_gains=None, **options):
    """A spec of another architecture: `options` of its config.json, gains of its own weights."""
    return {**base, "architecture": architecture, **options,
            "gains": {**base["gains"], **(more_gains or {})}}


def spec(seed, layers, hidden, q_heads, kv_heads, head_dim, inner, vocab, theta, tied, scaling,
         eps=1e-5):
    return {"seed": seed, "num_layers": layers, "hidden_size": hidden, "num_q_heads": q_heads,
            "num_kv_heads": kv_heads, "head_dim": head_dim, "intermediate_size": inner,
            "vocab_size": vocab, "max_position_embeddings": 4096, "rope_theta": theta,
            "rms_norm_eps": eps, "tie_word_embeddings": tied, "rope_scaling": scaling,
            "gains": gains(layers)}


GEMMA_GAINS = {"embed": 4.0, "post_attention_norm": 10.0, "post_feedforward_norm": 12.0, "q": 1.6,
               "k": 1.6}
# What a bias of all keys does to scores is the same for all but for rotation.
QWEN2_GAINS = {"bias": 0.35, "k_bias": 0.8, "q": 1.6, "k": 1.6, "v": 1.5, "down": 1.0}

# Hidden size and query width differ in some (as config.json allows with head_dim), no vocabulary
# is a multiple of 32, no intermediate size a power of two.
SPECS = {
    "gqa1_d64": spec(301, 3, 192, 3, 3, 64, 328, 517, 1e4, False, None),
    "gqa1_d128_tied_scaled": spec(102, 2, 320, 2, 2, 128, 456, 301, 5e5, True, LLAMA3),
    "gqa2_d64_tied": spec(103, 3, 320, 4, 2, 64, 520, 333, 1e5, True, None),
    "gqa2_d128_scaled": spec(104, 2, 352, 4, 2, 128, 600, 431, 5e5, False, LLAMA32, 1e-6),
    "gqa3_d64_tied": spec(105, 3, 576, 9, 3, 64, 776, 613, 1e5, True, None),
    "gqa3_d128_scaled": spec(106, 2, 320, 6, 2, 128, 456, 389, 1e4, False, SHORT),
    "gqa4_d64_tied_scaled": spec(107, 3, 512, 8, 2, 64, 872, 711, 5e5, True, LLAMA32),
    "gqa4_d128": spec(108, 2, 448, 8, 2, 128, 712, 997, 5e5, False, None),
    "gqa5_d64_scaled": spec(109, 3, 640, 10, 2, 64, 1096, 455, 5e5, False, LLAMA3),
    "gqa5_d128_tied": spec(110, 2, 224, 10, 2, 128, 360, 349, 1e4, True, None),
    "gqa8_d64_scaled": spec(111, 3, 320, 16, 2, 64, 456, 403, 1e5, False, SHORT),
    "gqa8_d128_tied_scaled": spec(112, 2, 192, 16, 2, 128, 328, 561, 5e5, True, LLAMA3),
    "qwen2_gqa7_d64": family(QWEN2, spec(201, 3, 448, 7, 1, 64, 712, 419, 1e6, False, None, 1e-6),
                             {**QWEN2_GAINS, "bias": 0.3, "v": 1.9, "down": 1.1}),
    "qwen2_gqa2_d128_tied": family(QWEN2, spec(202, 2, 320, 4, 2, 128, 456, 433, 1e6, True, None, 1e-6),
                                   QWEN2_GAINS),
    # q and k have unit size whatever their gains: what makes scores peaked is the norms' weights.
    "qwen3_gqa2_d128": family(QWEN3, spec(203, 2, 192, 4, 2, 128, 328, 401, 1e6, False, None, 1e-6),
                              {"q_norm": 1.35, "k_norm": 1.35}),
    "mistral_gqa4_d64_window": family(MISTRAL, spec(205, 3, 320, 8, 2, 64, 456, 383, 1e4, False, None),
                                      sliding_window=96),
    "mistral_gqa2_d128_window": family(MISTRAL, spec(206, 2, 320, 4, 2, 128, 456, 419, 1e4, True, None),
                                       sliding_window=300),
    "qwen2_gqa3_d64_window": family(QWEN2, spec(207, 3, 320, 6, 2, 64, 456, 409, 1e6, False, None, 1e-6),
                                    QWEN2_GAINS, sliding_window=40,
                                    use_sliding_window=True, max_window_layers=1),
    # Its embeddings are tied, and each token's own would outweigh all else but for the gains of the norms
    # behind attention and MLP. The caps lie where scores and logits are.
    "gemma2_gqa2_d256": family(GEMMA2, spec(208, 3, 256, 4, 2, 256, 456, 353, 1e4, True, None, 1e-6),
                               GEMMA_GAINS, sliding_window=120, query_pre_attn_scalar=144,
                               attn_logit_softcapping=4.0, final_logit_softcapping=7.0),
    "gemma2_gqa1_d128": family(GEMMA2, spec(209, 3, 320, 3, 3, 128, 392, 401, 1e4, True, None, 1e-6),
                               {**GEMMA_GAINS, "post_feedforward_norm": 14.0}, sliding_window=200, query_pre_attn_scalar=288,
                               attn_logit_softcapping=4.0, final_logit_softcapping=7.0),
    "qwen3_gqa4_d64_tied": family(QWEN3, spec(204, 3, 320, 8, 2, 64, 456, 467, 1e6, True, None, 1e-6),
                                  {"q_norm": 1.4, "k_norm": 1.4}),
}

# ---------------------------------------------------------------- the weights (see random_model.h)

GOLDEN = 0x9E3779B97F4A7C15
M64 = (1 << 64) - 1


def mix(z):
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & M64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & M64
    return z ^ (z >> 31)


def fnv1a64(text):
    h = 0xCBF29CE484222325
    for c in text.encode():
        h = ((h ^ c) * 0x100000001B3) & M64
    return h


def random_bits(seed, name, count):
    key = mix(mix((seed + GOLDEN) & M64) ^ fnv1a64(name))
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(GOLDEN) + np.uint64(key)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def to_bfloat16(x):
    u = x.astype(np.float32).view(np.uint32)
    odd = (u >> np.uint32(16)) & np.uint32(1)
    return ((u + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def draw(seed, name, shape, gain, shift=0.0):
    bits = random_bits(seed, name, math.prod(shape))
    if name.endswith("norm.weight"):
        return to_bfloat16(gain * (0.5 + (bits >> np.uint64(56)).astype(np.float64) / 256) - shift)
    field = np.uint64(0xFFFF)
    total = sum(((bits >> np.uint64(s)) & field).astype(np.int64) for s in (0, 16, 32, 48))
    columns = shape[1] if len(shape) == 2 else 1
    scale = gain / math.sqrt(columns) / 75674.5
    return to_bfloat16((2 * total - 262140).astype(np.float64) * scale).reshape(shape)


def arch(s):
    return s.get("architecture", LLAMA)


def tensors(s):
    g, hidden, inner, vocab = s["gains"], s["hidden_size"], s["intermediate_size"], s["vocab_size"]
    q, kv = s["num_q_heads"] * s["head_dim"], s["num_kv_heads"] * s["head_dim"]
    shapes = {"model.embed_tokens.weight": ((vocab, hidden), g["embed"]),
              "model.norm.weight": ((hidden,), 1)}
    if not s["tie_word_embeddings"]:
        shapes["lm_head.weight"] = ((vocab, hidden), g["lm_head"])
    layer = [("input_layernorm.weight", (hidden,), 1),
             ("post_attention_layernorm.weight", (hidden,), g.get("post_attention_norm", 1)),
             ("self_attn.q_proj.weight", (q, hidden), g["q"]),
             ("self_attn.k_proj.weight", (kv, hidden), g["k"]),
             ("self_attn.v_proj.weight", (kv, hidden), g["v"]),
             ("self_attn.o_proj.weight", (hidden, q), g["o"]),
             ("mlp.gate_proj.weight", (inner, hidden), g["gate"]),
             ("mlp.up_proj.weight", (inner, hidden), g["up"]),
             ("mlp.down_proj.weight", (hidden, inner), g["down"])]
    if arch(s) == QWEN2:
        layer += [(f"self_attn.{n}_proj.bias", (size,), g[gain])
                  for n, size, gain in (("q", q, "bias"), ("k", kv, "k_bias"), ("v", kv, "bias"))]
    if arch(s) == QWEN3:
        layer += [(f"self_attn.{n}_norm.weight", (s["head_dim"],), g[f"{n}_norm"]) for n in "qk"]
    if arch(s) == GEMMA2:
        layer += [("pre_feedforward_layernorm.weight", (hidden,), 1),
                  ("post_feedforward_layernorm.weight", (hidden,), g["post_feedforward_norm"])]
    for i in range(s["num_layers"]):
        shapes |= {f"model.layers.{i}.{name}": (shape, gain) for name, shape, gain in layer}
    shift = 1.0 if arch(s) == GEMMA2 else 0.0  # its norms multiply by 1 + w
    return {n: draw(s["seed"], n, *shapes[n], shift) for n in sorted(shapes)}


def write_model(s, folder):
    """The folder that WriteRandomModel(s, folder) writes; returns the SHA-256 of its weights."""
    os.makedirs(folder, exist_ok=True)
    scaling = s["rope_scaling"] and {"rope_type": "llama3", **s["rope_scaling"]}
    config = {
        "architectures": [arch(s)], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "head_dim": s["head_dim"],
        "hidden_act": "silu", "hidden_size": s["hidden_size"], "initializer_range": 0.02,
        "intermediate_size": s["intermediate_size"],
        "max_position_embeddings": s["max_position_embeddings"], "mlp_bias": False,
        "model_type": MODEL_TYPES[arch(s)], "num_attention_heads": s["num_q_heads"],
        "num_hidden_layers": s["num_layers"], "num_key_value_heads": s["num_kv_heads"],
        "pretraining_tp": 1, "rms_norm_eps": s["rms_norm_eps"], "rope_scaling": scaling,
        "rope_theta": s["rope_theta"], "tie_word_embeddings": s["tie_word_embeddings"],
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": s["vocab_size"]}
    if arch(s) == GEMMA2:
        config["hidden_act"] = config["hidden_activation"] = "gelu_pytorch_tanh"
    config |= {name: s[name] for name in OPTIONS if name in s}
    for name, content in (("config", config), ("generation_config", {
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})):
        with open(f"{folder}/{name}.json", "w") as f:
            f.write(json.dumps(content, indent=2, sort_keys=True) + "\n")
    weights, header, offset = tensors(s), {"__metadata__": {"format": "pt"}}, 0
    for name, w in weights.items():
        header[name] = {"dtype": "BF16", "shape": list(w.shape),
                        "data_offsets": [offset, offset + w.nbytes]}
        offset += w.nbytes
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + b"".join(w.tobytes() for w in weights.values())
    with open(f"{folder}/model.safetensors", "wb") as f:
        f.write(content)
    return hashlib.sha256(content).hexdigest()


# ---------------------------------------------------------------- a plain decoder, right or wrong

class PlainDecoder:
    """Float32 decoder written out; `wrong` names the one mechanism that is broken."""

    def __init__(self, s):
        self.s = s
        self.w = {name: torch.from_numpy((w.astype(np.uint32) << 16).view(np.float32))
                  for name, w in tensors(s).items()}

    def frequencies(self, wrong):
        s, d = self.s, self.s["head_dim"]
        f = 1.0 / s["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
        scaling = s["rope_scaling"]
        if scaling is None or wrong == "rope_not_scaled":
            return f.float()
        factor, original = scaling["factor"], scaling["original_max_position_embeddings"]
        if wrong == "rope_all_scaled":
            return (f / factor).float()
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((original * f / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        if wrong == "rope_scaled_without_ramp":
            smooth = (smooth >= 1).double()
        return (smooth * f + (1 - smooth) * f / factor).float()

    def rotate(self, x, wrong):
        """x: [heads][length][head_dim]; pairs are (i, i + head_dim / 2)."""
        if wrong == "no_rope":
            return x
        angle = torch.arange(x.shape[1]).float()[:, None] * self.frequencies(wrong)
        interleaved = wrong == "rope_interleaved"
        a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
        pair = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
        return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)

    def norm(self, x, name, wrong):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.s["rms_norm_eps"])
        if wrong == "no_norm_weight":
            return x
        one = 1 if arch(self.s) == GEMMA2 and wrong != "norm_without_one" else 0
        return x * (one + self.w[f"{name}.weight"])

    def post_norm(self, x, name, wrong):
        return x if arch(self.s) != GEMMA2 or wrong == "no_post_norms" else self.norm(x, name, wrong)

    def window(self, layer, wrong):
        """Tokens that a query of the layer sees, its own included; 0: all."""
        s = self.s
        window = s.get("sliding_window") or 0
        if wrong == "no_window" or window == 0:
            return 0
        if wrong in ("window_longer", "window_shorter"):
            window += 1 if wrong == "window_longer" else -1
        if arch(s) == GEMMA2:
            windowed = layer % 2 == (1 if wrong == "window_on_other_layers" else 0)
        elif arch(s) == MISTRAL:
            windowed = True
        else:
            windowed = bool(s.get("use_sliding_window")) and (
                layer >= s["max_window_layers"] or wrong == "window_on_all_layers")
        return window if windowed else 0

    def attention(self, h, prefix, layer, wrong):
        s, length = self.s, h.shape[0]
        q_heads, kv_heads, d = s["num_q_heads"], s["num_kv_heads"], s["head_dim"]

        def heads(name, n):
            x = h @ self.w[f"{prefix}.{name}_proj.weight"].T
            if arch(s) == QWEN2 and wrong not in ("no_bias", f"no_{name}_bias"):
                x = x + self.w[f"{prefix}.{name}_proj.bias"]
            return x.view(length, n, d).transpose(0, 1)

        def turned(name, n):
            x = heads(name, n)
            if arch(s) != QWEN3 or wrong in ("no_qk_norm", f"no_{name}_norm"):
                return self.rotate(x, wrong)
            norm = f"{prefix}.{name}_norm"
            if wrong == "qk_norm_after_rope":
                return self.norm(self.rotate(x, wrong), norm, wrong)
            if wrong == "qk_norm_of_all_heads":
                whole = x.transpose(0, 1).reshape(length, 1, n * d)
                whole = whole * torch.rsqrt(whole.pow(2).mean(-1, keepdim=True) + s["rms_norm_eps"])
                x = whole.view(length, n, d).transpose(0, 1) * self.w[f"{norm}.weight"]
                return self.rotate(x, wrong)
            return self.rotate(self.norm(x, norm, wrong), wrong)

        q, k, v = turned("q", q_heads), turned("k", kv_heads), heads("v", kv_heads)
        visible = torch.ones(length, length, dtype=torch.bool)
        if wrong != "no_mask":
            visible = visible.tril()
        if window := self.window(layer, wrong):
            visible = visible & torch.ones_like(visible).triu(1 - window)
        if wrong == "kv_bfloat16":
            k, v = k.bfloat16().float(), v.bfloat16().float()
        kind, _, detail = wrong.partition(":")
        if kind in ("block_missing", "block_stale"):
            block, in_layer = detail.split("@")
            first = int(block) * BLOCK
            rows = slice(first, first + BLOCK)
            if in_layer in ("all", str(layer)):
                if kind == "block_missing":  # its keys are not attended
                    visible[first + BLOCK:, rows] = False
                else:  # a tile that still holds the block before: seen by later queries only
                    k, v = k.clone(), v.clone()
                    k[:, rows] = k[:, first - BLOCK:first].clone()
                    v[:, rows] = v[:, first - BLOCK:first].clone()
        of_head = torch.arange(q_heads)
        of_head = of_head % kv_heads if wrong == "gqa_map" else of_head // (q_heads // kv_heads)
        scale = d if wrong == "scale_of_head_dim" else s.get("query_pre_attn_scalar", d)
        scores = q @ k[of_head].transpose(1, 2) / math.sqrt(scale)
        cap = s.get("attn_logit_softcapping")
        if cap and wrong != "no_attention_cap":
            scores = cap * (scores / cap).tanh()
        self.score_std.append(scores[:, torch.ones(length, length).tril().bool()].std().item())
        p = scores.masked_fill(~visible, -math.inf).softmax(-1)
        o = (p @ v[of_head]).transpose(0, 1).reshape(length, q_heads * d)
        if wrong == "no_attention":
            o = torch.zeros_like(o)
        return o @ self.w[f"{prefix}.o_proj.weight"].T

    @torch.no_grad()
    def logits(self, tokens, wrong=""):
        self.score_std = []
        w = self.w
        x = w["model.embed_tokens.weight"][tokens]
        if arch(self.s) == GEMMA2 and wrong != "no_embedding_scale":
            x = x * math.sqrt(self.s["hidden_size"])
        act = (lambda g: gelu(g, approximate="tanh")) if arch(self.s) == GEMMA2 else silu
        if wrong == "other_activation":
            act = silu if arch(self.s) == GEMMA2 else gelu
        mlp_norm = "pre_feedforward" if arch(self.s) == GEMMA2 else "post_attention"
        for i in range(self.s["num_layers"]):
            layer = f"model.layers.{i}"
            h = self.norm(x, f"{layer}.input_layernorm", wrong)
            o = self.attention(h, f"{layer}.self_attn", i, wrong)
            x = x + self.post_norm(o, f"{layer}.post_attention_layernorm", wrong)
            h = self.norm(x, f"{layer}.{mlp_norm}_layernorm", wrong)
            gate, up = (h @ w[f"{layer}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            if wrong != "no_mlp":
                down = (act(gate) * up) @ w[f"{layer}.mlp.down_proj.weight"].T
                x = x + self.post_norm(down, f"{layer}.post_feedforward_layernorm", wrong)
        head = "model.embed_tokens" if self.s["tie_word_embeddings"] else "lm_head"
        logits = self.norm(x, "model.norm", wrong) @ w[f"{head}.weight"].T
        cap = self.s.get("final_logit_softcapping")
        return cap * (logits / cap).tanh() if cap and wrong != "no_final_cap" else logits


def family_variants(s, length):
    variants = []
    window = s.get("sliding_window") or 0
    if arch(s) == QWEN2:
        # One key has all the weight, and a bias of all keys alike changes no weight: what shows of k's
        # is what rotation makes of it.
        variants += [("no_bias", 0), ("no_v_bias", 0)]
        if length >= 63:
            variants += [("no_q_bias", 1), ("no_k_bias", 1)]
    if arch(s) == QWEN3 and length >= 63:
        variants += [(f"no_{what}_norm", 1) for what in ("qk", "q", "k")]
        variants += [("qk_norm_after_rope", 1)]
    if arch(s) == GEMMA2:
        variants += [("norm_without_one", 0), ("no_post_norms", 0), ("no_embedding_scale", 0),
                     ("other_activation", 0), ("no_final_cap", 0)]
        if length >= 63:
            variants += [("no_attention_cap", 1), ("scale_of_head_dim", 1)]
    if window and length > 2 * window:
        variants += [("no_window", window), ("window_longer", window), ("window_shorter", window)]
        if arch(s) == GEMMA2:
            variants += [("window_on_other_layers", window)]
        if arch(s) in (QWEN2, QWEN3):
            variants += [("window_on_all_layers", window)]
    return variants


def wrong_variants(s, length):
    """(name, first position that it can move) of each mistake that must show at this length."""
    variants = [("no_attention", 0), ("no_mlp", 0), ("no_norm_weight", 0)]
    variants += family_variants(s, length)
    if length > 1:
        variants += [("no_mask", 0)]
    if s["num_q_heads"] > s["num_kv_heads"] > 1:
        variants += [("gqa_map", 0)]
    if length >= 63:
        variants += [("no_rope", 1), ("rope_interleaved", 1)]
        if s["rope_scaling"]:
            variants += [("rope_not_scaled", 1), ("rope_all_scaled", 1)]
    if length > 2 * BLOCK:
        if s["rope_scaling"]:
            variants += [("rope_scaled_without_ramp", 1)]
        last = length // BLOCK - 1
        for block in (1, last // 2, last):
            for where in ["all"] + list(range(s["num_layers"])):
                variants += [(f"{kind}:{block}@{where}", (block + 1) * BLOCK)
                             for kind in ("block_missing", "block_stale")]
    return variants


# ---------------------------------------------------------------- the goldens

def lengths(s):
    window = s.get("sliding_window")
    return sorted({*LENGTHS, *([window - 1, window, window + 1] if window else [])})


def stored_positions(length):
    if length <= 2:
        return list(range(length))
    last = {length - 3, length - 2, length - 1}
    if length <= 65:
        some = {0, 1, 2, 3, 7, 8, 15, 16, 31, 32, 33, 47, 48}
        return sorted({p for p in some | last if p < length})
    inner = {0, 1, 31, 63, 64, 65, 127, 128, 191, 192, 255, 256, 257, 319, 320, 447, 511, 512, 513,
             575, 640, 703, 767, 768, 769, 831, 895, 896}
    return sorted({p for p in inner | set(range(960, length, 5)) | last if p < length})


def errors(got, want):
    e = (got - want).abs() / want.std()
    return {"mean": e.mean().item(), "max": e.max().item()}


def rounded(value):
    return float(f"{value:.4g}")


class Refused(Exception):
    pass


def check(name, s, plain, length, tokens, positions, want, bfloat16):
    """What is recorded of one length. Raises Refused."""
    std = want.std().item()
    if std < MIN_STD:
        raise Refused(f"{name}: logits have std {std:.2f} at length {length}")
    base = errors(plain.logits(tokens)[positions], want)
    if base["max"] > 1e-3:
        raise Refused(f"{name}: the plain decoder differs from transformers at {length}: {base}")
    facts = {"std": std, "score_std": [rounded(x) for x in plain.score_std],
             "plain_error": {k: rounded(v) for k, v in base.items()}}
    served = errors(plain.logits(tokens, "kv_bfloat16")[positions], want)
    facts["kv_bfloat16_error"] = {k: rounded(v) for k, v in served.items()}
    half = errors(bfloat16, want)
    facts["bfloat16_error"] = {k: rounded(v) for k, v in half.items()}
    if served["mean"] > MEAN_TOLERANCE / 2 or served["max"] > MAX_TOLERANCE / 2:
        raise Refused(f"{name}: bfloat16 KV alone gives {served} at length {length}")
    if half["mean"] > MEAN_TOLERANCE or half["max"] > MAX_TOLERANCE:
        raise Refused(f"{name}: transformers' bfloat16 gives {half} at length {length}")
    facts["moved"] = {}
    for wrong, first in wrong_variants(s, length):
        # Of a block behind the window later positions know by others only.
        end = first + (s.get("sliding_window") or length) if "@" in wrong else length
        kept = [i for i, p in enumerate(positions) if first <= p < end]
        moved = errors(plain.logits(tokens, wrong)[positions][kept], want[kept])["mean"]
        facts["moved"][wrong] = rounded(moved)
        small = "@" in wrong and not wrong.endswith("@all") or wrong in ("window_longer",
                                                                         "window_shorter")
        if moved <= (MEAN_TOLERANCE if small else MOVED):
            raise Refused(f"{name}: {wrong} moves the logits by {moved:.3f} at length {length}")
    return facts


def make(name, s, out):
    with tempfile.TemporaryDirectory() as folder:
        sha256 = write_model(s, folder)
        exact, half = (transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager").eval()
            for dtype in (torch.float32, torch.bfloat16))
    plain = PlainDecoder(s)
    arrays, cases = {}, []
    for length in lengths(s):
        tokens = (random_bits(s["seed"], f"tokens.{length}", length) % np.uint64(s["vocab_size"])
                  ).astype(np.int32)
        positions = stored_positions(length)
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            want, bfloat16 = (m(ids[None], use_cache=False).logits[0, positions].float()
                              for m in (exact, half))
        facts = check(name, s, plain, length, ids, positions, want, bfloat16)
        cases.append({"length": length, **facts})
        arrays[f"tokens.{length}"] = tokens
        arrays[f"positions.{length}"] = np.array(positions, np.int32)
        arrays[f"logits.{length}"] = want.numpy()
    save_file(arrays, f"{out}/{name}.safetensors")
    sidecar = {"spec": s, "model_sha256": sha256,
               "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
               "tolerance": {"mean": MEAN_TOLERANCE, "max": MAX_TOLERANCE}, "cases": cases}
    with open(f"{out}/{name}.json", "w") as f:
        f.write(json.dumps(sidecar, indent=1) + "\n")
    last = cases[-1]
    weakest = [min((v, k, c["length"]) for c in cases for k, v in c["moved"].items()
                   if ("@" in k and "@all" not in k or k in ("window_longer", "window_shorter")) == single)
               for single in (False, True)]
    print(f"{name}: std {last['std']:.2f}, scores {last['score_std']}, weakest {weakest}, "
          f"bf16 {last['bfloat16_error']}, bf16 KV {last['kv_bfloat16_error']}, "
          f"plain {last['plain_error']}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=SPECS)
    parser.add_argument("--out", default=os.path.join(os.path.dirname(__file__), "data"))
    parser.add_argument("--write-model", nargs=2, metavar=("NAME", "DIR"))
    args = parser.parse_args()
    if args.write_model:
        name, folder = args.write_model
        print(write_model(SPECS[name], folder))
        return
    os.makedirs(args.out, exist_ok=True)
    for name in [args.only] if args.only else SPECS:
        make(name, SPECS[name], args.out)


if __name__ == "__main__":
    main()
