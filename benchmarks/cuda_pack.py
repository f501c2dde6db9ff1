"""Packs a bundle for a machine with a GPU, where cuda.py measures it.

Usage: python benchmarks/cuda_pack.py BUNDLE OUT.tar [--no-weights] [--reference DIR]

The tar holds cuda.py, the bundle, and TVM's runtime without its compiler, for a machine with a GPU, its driver, NumPy
and the same Python as here; there: tar xf OUT.tar && python cuda.py bundle. DIR holds reference.json and
reference.safetensors, transformers' logits as recorded for a checkpoint, which cuda.py then compares with.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from cuda import LIBRARY, REFERENCE, WEIGHTS, fail

PACKAGES = ("tvm", "tvm_ffi", "ml_dtypes", "typing_extensions")
# Of these packages, what a runtime has no use for; the compiler alone is 260 MB.
LEFT_OUT = (
    *(
        f"tvm/{name}"
        for name in ("lib/libtvm_compiler.so", "lib/libtvm_runtime_extra.so", "3rdparty", "include", "src")
    ),
    *(f"tvm/{name}" for name in ("cmake", "web")),
    *(f"tvm_ffi/{name}" for name in ("include", "src", "3rdparty", "cython", "share")),
)


def pack(args: argparse.Namespace) -> int:
    """Write the tar."""
    source = Path(args.bundle)
    if not (source / LIBRARY).is_file():
        fail(f"{source} has no {LIBRARY}: name the folder of a bundle or of a compile stage")
    files = [source / LIBRARY]
    if not args.no_weights and (source / WEIGHTS).is_file():
        shards = [shard["dataPath"] for shard in json.loads((source / WEIGHTS).read_text("utf-8"))["records"]]
        files += [source / WEIGHTS, *(source / name for name in shards)]
    with tarfile.open(args.out, "w") as tar:
        tar.add(Path(__file__).with_name("cuda.py"), "cuda.py")
        for file in files:
            tar.add(file.resolve(), f"bundle/{file.name}")
        if args.reference:
            _add_reference(tar, recorded(Path(args.reference), _scheme(source)))
        size = sum(_add_package(tar, name) for name in PACKAGES) + _add_cudart(tar)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB, of it TVM's runtime {size / 1e6:.1f} MB")
    return 0


def _add_reference(tar: tarfile.TarFile, arrays: dict[str, np.ndarray]) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)
    info = tarfile.TarInfo(f"bundle/{REFERENCE}")
    info.size = content.tell()
    content.seek(0)
    tar.addfile(info, content)


def _scheme(source: Path) -> str:
    found = next(filter(Path.is_file, (source / "bundle.json", source / "metadata.json")), None)
    if found is None:
        fail(f"{source} has neither bundle.json nor metadata.json, which tell the scheme to take a reference of")
    return str(json.loads(found.read_text("utf-8"))["model"]["scheme"])


def recorded(folder: Path, scheme: str) -> dict[str, np.ndarray]:
    """Return what is recorded for ``scheme``: ids, how many are the prompt, and float32 logits [ids, V] after each."""
    document = json.loads((folder / "reference.json").read_text("utf-8"))
    case = next((case for case in document["cases"] if case["scheme"] == scheme), None)
    if case is None or not case["logits"]:
        fail(f"{folder} records no logits of {scheme}")
    data = (folder / "reference.safetensors").read_bytes()
    begin = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:begin])[case["logits"]]
    start, end = entry["data_offsets"]
    logits = np.frombuffer(data[begin + start : begin + end], "<f4").reshape(entry["shape"])
    tokens = np.array(case["tokens"], "int32")
    return {"tokens": tokens, "prompt": np.array(len(tokens) // 2), "logits": logits}


def _add_package(tar: tarfile.TarFile, name: str) -> int:
    """Add a package (or module) of this Python to ``site/``; return its bytes."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        fail(f"{name} is not installed here: pack with the Python that compiles bundles")
    origin = Path(spec.origin)
    root = origin.parent if origin.name == "__init__.py" else origin
    total = 0
    for file in [root] if root.is_file() else sorted(root.rglob("*")):
        path = file.relative_to(root.parent).as_posix()
        if (
            file.is_file()
            and "__pycache__" not in path
            and not any(path == s or path.startswith(f"{s}/") for s in LEFT_OUT)
        ):
            tar.add(file.resolve(), f"site/{path}")
            total += file.stat().st_size
    return total


def _add_cudart(tar: tarfile.TarFile) -> int:
    """Add the CUDA runtime library where its package is installed: a driver does not bring it."""
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(root).glob("*/lib/libcudart.so.13")):
            tar.add(path.resolve(), f"site/{path.name}")
            return path.stat().st_size
    return 0


def main() -> int:
    """Parse the command line and pack."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("out")
    parser.add_argument("--no-weights", action="store_true", help="leave them to be drawn at random there")
    parser.add_argument("--reference", metavar="DIR", help="folder of reference.json and reference.safetensors")
    return pack(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
