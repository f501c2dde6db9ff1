"""bundle.json: what a bundle is made of and what it needs, and whether this machine can run it."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import re
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from stages.runtime import host, seal, signature
from stages.runtime.backend import DEVICES
from stages.runtime.errors import BundleError
from stages.runtime.folder import MANIFEST, Entry, Folder, read_document

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.runtime.documents import BundledModel, Cpu, DeviceCode, JsonObject

SCHEMA = 1
WEIGHTS = ".bin"  # files of this ending are digested as they are loaded, whatever else is checked before
_NEEDED = ("model.so", "tensor-cache.json", "tokenizer_info.json")
# Of what comes into messages, and commands to be copied from them: versions, processors, what these can do.
_WORD = re.compile(r"[A-Za-z0-9_.+!-]{1,64}")
_MOST = 20  # words of one message
_NEAR = 4  # bundles of one message
_VOCABULARIES = ("tokenizer.json", "rwkv_vocab.txt")  # one of them
_MODEL_SIZES = ("context_window", "prefill_chunk", "max_batch", "vocab_size", "hidden_size")
# Kinds of state -> the sizes that each needs beside those.
_STATES = {"kv": ("page_size",), "rnn": (), "hybrid": ("page_size",)}
# What a bundle may ask less of than its library was built for: to save memory.
_AT_MOST = ("context_window", "prefill_chunk", "max_batch")


@dataclass(frozen=True)
class Manifest:
    """A bundle's directory and the content of its bundle.json, its form checked."""

    root: Path
    name: str
    target: str
    machine: str
    tvm: Mapping[str, str]
    cpu: Cpu
    model: BundledModel
    device_code: Sequence[DeviceCode]
    files: Mapping[str, Entry]
    sampling: Mapping[str, float | bool] = field(default_factory=dict)  # of generation_config.json, by its keys
    quick: bool = False  # whether weights are loaded by their sizes alone, undigested
    sha256: str = field(default="", compare=False)  # of bundle.json's bytes, in hex

    @property
    def folder(self) -> Folder:
        """The files that may be read: those that are listed."""
        return Folder(self.root, self.files)

    @property
    def device(self) -> str:
        """The kind of device that the library's kernels run on: ``"cpu"`` or ``"cuda"``."""
        return DEVICES[self.target]


def read(path: Path, *, require_signature: Path | None = None) -> Manifest:
    """Read the bundle at ``path``, or at ``path/bundle``; :class:`BundleError` lists everything wrong with its form.

    ``require_signature`` is a public key (PEM): the folder must be signed by it, every file of it.
    """
    root = next((d for d in (path, path / "bundle") if (d / MANIFEST).is_file()), None)
    if root is None:
        raise BundleError(f"{path}: {_not_there(path)}")
    document, data = read_document(root / MANIFEST)
    problems = _problems_of_form(document)
    if problems:
        raise BundleError(*(f"{root / MANIFEST}: {problem}" for problem in problems))
    sha256 = hashlib.sha256(data).hexdigest()
    if require_signature is not None:
        signature.check(root, sha256, require_signature)
    return Manifest(
        root=root,
        name=document["name"],
        target=document["target"],
        machine=document["machine"],
        tvm=document["tvm"],
        cpu=document["cpu"],
        model=document["model"],
        device_code=document["device_code"],
        files={name: Entry(entry["sha256"], entry["size"]) for name, entry in document["files"].items()},
        sampling=document.get("sampling", {}),
        sha256=sha256,
    )


def _not_there(path: Path) -> str:
    """Say that there is no bundle at a path, and which there are near it."""
    place, where = (path, "in it") if path.is_dir() else (path.parent, "beside it")
    near = sorted(str(file.parent) for file in place.glob(f"*/{MANIFEST}"))[:_NEAR]
    problem = f"no {MANIFEST} there, so it is not a bundle" if path.exists() else "no such folder"
    advice = f"{where}: {', '.join(near)}" if near else "give the folder that `pipeline export` or stage bundle wrote"
    return f"{problem}; {advice}"


def check(manifest: Manifest, *, weights: bool = True, run: bool = True) -> list[str]:
    """Return what does not fit, each with what to do; an empty list means that the bundle can be loaded here.

    Without ``weights`` their sizes alone are looked at: they are digested as they are loaded. With ``run`` false the
    files are looked at and not the machine.
    """
    problems: list[str] = []
    for name in sorted(manifest.files):
        try:
            manifest.folder.check(name, digest=weights or not name.endswith(WEIGHTS))
        except BundleError as error:
            problems += error.problems
    return problems + machine_problems(manifest) if run else problems


def machine_problems(manifest: Manifest) -> list[str]:
    """Return why this machine cannot run the bundle, each reason with what to do."""
    problems = _version_problems(manifest)
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    if machine != manifest.machine:
        problems.append(f"the library is {manifest.machine} code and this machine is {machine}: build the bundle on it")
    else:
        problems += _cpu_problems(manifest, host.cpu_flags())
    if manifest.device == "cuda" and not host.has_nvidia_driver():
        problems.append("the bundle is for CUDA and no NVIDIA driver is loaded: install one, or use the llvm bundle")
    return problems


