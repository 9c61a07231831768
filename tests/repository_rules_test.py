#!/usr/bin/env python3
"""Rules of the tree that no compiler checks: who may include whom, and what text must not say."""

import fnmatch
import re
import subprocess
import unittest
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".h", ".cc", ".cu", ".cuh"}

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', re.MULTILINE)
GRPC_HEADER = re.compile(r"^grpc(pp|\+\+)?/|\.grpc\.pb\.h$")
GRPC_PLACE = re.compile(r"(_service|_client|_server)$|main|grpc_status|grpc_security")
# What a kernel may take from outside, besides the standard library and the system.
KERNEL_TOOLKIT = re.compile(r"^(cuda|cub|cooperative_groups|cute|cutlass|nv)(/|[\w.]*$)")

# Hosts that text may point to: readers follow these; everything else is reached through a package
# manager, by a package's name.
KNOWN_HOSTS = {
    "arxiv.org", "huggingface.co", "github.com", "www.apache.org", "www.w3.org", "localhost",
    "127.0.0.1",
}
URL = re.compile(r"\bhttps?://(?:\[[0-9a-f:]+\]|[\w.-]+)")
# Text that belongs to one machine or one afternoon.
LEFTOVER = re.compile(
    r"(?<![\w.$}])/(?:home|root|Users|work)/|\.\./shared\b|\bissue #?\d|\b(?:TODO|FIXME|XXX)\b|\bfor now\b",
    re.IGNORECASE,
)
# Generated, or a text that is not ours to word.
FOREIGN_TEXT = {"LICENSE", "Cargo.lock"}


# What kernels and services agree on as bytes.
LAYOUT_HEADERS = ("common/kv_layout.h", "common/mailbox_format.h")

def include_violations(path: PurePosixPath, text: str) -> list[str]:
    """What `text`, the source file at `path` in the repository, includes and must not."""
    found = []
    area = path.parts[0]
    for bracket, header in INCLUDE.findall(text):
        complaint = None
        if area == "kernels":
            complaint = kernel_complaint(bracket, header)
        elif area == "common" and header.startswith("services/"):
            complaint = "common/ knows no service"
        elif area == "services" and path.parts[1] != "headroom" and header.startswith("services/"):
            if header.split("/")[1] != path.parts[1]:
                complaint = "a service includes no other service"
        if area in ("common", "services") and GRPC_HEADER.search(header):
            if not GRPC_PLACE.search(path.stem):
                complaint = "gRPC headers: only in *_service, *_client, *_server, main, grpc_status, grpc_security"
        if complaint:
            found.append(f"{path}: {header}: {complaint}")
    return found


def kernel_complaint(bracket: str, header: str) -> str | None:
    if header.startswith("kernels/") or header in LAYOUT_HEADERS:
        return None
    if bracket == "<" and ("/" not in header or header.startswith("sys/")):
        return None
    if KERNEL_TOOLKIT.search(header):
        return None
    return "kernels/ includes the standard library, CUDA and the layouts of common/ only"


def text_violations(path: PurePosixPath, text: str) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        for match in LEFTOVER.finditer(line):
            found.append(f"{path}:{number}: {match.group()!r}")
        for match in URL.finditer(line):
            if match.group().split("//")[1].lower() not in KNOWN_HOSTS:
                found.append(f"{path}:{number}: {match.group()!r} is no host that readers need")
    return found


def repository_files() -> list[PurePosixPath]:
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [PurePosixPath(name) for name in listed if (ROOT / name).is_file()]


