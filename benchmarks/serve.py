"""How fast bundles are served, beside llama.cpp's server in the same run; every figure is a ratio of two of one round.

Usage: python benchmarks/serve.py --llama PYTHON [--model 125M|FOLDER ...] [--clients N...] [--rounds N] [--threads N]
                                  [--only speed|first|prefix|steps ...] [--activations int8|float] [--keep DIR]

A Llama-shaped checkpoint of random weights (125M), or the checkpoint in FOLDER that lies beside the GGUF file of the
same weights, is built in four bits; PYTHON has xllamacpp, whose wheel has llama.cpp's server.
Both serve on the same processors and are asked the same ids, in turns: tokens a second of 1, 4 and 16 clients in all,
by the clock and by the second of the server's processors; the time to the first token of a short prompt, alone and
while a long one is read; that of a prompt of which nine tenths were read before; and what Python itself takes of a step
of 16 answers. A table of all figures and what they must reach comes last; exit status 1 if one is missed. With --keep a
second run builds nothing.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import shutil
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

import quantize_llama  # noqa: E402
from quantize import SHAPES, pinned, write_checkpoint  # noqa: E402

WORK = str(ROOT / "benchmarks" / "serve_work.py")
CONTEXT, ANSWERS = 2048, 16
PROMPT, MADE, EACH = 64, 64, 2  # tokens of a prompt and of its answer; requests of each client
SHORT, LONG, SHARED = 64, 1500, 1000
LEAST, MOST_BESIDE, LEAST_PREFIX, MOST_OWN = 1.25, 2.0, 5.0, 1.5
PIPELINE = """\
extends: {root}/pipeline.yaml
name: served
vars: {{checkpoint: {checkpoint}, targets: [llvm], scheme: {scheme}, context_window: {context}}}
stages:
  graph-build: {{with: {{max_batch: {answers}}}}}
  compile: {{with: {{activations: {activations}}}}}
