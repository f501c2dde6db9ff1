"""Which of a checkpoint's tensors is which of the model's, where a tool that wrote it changed the names.

A base model saved alone lacks the first part of its names; wrappers (DDP, PEFT, a vision model around it) add parts in
front, and torch.compile, FSDP and activation checkpointing in between.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from stages.models.family import Family

ROTARY = "*.rotary_emb.*"  # inverse frequencies, cosines and sines, which every model here computes
NUMBERED = re.compile(r"(.*?)\.(\d{1,9})\.")  # a layer of many
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # parts that may stand anywhere


@dataclass(frozen=True)
class Naming:
    """``names`` are the model's name -> the checkpoint's, of those that differ; ``prefix`` is what stands before the
    checkpoint's names where the model's begin with ``own``. ``problem`` says why nothing could be matched.
    """

    own: str
    prefix: str
    names: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    problem: str = ""

    def stored(self, name: str) -> str:
        """Return the checkpoint's name of what the model calls ``name``."""
        return self.names.get(name, name)


@dataclass(frozen=True)
class Leftovers:
    """The checkpoint's tensors that no parameter is made of.

    ``derived``: the model computes them, or has them under another name. ``beside``: of no module that is built.
    ``within``: of one that is, so that they may say another model than config.json. ``layers``: of layers after the
    model's last, number -> their tensors.
    """

    derived: Sequence[str]
    beside: Sequence[str]
    within: Sequence[str]
    layers: Mapping[int, Sequence[str]]


def wanted(family: Family, config: Any) -> list[str]:
    """Return the names of the tensors that a model is made of, the embedding first."""
    return [name for parameter in family.params(config) for name in parameter.sources]


def resolve(family: Family, config: Any, found: Collection[str]) -> Naming:
    """Match the names of a model's tensors with those ``found`` in a checkpoint."""
    names = wanted(family, config)
    own = names[0].partition(".")[0] + "."
    body = [name.removeprefix(own) for name in names if name.startswith(own)]
    plain: dict[str, str] = {}
    for name in sorted(found, key=len, reverse=True):  # of equals, the one that was not wrapped
        plain[unwrapped(name)] = name
    prefix, rivals = _prefix(own, set(body), plain)
    if prefix is None:
        naming = Naming(own, own, problem=_problem(family, names, found, rivals))
        return Naming(own, own) if not rivals and any(name in found for name in names) else naming
    pairs = {own + name: plain[prefix + name] for name in body if prefix + name in plain}
    for name in (*names, *(family.tied or ())):
        head = None if name.startswith(own) else _head(name, family.aliases.get(name, name), prefix, plain)
        if head:
            pairs[name] = head
    notes = _notes(own, prefix, pairs)
    if family.tied and getattr(config, "tied", False):
        head, table = family.tied
        if table not in pairs and head in pairs:
            pairs[table] = pairs[head]
            notes.append(f"the embedding {table} is stored as the output head it is tied to, {pairs[head]}")
    return Naming(own, prefix, {name: stored for name, stored in pairs.items() if name != stored}, notes)


def leftovers(family: Family, config: Any, naming: Naming, found: Collection[str]) -> Leftovers:
    """Sort the tensors ``found`` that no parameter of the model is made of."""
    names = wanted(family, config)
    used = {naming.stored(name) for name in names}
    repeated = {naming.stored(name) for name in (family.tied or ())[:1]}  # a head equal to its tied embedding
    modules = {_module(name, naming.own) for name in names}
    kinds: dict[str, list[str]] = {"derived": [], "beside": [], "within": []}
    layers: dict[int, list[str]] = defaultdict(list)
    last = _last_layers(names)
    for name in found:
        if name in used:
            continue
        plain = unwrapped(name)
        ours = plain
        if _module(naming.own + plain.removeprefix(naming.prefix), naming.own) in modules:
            ours = naming.own + plain.removeprefix(naming.prefix)
        if name in repeated or any(fnmatchcase(f".{plain}", pattern) for pattern in (ROTARY, *family.recomputed)):
            kinds["derived"].append(name)
        elif (part := NUMBERED.match(ours)) and int(part[2]) > last.get(part[1], int(part[2])):
            layers[int(part[2])].append(name)
        else:
            kinds["within" if _module(ours, naming.own) in modules else "beside"].append(name)
    return Leftovers(**kinds, layers=dict(sorted(layers.items())))


def _last_layers(names: Sequence[str]) -> dict[str, int]:
    """Return what stands before a layer's number -> the number of the model's last."""
    last: dict[str, int] = {}
    for part in filter(None, map(NUMBERED.match, names)):
        last[part[1]] = max(last.get(part[1], 0), int(part[2]))
    return last


def _module(name: str, own: str) -> str:
    """Return the part of the model that a tensor belongs to: its layers, its embedding, its head."""
    first, _, rest = name.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if name.startswith(own) else first


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers put in between."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def suffixes(name: str) -> Iterator[str]:
    """Yield a name, then what is left of it without its first part, without its first two, and so on."""
    while name:
        yield name
        name = name.partition(".")[2]


def _prefix(own: str, body: set[str], plain: Collection[str]) -> tuple[str | None, list[str]]:
    """Return what stands before most of the names of ``body``; None, and rivals if there are, where it is not clear."""
    votes = Counter(name[: len(name) - len(end)] for name in plain for end in suffixes(name) if end in body)
    most = max(votes.values(), default=0)
    if 2 * most <= len(body):
        return None, []
    rivals = sorted(prefix for prefix, count in votes.items() if count == most)
    if own in rivals:
        return own, []
    return (rivals[0], []) if len(rivals) == 1 else (None, rivals)


def _head(name: str, alias: str, prefix: str, plain: Mapping[str, str]) -> str | None:
    """Return the one stored tensor that is ``name`` (or its ``alias``), before which the body's prefix, or a part of
    it, may stand.
    """
    for known in (name, alias):
        if known in plain:
            return plain[known]
        ends = [found for found in plain if found.endswith(f".{known}") and prefix.startswith(found[: -len(known)])]
        if len(ends) == 1:
            return plain[ends[0]]
    return None


def _notes(own: str, prefix: str, pairs: Mapping[str, str]) -> list[str]:
    notes = []
    if prefix != own:
        how = f"begin with '{prefix}' where the model's begin with" if prefix else "lack the prefix"
        notes.append(f"the names of the checkpoint's tensors {how} '{own}': they are read as the model's")
    parts = sorted(WRAPPERS & {part for stored in pairs.values() for part in stored.split(".")})
    if parts:
        notes.append(f"the names of the checkpoint's tensors are read without their parts {', '.join(parts)}")
    return notes


def _problem(family: Family, names: Sequence[str], found: Collection[str], rivals: Sequence[str]) -> str:
    if rivals:
        ways = " and ".join(f"'{prefix}'" for prefix in rivals)
        return f"the checkpoint holds the model's tensors more than once, below {ways}; remove those that are not meant"
    shown = ", ".join(sorted(found)[:3])
    return (
        f"the checkpoint's {len(found):,} tensors ({shown}, ...) are not named as those of a {family.name} model "
        f"({', '.join(names[:3])}, ...): they are of another architecture, or of another format that must be converted"
    )
