"""``pipeline models``: the families that can be built, what each supports and which keys of config.json it honours; and
what is known of the model types that are traced from transformers' code.
"""

from __future__ import annotations

import json
import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from stages.models import FAMILIES, load_family, native

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from stages.documents.files import JsonObject

EXAMPLE = "pipeline models qwen2"
TRIED = Path(__file__).with_name("traced.json")  # what benchmarks/coverage.py found, by model_type
WIDTH = 100  # characters at most
# Class of a key -> what it is headed with.
CLASSES = {
    "honoured": "keys of config.json that are honoured",
    "irrelevant": "keys that no inference depends on, as on all that are not listed",
    "refused": "keys that are refused unless they say the usual",
}


# What benchmarks/coverage.py says of a type -> what those are headed with.
VERDICTS = {
    "proven": "traced from transformers' code (the extra trace), and compared with it on llvm",
    "wrong": "traced, but further from transformers' logits than what is proven may be: verify decides on a checkpoint",
    "refused": "refused, with the reason that `pipeline models MODEL_TYPE` shows",
    "unmade": "not tried: transformers makes no small model of them",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument(
        "family",
        nargs="?",
        choices=[*sorted(filter(native, FAMILIES)), *traced()],
        metavar="MODEL_TYPE",
        help="one family, with all its keys",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on stdout")


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0."""
    names = [args.family] if args.family else sorted(filter(native, FAMILIES))
    families = {name: describe(name) for name in names if native(name)}
    tried = {name: entry for name, entry in traced().items() if args.family in (None, name)}
    if args.json:
        print(json.dumps({**families, **tried}, indent=1))
        return 0
    pages = [_page(name, entry, whole=bool(args.family)) for name, entry in families.items()]
    print("\n\n".join([*pages, *(_traced_page(tried, whole=bool(args.family)) if tried else [])]))
    return 0


def traced() -> dict[str, dict[str, str]]:
    """Return the result for every traced model_type, sorted: proven, or refused and why."""
    found: dict[str, dict[str, str]] = json.loads(TRIED.read_text("utf-8"))
    return {name: {"frontend": "traced", **entry} for name, entry in sorted(found.items()) if not native(name)}


def _traced_page(tried: Mapping[str, Mapping[str, str]], *, whole: bool) -> list[str]:
    """Return a paragraph for each verdict, and with ``whole`` the reason of each type."""
    pages = []
    for verdict, title in VERDICTS.items():
        names = [name for name, entry in tried.items() if entry["verdict"] == verdict]
        if names:
            lines = [f"{name}: {tried[name]['reason']}" for name in names] if whole else [" ".join(names)]
            pages.append("\n".join([title, *(part for line in lines for part in _wrapped(line))]))
    return pages


def describe(name: str) -> JsonObject:
    """Return architectures, what is supported, and the keys of config.json by class."""
    family = load_family(name)
    keys = {kind: sorted(key for key, found in family.keys.items() if found == kind) for kind in CLASSES}
    return {
        "frontend": "native",
        "architectures": [*family.architectures],
        "supports": [*family.supports],
        "keys": keys,
    }


def _page(name: str, entry: JsonObject, *, whole: bool) -> str:
    lines = [f"{name}  {', '.join(entry['architectures'])}", *_block("supports", "; ".join(entry["supports"]))]
    for kind, title in CLASSES.items():
        if whole or kind == "honoured":
            lines += _block(title, " ".join(entry["keys"][kind]))
    return "\n".join(lines)


def _block(title: str, text: str) -> list[str]:
    return [f"  {title}", *_wrapped(text)]


def _wrapped(text: str) -> list[str]:
    width = min(shutil.get_terminal_size((WIDTH, 24)).columns, WIDTH)
    return textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
