"""The KV cache in 8 bits: its kernels against numpy on keys and values that numpy rounded, and a model that uses it."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from stages.kernels.cpu import attention, kv_cache, kv_cache_int8
from stages.kernels.cpu.kv_cache_int8 import Int8Heads
from stages.sizes import PAGE_SIZE as PAGE
from tests.stages.test_lowering_cpu import V3, compiled
from tests.stages.test_lowering_passes import random

HEADS = Int8Heads(6, 2, 32)
QUERIES, KEYS, WIDTH = HEADS.stored
SCALE = 0.3


def rounded(x):
    """Return ``x`` [.., dim] as integers of -127 to 127 times a scale, in float64."""
    peak = np.abs(x).max(-1, keepdims=True).astype(np.float64)
    return np.rint(x / peak * 127) * peak / 127


def turned(x, frequencies):
    """Return heads ``x`` [n, h, d] turned by their positions, the halves of a head against each other."""
    angles = np.arange(len(x))[:, None] * frequencies
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    low, high = np.split(x.astype(np.float64), 2, -1)
    return np.concatenate([low * c - high * s, high * c + low * s], -1)


def attended(q, k, v, visible):
    """Return softmax(q k) v of float64 q [n, 6, d], k and v [m, 2, d], where ``visible`` [n, m]."""
    k, v = (np.repeat(each, HEADS.group, 1) for each in (k, v))
    scores = np.where(visible, np.einsum("qhd,khd->hqk", q, k) * SCALE, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)


class Cache:
    """The kernels, and what they leave of ``n`` tokens, whose pages lie in no order."""

    def __init__(self, n, window=0):
        self.n, self.frequencies = n, np.float32(0.3) ** np.arange(16, dtype=np.float32)
        self.kernels = {
            "rope": lambda: kv_cache.rope(HEADS, 64, 32, 1.0),
            "append": lambda: kv_cache.append(HEADS),
            "copy": lambda: kv_cache.copy_page(HEADS),
            "move": lambda: kv_cache.move_tokens(HEADS),
            "back": lambda: kv_cache.read_back(HEADS, 1),
            "decode": lambda: attention.decode(HEADS, 32, window),
            "prefill": lambda: attention.prefill(HEADS, 32, window),
            "ragged": lambda: attention.prefill_ragged(HEADS, 32),
            "merge": lambda: kv_cache_int8.merge(HEADS),
        }
        self.qkv = random(n, 6 + 2 * 2, 32)
        self.q, self.k, self.v = (self.empty(count) for count in (QUERIES, KEYS, KEYS))
        positions = np.arange(n, dtype=np.int32)
        cut = self.qkv.reshape(n, QUERIES + 2 * KEYS, WIDTH)
        self.call("rope", cut, positions, self.q, self.k, self.v, self.frequencies)
        self.pages = tvm.runtime.tensor(np.full((3, 2, KEYS, PAGE, WIDTH), np.nan, np.float32))
        self.order = np.array([2, 0], np.int32)
        self.places = self.order[positions // PAGE] * PAGE + positions % PAGE

    def empty(self, count):
        return tvm.runtime.tensor(np.full((self.n, count, WIDTH), np.nan, np.float32))

    def call(self, name, *arguments):
        given = [tvm.runtime.tensor(each) if isinstance(each, np.ndarray) else each for each in arguments]
        compiled(V3, **{name: self.kernels[name]()})[name](*given)

    def wanted(self):
        """Return q, k and v as numpy has them: turned, then rounded."""
        q, k, v = np.split(self.qkv, [6, 8], 1)
        return turned(q, self.frequencies), rounded(turned(k, self.frequencies)), rounded(v)

    def append(self, count):
        keys, values = (tvm.runtime.tensor(each.numpy()[:count]) for each in (self.k, self.v))
        self.call("append", self.pages, keys, values, self.places[:count])

    def answered(self, output):
        return output.numpy().reshape(len(output.numpy()), -1)[:, : 6 * 32].reshape(-1, 6, 32)

    def table(self, count):
        used = -(-count // PAGE)
        numbers = [0, used], self.order[:used], [count - (used - 1) * PAGE], [0]
        return [np.array(each, np.int32) for each in numbers]


@pytest.mark.parametrize("window", [0, 7])
def test_attention_over_the_cache_is_that_over_rounded_keys_and_values(window):
    cache = Cache(20, window)
    q, k, v = cache.wanted()
    cache.append(20)
    seen = np.arange(20) >= 20 - window if window else np.full(20, True)
    last, lse = tvm.runtime.tensor(cache.q.numpy()[-1:]), tvm.runtime.tensor(np.empty((1, QUERIES), np.float32))
    output = tvm.runtime.tensor(np.empty((1, QUERIES, WIDTH), np.float32))
    at = np.array([19], np.int32)
    cache.call("decode", last, cache.pages, *cache.table(20), at, output, lse, 0, 1.0, 1.0, SCALE)
    assert np.abs(cache.answered(output) - attended(q[-1:], k, v, seen[None])).max() < 1e-5


def test_a_chunk_behind_others_reads_itself_as_it_reads_the_cache():
    """Its queries read the pages, then one another, and both are merged: as if all had been read at once."""
    cache, first = Cache(30), 18
    q, k, v = cache.wanted()
    cache.append(first)
    n = 30 - first
    queries, keys, values = (tvm.runtime.tensor(each.numpy()[first:]) for each in (cache.q, cache.k, cache.v))
    output, other = (tvm.runtime.tensor(np.empty((n, QUERIES, WIDTH), np.float32)) for _ in range(2))
    lse, other_lse = (tvm.runtime.tensor(np.empty((n, QUERIES), np.float32)) for _ in range(2))
    starts, positions = np.array([0, n], np.int32), np.arange(first, 30, dtype=np.int32)
    rotary = 0, 1.0, 1.0, SCALE
    begins = positions[:1].copy()
    cache.call("ragged", queries, starts, keys, values, starts, positions, begins, output, lse, 1, *rotary)
    cache.call("prefill", queries, starts, cache.pages, *cache.table(first), positions, other, other_lse, 0, *rotary)
    cache.call("merge", output, lse, other, other_lse)
    wanted = attended(q[first:], k, v, np.tril(np.ones((30, 30), bool))[first:])
    assert np.abs(cache.answered(output) - wanted).max() < 1e-5


def test_tokens_keep_their_bits_in_other_places():
    cache = Cache(20)
    cache.append(20)
    kept = slice(0, 2 * 32 // 4 + 2)  # integers of both heads, then their scales

    def at(places):
        k, v = (tvm.runtime.tensor(np.zeros((1, len(places), KEYS, WIDTH), np.float32)) for _ in range(2))
        cache.call("back", cache.pages, np.array(places, np.int32), k, v, 0)
        return [each.numpy()[0].reshape(len(places), -1)[:, kept].view(np.int32) for each in (k, v)]

    given = [each.numpy().reshape(20, -1)[:, kept].view(np.int32) for each in (cache.k, cache.v)]
    assert all(map(np.array_equal, at(cache.places), given))
    cache.call("copy", cache.pages, 2, 1, 5)
    assert all(map(np.array_equal, at(range(PAGE, PAGE + 5)), (each[:5] for each in given)))
    moves = np.array([cache.places[[17, 3]], [30, 31]], np.int32)
    cache.call("move", cache.pages, np.array([0, 2], np.int32), moves, 1)
    assert all(map(np.array_equal, at([30, 31]), (each[[17, 3]] for each in given)))


@pytest.mark.parametrize(("heads", "dim"), [((9, 3), 64), ((32, 8), 128), ((1, 1), 16), ((6, 2), 48)])
def test_a_cache_takes_a_byte_for_a_channel_and_a_float_for_a_head(heads, dim):
    queries, keys, width = Int8Heads(*heads, dim).stored
    assert 0 <= 4 * keys * width - heads[1] * (dim + 4) < 4 * width
    assert (queries + 2 * keys) * width == (heads[0] + 2 * heads[1]) * dim
    assert queries * width >= heads[0] * dim
