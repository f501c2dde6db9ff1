"""From logits to a token: greedy, or drawn from the nucleus of the tempered distribution."""

from __future__ import annotations

import numpy as np

from stages.runtime.errors import RequestError


class Sampler:
    """Picks tokens; the same seed, logits and settings give the same tokens.

    ``temperature`` 0 is greedy. ``top_p`` keeps the most likely tokens up to that share of probability, the one that
    reaches it included. Ids from ``active_vocab_size`` on have no token and are never picked.
    """

    def __init__(self, active_vocab_size: int, *, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        if not 0 <= temperature < float("inf"):
            raise RequestError(f"temperature {temperature} is not a number from 0 (greedy) up")
        if not 0 < top_p <= 1:
            raise RequestError(f"top_p {top_p} is not above 0 and at most 1")
        if seed < 0:
            raise RequestError(f"seed {seed} is negative")
        self._active = active_vocab_size
        self._temperature = temperature
        self._top_p = top_p
        self._random = np.random.Generator(np.random.PCG64(seed))

    def pick(self, logits: np.ndarray) -> int:
        """Return the id picked from float32 ``logits`` [V]."""
        logits = logits[: self._active]
        if self._temperature == 0:
            return int(np.argmax(logits))
        below = logits.astype(np.float64) - logits.max()  # before dividing, which may overflow to minus infinity alone
        with np.errstate(over="ignore"):
            weights = np.exp(below / self._temperature)
        order = np.argsort(-weights, kind="stable")
        share = np.cumsum(weights[order]) / weights.sum()
        kept = order[: int(np.searchsorted(share, self._top_p)) + 1]
        edges = np.cumsum(weights[kept])
        drawn = int(np.searchsorted(edges, self._random.random() * edges[-1], side="right"))
        return int(kept[min(drawn, len(kept) - 1)])
