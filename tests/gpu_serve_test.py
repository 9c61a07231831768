#!/usr/bin/env python3
"""scripts/gpu_serve on the CPU device and a toy, so that it works where it is needed: every part runs, or
says why not. How fast anything is, is not looked at: the machine has other work."""

import argparse
import json
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = ROOT / "build/release/bin"

# 42 MB. The vocabulary is larger than that of SmolLM2's tokenizer, as it is with a large model's.
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128,
    "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 80000, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "rope_scaling": None, "tie_word_embeddings": False, "hidden_act": "silu",
    "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16", "bos_token_id": 1,
    "eos_token_id": 79999,
}
PARTS = ["model", "start", "pinning", "prefill", "plans", "stop", "all"]


class GpuServe(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.dir = Path(folder.name)
        self.config = self.write_config("config.json", CONFIG)

    def write_config(self, name, config):
        (self.dir / name).write_text(json.dumps(config))
        return str(self.dir / name)

    def run_script(self, *flags):
        command = [sys.executable, ROOT / "scripts/gpu_serve", "--config", self.config, "--device", "cpu",
                   "--json", self.dir / "out.json", *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    def lines(self):
        with open(self.dir / "out.json", encoding="utf-8") as file:
            return {line["part"]: line for line in map(json.loads, file)}

    def test_measures_every_part_and_keeps_a_folder_that_was_named(self):
        model = self.dir / "model"
        done = self.run_script("--model-dir", model, "--host-memory", "256MiB", "--short-prompt-tokens",
                               "100", "--prompt-tokens", "1500", BIN, "--", "--threads", "1")
        said = done.stdout + done.stderr
        lines = self.lines()
        self.assertEqual(list(lines), PARTS, said)
        self.assertEqual(lines["model"]["verdict"], "ok", said)
        self.assertGreater(lines["model"]["cached_share"], 0.99)
        # The config's 1,024 were too few for the prompt.
        self.assertEqual(json.loads((model / "config.json").read_text())["max_position_embeddings"], 1524)
        start = lines["start"]
        self.assertEqual((start["device"], start["plans_at_start"]), ("cpu", 0), said)
        self.assertEqual(set(start["phases"]),
                         {"kvstore serves", "worker serves", "store attached", "connected"})
        self.assertLess(start["phases"]["connected"], start["seconds"])
        pinning = lines["pinning"]
        self.assertEqual(pinning["host_bytes"], 256 << 20, said)
        self.assertEqual(pinning["registered_after"], 256 << 20)
        self.assertEqual(pinning["verdict"], "skipped")  # so little is registered at once
        self.assertGreater(pinning["tpot_alone_ms"], 0)
        prefill = lines["prefill"]
        self.assertEqual(len(prefill["token_ms"]), 24, said)
        self.assertEqual(prefill["token_ms"], sorted(prefill["token_ms"]))
        self.assertGreater(prefill["fetched_share"], 0.6)
        self.assertEqual((lines["plans"]["verdict"], lines["plans"]["built"]), ("skipped", 0), said)
        self.assertGreater(lines["plans"]["steps"], 150)
        self.assertEqual((lines["stop"]["verdict"], lines["stop"]["code"]), ("ok", 0), said)
        failed = any(line["verdict"] == "FAILED" for line in lines.values())
        self.assertEqual(done.returncode, int(failed), said)

        # Served as it is the second time, until the time is over.
        written = (model / "model.safetensors").stat().st_mtime_ns
        done = self.run_script("--model-dir", model, "--host-memory", "256MiB", "--stop-after", "4", BIN,
                               "--", "--delay-seed", "1")  # a step takes some 0.1 s
        said = done.stdout + done.stderr
        lines = self.lines()
        self.assertEqual(list(lines), PARTS, said)
        self.assertIsNone(lines["model"]["write_seconds"])
        self.assertEqual((model / "model.safetensors").stat().st_mtime_ns, written)
        self.assertEqual(lines["plans"]["verdict"], "cut off", said)
        self.assertLess(lines["all"]["seconds"], 8)
        self.assertEqual(done.returncode, int(lines["all"]["verdict"] == "FAILED"), said)

    def test_wrong_usage_is_said_before_anything_starts(self):
        (self.dir / "full").mkdir()
        (self.dir / "full/notes.txt").write_text("mine")
        other = self.write_config("other.json", CONFIG | {"architectures": ["Qwen2ForCausalLM"]})
        for flags, what in [
            (["--no-such-flag"], "--no-such-flag"),
            (["--prompt-tokens", "0"], "--prompt-tokens"),
            (["--config", other], "LlamaForCausalLM"),
            (["--config", self.dir / "none.json"], "none.json"),
            (["--tokenizer", self.dir / "full"], "tokenizer.json"),
            (["--model-dir", self.dir / "full"], "something else"),
        ]:
            with self.subTest(what):
                done = self.run_script(BIN, *flags)
                self.assertEqual(done.returncode, 2, done.stdout + done.stderr)
                self.assertIn(what, done.stderr)
        self.assertEqual([path.name for path in (self.dir / "full").iterdir()], ["notes.txt"])

    def test_a_server_that_does_not_start_is_a_failure_with_its_words(self):
        done = self.run_script("--host-memory", "256MiB", BIN, "--", "--gpu-memory", "1MiB")
        lines = self.lines()
        self.assertEqual(done.returncode, 1, done.stdout + done.stderr)
        self.assertEqual(lines["start"]["verdict"], "FAILED")
        self.assertIn("needs at least", lines["start"]["text"])
        self.assertEqual(lines["prefill"]["verdict"], "skipped")
        self.assertEqual(self.run_script(self.dir).returncode, 1)  # no program there


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--bin", type=Path, default=BIN)
    known, rest = parser.parse_known_args()
    BIN = known.bin
    unittest.main(argv=[sys.argv[0], *rest])
