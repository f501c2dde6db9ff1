"""Serialised modules without the source locations that TVMScript notes, which differ with the machine."""

from __future__ import annotations

import json

import tvm

from stages.ir.compat import load_json

SCHEDULED = "tirx.is_scheduled"  # attribute of a kernel that has its schedule


def without_places(text: str) -> str:
    """Return a module that was saved as ``text`` without the notes of which lines of which file it came from."""
    if '"ir.SourceName"' not in text:
        return text
    document = json.loads(text)
    nodes = document["nodes"]
    nowhere = next(index for index, node in enumerate(nodes) if node["type"] == "None")
    for node in nodes:
        if isinstance(node.get("data"), dict) and "span" in node["data"]:
            node["data"]["span"] = nowhere
    return str(tvm.ir.save_json(load_json(json.dumps(document))))
