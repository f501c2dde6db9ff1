"""Which safetensors files make up a checkpoint and which tensors they hold; headers only, no weights."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from stages.models import strict_json
from stages.models.record import ConfigError, capped
from stages.models.safetensors import TensorInfo, read_header

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

INDEX = "model.safetensors.index.json"
MAX_GUESSES = 20  # tensors to look for a near name of, which takes time
SINGLE = "model.safetensors"
BLOCK = 2**22  # bytes read at a time


def read_headers(files: Mapping[str, Path]) -> dict[str, tuple[str, TensorInfo]]:
    """Return tensor name -> (file, info) of the checkpoint in ``files`` (names in one folder -> where they are).

    :class:`ConfigError` lists every shard that is missing or damaged and every disagreement with the index.
    """
    weight_map, shards = _shards(files)
    problems: list[str] = []
    found: dict[str, tuple[str, TensorInfo]] = {}
    for shard in shards:
        try:
            header = read_header(files[shard], shard)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, info in header.items():
            if name in found:
                problems.append(f"tensor {name} is in both {found[name][0]} and {shard}")
            found[name] = (shard, info)
    if not problems and weight_map is not None:
        problems = _disagreements(weight_map, {name: shard for name, (shard, _) in found.items()})
    if problems:
        raise ConfigError(*capped(problems))
    return found


def same_values(path: Path, info: TensorInfo, other_path: Path, other: TensorInfo) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes."""
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    with path.open("rb") as first, other_path.open("rb") as second:
        first.seek(info.offset)
        second.seek(other.offset)
        sizes = [min(BLOCK, info.nbytes - start) for start in range(0, info.nbytes, BLOCK)]
        return all(first.read(size) == second.read(size) for size in sizes)


def _shards(files: Mapping[str, Path]) -> tuple[dict[str, str] | None, list[str]]:
    """Return the index's weight map (None without an index) and the shards that belong to the checkpoint."""
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    indexes = sorted(name for name in files if name.endswith(".safetensors.index.json"))
    index = INDEX if INDEX in files or len(indexes) != 1 else indexes[0]
    if index in files:
        weight_map = _weight_map(files[index], index, files)
        return weight_map, sorted(set(weight_map.values()))
    if SINGLE in shards or len(shards) == 1:
        return None, [SINGLE if SINGLE in shards else shards[0]]
    if not shards:
        raise ConfigError("no *.safetensors file with weights there")
    raise ConfigError(f"{len(shards)} safetensors files ({shards[0]}, ...) and no {INDEX} that says how they belong")


def _weight_map(path: Path, index: str, files: Mapping[str, Path]) -> dict[str, str]:
    """Return tensor name -> shard of an index whose shards are all in ``files``."""
    try:
        weight_map: Any = strict_json.read_object(path, index).get("weight_map")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise ConfigError(f"{index}: weight_map must map tensor names to file names")
    problems = []
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or shard in ("", ".", "..") or not shard.endswith(".safetensors"):
            problems.append(f"{index}: {shard!r} is not the name of a safetensors file in the same folder")
        elif shard not in files:
            problems.append(f"{shard}: the shard is missing, although {index} names it")
    if problems:
        raise ConfigError(*capped(problems))
    return weight_map


def _disagreements(weight_map: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Say where an index and the headers of its shards differ."""
    problems: list[str] = []
    for name, shard in weight_map.items():
        if name not in found:
            near = difflib.get_close_matches(name, found, n=1) if len(problems) < MAX_GUESSES else []
            hint = f"; there is {near[0]}" if near else ""
            problems.append(f"tensor {name}: the index puts it in {shard}, no shard holds it{hint}")
        elif found[name] != shard:
            problems.append(f"tensor {name}: the index puts it in {shard}, it is in {found[name]}")
    problems += [f"tensor {name}: in {found[name]} but not in the index" for name in found if name not in weight_map]
    return problems
