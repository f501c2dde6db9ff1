"""Which files make up a checkpoint and which tensors they hold; headers alone unless two files disagree.

As transformers 5 resolves a folder: ``model.safetensors`` comes first, then the shards that the index names. Of the
index nothing but the names of the files counts: what a file holds, its header says.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.checkpoint import misplaced, strict_json
from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf import weights as gguf
from stages.checkpoint.gguf.folder import files_of
from stages.checkpoint.prequantized import Fold, declared
from stages.checkpoint.safetensors import TensorInfo, read_header
from stages.problems import capped

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from stages.documents.model import CheckpointTensor, Packed

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
NUMBERED = re.compile(r"(.+)-(\d{1,6})-of-(\d{1,6})\.safetensors")
BLOCK = 2**22  # bytes read at a time
SHOWN = 3  # names in a note

TensorTable = dict[str, tuple[str, TensorInfo]]


@dataclass(frozen=True)
class Headers:
    """``tensors`` are name -> (file, info); ``notes`` describe peculiarities of the files that change nothing.

    ``packed`` says of those whose values are not stored how they are made.
    """

    tensors: TensorTable
    notes: Sequence[str]
    packed: Mapping[str, Packed] = field(default_factory=dict)

    def table(self) -> dict[str, CheckpointTensor]:
        """Return dtype, shape and file of every tensor, as tensors.json has them."""
        table: dict[str, CheckpointTensor] = {}
        for name, (file, info) in self.tensors.items():
            table[name] = {"dtype": info.dtype, "shape": [*info.shape], "file": file}
            if name in self.packed:
                table[name]["packed"] = self.packed[name]
        return table


def read_headers(files: Mapping[str, Path]) -> Headers:
    """Return the tensors of the checkpoint in ``files`` (names in one folder -> where they are).

    :class:`ConfigError` lists every shard that is missing or damaged, and what stands there twice and differs.
    """
    if whole := files_of(files):
        made = gguf.tensors(whole)
        return Headers(
            {name: (packed["parts"]["data"]["file"], info) for name, (info, packed) in made.items()},
            (),
            {name: packed for name, (_, packed) in made.items()},
        )
    notes: list[str] = []
    index, weight_map, shards = _shards(files, notes)
    tensors, holders = _read(files, shards, notes)
    if SINGLE in files and shards != [SINGLE]:
        single, _ = _read(files, [SINGLE], notes)
        difference = _difference(files, single, tensors)
        if difference:
            raise ConfigError(
                f"there are two checkpoints, {SINGLE} and the shards of {index}, and they differ: {difference}; "
                f"transformers reads {SINGLE}: remove the one that is not the model"
            )
        notes.append(f"{SINGLE} is read, as transformers does; the shards of {index} hold the same")
        return _folded(single, notes, files)
    if weight_map:
        notes += _disagreements(index, weight_map, holders)
    return _folded(tensors, notes, files)


def _folded(tensors: TensorTable, notes: Sequence[str], files: Mapping[str, Path]) -> Headers:
    """Return the headers with quantized tensors in the place of the parts that they are made of."""
    fold = Fold(tensors, files, declared(files))
    return Headers(fold.tensors, notes, fold.packed)


def same_values(path: Path, info: TensorInfo, other_path: Path, other: TensorInfo) -> bool:
    """Say whether two tensors have the same dtype, shape and bytes."""
    if (info.dtype, info.shape) != (other.dtype, other.shape):
        return False
    with path.open("rb") as first, other_path.open("rb") as second:
        first.seek(info.offset)
        second.seek(other.offset)
        sizes = [min(BLOCK, info.nbytes - start) for start in range(0, info.nbytes, BLOCK)]
        return all(first.read(size) == second.read(size) for size in sizes)


def listed(names: Collection[str]) -> str:
    """Return the first of ``names`` and how many more there are."""
    more = f" and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
    return ", ".join(sorted(names)[:SHOWN]) + more


def _shards(files: Mapping[str, Path], notes: list[str]) -> tuple[str, dict[str, str], list[str]]:
    """Return the index, its weight map (empty where none is used) and the files that belong to the checkpoint."""
    # Hidden ones are no weights: ._NAME is what macOS keeps beside a file on other file systems.
    present = sorted(name for name in files if name.endswith(".safetensors") and not name.startswith("."))
    indexes = sorted(name for name in files if name.endswith(".safetensors.index.json"))
    index = INDEX if INDEX in files or len(indexes) != 1 else indexes[0]
    if index not in files:
        return index, {}, _without_index(present, notes)
    try:
        weight_map = _weight_map(files[index], index, files)
    except ConfigError as error:
        if SINGLE not in files:
            raise
        notes.append(f"{SINGLE} is read, as transformers does, and not what {index} names: {error.problems[0]}")
        return index, {}, [SINGLE]
    return index, weight_map, sorted(set(weight_map.values()))


def _without_index(present: Sequence[str], notes: list[str]) -> list[str]:
    """Return which of the safetensors files are the checkpoint where no index says so."""
    if not present:
        raise ConfigError("no *.safetensors file with weights there")
    if SINGLE in present or len(present) == 1:
        return [SINGLE if SINGLE in present else present[0]]
    sets: dict[tuple[str, int], dict[int, str]] = defaultdict(dict)
    for name in present:
        if parts := NUMBERED.fullmatch(name):
            sets[parts[1], int(parts[3])][int(parts[2])] = name
    if len(sets) > 1:
        raise ConfigError(
            f"{len(present)} safetensors files of {len(sets)} numberings ({listed(present)}) and no {INDEX} that says "
            "which are the model; remove the others"
        )
    chosen = list(present)
    for (stem, total), found in sets.items():
        missing = sorted(set(range(1, total + 1)) - set(found))
        if missing:
            name = f"{stem}-{missing[0]:05d}-of-{total:05d}.safetensors"
            more = f" and {len(missing) - 1:,} more are" if len(missing) > 1 else " is"
            raise ConfigError(f"{name}{more} missing of {total:,} shards; fetch the checkpoint again")
        chosen = [found[number] for number in sorted(found)]
    others = f"; not read: {listed([*set(present) - set(chosen)])}" if len(chosen) < len(present) else ""
    notes.append(f"no {INDEX} is there: the {len(chosen)} files {listed(chosen)} are read for what they hold{others}")
    return chosen


def _weight_map(path: Path, index: str, files: Mapping[str, Path]) -> dict[str, str]:
    """Return tensor name -> shard of an index whose shards are all in ``files``."""
    try:
        named: Any = strict_json.read_object(path, index).get("weight_map")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if not isinstance(named, dict) or not named or not all(isinstance(v, str) for v in named.values()):
        raise ConfigError(f"{index}: weight_map must map tensor names to file names")
    problems = []
    weight_map: dict[str, str] = {name: shard.removeprefix("./") for name, shard in named.items()}
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\\" in shard or shard in ("", ".", "..") or not shard.endswith(".safetensors"):
            problems.append(
                f"{index}: {shard!r} is not the name of a safetensors file in the same folder; write the names of "
                "shards into it without their folders"
            )
        elif shard not in files:
            problems.append(f"{shard}: the shard is missing, although {index} names it")
    if problems:
        broken = misplaced.broken_links(path.parent, ("*.safetensors",))
        raise ConfigError(*capped(problems), *([broken] if broken else []))
    return weight_map


def _read(
    files: Mapping[str, Path], shards: Sequence[str], notes: list[str]
) -> tuple[TensorTable, dict[str, set[str]]]:
    """Return the tensors of ``shards``, and for each name the shards that hold it."""
    problems: list[str] = []
    found: TensorTable = {}
    holders: dict[str, set[str]] = defaultdict(set)
    for shard in shards:
        try:
            header = read_header(files[shard], shard)
        except ValueError as error:
            problems.append(str(error))
            continue
        for name, info in header.items():
            first, seen = found.setdefault(name, (shard, info))
            holders[name].add(shard)
            if first != shard and not same_values(files[first], seen, files[shard], info):
                problems.append(f"tensor {name} is in both {first} and {shard}, and not the same; remove the wrong one")
    if problems:
        raise ConfigError(*capped(problems))
    twice = [name for name, owners in holders.items() if len(owners) > 1]
    if twice:
        notes.append(f"{len(twice)} tensors are in several files, the same in each: {listed(twice)}")
    return found, holders


def _difference(files: Mapping[str, Path], whole: TensorTable, sharded: TensorTable) -> str:
    """Return the first difference between the tensors of two checkpoints in one folder, empty for none."""
    for name in sorted(whole.keys() ^ sharded.keys()):
        return f"tensor {name} is in {SINGLE if name in whole else sharded[name][0]} alone"
    for name, (file, info) in whole.items():
        other_file, other = sharded[name]
        if not same_values(files[file], info, files[other_file], other):
            return f"tensor {name} in {file} is not that in {other_file}"
    return ""


def _disagreements(index: str, weight_map: Mapping[str, str], holders: Mapping[str, set[str]]) -> list[str]:
    """Say where an index and the headers of its shards differ."""
    absent = [name for name in weight_map if name not in holders]
    moved = [name for name, shard in weight_map.items() if name in holders and shard not in holders[name]]
    unlisted = [name for name in holders if name not in weight_map]
    kinds = (
        (absent, "that no shard holds"),
        (moved, "in other shards than they are in"),
        (unlisted, "too few: the shards hold them"),
    )
    return [
        f"{index} is out of date, the shards' headers count: it names {len(names):,} tensors {how} ({listed(names)})"
        for names, how in kinds
        if names
    ]