"""


def bundle(folder: Path, checkpoint: Path, scheme: str, activations: str, threads: int) -> str:
    """Build a bundle of four bits and return its path."""
    file = folder / "pipeline.yaml"
    sizes = {"context": CONTEXT, "answers": ANSWERS}
    values = {"root": ROOT, "checkpoint": checkpoint, "scheme": scheme, "activations": activations, **sizes}
    file.write_text(PIPELINE.format(**values), encoding="utf-8")
    pinned([sys.executable, "-m", "stagegraph.cli.main", "run", str(file), "--stage", "bundle"], threads)
    return str(folder / "artifacts" / "served" / "bundle.llvm" / "bundle")


def random_model(folder: Path, activations: str, threads: int) -> tuple[str, str]:
    """Return the bundle and the GGUF file, in Q4_0, of two random Llamas of one shape."""
    checkpoint, file = folder / "checkpoint", folder / "model.gguf"
    if not checkpoint.is_dir():
        write_checkpoint("125M", checkpoint)
    write_vocabulary(checkpoint, SHAPES["125M"][-1])
    if not file.exists():
        quantize_llama.write(str(file), *SHAPES["125M"], kind="Q4_0")
    return bundle(folder, checkpoint, "q4f16_1", activations, threads), str(file)


def write_vocabulary(folder: Path, size: int) -> None:
    """Write a tokenizer of bytes, and of pairs and triples of letters that its merges make."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel as Split

    specials, alphabet = ["<unk>", "<s>", "</s>"], sorted(Split.alphabet())
    letters = string.ascii_letters + string.digits
    pairs = [*itertools.product(letters, letters)]
    triples = itertools.product(map("".join, pairs), letters)
    merges = [*itertools.islice(itertools.chain(pairs, triples), size - len(specials) - len(alphabet))]
    words = [*specials, *alphabet, *map("".join, merges)]
    tokenizer = Tokenizer(BPE({word: at for at, word in enumerate(words)}, merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = Split(add_prefix_space=False), ByteLevel()
    tokenizer.add_special_tokens(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


@dataclass
class Server:
    """A server under way: where it listens, and what keeps an answer from ending before its time."""

    process: subprocess.Popen[str]
    port: int
    endless: dict[str, Any]

    def seconds(self) -> float:
        """Return what it took of the processors so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def ask(self, ids: list[int], count: int) -> tuple[int, float]:
        """Continue ``ids`` by so many tokens, as they come; return how many came, and when the first did."""
        options = {"max_tokens": count, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps({"prompt": ids, **options, **self.endless})
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200, response.read()
        response.readline()
        first = time.perf_counter() - began
        events = [line for line in response.read().split(b"\n") if line.startswith(b"data: {")]
        # llama.cpp's sends none where the only token is no whole character.
        usage = next((found for line in events[::-1] if (found := json.loads(line[6:]).get("usage"))), None)
        connection.close()
        return int(usage["completion_tokens"]) if usage else 0, first


@contextmanager
def served(command: list[str], threads: int, endless: dict[str, Any]) -> Iterator[Server]:
    """Start a server on so many processors; end it afterwards."""
    chosen = sorted(os.sched_getaffinity(0))[:threads]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_NUM_THREADS": str(threads)}
    limit = ["taskset", "-c", ",".join(map(str, chosen))]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen([*limit, *command], text=True, env=env, **pipes)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "http://127.0.0.1:" in line:
            break
    else:
        raise SystemExit("".join(lines))
    threading.Thread(target=process.stdout.read, daemon=True).start()  # a full pipe would stop it
    port = int(lines[-1].partition("http://127.0.0.1:")[2].split("/")[0])
    try:
        yield Server(process, port, endless)
    finally:
        process.terminate()
        process.wait()


class Prompts:
    """Ids that no prompt before began with."""

    def __init__(self, vocab: int) -> None:
        self._random, self._vocab = np.random.default_rng(1), vocab

    def next(self, count: int) -> list[int]:
        """Return so many."""
        return [int(token) for token in self._random.integers(300, self._vocab, count)]


def speed(server: Server, prompts: list[list[int]], clients: int) -> tuple[float, float]:
    """Return the tokens that all clients were given together, a second by the clock, and of the processors."""
    clock, processor = time.perf_counter(), server.seconds()
    with ThreadPoolExecutor(clients) as pool:
        made = sum(count for count, _ in pool.map(lambda ids: server.ask(ids, MADE), prompts))
    assert made == MADE * len(prompts), f"{made} tokens of {MADE * len(prompts)}"
    return made / (time.perf_counter() - clock), made / (server.seconds() - processor)


def first(server: Server, short: list[int], other: list[int], long: list[int]) -> tuple[float, float]:
    """Return when the first token of a short prompt comes, alone and while a long one is read."""
    _, alone = server.ask(short, 1)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(server.ask, long, 1)
        time.sleep(0.2 * alone)
        assert not reading.done(), "the long prompt was read at once: it is too short for this machine"
        _, beside = server.ask(other, 1)
        reading.result()
    return alone, beside


def prefix(server: Server, prompt: list[int], tail: list[int]) -> tuple[float, float]:
    """Return when the first token of a prompt comes, and of one of which nine tenths are the same."""
    _, cold = server.ask(prompt, 1)
    _, warm = server.ask([*prompt[: len(prompt) * 9 // 10], *tail], 1)
    return cold, warm


class Report:
    """What is said of each figure of a model, as it is found and in a table at the end; and whether one was missed."""

    def __init__(self) -> None:
        self.model, self.missed = "", False
        self._rows = [("model", "what", "found", "", "required")]

    def say(self, what: str, shown: str, ok: bool | None, required: str) -> None:
        """Take a figure; ``ok`` is None where nothing is asked of it."""
        self.missed |= ok is False
        verdict = "" if ok is None else "met" if ok else "MISSED"
        self._rows.append((self.model, what, shown, verdict, "" if ok is None else required))
        print(*self._rows[-1], sep=" | ", flush=True)

    def table(self) -> str:
        """Return all figures."""
        widths = [max(map(len, column)) for column in zip(*self._rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in self._rows)


def measure(ours: Server, theirs: Server | None, vocab: int, args: argparse.Namespace, report: Report) -> None:
    """Measure both in turns and report the medians of what each round's ratio is."""
    prompts, median = Prompts(vocab), statistics.median
    sides = {"ours": ours} | ({"llama.cpp": theirs} if theirs else {})
    for server in sides.values():
        server.ask(prompts.next(PROMPT), MADE)  # warm
    for clients in args.clients if "speed" in args.only else ():
        found: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(args.rounds):
            asked = [prompts.next(PROMPT) for _ in range(clients * EACH)]
            for side, server in sides.items():
                found[side].append(speed(server, asked, clients))
        for column, unit in enumerate(("tokens/s", "tokens per second of the processors")):
            shown = ", ".join(f"{side} {median(row[column] for row in rows):.1f}" for side, rows in found.items())
            if not theirs:
                report.say(f"{clients} clients, {unit}", shown, None, "")
                continue
            ratio = median(a[column] / b[column] for a, b in zip(found["ours"], found["llama.cpp"], strict=True))
            ok = ratio >= LEAST if column == 0 else None
            report.say(f"{clients} clients, {unit}", f"{shown}: {ratio:.2f} x", ok, f">= {LEAST} x")
    for name, required, work in (
        ("first", f"<= {MOST_BESIDE:g} x", lambda s: first(s, *map(prompts.next, (SHORT, SHORT, LONG)))),
        ("prefix", f">= {LEAST_PREFIX:g} x", lambda s: prefix(s, *map(prompts.next, (SHARED, SHARED // 10)))),
    ):
        for side, server in sides.items() if name in args.only else ():
            pairs = [work(server) for _ in range(args.rounds)]
            one, two = (1e3 * median(pair[at] for pair in pairs) for at in (0, 1))
            ratio = median(b / a if name == "first" else a / b for a, b in pairs)
            words = ("alone", "beside a long one") if name == "first" else ("cold", "90 % read before")
            ok = ratio <= MOST_BESIDE if name == "first" else ratio >= LEAST_PREFIX
            shown = f"{words[0]} {one:.0f} ms, {words[1]} {two:.0f} ms: {ratio:.2f} x"
            report.say(f"first token, {side}", shown, ok if side == "ours" else None, required)


def main() -> int:
    """Build, measure, say whether all is met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter that has xllamacpp; without it ours alone")
    parser.add_argument("--model", nargs="+", default=["125M"], help="125M, or a checkpoint's folder with a GGUF file")
    parser.add_argument("--scheme", default="q4a32", help="of a folder's bundle: what its GGUF file has")
    parser.add_argument("--activations", default="int8", choices=("int8", "float"))
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--only", nargs="+", choices=(every := ["speed", "first", "prefix", "steps"]), default=every)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="work here and leave it; default: a temporary directory")
    args = parser.parse_args()
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="stagegraph-bench-"))).absolute()
    report = Report()
    try:
        models = [built(folder, model, args) for model in args.model]
        for model, (made, file) in zip(args.model, models, strict=True):
            report.model = Path(model).name
            run(made, file, args, report)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{report.table()}")
    return int(report.missed)


def built(folder: Path, model: str, args: argparse.Namespace) -> tuple[str, str]:
    """Return the bundle of a model and its GGUF file."""
    place = folder / f"{Path(model).name}-{args.activations}"
    place.mkdir(parents=True, exist_ok=True)
    if model == "125M":
        return random_model(place, args.activations, args.threads)
    checkpoint = Path(model).absolute()
    made = bundle(place, checkpoint, args.scheme, args.activations, args.threads)
    return made, str(next(checkpoint.glob("*.gguf")))


def run(made: str, file: str, args: argparse.Namespace, report: Report) -> None:
    """Measure a bundle beside a GGUF file."""
    vocab = json.loads(Path(made, "bundle.json").read_text())["model"]["vocab_size"]
    stop = json.loads(Path(made, "tokenizer_info.json").read_text())["stop"]
    print(f"load of the machine before: {os.getloadavg()[0]:.1f}")
    if "steps" in args.only:
        command = [sys.executable, WORK, "steps", made, str(args.threads), str(ANSWERS)]
        step = json.loads(pinned(command, args.threads).splitlines()[-1])
        shown = f"{step['own']:.2f} ms of {step['step']:.1f} ms"
        report.say(f"Python's own, {ANSWERS} answers", shown, step["own"] < MOST_OWN, f"< {MOST_OWN} ms")
    if {*args.only} == {"steps"}:
        return
    command = [sys.executable, "-m", "stages.runtime", "serve", made, "--port", "0", "--no-page", "--quick"]
    with served(command, args.threads, {"logit_bias": dict.fromkeys(stop, -100)}) as ours:
        if not args.llama:
            measure(ours, None, vocab, args, report)
            return
        command = [args.llama, WORK, "llama", file, str(args.threads), str(ANSWERS), str(CONTEXT)]
        with served(command, args.threads, {"ignore_eos": True}) as theirs:
            measure(ours, theirs, vocab, args, report)


if __name__ == "__main__":
    sys.exit(main())
