"""bundle.json: what a bundle is made of and what it needs, and whether this machine can run it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.runtime import host
from stages.runtime.errors import BundleError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SCHEMA = 1
FILE = "bundle.json"
_NEEDED = ("model.so", "tensor-cache.json", "tokenizer_info.json")
_VOCABULARIES = ("tokenizer.json", "rwkv_vocab.txt")  # one of them
_MODEL_SIZES = ("context_window", "prefill_chunk", "max_batch", "vocab_size", "hidden_size")
_STATES = {"kv": ("page_size",), "rnn": ()}  # kinds of state -> the sizes that each needs beside those


@dataclass(frozen=True)
class Entry:
    """One file of a bundle: its SHA-256 in hex and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """A bundle's directory and the content of its bundle.json, its form checked."""

    root: Path
    name: str
    target: str
    tvm: Mapping[str, str]
    cpu: Mapping[str, Any]
    model: Mapping[str, Any]
    device_code: Sequence[Mapping[str, Any]]
    files: Mapping[str, Entry]

    @property
    def device(self) -> str:
        """The kind of device that the library's kernels run on: ``"cpu"`` or ``"cuda"``."""
        return "cuda" if self.target == "cuda" else "cpu"


def read(path: Path) -> Manifest:
    """Read the bundle at ``path``, or at ``path/bundle``; :class:`BundleError` lists everything wrong with its form."""
    root = next((d for d in (path, path / "bundle") if (d / FILE).is_file()), None)
    if root is None:
        raise BundleError(f"{path}: no {FILE} there, so it is not a bundle; give the directory that bundle wrote")
    try:
        document = json.loads((root / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{root / FILE}: cannot be read as JSON: {error}") from None
    problems = _problems_of_form(document)
    if problems:
        raise BundleError(*(f"{root / FILE}: {problem}" for problem in problems))
    return Manifest(
        root=root,
        name=document["name"],
        target=document["target"],
        tvm=document["tvm"],
        cpu=document["cpu"],
        model=document["model"],
        device_code=document["device_code"],
        files={name: Entry(entry["sha256"], entry["size"]) for name, entry in document["files"].items()},
    )


def check(manifest: Manifest, *, digest_limit: int | None = None, run: bool = True) -> list[str]:
    """Return what does not fit, each with what to do; an empty list means that the bundle can be loaded here.

    Files larger than ``digest_limit`` bytes are checked by size alone; None digests every file. With ``run`` false
    the files are looked at and not the machine.
    """
    problems = _file_problems(manifest, digest_limit)
    if not run:
        return problems
    problems += _version_problems(manifest)
    if platform.machine() not in ("x86_64", "AMD64"):
        problems.append(f"the library is x86-64 code and this machine is {platform.machine()}: build the bundle for it")
    else:
        problems += _cpu_problems(manifest, host.cpu_flags())
    if manifest.device == "cuda" and not host.has_nvidia_driver():
        problems.append("the bundle is for CUDA and no NVIDIA driver is loaded: install one, or use the llvm bundle")
    return problems


def capability_problems(manifest: Manifest, capability: int) -> list[str]:
    """Say whether none of the library's device code runs on a device of compute capability ``capability`` (90 is 9.0).

    Machine code runs on the same major version from its minor version on, PTX on everything from its version on.
    """
    code = [(str(entry["kind"]), int(entry["arch"])) for entry in manifest.device_code]
    for kind, arch in code:
        if arch <= capability and (kind == "ptx" or arch // 10 == capability // 10):
            return []
    held = ", ".join(f"{kind} {arch}" for kind, arch in code) or "none"
    return [f"the library's device code ({held}) does not run on sm_{capability}: compile with {capability} in 'archs'"]


def _problems_of_form(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return ["expected an object"]
    if document.get("schema") != SCHEMA:
        return [f"schema {document.get('schema')!r} is not {SCHEMA}: use the runtime that it was built with"]
    kinds = {"name": str, "target": str, "tvm": dict, "cpu": dict, "model": dict, "device_code": list, "files": dict}
    problems = [
        f"'{key}' must be {kind.__name__}, found {type(document.get(key)).__name__}"
        for key, kind in kinds.items()
        if not isinstance(document.get(key), kind)
    ]
    if problems:
        return problems
    state = document["model"].get("state", "kv")
    if str(state) not in _STATES:
        problems.append(f"'model.state' is {state!r}; this runtime knows {', '.join(_STATES)}")
    for key in (*_MODEL_SIZES, *_STATES.get(str(state), ())):
        value = document["model"].get(key)
        if type(value) is not int or value <= 0:
            problems.append(f"'model.{key}' must be a positive integer, found {value!r}")
    for name, entry in document["files"].items():
        if not _stays_inside(name):
            problems.append(f"file name {name!r} leaves the bundle; this is not a bundle to trust")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("size")) is not int
        ):
            problems.append(f"file {name!r} must have a 'sha256' and a 'size'")
    problems += [f"it does not list {name}" for name in _NEEDED if name not in document["files"]]
    if not set(_VOCABULARIES) & set(document["files"]):
        problems.append(f"it does not list {' or '.join(_VOCABULARIES)}")
    return problems


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


def _file_problems(manifest: Manifest, digest_limit: int | None) -> list[str]:
    problems = []
    root = manifest.root.resolve()
    for name, entry in sorted(manifest.files.items()):
        path = root / name
        if not path.resolve().is_relative_to(root):
            problems.append(f"{path}: a link that leaves the bundle; copy the bundle with its links followed (cp -L)")
        elif not path.is_file():
            problems.append(f"{path}: missing; copy the whole bundle again")
        elif path.stat().st_size != entry.size:
            problems.append(
                f"{path}: {path.stat().st_size} bytes, not the {entry.size} of {FILE}; copy the bundle again"
            )
        elif (digest_limit is None or entry.size <= digest_limit) and sha256(path) != entry.sha256:
            problems.append(f"{path}: its SHA-256 is not the one in {FILE}: damaged or changed; copy the bundle again")
    return problems


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version_problems(manifest: Manifest) -> list[str]:
    problems = []
    for dist, wanted in sorted(manifest.tvm.items()):
        try:
            found = metadata.version(dist)
        except metadata.PackageNotFoundError:
            found = "absent"
        if found != wanted:
            problems.append(f"{dist} {wanted} is needed and {found} is here: pip install '{dist}=={wanted}'")
    problems += [
        f"the Python package {name} is needed and absent: pip install {name}"
        for name in ("numpy", "tokenizers")
        if importlib.util.find_spec(name) is None
    ]
    return problems


def _cpu_problems(manifest: Manifest, flags: frozenset[str]) -> list[str]:
    missing = host.missing_features(manifest.cpu.get("features", ()), flags)
    if not missing:
        return []
    mcpu = manifest.cpu.get("mcpu")
    return [f"the library is compiled for {mcpu} and this processor lacks {', '.join(missing)}: choose an older mcpu"]
