"""The state of a session's sequences on the device: a paged KV cache, a recurrent model's state, or both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from stages.runtime.documents import BundledModel

HISTORY = 16  # states a session keeps of each sequence, the newest among them


@dataclass(frozen=True)
class SessionState:
    """The library's objects that hold it, and what it allows.

    ``limit`` is the most tokens a sequence may have, None where none is. ``history`` is how many states are kept of
    a sequence, None where every token is. ``page`` is how many tokens share a page, None where there are no pages.
    """

    objects: tuple[Any, ...]
    limit: int | None
    history: int | None
    page: int | None

    def reach(self, before: int, count: int) -> int:
        """Return how many tokens can be taken back after ``count`` were read at once, where it was ``before``."""
        if self.history is None:
            return before + count
        # A state is kept per call: between the tokens of one call there is none to return to.
        return min(before + 1, self.history - 1) if count == 1 else 0


def create(
    functions: Any,
    shape: Callable[[list[int]], Any],
    model: BundledModel,
    sequences: int,
    *,
    spare: int = 0,
    tokens: int | None = None,
) -> SessionState:
    """Create the state that ``model`` (metadata's) asks for; ``functions`` are the library's, ``shape`` TVM's tuple.

    ``sequences`` are read at once, and ``spare`` more may be held; all have so many ``tokens`` together, None for a
    whole context each, but for those whose pages are shared.
    """
    kind = model.get("state", "kv")
    steps = [functions["create_rnn_state"](shape([sequences + spare]), shape([HISTORY]))] if kind != "kv" else []
    if kind == "rnn":
        return SessionState((*steps,), None, HISTORY, None)
    window, page = model["context_window"], model["page_size"]
    assert page, "the size of a page was checked with the manifest"
    whole = sequences + (spare if steps else 0)  # kept states have their own pages
    pages = whole * -(-window // page) if tokens is None else -(-tokens // page)
    sizes = (sequences, pages * page, model["prefill_chunk"], page, 0)
    cache = functions["create_tir_paged_kv_cache"](*(shape([size]) for size in sizes))
    return SessionState((cache, *steps), window, HISTORY if steps else None, None if steps else page)
