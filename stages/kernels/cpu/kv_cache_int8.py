"""Keys and values of the paged KV cache in 8 bits: of each head of a token integers of -127 to 127 and one scale.

The runtime makes pages, queries and outputs of one dtype and one width of heads. So it is told of heads of four floats:
of so many of keys that their room in a page is that of integers and scales, and of so many of queries that what comes
in is as long as queries, keys and values are. In a page, of keys or of values, come the integers of all heads, those of
a head's keys as [dim, 16] and of its values as [16, dim], then the scales [heads, 16]. What attention reads is rounded
as soon as it is turned, also where a chunk reads itself: so it does not matter in what chunks tokens are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T  # noqa: N812

from stages.kernels.cpu.byte_products import LARGEST
from stages.kernels.cpu.kv_cache import LANES, Heads
from stages.kernels.cpu.vectors import along, as_float, each_row, get, kernel, lanes_of, put, span, splat, total, vector
from stages.sizes import PAGE_SIZE as PAGE

WORD = 4  # integers in the room of a float
WIDTH = 4  # floats in a head that the runtime is told of; more leave more room unused, fewer take more log-sum-exps


@dataclass(frozen=True)
class _Packed:
    """The same memory as floats and as bytes."""

    floats: Any
    bytes: Any


@dataclass(frozen=True)
class Int8Heads(Heads):
    """Attention heads whose keys and values are kept in 8 bits."""

    @property
    def stored(self) -> tuple[int, int, int]:
        """What the runtime is told of queries, keys and channels."""
        keys = -(-(self._words + self.keys) // WIDTH)
        return (self.queries + 2 * self.keys) * self.dim // WIDTH - 2 * keys, keys, WIDTH

    @property
    def _words(self) -> int:
        """Floats in whose room the integers of a token are; its scales are behind them."""
        return self.keys * self.dim // WORD

    def qkv(self, made: Any, n: Any) -> Any:
        """Declare queries, keys and values of ``n`` tokens: [n, queries + 2 keys, dim]."""
        queries, keys, width = self.stored
        given = made.argument("qkv", (n, queries + 2 * keys, width), "float32")
        return made.view(given, (n, self.queries + 2 * self.keys, self.dim))

    def rows(self, made: Any, name: str, n: Any) -> Any:
        """Declare what ``n`` queries ask, or what attention answers: [n, queries, dim], with a gap after each row."""
        queries, _, width = self.stored
        given = made.argument(name, (n, queries, width), "float32")
        strides = [queries * width, self.dim, 1]
        return made.view(given, (n, self.queries, self.dim), strides=strides)

    def sums(self, made: Any, name: str, n: Any) -> Any:
        """Declare the log-sum-exp of ``n`` queries: [n, queries], with a gap after each row."""
        queries = self.stored[0]
        given = made.argument(name, (n, queries), "float32")
        return made.view(given, (n, self.queries), strides=[queries, 1])

    def tokens(self, made: Any, name: str, *n: Any) -> Any:
        """Declare the keys or the values of ``n`` tokens that are in no page: integers [keys, dim], scales [keys]."""
        _, keys, width = self.stored
        return _both(made, made.argument(name, (*n, keys, width), "float32"), (*n, keys * width))

    def pages(self, made: Any, count: Any) -> Any:
        """Declare the pages of a layer, ``count`` of them, which may begin inside a larger tensor."""
        _, keys, width = self.stored
        given = made.argument("pages", (count, 2, keys, PAGE, width), "float32", inside=True)
        return _both(made, given, (count, 2, keys * PAGE * width))

    def keep(self, tokens: Any, s: Any, head: Any, emit: Callable[[Any, Any, Any], None]) -> None:
        """Round a head of a token that ``emit(buffer, row, head)`` writes, and keep that in ``tokens``."""
        row, peak = T.alloc_buffer((1, 1, self.dim), "float32"), vector(LANES)
        emit(row, 0, 0)
        put(peak, splat(T.float32(1e-20), LANES), span(0, LANES))

        def magnitude(at: Any, lanes: int) -> None:
            put(peak, T.max(get(peak, lanes), T.fabs(row[0, 0, span(at, lanes)])), span(0, lanes))

        along(self.dim, LANES, magnitude)
        total(peak, LANES, T.max)
        factor = T.bind(T.float32(LARGEST) / peak[0])

        def codes(at: Any, lanes: int) -> None:
            whole = T.Cast(lanes_of("int32", lanes), T.nearbyint(row[0, 0, span(at, lanes)] * splat(factor, lanes)))
            put(tokens.bytes, T.Cast(lanes_of("int8", lanes), whole), s, span(head * self.dim + at, lanes))

        along(self.dim, LANES, codes)
        put(tokens.floats, peak[0] * T.float32(1 / LARGEST), s, self._words + head)

    def given(self, tokens: Any, s: Any, head: Any, start: Any, lanes: int) -> Any:
        """Return channels of a head of a token that is in no page."""
        codes = as_float(tokens.bytes[s, span(head * self.dim + start, lanes)], lanes)
        return codes * splat(tokens.floats[s, self._words + head], lanes)

    def page_keys(self, pages: Any, page: Any, head: Any, channel: Any) -> Any:
        """Return one channel of the keys of all tokens of a page."""
        codes = as_float(pages.bytes[_wide(page), 0, span(self._of_key(head, channel, 0), PAGE)], PAGE)
        return codes * pages.floats[_wide(page), 0, span(self._scale(head, 0), PAGE)]

    def page_value(self, pages: Any, page: Any, head: Any, token: Any, start: Any, lanes: int) -> Any:
        """Return channels of the value of a token of a page."""
        codes = as_float(pages.bytes[_wide(page), 1, span(self._of_value(head, token, start), lanes)], lanes)
        return codes * splat(pages.floats[_wide(page), 1, self._scale(head, token)], lanes)

    def append(self, pages: Any, page: Any, token: Any, head: Any, k: Any, v: Any, s: Any) -> None:
        """Emit what puts the key and the value of token ``s`` into a page."""
        for side, tokens, place in ((0, k, self._of_key), (1, v, self._of_value_channel)):
            with T.serial(0, self.dim) as d:
                put(pages.bytes, tokens.bytes[s, head * self.dim + d], _wide(page), side, place(head, d, token))
            put(pages.floats, tokens.floats[s, self._words + head], _wide(page), side, self._scale(head, token))

    def move(self, pages: Any, source: tuple[Any, Any], target: tuple[Any, Any], head: Any) -> None:
        """Emit what copies a token, (page, token), to another place."""
        (page, token), (to_page, to_token) = source, target
        for side, place in ((0, self._of_key), (1, self._of_value_channel)):
            with T.serial(0, self.dim) as d:
                code = pages.bytes[_wide(page), side, place(head, d, token)]
                put(pages.bytes, code, _wide(to_page), side, place(head, d, to_token))
            scale = pages.floats[_wide(page), side, self._scale(head, token)]
            put(pages.floats, scale, _wide(to_page), side, self._scale(head, to_token))

    def read_back(self, pages: Any, page: Any, token: Any, head: Any, k: Any, v: Any, at: tuple[Any, Any]) -> None:
        """Emit what copies a token out of its page to ``k`` and ``v``, which hold of each what ``tokens`` do."""
        for side, out, place in ((0, k, self._of_key), (1, v, self._of_value_channel)):
            with T.serial(0, self.dim) as d:
                put(out.bytes, pages.bytes[_wide(page), side, place(head, d, token)], *at, head * self.dim + d)
            put(out.floats, pages.floats[_wide(page), side, self._scale(head, token)], *at, self._words + head)

    def _of_key(self, head: Any, channel: Any, token: Any) -> Any:
        return (head * self.dim + channel) * PAGE + token

    def _of_value(self, head: Any, token: Any, channel: Any) -> Any:
        return (head * PAGE + token) * self.dim + channel

    def _of_value_channel(self, head: Any, channel: Any, token: Any) -> Any:
        return self._of_value(head, token, channel)

    def _scale(self, head: Any, token: Any) -> Any:
        return (self._words + head) * PAGE + token


def merge(heads: Int8Heads) -> tirx.PrimFunc:
    """Return the kernel of (output, lse, another output, its lse): the first two become those of both."""
    with kernel() as made:
        n = T.int32()
        output, lse = heads.rows(made, "output", n), heads.sums(made, "lse", n)
        other, other_lse = heads.rows(made, "other", n), heads.sums(made, "other_lse", n)

        def row(s: Any) -> None:
            with T.serial(0, heads.queries) as h:
                top = T.bind(T.max(lse[s, h], other_lse[s, h]))
                ours, theirs = (T.bind(T.exp2(each[s, h] - top)) for each in (lse, other_lse))
                both = T.bind(ours + theirs)
                share, rest = T.bind(ours / both), T.bind(theirs / both)

                def channels(at: Any, lanes: int) -> None:
                    kept = output[s, h, span(at, lanes)] * splat(share, lanes)
                    added = other[s, h, span(at, lanes)] * splat(rest, lanes)
                    put(output, kept + added, s, h, span(at, lanes))

                along(heads.dim, LANES, channels)
                put(lse, T.log2(both) + top, s, h)

        each_row(n, 4 * heads.queries * heads.dim, row)
    return made.function


def _both(made: Any, given: Any, shape: tuple[Any, ...]) -> _Packed:
    """Return ``given`` as floats of ``shape``, and as so many times more bytes."""
    offset = given.elem_offset
    more = (*shape[:-1], shape[-1] * WORD)
    floats = made.view(given, shape, elem_offset=offset)
    return _Packed(floats, made.view(given, more, "int8", elem_offset=offset * WORD))


def _wide(page: Any) -> Any:
    """Return a page's number as one whose product with the bytes of a page is not too large."""
    return T.Cast("int64", page)
