"""The ways in which one text can be read: each must give the logits that any other gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stages.runtime.session import Session

# The shortest prompt that can be cut into chunks, halves and thirds.
SHORTEST = 3


class Reading(NamedTuple):
    """A way to read: row i of what ``read`` returns, float32 [n, V], follows the token at the place ``after[i]``."""

    name: str
    after: Sequence[int]
    read: Callable[[Session], np.ndarray]


def readings(tokens: Sequence[int], prompt: int, sequences: int) -> list[Reading]:
    """Return the ways to read ``tokens``, of which the first ``prompt`` are read together.

    A ``prompt`` of fewer than :data:`SHORTEST` tokens is read in two ways; two ``sequences`` are needed for batches.
    """
    found = [
        Reading(
            "prefill, then decode",
            range(prompt - 1, len(tokens)),
            lambda session: read_along(session, tokens[:prompt], tokens[prompt:]),
        ),
        Reading(
            "every token scored",
            range(prompt - 1, len(tokens)),
            lambda session: score_all(session, tokens)[prompt - 1 :],
        ),
    ]
    if prompt >= SHORTEST:
        after = range(prompt - 1, min(prompt + 1, len(tokens)))
        found += [
            Reading("prefill in chunks", [prompt - 1], lambda session: _chunked(session, tokens, prompt)),
            Reading("tokens taken back", after, lambda session: _taken_back(session, tokens, prompt)),
        ]
    if prompt >= SHORTEST and sequences > 1:
        first, second = prompt // 2, prompt // 3
        rows = [first - 1, second - 1, first, second]
        found.append(Reading("two sequences at once", rows, lambda session: _batched(session, tokens, first, second)))
    return found


def read_along(session: Session, prompt: Sequence[int], then: Sequence[int]) -> np.ndarray:
    """Return the logits [1 + n, V] after ``prompt``, and after each of the n ids ``then`` decoded behind it."""
    sequence = session.add()
    rows = [session.prefill(sequence, prompt), *(session.decode(sequence, token) for token in then)]
    session.remove(sequence)
    return np.stack(rows)


def score_all(session: Session, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits [n, V] after each of ``tokens``, as many at once as the library gives."""
    sequence = session.add()
    rows = np.concatenate([*session.score(sequence, tokens)])
    session.remove(sequence)
    return rows


def _chunked(session: Session, tokens: Sequence[int], prompt: int) -> np.ndarray:
    sequence = session.add()
    # Uneven on purpose: the last chunk is shorter, and no chunk is a whole number of pages.
    row = session.prefill(sequence, tokens[:prompt], chunk=max(1, prompt // 3 + 1))
    session.remove(sequence)
    return row[None]


def _taken_back(session: Session, tokens: Sequence[int], prompt: int) -> np.ndarray:
    sequence = session.add()
    session.prefill(sequence, tokens[: prompt - 1])
    for token in tokens[: min(5, len(tokens) - prompt)]:  # a false start
        session.decode(sequence, token)
    session.popn(sequence, session.length(sequence) - (prompt - 1))
    rows = [session.decode(sequence, token) for token in tokens[prompt - 1 : prompt + 1]]
    session.remove(sequence)
    return np.stack(rows)


def _batched(session: Session, tokens: Sequence[int], first: int, second: int) -> np.ndarray:
    a, b = session.add(), session.add()
    if first + second <= session.prefill_chunk:
        read = session.batch_prefill({a: tokens[:first], b: tokens[:second]})
    else:
        read = np.stack([session.prefill(a, tokens[:first]), session.prefill(b, tokens[:second])])
    decoded = session.batch_decode({a: tokens[first], b: tokens[second]})
    session.remove(a)
    session.remove(b)
    return np.concatenate([read, decoded])
