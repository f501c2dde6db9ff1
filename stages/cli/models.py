"""``pipeline models``: the families that can be built, what each supports and which keys of config.json it honours."""

from __future__ import annotations

import json
import shutil
import textwrap
from typing import TYPE_CHECKING, Any

from stages.models import FAMILIES, load_family, native

if TYPE_CHECKING:
    import argparse

EXAMPLE = "pipeline models qwen2"
WIDTH = 100  # characters at most
# Class of a key -> what it is headed with.
CLASSES = {
    "honoured": "keys of config.json that are honoured",
    "irrelevant": "keys that no inference depends on, as on all that are not listed",
    "refused": "keys that are refused unless they say the usual",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "family",
        nargs="?",
        choices=sorted(filter(native, FAMILIES)),
        metavar="MODEL_TYPE",
        help="one family, with all its keys",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0."""
    found = {name: describe(name) for name in ([args.family] if args.family else sorted(filter(native, FAMILIES)))}
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print("\n\n".join(_page(name, entry, whole=bool(args.family)) for name, entry in found.items()))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Return architectures, what is supported, and the keys of config.json by class."""
    family = load_family(name)
    keys = {kind: sorted(key for key, found in family.keys.items() if found == kind) for kind in CLASSES}
    return {"architectures": [*family.architectures], "supports": [*family.supports], "keys": keys}


def _page(name: str, entry: dict[str, Any], *, whole: bool) -> str:
    lines = [f"{name}  {', '.join(entry['architectures'])}", *_block("supports", "; ".join(entry["supports"]))]
    for kind, title in CLASSES.items():
        if whole or kind == "honoured":
            lines += _block(title, " ".join(entry["keys"][kind]))
    return "\n".join(lines)


def _block(title: str, text: str) -> list[str]:
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    return [f"  {title}", *textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")]
