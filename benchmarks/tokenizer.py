"""What tokenizing costs: converting and proving a vocabulary, and encoding with what comes out of it.

Usage: python benchmarks/tokenizer.py VOCABULARY [CORPUS]   (exit status 1 if a figure is missed)

VOCABULARY is a qwen.tiktoken; CORPUS has one ``["kind", "text"]`` a line and is by default the sample that ships.
Measured, in processes of their own: seconds and memory of the stage; megabytes of UTF-8 encoded a second by the
bundle's runtime, by the tokenizers library on the emitted file alone, and by tiktoken on the source.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "stages" / "tokenizers" / "proof" / "sample_corpus.jsonl"
RANKS, ROWS = 151_643, 151_936
SECONDS, MEGABYTES = 10, 500
ROUNDS = 5

STAGE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tests.support.local_context import run_stage
from stages.tokenizer_bundle import TokenizerBundle
root = Path(sys.argv[2])
inputs = {port: root / f"{port}.json" for port in ("config", "generation", "tensors")}
started = time.perf_counter()
run_stage(TokenizerBundle(), root / "out", {"checkpoint": str(root / "checkpoint")}, inputs)
seconds = time.perf_counter() - started
heavy = sorted({"torch", "tvm", "transformers"} & set(sys.modules))
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, heavy]))
"""

ENCODE = """
import json, sys, time
sys.path.insert(0, sys.argv[1])
import unicodedata
from pathlib import Path
how, root = sys.argv[2], Path(sys.argv[3])
texts = [json.loads(line)[1] for line in open(sys.argv[4], encoding="utf-8")]
texts = texts * (1 + 2_000_000 // sum(len(text.encode("utf-8", "surrogatepass")) for text in texts))
if how == "runtime":
    from stages.runtime.tokenizer import BundleTokenizer
    encode = BundleTokenizer(root / "out" / "tokenizer").encode
elif how == "library":
    from tokenizers import Tokenizer
    library = Tokenizer.from_file(str(root / "out" / "tokenizer" / "tokenizer.json"))
    encode = lambda text: library.encode(text).ids
elif how == "tiktoken":
    from stages.tokenizers import load_tokenizer_family
    from stages.tokenizers.resolution import resolve
    checkpoint = root / "checkpoint"
    resolution = resolve(checkpoint, {path.name: path for path in checkpoint.iterdir()})
    reference = load_tokenizer_family(resolution.family).reference(resolution)
    encode = lambda text: reference.encode(text, specials=True)
encode(texts[0])
started = time.perf_counter()
for text in texts:
    encode(text)
print(sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) / 1e6 / (time.perf_counter() - started))
"""


def checkpoint(root: Path, vocabulary: Path) -> None:
    """Write the files that the stage reads of a first-generation Qwen."""
    folder = root / "checkpoint"
    folder.mkdir()
    (folder / "qwen.tiktoken").symlink_to(vocabulary.resolve())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer"}))
    shape = {"dtype": "BF16", "shape": [ROWS, 64], "file": "m.safetensors"}
    values = {
        "config": {"schema": 1, "family": "qwen", "vocab_size": ROWS, "context_window": 8192},
        "generation": {"schema": 1, "eos": [RANKS], "pad": RANKS, "stop": [RANKS], "chat_format": "chatml"},
        "tensors": {"schema": 1, "tensors": {"transformer.wte.weight": shape}, "names": {}},
    }
    for port, value in values.items():
        (root / f"{port}.json").write_text(json.dumps(value))


def run(script: str, *arguments: str) -> str:
    """Run a script in a process of its own and return the last line that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout.splitlines()[-1]


def main() -> int:
    """Measure, print, and say whether every figure is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vocabulary", type=Path)
    parser.add_argument("corpus", type=Path, nargs="?", default=SAMPLE)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        checkpoint(root, args.vocabulary)
        seconds, megabytes, heavy = json.loads(run(STAGE, str(root)))
        # Interleaved, so that what else the machine does meets all three.
        rates: dict[str, list[float]] = {"runtime": [], "library": [], "tiktoken": []}
        for _ in range(ROUNDS):
            for how, found in rates.items():
                found.append(float(run(ENCODE, how, str(root), str(args.corpus))))
    middle = {how: statistics.median(found) for how, found in rates.items()}
    ratio = statistics.median(a / b for a, b in zip(rates["runtime"], rates["library"], strict=True))
    figures = [
        ("conversion and proof", f"{seconds:.1f} s", f"under {SECONDS} s", seconds < SECONDS),
        ("memory of it", f"{megabytes:.0f} MB", f"under {MEGABYTES} MB", megabytes < MEGABYTES),
        ("loads torch, tvm or transformers", ", ".join(heavy) or "no", "no", not heavy),
        ("encode, bundle's runtime", f"{middle['runtime']:.2f} MB/s", "", True),
        ("encode, tokenizers library", f"{middle['library']:.2f} MB/s", "", True),
        ("encode, tiktoken", f"{middle['tiktoken']:.2f} MB/s", "", True),
        ("runtime against library", f"{ratio:.2f} times", "at least 1", ratio >= 1),
    ]
    for what, measured, required, met in figures:
        print(f"{what:<34}{measured:>14}  {required:<16}{'' if met else 'MISSED'}".rstrip())
    print(f"Unicode tables of Python: {unicodedata.unidata_version}")
    return 0 if all(met for *_, met in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
