"""How fast a bundle runs on a GPU, and whether it is right there; this file is all of stagegraph that is needed.

Usage: python cuda.py BUNDLE [--device cuda|cpu] [--contexts 128 1024 4096] [--json FILE]

BUNDLE is any folder with a model.so: without weights, as a compile stage leaves it, they are drawn at random on the
device. Where cuda_pack.py put a reference beside it, what the device computes is compared with that, and the exit
status is 1 if it differs. ``cuda_pack.py`` also writes the tar that takes all of it to another machine.

Of each context: one prompt of that many tokens in chunks, then steps of one token, median of several, waiting for the
device after each; logits stay on it. Achieved bandwidth is what a step must read, the cache and all weights but the
embedding's, over its time, beside a copy of 1 GiB on the device, whose bytes are counted once read and once written.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

HERE = Path(__file__).resolve().parent
LIBRARY, WEIGHTS, REFERENCE = "model.so", "tensor-cache.json", "reference.npz"
CONTEXTS = (128, 1024, 4096)
STEPS, REPEATS = 32, 3
COPIED = 2**30
ROWS_TOGETHER = 32  # in a layout that stores rows side by side; the last ones may be padding
# compute dtype -> what it may make of logits: max |difference| over max |logit|
TOLERANCES = {"float32": 2e-3, "float16": 2e-2, "bfloat16": 2e-2}
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "uint32": 4}


def fail(message: str) -> NoReturn:
    """Leave with a message and the exit status of wrong usage."""
    print(f"cuda.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# Running


def import_tvm(device: str) -> Any:
    """Import TVM's runtime, from beside this file if it is there, and its CUDA side if that is asked for."""
    if (HERE / "site").is_dir():
        sys.path.insert(0, str(HERE / "site"))
    os.environ.update(TVM_USE_RUNTIME_LIB="1", TVM_FFI_DISABLE_TORCH_C_DLPACK="1")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # or tvm_ffi imports it, for nothing
    try:
        import tvm
        import tvm.runtime.vm
    except ImportError as error:
        fail(
            f"TVM's runtime cannot be imported by Python {sys.version.split()[0]}: {error}; it was packed with another?"
        )
    if device == "cuda":
        libraries = Path(tvm.base._LOADED_LIBS["tvm_runtime"]._name).parent  # noqa: SLF001 - it names no public path
        packed = HERE / "site" / "libcudart.so.13"
        try:
            ctypes.CDLL(str(packed) if packed.is_file() else "libcudart.so.13", ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(libraries / "libtvm_runtime_cuda.so"), ctypes.RTLD_GLOBAL)
        except OSError as error:
            fail(f"TVM's CUDA side cannot be loaded: {error}; it takes NVIDIA's driver and libcudart.so.13")
        if not tvm.cuda(0).exist:
            fail("TVM finds no CUDA device: look at nvidia-smi")
    return tvm


