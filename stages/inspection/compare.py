"""Finds differences within two results of a stage, for ``pipeline diff``: calls of graphs, libraries, tokenizers.

Each function takes the files of both results (name -> where the content is) and returns rows: what, in A, in B.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stages.documents.files import JsonObject


Files = Mapping[str, Path]
Row = tuple[str, str, str]
SHOWN = 30  # rows of one kind; more are counted
STRUCTURE = "views/structure.json"


def graphs(a: Files, b: Files) -> list[Row]:
    """Compare two graph-builds: functions call by call with types, whatever variables are named; kernels by hash."""
    if STRUCTURE not in a or STRUCTURE not in b:
        states = ["recorded" if STRUCTURE in side else "not recorded" for side in (a, b)]
        return [("structure", states[0], states[1])]
    old, new = _read(a[STRUCTURE]), _read(b[STRUCTURE])
    before, after = old["functions"], new["functions"]
    sizes = [{name: f"{len(calls)} calls" for name, calls in side.items()} for side in (before, after)]
    rows = [row for row in _unequal("", *sizes) if "-" in row[1:]]
    for name in sorted(before.keys() & after.keys()):
        rows += _capped(list(_calls(name, before[name], after[name])), f"calls of {name}")
    return rows + _capped(_unequal("kernel ", old["kernels"], new["kernels"]), "kernels")


def _calls(function: str, a: list[str], b: list[str]) -> Iterator[Row]:
    """Yield what was replaced, removed and added in the sequence of calls."""
    for tag, i, i_end, j, j_end in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            for k in range(max(i_end - i, j_end - j)):
                old, new = a[i + k] if i + k < i_end else "", b[j + k] if j + k < j_end else ""
                yield f"{function}, call {i + k}", old, new


def libraries(a: Files, b: Files) -> list[Row]:
    """Compare two compiled libraries: target, tools, kernels added and removed, memory plan, sizes of parameters."""
    old, new = _read(a["metadata.json"]), _read(b["metadata.json"])
    kernels = [dict.fromkeys(document.pop("kernels", []), "there") for document in (old, new)]
    params = [{p["name"]: f"{p['dtype']} {p['shape']}" for p in d.pop("params", [])} for d in (old, new)]
    figures = [dict(_leaves(document.pop("device_kernels", {}), "")) for document in (old, new)]
    rows = _unequal("", *(dict(_leaves(document, "")) for document in (old, new)))
    rows += _capped(_unequal("kernel ", *kernels), "kernels")
    rows += _capped(_unequal("", *figures), "figures of device code")
    return rows + _capped(_unequal("param ", *params), "params")


def tokenizers(a: Files, b: Files) -> list[Row]:
    """Compare two tokenizers: what each says of itself, and the tokens whose id differs or that only one has."""
    rows = _unequal("", *(dict(_leaves(_read(side["tokenizer/tokenizer_info.json"]), "")) for side in (a, b)))
    ids = [_ids(_read(side["tokenizer/tokenizer.json"])) for side in (a, b)]
    return rows + _capped(_unequal("token ", *ids), "tokens")


def _ids(document: JsonObject) -> dict[str, str]:
    vocabulary = document.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # a Unigram model's: [token, score], the id being the place
        vocabulary = {entry[0]: i for i, entry in enumerate(vocabulary)}
    ids = {repr(token): str(i) for token, i in vocabulary.items()}
    return ids | {repr(token["content"]): str(token["id"]) for token in document.get("added_tokens", [])}


def _read(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, below in value.items():
            yield from _leaves(below, f"{path}.{key}" if path else key)
    else:
        yield path, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _unequal(prefix: str, a: Mapping[str, str], b: Mapping[str, str]) -> list[Row]:
    names = list(dict.fromkeys([*a, *b]))
    return [(prefix + name, a.get(name, "-"), b.get(name, "-")) for name in names if a.get(name) != b.get(name)]


def _capped(rows: list[Row], what: str) -> list[Row]:
    """Return the first rows, and how many more there are."""
    return rows if len(rows) <= SHOWN else [*rows[:SHOWN], (f"{len(rows) - SHOWN} more {what}", "", "")]
