"""``pipeline tokenize BUNDLE TEXT``: how a bundle's tokenizer reads a text, id by id, and where another differs."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from stages.runtime import manifest, serving
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.folder import MANIFEST
from stages.runtime.tokenizer import INFO, BundleTokenizer

if TYPE_CHECKING:
    import argparse

    from stages.documents.files import JsonObject
    from stages.runtime.folder import Folder

EXAMPLE = "pipeline tokenize artifacts/tiny-qwen/tokenizer-bundle 'It was'"
REFERENCES = ("bundle", "compare")  # arguments that may name a node's result instead of a path
TEXT_COLUMN = 57  # characters before the last column of the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    add = parser.add_argument
    add("bundle", type=Path, metavar="BUNDLE", help="a bundle's directory, or one with a bundle/ or tokenizer/ in it")
    add("text", metavar="TEXT", help="the text; - reads it from standard input")
    add("--specials", action="store_true", help="what spells a special token is one (in a prompt it never is)")
    add("--compare", type=Path, metavar="DIR", help="another bundle: say where its ids or text differ first")
    add("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Run the verb; 0 ok, 1 if ``--compare`` finds a difference, 2 for a bundle that cannot be read."""
    try:
        text = serving.standard_input() if args.text == "-" else args.text
        tokenizer = BundleTokenizer(_place(args.bundle))
        other = BundleTokenizer(_place(args.compare)) if args.compare else None
        found = describe(tokenizer, text, specials=args.specials)
    except (BundleError, RequestError) as error:
        for problem in getattr(error, "problems", (error,)):
            print(f"error: {problem}", file=sys.stderr)
        return 2
    difference = None
    if other is not None:
        difference = compare(found, describe(other, text, specials=args.specials))
        found = {**found, "difference": difference}
    print(serving.json_text(found) if args.json else _page(found))
    if other is not None and not args.json:
        print(_comparison(difference, str(args.compare)))
    return 1 if difference else 0


def describe(tokenizer: BundleTokenizer, text: str, *, specials: bool) -> JsonObject:
    """Return what there is to know: normalised text, one line for each id, the text that the ids decode to."""
    ids = tokenizer.encode(text, specials=specials)
    pieces = [
        {
            "id": index,
            "bytes": (tokenizer.piece(index) or b"").hex(" "),
            "text": (tokenizer.piece(index) or b"").decode(errors="replace"),
            "special": tokenizer.is_special(index),
        }
        for index in ids
    ]
    # Special tokens are left out on the way back, so a text with them comes back without.
    return {
        "text": text,
        "normalized": tokenizer.normalize(text),
        "before_a_prompt": tokenizer.prefix,
        "pieces": pieces,
        "decoded": tokenizer.decode(ids),
    }


def compare(found: JsonObject, other: JsonObject) -> JsonObject | None:
    """Return the first difference between two descriptions; None if there is none."""
    for key in ("normalized", "before_a_prompt"):
        if found[key] != other[key]:
            return {"what": key, "here": found[key], "there": other[key]}
    mine, theirs = found["pieces"], other["pieces"]
    for at in range(max(len(mine), len(theirs))):
        here, there = mine[at : at + 1], theirs[at : at + 1]
        if here != there:
            return {"what": "pieces", "position": at, "here": mine[at : at + 6], "there": theirs[at : at + 6]}
    if found["decoded"] != other["decoded"]:
        return {"what": "decoded", "here": found["decoded"], "there": other["decoded"]}
    return None


def _place(path: Path) -> Path | Folder:
    """Return the listed files of a bundle, or the directory of tokenizer-bundle's output."""
    found = next((d for d in (path, path / "bundle", path / "tokenizer") if (d / INFO).is_file()), None)
    if found is None:
        raise BundleError(f"{path}: no {INFO} there; give the directory of a bundle or of tokenizer-bundle's output")
    return manifest.read(found).folder if (found / MANIFEST).is_file() else found


def _page(found: JsonObject) -> str:
    lines = [f"text        {found['text']!r}"]
    if found["normalized"] != found["text"]:
        lines.append(f"normalised  {found['normalized']!r}")
    if found["before_a_prompt"]:
        lines.append(f"before a prompt: ids {found['before_a_prompt']}")
    lines += ["", f"{'':>5}  {'id':>7}  {'':<7}  {'bytes':<30}  text"]
    room = max(shutil.get_terminal_size((120, 24)).columns - TEXT_COLUMN, 12)
    for at, piece in enumerate(found["pieces"]):
        mark = "special" if piece["special"] else ""
        shown = piece["bytes"] if len(piece["bytes"]) <= 30 else f"{piece['bytes'][:29]}…"
        text = repr(piece["text"])
        text = text if len(text) <= room else f"{text[: room - 1]}…"
        lines.append(f"{at:>5}  {piece['id']:>7}  {mark:<7}  {shown:<30}  {text}")
    lines += ["", f"decoded     {found['decoded']!r}", _verdict(found)]
    return "\n".join(lines)


def _verdict(found: JsonObject) -> str:
    if found["decoded"] == found["normalized"]:
        return "            the text comes back"
    if any(piece["special"] for piece in found["pieces"]):
        return "            the text comes back without its special tokens"
    return "            THE TEXT DOES NOT COME BACK as it went in"


def _comparison(difference: JsonObject | None, where: str) -> str:
    if difference is None:
        return f"\n{where}: the same ids and text"
    if difference["what"] != "pieces":
        return f"\n{where}: {difference['what']} differs: here {difference['here']!r}, there {difference['there']!r}"
    rows = [
        f"  {name}  " + "  ".join(f"{piece['id']} {piece['text']!r}" for piece in difference[name])
        for name in ("here", "there")
    ]
    return "\n".join(["", f"{where}: ids differ from position {difference['position']} on:", *rows])