class Model:
    """A library with weights on a device and one sequence."""

    def __init__(self, tvm: Any, folder: Path, device: Any, tokens: int) -> None:
        self.tvm, self.device, self.shape = tvm, device, tvm.runtime.ShapeTuple
        self.vm = tvm.runtime.vm.VirtualMachine(tvm.runtime.load_module(str(folder / LIBRARY)), device)
        self.metadata = json.loads(self.vm["_metadata"]())
        self.model = self.metadata["model"]
        self.stored = (folder / WEIGHTS).is_file()
        make = _stored(folder) if self.stored else _random()
        import tvm_ffi

        self.params = tvm_ffi.Array([self._upload(param, make(param)) for param in self.metadata["params"]])
        self.limit = min(tokens, self.model["context_window"]) if self.model["state"] == "kv" else tokens
        if self.model["state"] == "kv":
            page = self.model["page_size"]
            sizes = (1, -(-self.limit // page) * page, self.model["prefill_chunk"], page, 0)
            self.state = self.vm["create_tir_paged_kv_cache"](*(self.shape([size]) for size in sizes))
        else:
            self.state = self.vm["create_rnn_state"](self.shape([1]), self.shape([1]))

    def _upload(self, param: dict[str, Any], array: np.ndarray) -> Any:
        tensor = self.tvm.runtime.empty(tuple(param["shape"]), param["dtype"], self.device)
        tensor.copyfrom(array)
        return tensor

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the sequence's state."""
        self.tvm.get_global_func(f"vm.builtin.kv_state_{name}")(self.state, *arguments)

    def forward(self, function: str, ids: Sequence[int]) -> Any:
        """Read tokens; return the logits [1, 1, V] of the last, on the device, done."""
        tensor = self.tvm.runtime.tensor(np.array(ids, "int32"), self.device)
        reshape = self.tvm.get_global_func("vm.builtin.reshape")
        if self.model["sep_embed"]:
            tensor = self.vm["embed"](tensor, self.params)
        states = reshape(tensor, self.shape([1, len(ids), *tensor.shape[1:]]))
        self.call("begin_forward", self.shape([0]), self.shape([len(ids)]))
        logits = self.vm[function](states, self.state, self.params)[0]
        self.call("end_forward")
        self.device.sync()
        return logits

    def prefill(self, ids: Sequence[int]) -> Any:
        """Read tokens in chunks; return the logits of the last."""
        chunk = self.model["prefill_chunk"]
        for start in range(0, len(ids), chunk):
            logits = self.forward("prefill", ids[start : start + chunk])
        return logits

    def read_bytes(self, context: int) -> int:
        """Return what a step after ``context`` tokens must read: the cache, and all weights but the embedding's."""
        tables: dict[str, int] = {}
        total = 0
        for param in self.metadata["params"]:
            size = math.prod(param["shape"]) * BYTES[param["dtype"]]
            total += size
            if _rows(param["shape"]) - self.model["vocab_size"] in range(ROWS_TOGETHER):
                table = param["name"].rpartition(".")[0]
                tables[table] = tables.get(table, 0) + size
        embedding = next(iter(tables.values())) if len(tables) > 1 else 0  # a single table is the head's too
        return total - embedding + context * self.model["cache_bytes_per_token"]


def _rows(shape: Sequence[int]) -> int:
    """Return the rows of a stored matrix [n, k], or [n / 32, k, 32] with 32 rows side by side; 0 for a vector."""
    return shape[0] * shape[2] if len(shape) == 3 else shape[0] if len(shape) == 2 else 0


def _stored(folder: Path) -> Callable[[dict[str, Any]], np.ndarray]:
    """Return what reads a parameter of TVM's tensor cache."""
    document = json.loads((folder / WEIGHTS).read_text("utf-8"))
    found = {entry["name"]: (shard["dataPath"], entry) for shard in document["records"] for entry in shard["records"]}

    def read(param: dict[str, Any]) -> np.ndarray:
        file, entry = found[param["name"]]
        if entry["format"] != "raw":
            fail(f"{param['name']} is stored as {entry['format']}: only raw tensors are read here")
        return np.memmap(folder / file, param["dtype"], "r", entry["byteOffset"], tuple(param["shape"]))

    return read


def _random() -> Callable[[dict[str, Any]], np.ndarray]:
    """Return what draws a parameter, the same at every run: of a size that keeps the numbers of a model in range."""
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(2**20, "float32")
    words = draw.integers(0, 2**32, 2**20, "uint32")

    def make(param: dict[str, Any]) -> np.ndarray:
        shape, dtype = tuple(param["shape"]), param["dtype"]
        if dtype == "uint32":
            return np.resize(words, shape)
        if param["name"].endswith("q_scale"):
            return np.resize(np.abs(normal) * np.float32(0.004), shape).astype(dtype)
        if len(shape) == 1:
            return np.ones(shape, dtype)
        return np.resize((normal * np.float32(0.02)).astype(dtype), shape)

    return make


# Measuring


def parity(model: Model, reference: dict[str, np.ndarray]) -> dict[str, Any]:
    """Compare logits, of a prompt at once and of what follows one by one, with recorded ones."""
    tokens, prompt, wanted = reference["tokens"].tolist(), int(reference["prompt"]), reference["logits"]
    with sequence(model):
        found = [model.prefill(tokens[:prompt]).numpy()]
        found += [model.forward("decode", [token]).numpy() for token in tokens[prompt:]]
    rows = np.stack([logits.reshape(-1) for logits in found]).astype("float32")
    expected = wanted[prompt - 1 :]
    worst = float((np.abs(rows - expected).max(1) / np.abs(expected).max(1)).max())
    same = int((rows.argmax(1) == expected.argmax(1)).sum())
    tolerance = TOLERANCES[model.model["compute_dtype"]]
    right = bool(np.isfinite(rows).all()) and worst <= tolerance
    return {"steps": len(rows), "worst": worst, "tolerance": tolerance, "same_token": same, "right": right}


@contextlib.contextmanager
def sequence(model: Model) -> Iterator[None]:
    """Start an empty sequence and forget it again."""
    model.call("add_sequence", 0)
    try:
        yield
    finally:
        model.call("remove_sequence", 0)


def seconds(run: Callable[[], object]) -> float:
    """Return how long a call takes, by the clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(model: Model, contexts: Sequence[int], copy: float) -> list[dict[str, Any]]:
    """Return a row per context: tokens per second of prefill and decode, and the bandwidth that decode achieves."""
    rows = []
    for context in contexts:
        ids = [(7919 * i) % model.model["vocab_size"] for i in range(context)]
        prefill, decode = [], []
        for number in range(REPEATS + 1):
            with sequence(model):
                taken = seconds(lambda: model.prefill(ids))  # noqa: B023 - called at once
                steps = [seconds(lambda: model.forward("decode", [ids[0]])) for _ in range(STEPS)]  # noqa: B023
            if number:  # the first one warms up
                prefill.append(taken)
                decode += steps
        step = statistics.median(decode)
        bandwidth = model.read_bytes(context + STEPS // 2) / step / 1e9
        rows.append(
            {
                "context": context,
                "prefill_tokens_per_second": context / statistics.median(prefill),
                "decode_tokens_per_second": 1 / step,
                "decode_slowest_ms": 1e3 * max(decode),
                "decode_gigabytes_per_second": bandwidth,
                "of_copy": bandwidth / copy,
            }
        )
    return rows


def copy_bandwidth(tvm: Any, device: Any) -> float:
    """Return gigabytes per second of a copy on the device, bytes read and bytes written counted."""
    a, b = (tvm.runtime.empty((COPIED,), "uint8", device) for _ in range(2))

    def copy() -> None:
        a.copyto(b)
        device.sync()

    b.copyto(a)  # memory that was never written to is not there, and cheap to read
    copy()
    return 2 * COPIED / min(seconds(copy) for _ in range(5)) / 1e9


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write JSON."""
    folder = Path(args.bundle)
    if not (folder / LIBRARY).is_file():
        fail(f"{folder} has no {LIBRARY}")
    tvm = import_tvm(args.device)
    device = tvm.cuda(0) if args.device == "cuda" else tvm.cpu()
    reference = dict(np.load(folder / REFERENCE)) if (folder / REFERENCE).is_file() else {"tokens": ()}
    model = Model(tvm, folder, device, max(max(args.contexts) + STEPS, len(reference["tokens"])))
    contexts = [context for context in args.contexts if context + STEPS <= model.limit]
    if not contexts:
        fail(f"no context fits: the library was built for {model.limit} tokens, {STEPS} of which are decoded")
    name = device.device_name if args.device == "cuda" else platform.processor() or platform.machine()
    about = {
        "device": f"{args.device}: {name}",
        "library": hashlib.sha256((folder / LIBRARY).read_bytes()).hexdigest(),
        "target": model.metadata["target"],
        "tools": model.metadata["tools"],
        "model": model.model,
        "weights": "stored" if model.stored else "random",
        "weight_bytes": sum(math.prod(p["shape"]) * BYTES[p["dtype"]] for p in model.metadata["params"]),
    }
    found: dict[str, Any] = {"about": about, "copy_gigabytes_per_second": copy_bandwidth(tvm, device)}
    if len(reference["tokens"]) and model.stored:
        found["parity"] = parity(model, reference)
    found["rows"] = measure(model, contexts, found["copy_gigabytes_per_second"])
    print(table(found))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    return 0 if found.get("parity", {"right": True})["right"] else 1


def table(found: dict[str, Any]) -> str:
    """Render what was measured."""
    about, model, check = found["about"], found["about"]["model"], found.get("parity")
    lines = [
        f"{about['device']}; {about['weights']} weights of {about['weight_bytes'] / 1e9:.3f} GB",
        f"{model['family']} {model['scheme']}, {model['num_layers']} layers of {model['hidden_size']}",
        f"library {about['library'][:16]}; copy on the device {found['copy_gigabytes_per_second']:.1f} GB/s",
    ]
    if check:
        lines.append(
            f"against transformers: {check['steps']} steps, worst difference {check['worst']:.2e} of the largest logit "
            f"(allowed {check['tolerance']:.0e}), same token {check['same_token']} times: "
            + ("right" if check["right"] else "WRONG")
        )
    lines.append(f"{'context':>8}{'prefill tok/s':>15}{'decode tok/s':>14}{'slowest ms':>12}{'GB/s':>9}{'of copy':>9}")
    lines += [
        f"{row['context']:>8}{row['prefill_tokens_per_second']:>15.1f}{row['decode_tokens_per_second']:>14.1f}"
        f"{row['decode_slowest_ms']:>12.2f}{row['decode_gigabytes_per_second']:>9.1f}{row['of_copy']:>9.0%}"
        for row in found["rows"]
    ]
    return "\n".join(lines)


def main() -> int:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS, metavar="N")
    parser.add_argument("--json", metavar="FILE")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
