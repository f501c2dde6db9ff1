"""Runs transformers' AutoTokenizer on a checkpoint's own files: the tokenizer that its users have.

It runs in a process of its own. That keeps its two seconds of import out of the worker, keeps it from importing torch,
and shows it nothing but the files that the stage declares: no code of the checkpoint is among them, so none can run.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from stages.tokenizers import library
from stages.tokenizers.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from stages.documents.files import JsonObject

ROOT = Path(__file__).resolve().parents[3]
MAX_MESSAGE = 400  # characters of what the library says
TABLES = "tokenizer.json"
# A process that a file makes compute or grow without end is stopped by the kernel. Seconds are of computing; a tenth of
# them is what the largest published vocabularies take.
SECONDS = 5  # for a request, and beside that
SECONDS_PER_MB = 10  # of files that are loaded, and of texts
MEMORY = 1 << 29  # bytes beyond what it has, and beside that
MEMORY_PER_BYTE = 40  # of files that are loaded
_CHILD = "import sys; sys.path.append(sys.argv[1]); from stages.tokenizers.reference.automatic import serve; serve()"


class Automatic:
    """A loaded tokenizer of transformers; a :class:`~stages.tokenizers.tokenizer_family.ReferenceTokenizer`.

    ``name`` is the class that it chose, ``refused`` why the checkpoint's own class was not taken (None: it was).
    ``document`` is tokenizer.json as this class runs it: the file's, with what the other files change. ``prefix`` and
    ``suffix`` are the ids around every text.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        """Load ``files`` (name -> where to open it); :class:`TokenizerError` with what transformers says of them."""
        self._tables = str(files[TABLES].resolve()) if TABLES in files else ""
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as folder:
            for name, path in files.items():
                (Path(folder) / name).symlink_to(path.resolve())
            loaded = _server().ask("load", [folder])
        self._number = loaded["number"]
        weakref.finalize(self, _forget, self._number)
        self.name: str = loaded["class"]
        self.refused: str | None = loaded["refused"]
        self.document: JsonObject = json.loads(loaded["document"])
        self.prefix: list[int] = loaded["prefix"]
        self.suffix: list[int] = loaded["suffix"]
        self._tokens = {int(index): bytes.fromhex(data) for index, data in loaded["tokens"].items()}
        self._known: dict[tuple[str, bool], list[int]] = {}
        special = [token for token in self.document["added_tokens"] if token["special"]]
        # A normaliser may make a special token's text of another; else what does not begin one cannot be one.
        made = self.document["normalizer"] is not None and any(token["normalized"] for token in special)
        self._starts = {"" if made else token["content"][:2] for token in special}

    def tokenizer(self) -> Tokenizer:
        """Return the document as the tokenizers library loads it, which is how a runtime will."""
        return library.load(json.dumps(self.document), "tokenizer.json as transformers runs it cannot be loaded")

    def read(self, texts: Sequence[str]) -> None:
        """Encode many texts at once, for :meth:`encode` to have them."""
        for specials in (True, False):
            wanted = [text for text in texts if specials or self._may_hold_special(text)]
            found = self._ask("encode" if specials else "encode_plain", wanted)
            self._known.update({(text, specials): ids for text, ids in zip(wanted, found, strict=True)})

    def encode(self, text: str, *, specials: bool) -> list[int]:
        """Return the ids of ``text`` without what goes around it; ``specials`` is split_special_tokens=False."""
        specials = specials or not self._may_hold_special(text)
        if (text, specials) not in self._known:
            (ids,) = self._ask("encode" if specials else "encode_plain", [text])
            self._known[text, specials] = ids
        return self._known[text, specials]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids``, special tokens included."""
        (text,) = self._ask("decode", [list(ids)])
        return str(text)

    def tokens(self) -> dict[int, bytes]:
        """Return every id with its bytes."""
        return self._tokens

    @property
    def added(self) -> list[str]:
        """The added tokens."""
        return [token["content"] for token in self.document["added_tokens"]]

    def alone(self, texts: Sequence[str]) -> JsonObject:
        """Return the ``ids`` that tokenizer.json gives without the class and the files beside it, or the ``error``."""
        found: JsonObject = self._ask("alone", [self._tables, list(texts)])
        return found

    def chats(self, template: str | None, cases: Sequence[tuple[list[JsonObject], bool]]) -> list[JsonObject]:
        """Return the ``ids`` of conversations, or the ``error`` that refuses one; None is the checkpoint's template.

        A case is messages, and whether the assistant is to speak. What messages spell of control tokens is text.
        """
        found: list[JsonObject] = self._ask("chat", [[template, messages, speaks] for messages, speaks in cases])
        return found

    def _may_hold_special(self, text: str) -> bool:
        return any(start in text for start in self._starts)

    def _ask(self, what: str, values: Sequence[Any]) -> Any:
        return _server().ask(what, values, self._number)


class _Server:
    """The process, which serves all tokenizers of this one and ends with it."""

    def __init__(self) -> None:
        settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, str(ROOT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env={**os.environ, **settings},
        )

    def ask(self, what: str, values: Sequence[Any], number: int | None = None) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps([what, values, number]) + "\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            raise TokenizerError(f"transformers {_ended(self.process.wait())} with these tokenizer files") from None
        if "error" in answer:
            raise TokenizerError(f"transformers cannot read these tokenizer files: {answer['error']}")
        return answer["value"]


def _ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "was stopped after computing far longer than any takes"
    if code == -signal.SIGABRT:
        return "ended for want of memory, or by a fault of its own,"
    return f"ended with code {code}"


_running: list[_Server] = []


def _server() -> _Server:
    if not _running or _running[0].process.poll() is not None:
        _running[:] = [_Server()]
    return _running[0]


def _forget(number: int) -> None:
    if _running and _running[0].process.poll() is None:
        _running[0].ask("forget", [], number)


def serve() -> None:
    """Answer requests, one JSON document a line; output that libraries print is discarded."""
    sys.modules["torch"] = None  # type: ignore[assignment] # not there, whether or not it is installed
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    loaded: dict[int, Any] = {}
    for line in sys.stdin:
        what, values, number = json.loads(line)
        try:
            _limit(len(line), _loaded_bytes(what, values))
            if what == "load":
                number = len(loaded)
                loaded[number], refused = _load(*values)
                value: Any = {**_describe(loaded[number]), "number": number, "refused": refused}
            elif what == "forget":
                value = loaded[number] = None
            else:
                value = _answer(loaded[number], what, values)
        except BaseException as error:  # noqa: BLE001 - the library panics, too; all of it is reported, none is handled
            _write(answers, {"error": _message(error)})
        else:
            _write(answers, {"value": value})


def _limit(texts: int, files: int) -> None:
    """Set what the kernel lets a request have, of so many bytes of ``texts``, that loads so many of ``files``."""
    if files:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401 - their import is not the files'

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])
        _at_most(resource.RLIMIT_DATA, pages * resource.getpagesize() + MEMORY + MEMORY_PER_BYTE * files)
    seconds = time.process_time() + SECONDS + SECONDS_PER_MB * (texts + files) / 1e6
    _at_most(resource.RLIMIT_CPU, int(seconds) + 1)


def _loaded_bytes(what: str, values: Sequence[Any]) -> int:
    """Return the bytes of the files that a request loads."""
    if what == "load":
        return sum(path.stat().st_size for path in Path(*values).iterdir())
    return Path(values[0]).stat().st_size if what == "alone" else 0


def _at_most(kind: int, limit: int) -> None:
    """Set a limit; one that the user's shell or a container has set stays, and may be lower."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def _load(folder: str) -> tuple[Any, str | None]:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False), None
    except Exception as error:
        # A class that is the checkpoint's own code, or is not known: then the file speaks for itself.
        if not (Path(folder) / TABLES).exists():
            raise
        return PreTrainedTokenizerFast.from_pretrained(folder), _message(error)