class Includes(unittest.TestCase):
    def test_the_tree_keeps_the_rules(self):
        sources = [path for path in repository_files() if path.suffix in SOURCE_SUFFIXES]
        self.assertTrue(sources)
        found = [
            complaint
            for path in sources
            for complaint in include_violations(path, (ROOT / path).read_text())
        ]
        self.assertEqual([], found)

    def test_a_broken_rule_is_seen(self):
        for path, header in [
            ("kernels/cpu/gemm.cc", '"absl/status/status.h"'),
            ("kernels/cpu/gemm.cc", '"common/status.h"'),
            ("kernels/cpu/gemm.cc", "<absl/status/status.h>"),
            ("common/config.cc", '"services/worker/sampler.h"'),
            ("services/worker/sampler.cc", '"services/kvstore/segment.h"'),
            ("services/worker/sampler.cc", "<grpcpp/grpcpp.h>"),
            ("common/config.h", '"headroom/v1/worker.grpc.pb.h"'),
        ]:
            with self.subTest(path=path, header=header):
                self.assertTrue(include_violations(PurePosixPath(path), f"#include {header}\n"))

    def test_what_is_allowed_is_not_complained_of(self):
        for path, header in [
            ("kernels/cpu/gemm.cc", "<immintrin.h>"),
            ("kernels/cuda/gemm.cu", "<cuda_bf16.h>"),
            ("kernels/cuda/gemm.cu", "<cuda/std/atomic>"),
            ("kernels/cpu/gemm.cc", '"common/kv_layout.h"'),
            ("services/headroom/serve.cc", '"services/worker/worker_service.h"'),
            ("services/worker/worker_service.cc", "<grpcpp/grpcpp.h>"),
            ("services/coordinator/store_client.h", '"headroom/v1/kv_store.grpc.pb.h"'),
        ]:
            with self.subTest(path=path, header=header):
                self.assertEqual([], include_violations(PurePosixPath(path), f"#include {header}\n"))


class Text(unittest.TestCase):
    def test_no_file_names_a_machine_or_leaves_work_undone(self):
        found = []
        for path in repository_files():
            if path.name in FOREIGN_TEXT or ROOT / path == Path(__file__).resolve():
                continue
            try:
                text = (ROOT / path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # no text
            found += text_violations(path, text)
        self.assertEqual([], found)

    def test_a_leftover_is_seen(self):
        for line in ["cd /home/me/headroom", "// TODO: later", "good enough for now", "see issue 12"]:
            with self.subTest(line=line):
                self.assertTrue(text_violations(PurePosixPath("a.cc"), line))

    def test_an_unknown_host_is_seen(self):
        self.assertTrue(text_violations(PurePosixPath("a.md"), "from https://downloads.example.com/x"))
        self.assertEqual([], text_violations(PurePosixPath("a.md"), "see https://arxiv.org/abs/1"))


class GpuTest(unittest.TestCase):
    """scripts/gpu_test runs where no CI does: a test that it leaves out may have gone by now."""

    TEST = re.compile(r"^TEST(?:_[FP])?\((\w+), (\w+)\)", re.MULTILINE)

    def test_what_it_names_is_there(self):
        script = (ROOT / "scripts/gpu_test").read_text()
        cmake = [(ROOT / p).read_text() for p in repository_files() if p.name == "CMakeLists.txt"]
        tests = [f"{suite}.{name}" for p in repository_files() if p.name.endswith("_test.cc")
                 for suite, name in self.TEST.findall((ROOT / p).read_text())]
        self.assertGreater(len(tests), 500)
        filters = re.findall(r"'([^'\s]*\*[^'\s]*)'", script)
        self.assertGreater(len(filters), 8)
        for pattern in sorted({p.lstrip("-") for text in filters for p in text.split(":")}):
            with self.subTest(pattern=pattern):
                self.assertTrue(any(fnmatch.fnmatchcase(test, pattern) for test in tests))
        for name in sorted(set(re.findall(r"(?<![\w*-])(?!gpu_test\b)[a-z]\w*_test\b", script))):
            # By name, or as one of foreach(test ...) under a prefix.
            prefix, _, rest = name.removesuffix("_test").partition("_")
            of_many = re.compile(rf"foreach\(test[^)]*\b{rest}\b[^)]*\)\s+headroom_test\({prefix}_\$")
            with self.subTest(name=name):
                self.assertTrue(any(f"headroom_test({name} " in text or of_many.search(text)
                                    for text in cmake))


if __name__ == "__main__":
    unittest.main()
