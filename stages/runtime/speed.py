"""How fast a bundle runs on the machine at hand: tokens read and written a second, the median of several repeats."""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

from stages.runtime.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.documents import Speed
    from stages.runtime.manifest import Manifest


def measure(
    bundle: Manifest,
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
    session = Session(bundle)
    steps = max(1, min(decode_tokens, session.context_window // 2))
    length = max(1, min(prompt_tokens, session.context_window - steps))
    ids = [7919 * at % session.vocab_size for at in range(length + steps)]  # what the text is does not matter
    times: list[tuple[float, float]] = []
    for done in range(repeats + 1):
        times.append(_read(session, ids[:length], ids[length:]))
        progress(done + 1)
    prefill, decode = zip(*times[1:], strict=True)
    return {"prefill": _rates(length, prefill), "decode": {**_rates(steps, decode), "after": length}}


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
