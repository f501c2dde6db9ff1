"""Secrets, the values of ``${secret.NAME}``: passed to their stage alone, and masked in all that is stored or printed.

In a key a secret is a keyed digest (HMAC-SHA-256 with a key that the store makes for itself), so that a result is found
again and nobody can try guesses without that key. What a stage says is masked before it is written or shown, what it
prints on its way to the log; a stage that writes its secret into an output or a part fails.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from stagegraph.planning.key import SHOWN
from stagegraph.stage import Secret

BLOCK = 1 << 20
POLL_SECONDS = 0.1
PIPE_BYTES = 1 << 20  # more than a pipe holds: what was printed before an execution ended is read by then
# What of a worker's events is text of its stage.
SAID = ("problems", "warnings", "summary", "facts", "unit", "note", "meaning")


def spread(params: Any, secrets: Iterable[str]) -> Any:
    """Return resolved parameters in which every text that holds one of the ``secrets`` is a secret itself."""
    known = list(secrets)

    def secret(value: Any) -> Any:
        return Secret(value) if isinstance(value, str) and any(each in value for each in known) else value

    return _mapped(params, secret)


def sealed(params: Any, mac: Callable[[str], str]) -> Any:
    """Return parameters as they enter a key: every secret as ``{"***": its keyed digest}``."""
    return _mapped(params, lambda value: {SHOWN: mac(value)} if isinstance(value, Secret) else value)


def _mapped(params: Any, change: Callable[[Any], Any]) -> Any:
    values = {f.name: getattr(params, f.name) for f in dataclasses.fields(params)}
    new = {n: tuple(map(change, v)) if isinstance(v, tuple | list) else change(v) for n, v in values.items()}
    return dataclasses.replace(params, **{name: value for name, value in new.items() if value is not values[name]})


class Mask:
    """Masks secrets in text, in all their spellings: plain, JSON, URL-encoded or as Python's ``repr``."""

    def __init__(self, secrets: Iterable[str]) -> None:
        forms = {form for secret in secrets for form in _forms(str(secret))}
        self.forms = [form.encode(errors="surrogateescape") for form in sorted(forms, key=len, reverse=True)]
        self._bytes = re.compile(b"|".join(map(re.escape, self.forms)))
        self._text = re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))

    def value(self, value: Any) -> Any:
        """Return a JSON value without secrets in its texts."""
        if isinstance(value, str):
            return self._text.sub(SHOWN, value)
        if isinstance(value, Mapping):
            return {self.value(name): self.value(each) for name, each in value.items()}
        return [self.value(each) for each in value] if isinstance(value, list | tuple) else value

    def event(self, event: Mapping[str, object]) -> dict[str, object]:
        """Return an event of a worker without secrets in what its stage says."""
        return {name: self.value(value) if name in SAID else value for name, value in event.items()}

    def split(self, data: bytes, *, ended: bool) -> tuple[bytes, bytes]:
        """Return masked bytes, and the unmasked rest that may be the beginning of a secret."""
        data = self._bytes.sub(SHOWN.encode(), data)
        most = 0 if ended else min(len(data), len(self.forms[0]) - 1)
        starts = (data[-n:] for n in range(most, 0, -1))
        pending = next((end for end in starts if any(form.startswith(end) for form in self.forms)), b"")
        return data[: len(data) - len(pending)], pending

    def holds(self, path: Path) -> bool:
        """Say whether a file holds a secret."""
        before = b""
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                if self._bytes.search(before + block):
                    return True
                before = (before + block)[1 - len(self.forms[0]) :]
        return False


def _forms(secret: str) -> Iterator[str]:
    yield secret
    yield json.dumps(secret)[1:-1]
    yield json.dumps(secret, ensure_ascii=False)[1:-1]
    yield repr(secret)[1:-1]
    yield quote(secret, safe="", errors="surrogateescape")


class MaskedLog:
    """A pipe that a worker prints into, and a thread that writes the masked text to the log."""

    def __init__(self, pipe: Path, log: Path, mask: Mask) -> None:
        from threading import Event, Thread

        os.mkfifo(pipe, 0o600)
        self.pipe = pipe
        self._end = os.open(pipe, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)  # its own writer: it never seems to end
        self._log = log.open("wb", buffering=0)
        self._mask = mask
        self._ended = Event()
        self._thread = Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        pending, left = b"", PIPE_BYTES
        while left > 0:
            ended = self._ended.is_set()
            select.select([self._end], [], [], 0 if ended else POLL_SECONDS)
            try:
                data = os.read(self._end, 1 << 16)
            except BlockingIOError:
                if ended:
                    break
                continue
            left -= len(data) if ended else 0
            masked, pending = self._mask.split(pending + data, ended=False)
            self._write(masked)
        self._write(self._mask.split(pending, ended=True)[0])

    def _write(self, data: bytes) -> None:
        try:
            self._log.write(data)
        except OSError:
            return  # a full disk: the stage must not wait for it

    def close(self) -> None:
        """Write the rest; its worker has ended or waits."""
        self._ended.set()
        self._thread.join()
        self._log.close()
        os.close(self._end)
