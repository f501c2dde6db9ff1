"""The single checks: each compares a function of a loaded bundle with a reference, or with its own steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stages.runtime.readings import read_along, readings, score_all
from stages.verification.tolerances import softmax_bound

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Sequence

    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer
    from stages.verification.reference import Continuation

PROBES = (
    "Hello, world! It's 2024; 1,234.56 reasons.",
    " two  spaces and a trailing one ",
    "tabs\tand\r\nlines\n\n",
    "你好，世界！今天天气怎么样？",
    "日本語のテキストと한국어",
    "naïve café e\u0301 \U0001f468\u200d\U0001f469\u200d\U0001f467",
)


# What the checks of text are called, and of the logits after every token.
TEXT, EVERY_STEP = "greedy text after", "every step"
CACHE = "KV cache"


@dataclass(frozen=True)
class Check:
    """One thing that was checked. ``measured`` and ``bound`` are relative differences where the check has numbers."""

    name: str
    ok: bool
    detail: str
    measured: float | None = None
    bound: float | None = None


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return max |found - wanted| over max |wanted|, of the worst row; infinite where anything is not finite.

    A row of zeros is met by zeros alone.
    """
    found, wanted = np.atleast_2d(found), np.atleast_2d(wanted)
    away, scale = np.abs(found - wanted).max(-1), np.abs(wanted).max(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        worst = np.where(away == 0, 0.0, away / scale)
    return float(worst.max()) if np.isfinite(worst).all() else math.inf


def compare(name: str, found: np.ndarray, wanted: np.ndarray, bound: float) -> Check:
    """Return the check that :func:`difference` is at most ``bound``."""
    measured = difference(found, wanted)
    return Check(name, measured <= bound, f"{measured:.2e}, at most {bound:.1e}", measured, bound)


def decode_all(session: Session, tokens: Sequence[int]) -> np.ndarray:
    """Return the logits [n, V] after each of ``tokens``, read one at a time."""
    return read_along(session, tokens[:1], tokens[1:])


def logits(
    session: Session, tokens: Sequence[int], prompt: int, decoded: np.ndarray, wanted: np.ndarray, bound: float
) -> list[Check]:
    """Read ``tokens`` in every way that the library offers; each must give the rows ``wanted`` [n, V].

    ``decoded`` are the rows after the ``prompt`` and after each token decoded behind it: the first of
    :func:`~stages.runtime.readings.readings`, which is not read again.
    """
    first, *others = readings(tokens, prompt, session.sequences)
    found = [(first, decoded), *((reading, reading.read(session)) for reading in others)]
    return [compare(reading.name, rows, wanted[list(reading.after)], bound) for reading, rows in found]


def read_greedily(
    session: Session, prompt: Sequence[int], length: int, active: int, stop: Collection[int] = ()
) -> tuple[list[int], np.ndarray]:
    """Return at most ``length`` ids that the bundle continues ``prompt`` with, and the logits [n, V] each was picked
    from. Picked are ids below ``active``; one of ``stop`` is the last.
    """
    sequence = session.add()
    rows, ids = [session.prefill(sequence, prompt)], []
    while True:
        ids.append(int(rows[-1][:active].argmax()))
        if len(ids) == length or ids[-1] in stop:
            break
        rows.append(session.decode(sequence, ids[-1]))
    session.remove(sequence)
    return ids, np.stack(rows)


def greedy(tokenizer: BundleTokenizer, rows: np.ndarray, wanted: Continuation, bound: float, *, exact: bool) -> Check:
    """Of ``rows`` [n, V], the bundle's logits before each of the ids of ``wanted``, those ids must be the greedy picks,
    and read as the text of ``wanted``.

    Without ``exact``, where the bundle's two candidates are within twice the tolerance of each other, either is right
    and the comparison ends there.
    """
    name = f"{TEXT} {wanted.prompt[-24:]!r}{wanted.note}"
    active = min(tokenizer.active_vocab_size, rows.shape[-1])
    for position, (logits, token) in enumerate(zip(rows, wanted.ids, strict=True)):
        picked = int(logits[:active].argmax())
        if picked != token:
            margin = float((logits[picked] - logits[token]) / np.abs(logits).max())
            ended = f"id {picked} instead of {token} at position {position}, by {margin:.1e} of the largest logit"
            tie = not exact and margin <= 2 * bound
            return Check(name, tie, f"a tie: {ended}" if tie else ended)
    text = tokenizer.decode([token for token in wanted.ids if token not in tokenizer.stop])
    if text != wanted.text:
        return Check(name, ok=False, detail=f"equal ids, but the text is {text!r} instead of {wanted.text!r}")
    return Check(name, ok=True, detail=f"{len(wanted.ids)} ids equal, text {text[:60]!r}")


def embedding(session: Session, tokens: Sequence[int], rows: Callable[[list[int]], np.ndarray]) -> Check:
    """``embed`` must return the held table's ``rows`` of the ids, float32 [n, h], in the compute dtype."""
    ids = sorted(set(tokens))[: session.prefill_chunk]
    found = session.embed(ids)
    wanted = rows(ids).astype(found.dtype)
    # One product may round differently in a compute dtype of float16; in float32 it is the same product.
    return compare("embed", found.astype(np.float32), wanted.astype(np.float32), 1e-3)


def softmax(session: Session, rows: np.ndarray) -> Check:
    """``softmax_with_temperature`` against numpy in float64, with a temperature of its own for each row."""
    rows = rows[: min(len(rows), session.max_batch)]
    temperature = np.linspace(0.7, 1.3, len(rows)).astype(np.float32)
    return probabilities(session.softmax(rows, temperature), rows, temperature)


def probabilities(found: np.ndarray, logits: np.ndarray, temperature: np.ndarray) -> Check:
    """Each of ``found`` float32 [n, V] is the probability of its own logit at its row's ``temperature`` [n], within
    :func:`~stages.verification.tolerances.softmax_bound` of that probability itself, the smallest included.
    """
    scaled = logits.astype(np.float64) / temperature[:, None]
    weights = np.exp(scaled - scaled.max(-1, keepdims=True))
    wanted = weights / weights.sum(-1, keepdims=True)
    bound = softmax_bound(logits.shape[-1], float(np.abs(scaled).max()))
    smallest = np.finfo(np.float32).tiny  # below it a float32 loses digits, or is zero
    away = np.maximum(np.abs(found - wanted) - smallest, 0) / np.maximum(wanted, smallest)
    measured = float(away.max()) if np.isfinite(away).all() else math.inf
    detail = f"relative error of a probability {measured:.1e}, at most {bound:.1e}"
    return Check("softmax_with_temperature", measured <= bound, detail, measured, bound)


def round_trip(tokenizer: BundleTokenizer, texts: Iterable[str]) -> Check:
    """Encoding and decoding gives the text back, in one piece and streamed id by id."""
    import unicodedata

    for text in texts:
        ids, wanted = tokenizer.encode(text), unicodedata.normalize("NFC", text)
        stream = tokenizer.stream()
        streamed = "".join([*(stream.step(token) for token in ids), stream.finish()])
        for how, found in (("decodes", tokenizer.decode(ids)), ("streams", streamed)):
            if found not in (text, wanted):
                return Check("tokenizer round trip", ok=False, detail=f"{text!r} {how} to {found!r}")
    return Check("tokenizer round trip", ok=True, detail="every text decodes to itself")


def mean_loss(rows: np.ndarray, tokens: Sequence[int]) -> float:
    """Return the mean negative log-likelihood in nats of ``tokens[1:]`` under ``rows`` [n, V]."""
    shifted = rows[: len(tokens) - 1].astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    chosen = shifted[np.arange(len(shifted)), list(tokens[1:])]
    return float((np.log(np.exp(shifted).sum(-1)) - chosen).mean())


def divergences(rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the divergence in nats [n] of the distributions of logits ``rows`` [n, V] from those of ``wanted``."""
    return np.array([_divergence(*pair) for pair in zip(rows, wanted, strict=True)])


def _divergence(row: np.ndarray, wanted: np.ndarray) -> float:
    found, reference = (logits.astype(np.float64) - logits.max() for logits in (row, wanted))
    found, reference = (logits - np.log(np.exp(logits).sum()) for logits in (found, reference))
    return float((np.exp(reference) * (reference - found)).sum())


def perplexity(rows: np.ndarray, wanted: np.ndarray, tokens: Sequence[int], bound: float) -> Check:
    """The perplexity of ``tokens`` under ``rows`` [n, V] exceeds that under the reference's, ``wanted``, by at most
    ``bound`` of it, and luck.

    Distributions at a divergence d move the logarithm of a token's probability by about sqrt(2 d), upwards or
    downwards, and the mean of n of them by 1 / sqrt(n) of that; three times as much is luck.
    """
    luck = 3 * math.sqrt(2 * max(0.0, float(divergences(rows, wanted).mean())) / max(1, len(tokens) - 1))
    bound += luck if math.isfinite(luck) else 0.0
    found, reference = mean_loss(rows, tokens), mean_loss(wanted, tokens)
    with np.errstate(over="ignore"):
        more, each, other = (float(value) for value in (np.expm1(found - reference), np.exp(found), np.exp(reference)))
    detail = f"{each:.4f}, the reference {other:.4f}: {more:+.2%}, at most {bound:+.1%}"
    return Check("perplexity of the prompt", more <= bound, detail, more, bound)


def disorder_loss(session: Session, ids: Sequence[int], active_vocab_size: int) -> float:
    """Return the mean loss of ``ids`` under one fixed permutation of the vocabulary."""
    size = min(active_vocab_size, session.vocab_size)
    table = np.random.default_rng(22).permutation(size)
    disorder = [int(table[token]) for token in ids]
    return mean_loss(score_all(session, disorder), disorder)
