"""Prepares the probes: texts of several kinds on which a bundle is compared with the original model, token by token.

A corpus is a text file, or lines of JSON: ``{"kind": "prose", "text": ...}``, ``{"kind": "chat", "messages": [...]}``.
All of it becomes one stream of ids, cut into pieces that fill the context. So a corpus that is long enough also tests
positions beyond every chunk, page, sliding window and original context.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stages.problems import ProblemsError
from stages.runtime.errors import RequestError
from stages.runtime.wording import writes_date

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stages.documents.files import JsonObject
    from stages.runtime.folder import Folder
    from stages.runtime.tokenizer import BundleTokenizer

DEFAULT = Path(__file__).with_name("probes.jsonl")
LIMIT = 2**24  # bytes of a corpus
PART = 2**13  # characters of a text file that are encoded at a time, as many as are needed
LONGEST_MESSAGE = 200  # characters of what stands in a message about a line


class CorpusError(ProblemsError):
    """A corpus that cannot be read; ``problems`` says why."""


@dataclass(frozen=True)
class Probes:
    """``pieces`` are token ids, each no longer than the context and begun with the ``prefix`` of every text.

    There is none in a context of too few tokens. ``kinds`` has what kind of text each token of each piece is of.
    """

    pieces: Sequence[Sequence[int]]
    kinds: Sequence[Sequence[str]]
    prefix: Sequence[int]

    @property
    def skipped(self) -> int:
        """How many places at the beginning of a piece say nothing: those within the prefix."""
        return max(len(self.prefix) - 1, 0)

    @property
    def count(self) -> int:
        """How many places are compared: those that another token stands after."""
        return sum(len(piece) - 1 - self.skipped for piece in self.pieces)

    @property
    def longest(self) -> int:
        """How many tokens the longest piece has."""
        return max(map(len, self.pieces), default=0)

    def compared_kinds(self) -> list[str]:
        """Return of each place that is compared, in order, which kind the token after it is of."""
        return [kind for kinds in self.kinds for kind in kinds[self.skipped + 1 :]]


def of(
    corpus: Path,
    tokens: int,
    *,
    window: int,
    prefix: Sequence[int],
    encode: Callable[[str], Sequence[int]],
    chat: Callable[[Sequence[JsonObject]], Sequence[int]],
) -> Probes:
    """Return the first ``tokens`` ids of ``corpus`` in pieces of at most ``window``, each begun with ``prefix``.

    ``encode`` gives the ids of a text, ``chat`` those of a conversation. :class:`CorpusError` if there is no text.
    """
    room = window - len(prefix)
    ids: list[int] = []
    kinds: list[str] = []
    for kind, content in segments(corpus):
        if len(ids) >= tokens:
            break
        found = encode(content) if isinstance(content, str) else chat(content)
        ids += found
        kinds += [kind] * len(found)
    ids, kinds = ids[:tokens], kinds[:tokens]
    cuts = range(0, len(ids), max(room, 1))
    # A last piece of one token has nothing after it.
    starts = [start for start in cuts if room > 0 and len(prefix) + len(ids[start : start + room]) > 1]
    if len(ids) < 2:
        raise CorpusError(f"{corpus}: too little text: it has {len(ids)} tokens, and at least two are needed")
    return Probes(
        [[*prefix, *ids[start : start + room]] for start in starts],
        [[*[""] * len(prefix), *kinds[start : start + room]] for start in starts],
        prefix,
    )


def conversation(
    messages: Sequence[JsonObject],
    tokenizer: BundleTokenizer,
    folder: Folder,
    encode: Callable[[str], Sequence[int]],
) -> Sequence[int]:
    """Return the ids of a conversation in the model's own form, as plain text where its template takes none or writes
    the date: what is measured must be the same tomorrow. ``folder`` is where the ``tokenizer`` is.
    """
    if not writes_date(folder):
        try:
            return tokenizer.chat(messages, add_generation_prompt=False)
        except RequestError:
            pass
    return encode("\n\n".join(f"{each['role']}: {each['content']}" for each in messages) + "\n\n")


def one_file(named: str, files: Mapping[str, Path]) -> Path:
    """Return the one file that a user's corpus ``named`` is."""
    if len(files) != 1:
        raise CorpusError(f"corpus: {named}: name one .txt or .jsonl file, found {len(files)}")
    return next(iter(files.values()))


def segments(corpus: Path) -> Iterator[tuple[str, str | list[JsonObject]]]:
    """Yield kind and content of each part of a corpus: a text, or the messages of a conversation."""
    data = corpus.read_bytes()
    if len(data) > LIMIT:
        raise CorpusError(f"{corpus}: {len(data):,} bytes; a corpus has at most {LIMIT:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{corpus}: not UTF-8 at byte {error.start}: save it as UTF-8 text") from None
    if corpus.suffix != ".jsonl":
        for start in range(0, len(text), PART):
            yield "text", text[start : start + PART]
        return
    for number, line in enumerate(text.split("\n"), start=1):  # other ends of lines may stand within a JSON string
        if line.strip():
            yield _segment(line, f"{corpus}:{number}")


def _segment(line: str, where: str) -> tuple[str, str | list[JsonObject]]:
    try:
        entry = json.loads(line)
        json.dumps(entry, ensure_ascii=False).encode()  # refuses escapes that are no characters
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not JSON: {str(error)[:LONGEST_MESSAGE]}") from None
    if isinstance(entry, dict) and isinstance(kind := entry.get("kind", "text"), str):
        if isinstance(entry.get("text"), str):
            return kind, entry["text"]
        messages = entry.get("messages")
        if isinstance(messages, list) and all(
            isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("role", "content"))
            for each in messages
        ):
            return kind, messages
    raise CorpusError(f'{where}: expected {{"kind": ..., "text": ...}} or {{"kind": ..., "messages": [...]}}')
