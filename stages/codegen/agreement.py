"""Checks that graphs and registered parameters are of one build; finds the layers that can read int8 activations."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING

from stages.documents.graph import ModelSizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stages.documents.graph import Graph
    from stages.documents.params import Parameter, Register


def takes_bytes(registry: Register) -> tuple[list[str], list[str]]:
    """Return the layers that can read activations as int8, and those whose quantized weights are read by floats."""
    logical = registry["logical"]
    head = "head" if any(entry["kind"] == "head" for entry in logical) else "embedding"  # tied: the table is the head
    layers = [entry for entry in logical if entry["quantize"] and entry["kind"] in ("linear", head)]
    names = [(entry["name"], _takes_bytes(entry)) for entry in layers]
    return [name for name, takes in names if takes], [name for name, takes in names if not takes]


def _takes_bytes(entry: Parameter) -> bool:
    return entry["layout"] == "n32" and entry["quantize"] is not None


def disagreements(graphs: Sequence[Graph], registry: Register, target: str, activations: str) -> list[str]:
    """Return where graphs are of different builds, and which functions occur twice or not at all."""
    problems = []
    for name in (*ModelSizes.__annotations__, "target"):
        values = {json.dumps(dict(graph)[name]) for graph in graphs}
        if len(values) > 1:
            problems.append(
                f"the graphs disagree on {name}: {', '.join(sorted(values))}; give every graph-build the same"
            )
    if target != graphs[0]["target"]:
        problems.append(f"the graphs are built for target {graphs[0]['target']}, the library for {target}")
    if registry["scheme"] != graphs[0]["scheme"]:
        problems.append(f"the graphs expect {graphs[0]['scheme']} parameters, the register holds {registry['scheme']}")
    if activations == "int8" and not takes_bytes(registry)[0]:
        problems.append(
            f"activations: int8 has no effect: no layer of this model in {registry['scheme']} has a kernel for it, "
            "which takes weights with float32 or float16 scales, in rows of whole groups; use float"
        )
    functions = [name for graph in graphs for name in graph["functions"]]
    return problems + [f"two graphs export {name}" for name, count in sorted(Counter(functions).items()) if count > 1]
