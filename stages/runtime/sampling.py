"""From logits to a token: greedy, or drawn, with the settings of transformers' ``generate`` in its order.

The penalty comes first; then the temperature, ``top_k``, ``top_p`` and ``min_p``, each over what the one before left.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_TOP_K = 50  # what transformers takes where a checkpoint draws and does not say


@dataclass(frozen=True)
class Settings:
    """How tokens are picked; :class:`RequestError` for a value out of range.

    ``temperature`` 0 is greedy. ``top_k`` keeps the k likeliest tokens and those level with the last (0: all),
    ``top_p`` the likeliest up to that share of probability, the one that reaches it included, and ``min_p`` those at
    least that many times as likely as the likeliest. ``repetition_penalty`` divides the logits above 0 of every token
    that was read already, and multiplies those below.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature {self.temperature} is not a number from 0 (greedy) up")
        if self.top_k < 0:
            raise RequestError(f"top_k {self.top_k} is negative; 0 keeps every token")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise RequestError(f"min_p {self.min_p} is not from 0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise RequestError(f"repetition_penalty {self.repetition_penalty} is not a number above 0; 1 is none")

    def __str__(self) -> str:
        """Return the settings that change something: ``temperature 0.6, top_k 50``; ``greedy``."""
        greedy = self.temperature == 0
        texts = ["greedy" if greedy else f"temperature {self.temperature:g}"]
        drawn = {"top_k", "top_p", "min_p"}
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default and not (greedy and field.name in drawn):
                texts.append(f"{field.name} {value:g}")
        return ", ".join(texts)


def of_checkpoint(sampling: Mapping[str, float | bool]) -> dict[str, Any]:
    """Return as arguments of :class:`Settings` what transformers makes of a generation_config.json.

    ``sampling`` has its keys; without ``do_sample`` all but the penalty is idle there.
    """
    found = {key: sampling[key] for key in ("repetition_penalty",) if key in sampling}
    if sampling.get("do_sample"):
        found |= {"temperature": 1.0, "top_k": _TOP_K}
        found |= {key: sampling[key] for key in ("temperature", "top_k", "top_p", "min_p") if key in sampling}
    return found


class Sampler:
    """Picks tokens; the same seed, logits and settings give the same tokens.

    Ids from ``active_vocab_size`` on have no token and are never picked.
    """

    def __init__(self, active_vocab_size: int, settings: Settings | None = None, *, seed: int = 0) -> None:
        if seed < 0:
            raise RequestError(f"seed {seed} is negative")
        self.settings = settings or Settings()
        self._active = active_vocab_size
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: np.ndarray, before: Sequence[int] = ()) -> int:
        """Return the id picked from float32 ``logits`` [V] after the ids ``before``."""
        if self.settings.temperature == 0:
            return int(self._penalised(logits, before).argmax())
        candidates, weights = self.distribution(logits, before)
        edges = np.cumsum(weights)
        drawn = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(candidates[min(drawn, len(candidates) - 1)])

    def distribution(self, logits: np.ndarray, before: Sequence[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that may be drawn at a temperature above 0, likeliest first, and their weights in float64.

        A weight is the probability divided by that of the likeliest id.
        """
        settings, logits = self.settings, self._penalised(logits, before)
        ids = np.arange(len(logits))
        if 0 < settings.top_k < len(logits):
            ids = np.flatnonzero(logits >= np.partition(logits, -settings.top_k)[-settings.top_k])
        below = logits[ids].astype(np.float64) - logits.max()  # before dividing, which may overflow to minus infinity
        with np.errstate(over="ignore"):
            weights = np.exp(below / settings.temperature)
        order = _descending(logits[ids])
        order, weights = ids[order], weights[order]
        count = len(order)
        if settings.top_p < 1:
            share = np.cumsum(weights) / weights.sum()
            count = int(np.searchsorted(share, settings.top_p)) + 1
        if settings.min_p > 0:
            count = min(count, int(np.count_nonzero(weights >= settings.min_p)))
        return order[:count], weights[:count]

    def _penalised(self, logits: np.ndarray, before: Sequence[int]) -> np.ndarray:
        """Return the logits of ids that have a token, in float32 as transformers penalises them."""
        logits = logits[: self._active]
        penalty = np.float32(self.settings.repetition_penalty)
        if penalty == 1 or not before:
            return logits
        ids = np.asarray(before)
        ids = ids[ids < self._active]
        found = logits[ids]
        logits = logits.copy()
        logits[ids] = np.where(found < 0, found * penalty, found / penalty)
        return logits


def _descending(logits: np.ndarray) -> np.ndarray:
    """Return the order of float32 logits, the largest first, and of equal ones the first.

    A stable argsort of a large vocabulary takes as long as all else in a draw. So each logit becomes an integer, whose
    upper half falls as the float rises, and lower half is its place: plain sorting, which is faster, is stable then.
    """
    bits = logits.astype(np.float32).view(np.uint32)
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    keys = falling.astype(np.uint64) << np.uint64(32) | np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
