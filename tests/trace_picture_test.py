#!/usr/bin/env python3
"""What scripts/trace_picture draws of small traces written by hand."""

import contextlib
import importlib.machinery
import importlib.util
import io
import re
import sys
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SVG = "{http://www.w3.org/2000/svg}"
WORKER, STORE = 10, 20
COMPUTE, COPY, COMPLETION, ATTEND = 1 << 30, (1 << 30) + 1, 12, 21


def load_script():
    loader = importlib.machinery.SourceFileLoader("trace_picture", str(ROOT / "scripts/trace_picture"))
    spec = importlib.util.spec_from_loader("trace_picture", loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trace_picture"] = module  # dataclasses look it up
    cached, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    loader.exec_module(module)
    sys.dont_write_bytecode = cached
    return module


tp = load_script()


def name_of(pid, tid, name):
    if tid is None:
        return f'{{"ph":"M","name":"process_name","pid":{pid},"args":{{"name":"{name}"}}}},'
    return f'{{"ph":"M","name":"thread_name","pid":{pid},"tid":{tid},"args":{{"name":"{name}"}}}},'


def event(pid, tid, name, begin, end, args=""):
    args = f',"args":{{{args}}}' if args else ""
    return f'{{"name":"{name}","pid":{pid},"tid":{tid},"ts":{begin:.3f},"ph":"X","dur":{end - begin:.3f}{args}}},'


HEAD = ["[", name_of(WORKER, None, "worker"), name_of(STORE, None, "kvstore"),
        name_of(WORKER, COMPUTE, "compute"), name_of(WORKER, COPY, "copy"),
        name_of(WORKER, COMPLETION, "completion"), name_of(STORE, ATTEND, "attend")]


def compute(name, begin, end):
    return event(WORKER, COMPUTE, name, begin, end)


def layer(at):
    """100 us on the compute stream."""
    return [compute("RmsNorm", at, at + 5), compute("Gemm", at + 5, at + 25),
            compute("RopeAppend", at + 25, at + 30), compute("Attend", at + 30, at + 40),
            compute("Wait", at + 40, at + 50), compute("Attend", at + 50, at + 75),
            compute("GatedGemm", at + 75, at + 100)]


def token_step(at, number, layers=2):
    end = at + 10 + 100 * layers + 40
    lines = [compute("Embed", at, at + 10)]
    for i in range(layers):
        lines += layer(at + 10 + 100 * i)
    lines += [compute("RmsNorm", end - 40, end - 35), compute("Gemm", end - 35, end - 10),
              compute("Sample", end - 10, end),
              event(WORKER, COMPLETION, "token step", at, end, f'"step":{number}')]
    return lines, end


def small_trace():
    """Two token steps of two layers from 1,000 and 1,250 us on, with copies and attention in place."""
    first, end = token_step(1000, 7)
    second, _ = token_step(end, 8)
    return HEAD + first + second + [
        event(WORKER, COPY, "Copy", 1010, 1110, '"bytes":5000000'),
        event(WORKER, COPY, "Wait", 1110, 1120),
        event(WORKER, COPY, "Copy", 1120, 1245, '"bytes":6250000'),
        event(STORE, ATTEND, "attend in place", 1040, 1080, '"layer":0'),
        event(STORE, ATTEND, "attend in place", 1140, 1180, '"layer":1'),
        '{"name":"Attend","pid":10,"tid":10737418',  # its writer was killed
    ]


def rectangles(svg, colour):
    """(x, width) of a colour's rectangles, by path."""
    found = []
    for path in ElementTree.fromstring(svg).iter(SVG + "path"):
        if path.get("fill") == colour:
            found.append([(float(x), float(w)) for x, w in
                          re.findall(r"M([\d.]+) [\d.]+h([\d.]+)v", path.get("d"))])
    return found


def words(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(SVG + "text")]


def draw(lines, kind="token", number=1, layers=None):
    rows = tp.read_rows(lines)
    step = tp.choose(tp.read_steps(rows), kind, number)
    return tp.picture(rows, step, tp.window_of(step, layers), "A title & more")


class Picture(unittest.TestCase):
    def test_a_step_is_drawn_to_scale(self):
        svg = draw(small_trace())
        scale = tp.PLOT / 250
        (copies,) = rectangles(svg, tp.KINDS["copy"][0])
        for (x, width), (begin, end) in zip(copies, [(10, 110), (120, 245)], strict=True):
            self.assertAlmostEqual(x, tp.LEFT + begin * scale, delta=0.02)
            self.assertAlmostEqual(width, (end - begin) * scale, delta=0.02)
        (in_place,) = rectangles(svg, tp.KINDS["in place"][0])
        self.assertEqual(len(in_place), 2)
        (products,) = rectangles(svg, tp.KINDS["product"][0])
        self.assertEqual(len(products), 5)
        self.assertEqual(len(rectangles(svg, tp.KINDS["wait"][0])), 2)  # one path a row

    def test_its_words(self):
        text = words(draw(small_trace()))
        for word in ["A title & more", "0.25 ms, 2 layers", "compute", "copy", "store: attend", "ms",
                     "90% busy", "11.2 MB, 50.0 GB/s", "32% busy", "layer 0", "layer 1",
                     "attention in place, by the store", "waits"]:
            self.assertIn(word, text)

    def test_attention_behind_a_wait_is_of_a_tile(self):
        svg = draw(small_trace())
        (fetched,) = rectangles(svg, tp.KINDS["fetched"][0])
        (resident,) = rectangles(svg, tp.KINDS["resident"][0])
        self.assertEqual([round(w) for _, w in fetched], [76, 76])  # 25 us each
        self.assertEqual([round(w) for _, w in resident], [30, 30])

    def test_layers_are_a_window(self):
        rows = tp.read_rows(small_trace())
        step = tp.choose(tp.read_steps(rows), "token", 1)
        self.assertEqual(step.layers, [1010, 1110, 1210])  # what follows is the logits'
        self.assertEqual(tp.window_of(step, "1-1"), (1110, 1210))
        self.assertEqual(tp.window_of(step, "0-1"), (1010, 1210))
        svg = draw(small_trace(), layers="1")
        (products,) = rectangles(svg, tp.KINDS["product"][0])
        self.assertEqual(len(products), 2)
        for layers in ["0-2", "2", "1-0", "-1", "one"]:
            with self.subTest(layers=layers), self.assertRaises(tp.PictureError):
                tp.window_of(step, layers)

    def test_a_token_step_inside_a_chunk_is_not_the_chunks(self):
        inner, _ = token_step(1200, 2)
        lines = HEAD + [compute("Embed", 1000, 1010)] + layer(1010) + inner + layer(1500) + layer(1600)
        lines += [event(WORKER, COMPLETION, "chunk step", 990, 1700, '"step":1')]
        rows = tp.read_rows(lines)
        steps = tp.read_steps(rows)
        self.assertEqual([step.kind for step in steps], ["token", "chunk"])
        self.assertEqual(tp.choose(steps, "chunk", 1).layers, [1010, 1500, 1600, 1700])
        self.assertEqual(tp.choose(steps, "token", -1).layers, [1210, 1310, 1410])
        self.assertIn("layer", words(draw(lines, "chunk")))

    def test_layers_of_chains_begin_with_the_chain_in_front_of_attention(self):
        lines = HEAD + [compute("Embed", 1000, 1010), compute("Chain", 1010, 1030)]
        for at in (1030, 1130):
            lines += [compute("Attend", at, at + 10), compute("Wait", at + 10, at + 20),
                      compute("Attend", at + 20, at + 40), compute("Chain", at + 40, at + 100)]
        lines += [compute("Chain", 1230, 1260), compute("Sample", 1260, 1270),
                  event(WORKER, COMPLETION, "token step", 1000, 1270, '"step":1')]
        rows = tp.read_rows(lines)
        step = tp.choose(tp.read_steps(rows), "token", 1)
        self.assertEqual(step.layers, [1010, 1070, 1230])
        (products,) = rectangles(draw(lines), tp.KINDS["product"][0])
        self.assertEqual(len(products), 4)

    def test_heads_with_norms_rotate_behind_their_chain(self):
        lines = HEAD + [compute("Embed", 1000, 1010), compute("Chain", 1010, 1030)]
        for at in (1030, 1130):
            lines += [compute("RopeAppend", at, at + 5), compute("Attend", at + 5, at + 40),
                      compute("Chain", at + 40, at + 100)]
        lines += [compute("Sample", 1230, 1240),
                  event(WORKER, COMPLETION, "token step", 1000, 1240, '"step":1')]
        self.assertEqual(tp.choose(tp.read_steps(tp.read_rows(lines)), "token", 1).layers,
                         [1010, 1070, 1170])

    def test_steps_without_work_do_not_count(self):
        lines = small_trace() + [event(WORKER, COMPLETION, "token step", 900, 920, '"step":6')]
        self.assertEqual([step.number for step in tp.read_steps(tp.read_rows(lines))], [7, 8])

    def test_narrow_slices_keep_their_sum_and_the_file_small(self):
        lines = HEAD + [compute("Embed", 0, 10), compute("RmsNorm", 10, 11), compute("RopeAppend", 11, 12)]
        names = ["Gemm", "Attend", "RmsNorm"]
        count = 60_000
        lines += [compute(names[i % 3], 12 + 10 * i, 12 + 10 * i + 4) for i in range(count)]
        lines += [event(WORKER, COMPLETION, "token step", 0, 10 * count + 12, '"step":1')]
        svg = draw(lines)
        self.assertLess(len(svg.encode()), 150 * 1024)
        (products,) = rectangles(svg, tp.KINDS["product"][0])
        drawn = sum(w for _, w in products)
        self.assertAlmostEqual(drawn, tp.PLOT * 4 / 30, delta=0.05 * tp.PLOT * 4 / 30)

    def test_many_threads_of_the_store_are_one_row(self):
        lines = small_trace()[:-1]
        for tid in range(30, 34):
            lines += [name_of(STORE, tid, f"pool {tid}"),
                      event(STORE, tid, "attend in place", 1000, 1125, '"layer":0')]
        text = words(draw(lines))
        for word in ["store: attend", "4 threads", "2.0 busy on average"]:
            self.assertIn(word, text)


class Command(unittest.TestCase):
    def run_it(self, *arguments):
        out, err = io.StringIO(), io.StringIO()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            trace.write_text("\n".join(small_trace()))
            filled = [str(a).replace("FOLDER", folder) for a in arguments]
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = tp.main([str(trace), *filled])
            files = {path.name: path.read_text() for path in Path(folder).glob("*.svg")}
        return code, out.getvalue(), err.getvalue(), files

    def test_writes_the_file_or_standard_output(self):
        code, out, err, files = self.run_it("--step", "-1", "--out", "FOLDER/a.svg")
        self.assertEqual((code, out, err), (0, "", ""))
        self.assertIn("One decode step", words(files["a.svg"]))
        code, out, _, _ = self.run_it("--step", "1", "--layers", "0-1")
        self.assertEqual(code, 0)
        self.assertIn("One decode step: layers 0 to 1", words(out))

    def test_lists_steps(self):
        code, out, _, _ = self.run_it("--list")
        self.assertEqual(code, 0)
        self.assertEqual([line.split()[:3] for line in out.splitlines()],
                         [["--step", "1", "0.25"], ["--step", "2", "0.25"]])

    def test_says_what_is_not_there(self):
        for arguments, message in [(["--step", "3"], "2 token steps"), (["--step", "0"], "from 1"),
                                   (["--chunk", "1"], "no chunk step"),
                                   (["--step", "1", "--layers", "5-6"], "layers 0 to 1")]:
            with self.subTest(arguments=arguments):
                code, out, err, _ = self.run_it(*arguments)
                self.assertEqual((code, out), (1, ""))
                self.assertIn(message, err)


if __name__ == "__main__":
    unittest.main()
