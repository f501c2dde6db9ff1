"""What a sequence holds: only what is new is read, and the logits are those of reading all of it."""

from __future__ import annotations

import numpy as np
import pytest

from stages.runtime import manifest
from stages.runtime.context import Context
from stages.runtime.errors import RequestError
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer


@pytest.fixture(scope="module")
def session(recorded):
    return Session(manifest.read(recorded.bundle), sequences=2)


TEXTS = [
    "The old lighthouse keeper",
    "The old lighthouse keeper walked slowly down",  # goes on
    "The old lighthouse was empty",  # goes back and on
    "The old",  # goes back
    "The old",  # the same
    "Every morning",  # has nothing in common
]


def test_every_prompt_has_the_logits_of_one_read_alone(session, recorded):
    tokenizer = BundleTokenizer(recorded.bundle)
    context = Context(session)
    try:
        for text in TEXTS:
            ids = tokenizer.encode(text)
            found = context.read(ids)
            assert context.ids == ids
            alone = Context(session)
            np.testing.assert_allclose(found, alone.read(ids), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(context.next(7), alone.next(7), rtol=1e-4, atol=1e-4)
            alone.close()
    finally:
        context.close()


class Recorder:
    """Stands for a session: notes what is asked of it; ``reach`` tokens can be taken back."""

    prefill_chunk, limit = 4, 20

    def __init__(self, reach=100):
        self.calls, self._reach = [], reach

    def add(self):
        self.calls.append("add")
        return 0

    def remove(self, sequence):
        self.calls.append("remove")

    def reach(self, sequence):
        return self._reach

    def popn(self, sequence, count):
        self.calls.append(("popn", count))

    def prefill(self, sequence, ids):
        self.calls.append(list(ids))
        return np.zeros(1)

    def decode(self, sequence, token):
        return np.zeros(1)


def test_only_what_follows_the_common_beginning_is_read():
    session = Recorder()
    context = Context(session)
    context.read([1, 2, 3, 4, 5, 6])
    context.next(7)
    context.read([1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert context.reused == 7
    context.read([1, 2, 3, 9])
    assert context.reused == 3
    context.read([1, 2, 3, 9])
    assert session.calls == ["add", [1, 2, 3, 4], [5, 6], [8, 9], ("popn", 6), [9], ("popn", 1), [9]]


def test_a_state_that_cannot_go_back_is_read_again():
    session = Recorder(reach=1)
    context = Context(session)
    context.read([1, 2, 3])
    context.read([1, 5])
    assert session.calls == ["add", [1, 2, 3], "remove", "add", [1, 5]]
    assert (context.ids, context.reused) == ([1, 5], 0)


def test_an_interrupt_between_chunks_leaves_what_was_read():
    session = Recorder()
    context = Context(session)
    assert context.read(list(range(10)), lambda: True) is None
    assert context.ids == [0, 1, 2, 3]
    assert context.read(list(range(10))) is not None
    assert session.calls == ["add", [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_prompt_that_is_too_long_is_said_with_both_numbers_and_changes_nothing():
    session = Recorder()
    context = Context(session)
    context.read([1, 2, 3])
    with pytest.raises(RequestError, match="the context holds 20 tokens and the prompt has 21"):
        context.read(list(range(21)))
    assert context.ids == [1, 2, 3]
