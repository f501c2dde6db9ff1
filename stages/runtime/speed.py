"""How fast a bundle runs on the machine at hand: tokens a second, the median of several repeats, and time by kernel."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.documents import KernelTime, Speed
    from stages.runtime.session import Session


def measure(
    session: Session,
    *,
    prompt_tokens: int,
    decode_tokens: int,
    repeats: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Speed]:
    """Return for ``prefill`` and ``decode`` how many tokens were read, and tokens per second.

    ``rate`` is the median, ``lowest`` and ``highest`` are the ends of what was seen. A prompt is read in one call and
    then tokens one by one; what is timed ends when the logits are on the host. One repeat goes before those that count.
    ``progress`` is told how many repeats are done, that one included. Where the context holds fewer tokens, fewer are
    read.
    """
    prompt, following = _text(session, prompt_tokens, decode_tokens)
    times: list[tuple[float, float]] = []
    for done in range(repeats + 1):
        times.append(_read(session, prompt, following))
        progress(done + 1)
    prefill, decode = zip(*times[1:], strict=True)
    length = len(prompt)
    return {"prefill": _rates(length, prefill), "decode": {**_rates(len(following), decode), "after": length}}


def kernels(session: Session, *, prompt_tokens: int, decode_tokens: int) -> dict[str, list[KernelTime]]:
    """Return what each function that the library calls takes in ``prefill`` and ``decode``, read as by :func:`measure`.

    The most time comes first. Every call is watched from Python, which takes some microseconds that count to the caller
    of what is called. For a processor only: on a GPU a call returns before its kernel has run.
    """
    prompt, following = _text(session, prompt_tokens, decode_tokens)
    watch = _Watch()
    session.instrument(watch)
    sequence = session.add()
    session.prefill(sequence, prompt)
    prefill = watch.taken()
    for token in following:
        session.decode(sequence, token)
    session.remove(sequence)
    return {"prefill": prefill, "decode": watch.taken()}


class _Watch:
    """Adds up calls and seconds by function, of nested ones each its own seconds."""

    def __init__(self) -> None:
        self._found: dict[str, KernelTime] = {}
        self._open: list[list[float]] = []  # of each call under way: when it began, and the seconds of those within

    def __call__(self, name: str, begins: bool) -> None:
        if begins:
            self._open.append([time.perf_counter(), 0.0])
            return
        began, within = self._open.pop()
        whole = time.perf_counter() - began
        if self._open:
            self._open[-1][1] += whole
        entry = self._found.setdefault(name, {"name": name, "calls": 0, "seconds": 0.0})
        entry["calls"] += 1
        entry["seconds"] += whole - within

    def taken(self) -> list[KernelTime]:
        """Return what was added up since this was asked last."""
        found, self._found = self._found, {}
        rounded: list[KernelTime] = [{**each, "seconds": _digits(each["seconds"])} for each in found.values()]
        return sorted(rounded, key=lambda each: (-each["seconds"], each["name"]))


def _text(session: Session, prompt_tokens: int, decode_tokens: int) -> tuple[list[int], list[int]]:
    """Return the ids that are read at once, and those that are read after them one by one: fewer in a short context."""
    steps = max(1, min(decode_tokens, session.context_window // 2))
    length = max(1, min(prompt_tokens, session.context_window - steps))
    ids = [7919 * at % session.vocab_size for at in range(length + steps)]  # what the text is does not matter
    return ids[:length], ids[length:]


def _read(session: Session, prompt: Sequence[int], following: Sequence[int]) -> tuple[float, float]:
    """Return the seconds that a prompt takes, and what follows it."""
    sequence = session.add()
    began = time.perf_counter()
    session.prefill(sequence, prompt)
    read = time.perf_counter()
    for token in following:
        session.decode(sequence, token)
    ended = time.perf_counter()
    session.remove(sequence)
    return read - began, ended - read


def _rates(tokens: int, seconds: Sequence[float]) -> Speed:
    """Return tokens per second, of four digits: all that they mean."""
    rates = [tokens / each for each in seconds]
    return {
        "tokens": tokens,
        "rate": _digits(statistics.median(rates)),
        "lowest": _digits(min(rates)),
        "highest": _digits(max(rates)),
    }


def _digits(value: float) -> float:
    return float(f"{value:.4g}")