def _describe(loaded: Any) -> JsonObject:
    from stages.tokenizers.formats.byte_level import read_token

    backend = loaded.backend_tokenizer
    document = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    added = set(loaded.get_added_vocab())
    around = backend.encode("a")
    inside = [index for index, mask in enumerate(around.special_tokens_mask) if not mask]
    first, last = (inside[0], inside[-1]) if inside else (len(around.ids), len(around.ids))
    byte_level = '"ByteLevel"' in json.dumps(document["decoder"])
    tokens = {
        index: (token.encode() if token in added or not byte_level else read_token(token)).hex()
        for token, index in loaded.get_vocab().items()
    }
    return {
        "class": type(loaded).__name__,
        "document": json.dumps(document),
        "prefix": around.ids[:first],
        "suffix": around.ids[last + 1 :],
        "tokens": tokens,
    }


def _chat(loaded: Any, template: str | None, messages: list[JsonObject], speaks: bool) -> JsonObject:
    options = {"add_generation_prompt": speaks, "sanitize_control_tokens": True, "return_dict": False}
    try:
        return {"ids": loaded.apply_chat_template(messages, chat_template=template, **options)}
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        return {"error": _message(error)}


def _alone(path: str, texts: list[str]) -> JsonObject:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(path)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return {"ids": [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]}
    except BaseException as error:  # noqa: BLE001 - the library panics, too
        return {"error": _message(error)}


def _answer(loaded: Any, what: str, values: list[Any]) -> Any:
    if what == "chat":
        return [_chat(loaded, *value) for value in values]
    if what == "alone":
        return _alone(*values)
    if what == "decode":
        return [loaded.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) for ids in values]
    plain = what == "encode_plain"
    return loaded(values, add_special_tokens=False, split_special_tokens=plain)["input_ids"] if values else []


def _message(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:MAX_MESSAGE]}{' ...' if len(text) > MAX_MESSAGE else ''}"


def _write(answers: IO[str], value: Any) -> None:
    answers.write(json.dumps(value) + "\n")
    answers.flush()