def capability_problems(manifest: Manifest, capability: int) -> list[str]:
    """Say whether none of the library's device code runs on a device of compute capability ``capability`` (90 is 9.0).

    Machine code runs on the same major version from its minor version on, PTX on everything from its version on.
    """
    code = [(entry["kind"], entry["arch"]) for entry in manifest.device_code]
    for kind, arch in code:
        if arch <= capability and (kind == "ptx" or arch // 10 == capability // 10):
            return []
    available = ", ".join(f"{kind} {arch}" for kind, arch in code[:_MOST]) or "none"
    return [
        f"the library's device code ({available}) does not run on sm_{capability}: compile with {capability} in 'archs'"
    ]


def disagreements(manifest: Manifest, metadata: JsonObject) -> list[str]:
    """Return where bundle.json contradicts what its library says of itself (``_metadata``), which is what runs."""
    found: JsonObject = {"target": manifest.target, **manifest.model}
    built = {"target": metadata["target"]["target"], **metadata["model"]}
    return [
        f"{manifest.root / MANIFEST}: {key} is {found.get(key)!r:.60} and the library was built for {value!r:.60}: "
        "build the bundle again"
        for key, value in built.items()
        if found.get(key) != value and not (key in _AT_MOST and 0 < found.get(key, 0) < value)
    ]


def _problems_of_form(document: Any) -> list[str]:
    if not isinstance(document, dict):
        return ["expected an object"]
    if document.get("schema") != SCHEMA:
        return [f"schema {document.get('schema')!r} is not {SCHEMA}: use the runtime that it was built with"]
    kinds = {"name": str, "target": str, "machine": str, "tvm": dict, "cpu": dict, "model": dict, "device_code": list}
    kinds["files"] = dict
    problems = [
        f"'{key}' must be {kind.__name__}, found {type(document.get(key)).__name__}"
        for key, kind in kinds.items()
        if not isinstance(document.get(key), kind)
    ]
    if problems:
        return problems
    if document["target"] not in DEVICES:
        problems.append(f"target {document['target']!r} is not known here; known: {', '.join(DEVICES)}")
    problems += _problems_of_sampling(document.get("sampling", {}))
    problems += _problems_of_model(document) + _problems_of_machine(document) + _problems_of_files(document)
    if not problems and document.get(seal.KEY, found := seal.seal(document)) != found:
        problems.append(
            "it is not as it was written, so damaged or changed: copy the bundle again; if you changed it on purpose, "
            f"remove '{seal.KEY}', which seals the rest"
        )
    return problems


def _problems_of_sampling(sampling: Any) -> list[str]:
    if not isinstance(sampling, dict):
        return [f"'sampling' must be dict, found {type(sampling).__name__}"]
    return [
        f"'sampling.{key}' must be a number (of at most 2**53), true or false, found {value!r:.60}"
        for key, value in sampling.items()
        if not isinstance(value, int | float) or not -(2**53) <= value <= 2**53
    ]


def _problems_of_model(document: JsonObject) -> list[str]:
    model, problems = document["model"], []
    state = model.get("state", "kv")
    if str(state) not in _STATES:
        problems.append(f"'model.state' is {state!r:.60}; this runtime knows {', '.join(_STATES)}")
    for key in (*_MODEL_SIZES, *_STATES.get(str(state), ())):
        value = model.get(key)
        if type(value) is not int or not 0 < value < 2**31:
            problems.append(f"'model.{key}' must be a positive 32-bit integer, found {value!r:.60}")
    for key, kind in (("sep_embed", bool), ("scheme", str), ("compute_dtype", str)):
        if not isinstance(model.get(key), kind):
            problems.append(f"'model.{key}' must be {kind.__name__}, found {model.get(key)!r:.60}")
    return problems


def _problems_of_machine(document: JsonObject) -> list[str]:
    problems = []
    for dist, version in document["tvm"].items():
        if not re.fullmatch(r"[a-z0-9-]{1,64}", dist) or not _is_word(version):
            problems.append(f"'tvm' must map distributions to versions, found {dist!r:.60}: {version!r:.60}")
    for key, value in (("machine", document["machine"]), ("cpu.mcpu", document["cpu"].get("mcpu"))):
        if value is not None and not _is_word(value):
            problems.append(f"'{key}' must be a name, found {value!r:.60}")
    features = document["cpu"].get("features")
    if not isinstance(features, list) or not all(map(_is_word, features)):
        problems.append(f"'cpu.features' must be a list of names, found {features!r:.60}")
    problems += [
        f"'device_code' must hold a 'kind' and an 'arch' each, found {code!r:.60}"
        for code in document["device_code"]
        if not isinstance(code, dict) or not _is_word(code.get("kind")) or not _is_arch(code.get("arch"))
    ]
    return problems


def _problems_of_files(document: JsonObject) -> list[str]:
    problems = []
    for name, entry in document["files"].items():
        if not _stays_inside(name):
            problems.append(f"file name {name!r:.200} leaves the bundle; this is not a bundle to trust")
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("sha256"), str)
            or type(entry.get("size")) is not int
        ):
            problems.append(f"file {name!r:.200} must have a 'sha256' and a 'size'")
    problems += [f"it does not list {name}" for name in _NEEDED if name not in document["files"]]
    if not set(_VOCABULARIES) & set(document["files"]):
        problems.append(f"it does not list {' or '.join(_VOCABULARIES)}")
    return problems


def _is_arch(value: Any) -> bool:
    return type(value) is int and 0 < value < 10_000


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and _WORD.fullmatch(value) is not None


def _stays_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(name) and not path.is_absolute() and ".." not in path.parts and "\\" not in name and "\0" not in name


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
    mcpu, named = manifest.cpu.get("mcpu"), ", ".join(missing[:_MOST])
    return [f"the library is compiled for {mcpu} and this processor lacks {named}: choose an older mcpu"]
