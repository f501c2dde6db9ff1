"""The library called otherwise than docs/abi.md says: an error each time, and no wrong logits after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from stages.runtime import manifest
from stages.runtime.session import Session

IDS = [1 + i % 50 for i in range(40)]


class Library:
    """The exported functions, called as a foreign runtime does."""

    def __init__(self, session: Session) -> None:
        self.vm, self.params, self.model = session._vm, session._params, session.manifest.model
        self.tvm = session._tvm
        self.expected = self.prefill(self.cache(), IDS)

    def shape(self, *sizes: int) -> Any:
        return self.tvm.runtime.ShapeTuple(sizes)

    def tensor(self, values: Any) -> Any:
        return self.tvm.runtime.tensor(np.ascontiguousarray(values))

    def cache(self, sequences: int = 1, **other: int) -> Any:
        """Return a cache with so many sequences in it; sizes are those of the metadata unless ``other`` says so."""
        model = self.model
        sizes = {
            "batch": max(sequences, model["max_batch"]), "tokens": 16 * model["context_window"],
            "chunk": model["prefill_chunk"], "page": model["page_size"], "sliding": 0,
        }  # fmt: skip
        cache = self.vm["create_tir_paged_kv_cache"](*(self.shape(size) for size in {**sizes, **other}.values()))
        for sequence in range(sequences):
            self.call(cache, "add_sequence", sequence)
        return cache

    def call(self, cache: Any, name: str, *arguments: Any) -> Any:
        return self.tvm.get_global_func(f"vm.builtin.kv_state_{name}")(cache, *arguments)

    def states(self, ids: Sequence[int], *shape: int) -> Any:
        rows = self.vm["embed"](self.tensor(np.array(ids, np.int32)), self.params).numpy()
        return self.tensor(rows.reshape(*shape, rows.shape[-1]))

    def prefill(self, cache: Any, ids: Sequence[int], said: int | None = None) -> np.ndarray:
        self.call(cache, "begin_forward", self.shape(0), self.shape(len(ids) if said is None else said))
        logits, _ = self.vm["prefill"](self.states(ids, 1, len(ids)), cache, self.params)
        self.call(cache, "end_forward")
        return logits.numpy()[0, 0]

    def decode(self, cache: Any, count: int) -> np.ndarray:
        self.call(cache, "begin_forward", self.shape(*range(count)), self.shape(*[1] * count))
        logits, _ = self.vm["batch_decode"](self.states([5] * count, count, 1), cache, self.params)
        self.call(cache, "end_forward")
        return logits.numpy()[:, 0]


@pytest.fixture(scope="module")
def library(recorded):
    return Library(Session(manifest.read(recorded.bundle)))


def too_many_in_a_chunk(library: Library) -> None:
    library.prefill(library.cache(chunk=2 * library.model["prefill_chunk"]), [1] * (library.model["prefill_chunk"] + 1))


def too_many_rows_of_logits(library: Library) -> None:
    count = library.model["max_batch"] + 1
    logits = np.zeros((count, 1, library.model["vocab_size"]), np.float32)
    library.vm["softmax_with_temperature"](library.tensor(logits), library.tensor(np.ones(count, np.float32)))


def states_of_another_dtype(library: Library) -> None:
    cache, width = library.cache(), library.model["hidden_size"]
    library.call(cache, "begin_forward", library.shape(0), library.shape(4))
    library.vm["prefill"](library.tensor(np.zeros((1, 4, width), np.float16)), cache, library.params)


def a_parameter_too_few(library: Library) -> None:
    cache = library.cache()
    library.call(cache, "begin_forward", library.shape(0), library.shape(4))
    library.vm["prefill"](library.states([1] * 4, 1, 4), cache, list(library.params)[:-1])


MISUSES = {
    "pages of 8": (lambda it: it.prefill(it.cache(page=8), IDS), "tir_kv_cache_transpose_append|page"),
    "pages of 17": (lambda it: it.prefill(it.cache(page=17), IDS), "tir_kv_cache_transpose_append|page"),
    "pages of 32": (lambda it: it.prefill(it.cache(page=32), IDS), "tir_kv_cache_transpose_append|page"),
    "pages of less than nothing": (lambda it: it.cache(page=-16), "bad_alloc"),
    "a chunk beyond prefill_chunk": (too_many_in_a_chunk, "storage allocation failure"),
    "a chunk beyond the cache's": (lambda it: it.prefill(it.cache(chunk=8), IDS), "View with shape"),
    "rows of logits beyond max_batch": (too_many_rows_of_logits, "storage allocation failure"),
    "tokens beyond the cache's": (lambda it: it.prefill(it.cache(tokens=16), IDS), "The KV cache is full"),
    "fewer rows than were announced": (lambda it: it.prefill(it.cache(), IDS[:10], said=40), "total_seq_length"),
    "a sequence that was not added": (lambda it: it.prefill(it.cache(0), IDS), "cannot be found"),
    "tokens of less than nothing": (lambda it: it.prefill(it.cache(), IDS, said=-5), "not allowed"),
    "states of another dtype": (states_of_another_dtype, "expect Tensor with dtype"),
    "a parameter too few": (a_parameter_too_few, "packed_params"),
}


@pytest.mark.parametrize(("misuse", "says"), MISUSES.values(), ids=MISUSES)
def test_what_the_library_was_not_built_for_is_an_error_and_changes_nothing(library, misuse, says):
    with pytest.raises((ValueError, RuntimeError, TypeError, library.tvm.error.InternalError), match=says):
        misuse(library)
    assert np.array_equal(library.prefill(library.cache(), IDS), library.expected)


def test_more_sequences_than_the_cache_was_made_for_are_read_right(library):
    """The cache grows its tables; the library's own limit is max_batch."""
    count = library.model["max_batch"]
    small, large = library.cache(count, batch=1), library.cache(count)
    for _ in range(20):
        found, expected = library.decode(small, count), library.decode(large, count)
    assert np.array_equal(found, expected)


def test_sequences_beyond_max_batch_are_read_right_or_refused(library):
    """Memory is planned for max_batch; what it has to spare may take a few more."""
    one = library.decode(library.cache(1), 1)[0]
    for count in range(library.model["max_batch"] + 1, 64):
        try:
            found = library.decode(library.cache(count), count)
        except library.tvm.error.InternalError as error:
            said = str(error)
            break
        assert np.abs(found - one).max() < 1e-5 * np.abs(one).max()
    else:
        pytest.fail("64 sequences are taken")
    assert "storage allocation failure" in said
    assert np.array_equal(library.prefill(library.cache(), IDS), library.expected)
