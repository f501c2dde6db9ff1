"""The baseline that the example model has to beat: an interpolated n-gram model with modified Kneser-Ney smoothing.

Chen and Goodman (1998), "An empirical study of smoothing techniques for language modeling", section 3; discounts are
estimated from counts of counts, the lowest order is interpolated with the uniform distribution over all tokens.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict

Context = tuple[int, ...]


class KneserNey:
    """Token probabilities of all orders up to `order`, learnt from documents of token ids."""

    def __init__(self, documents: list[list[int]], order: int, vocab_size: int) -> None:
        self.order = order
        self.vocab_size = vocab_size
        self.tables = [self._table(documents, n) for n in range(1, order + 1)]

    def _table(self, documents: list[list[int]], order: int) -> tuple[dict[Context, Counter[int]], list[float]]:
        """Return counts by context (for lower orders: how many tokens precede) and the discounts for 1, 2 and more."""
        counts: dict[Context, Counter[int]] = defaultdict(Counter)
        if order == self.order:
            for padded in map(self._pad, documents):
                for i in range(self.order - 1, len(padded)):
                    counts[tuple(padded[i - order + 1 : i])][padded[i]] += 1
        else:
            seen = {
                tuple(padded[i - order : i + 1])
                for padded in map(self._pad, documents)
                for i in range(self.order - 1, len(padded))
            }
            for gram in seen:
                counts[gram[1:-1]][gram[-1]] += 1
        n = Counter(count for following in counts.values() for count in following.values())
        y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0  # without rare events nothing is to be discounted
        return counts, [0.0, *(k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in (1, 2, 3))]

    def _pad(self, document: list[int]) -> list[int]:
        """Return the document behind as many end-of-text tokens as the highest order looks back."""
        return [document[-1]] * (self.order - 1) + document

    def probability(self, context: Context, token: int) -> float:
        """Return the interpolated probability of a token behind a context of at most order - 1 tokens."""
        value = 1.0 / self.vocab_size
        for n, (counts, discounts) in enumerate(self.tables, start=1):
            following = counts.get(context[len(context) - n + 1 :])
            if following is None:
                break
            total = following.total()
            count = following[token]
            kept = max(count - discounts[min(count, 3)], 0.0)
            freed = sum(discounts[min(c, 3)] for c in following.values())
            value = (kept + freed * value) / total
        return value

    def perplexity(self, documents: list[list[int]]) -> float:
        """Return the perplexity per token over whole documents, each begun behind end-of-text."""
        loss, tokens = 0.0, 0
        for document in documents:
            padded = self._pad(document)
            for i in range(self.order - 1, len(padded)):
                loss -= math.log(self.probability(tuple(padded[i - self.order + 1 : i]), padded[i]))
            tokens += len(document)
        return math.exp(loss / tokens)
