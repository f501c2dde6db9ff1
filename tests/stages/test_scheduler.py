"""Continuous batching on a model that only counts: what it answers tells whether each sequence held what it should."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
import pytest

from stages.runtime.sampling import Sampler, Settings
from stages.runtime.server.jobs import Job
from stages.runtime.server.prefixes import Prefixes
from stages.runtime.server.scheduler import Scheduler

VOCAB, PAGE, END = 97, 4, 0


def following(ids: Sequence[int]) -> int:
    """The token after ``ids``, which depends on all of them."""
    found = 7
    for token in ids:
        found = (31 * found + token + 1) % 1_000_003
    return found % VOCAB


def alone(prompt: Sequence[int], count: int) -> list[int]:
    """What a job answers that nothing disturbs: END ends it, and is no part."""
    ids = list(prompt)
    while len(ids) - len(prompt) < count and (token := following(ids)) != END:
        ids.append(token)
    return ids[len(prompt) :]


class Counting:
    """Sequences with pages as TVM's cache has them: forks share whole pages, and a page that nobody has is free.

    Without pages they are states of one place, as recurrent models have them: back over what was read one at a time.
    """

    prefill_chunk = 32

    def __init__(self, pages: int = 64, *, max_batch: int = 4, spare: int = 8, paged: bool = True) -> None:
        self.pages, self.max_batch, self.spare = pages, max_batch, spare
        self.page_size, self.verify_chunk = (PAGE, 12) if paged else (None, 0)
        self.reaches: dict[int, int] = {}
        self.ids: dict[int, list[int]] = {}
        self.tables: dict[int, list[int]] = {}
        self.references = [0] * pages
        self.read: list[int] = []  # tokens of each prefill
        self.rows = 0

    @property
    def free_pages(self) -> int:
        return self.references.count(0) if self.page_size else 0

    def add(self) -> int:
        number = next(n for n in range(10**6) if n not in self.ids)
        assert number < self.max_batch + self.spare, "more sequences than there is room for"
        self.ids[number], self.tables[number], self.reaches[number] = [], [], 0
        return number

    def reach(self, sequence: int) -> int:
        return self.reaches[sequence]

    def fork(self, sequence: int, length: int) -> int:
        back = len(self.ids[sequence]) - length
        if self.page_size is None:
            assert back <= self.reaches[sequence], "a state cannot go back so far"
        else:
            assert length % PAGE == 0, "a page would be copied"
        child = self.add()
        self.reaches[child] = self.reaches[sequence] - back
        self.ids[child] = self.ids[sequence][:length]
        assert len(self.ids[child]) == length
        self.tables[child] = self.tables[sequence][: length // PAGE]
        for page in self.tables[child]:
            self.references[page] += 1
        return child

    def remove(self, sequence: int) -> None:
        del self.ids[sequence]
        for page in self.tables.pop(sequence):
            self.references[page] -= 1

    def batch_prefill(self, requests: Mapping[int, Sequence[int]]) -> np.ndarray:
        assert sum(map(len, requests.values())) <= self.prefill_chunk
        self.read.append(sum(map(len, requests.values())))
        return self._forward(requests)

    def batch_decode(self, tokens: Mapping[int, int]) -> np.ndarray:
        return self._forward({sequence: [token] for sequence, token in tokens.items()})

    def batch_verify(self, requests: Mapping[int, Sequence[int]]) -> list[np.ndarray]:
        assert sum(map(len, requests.values())) <= self.verify_chunk
        return [
            np.concatenate([self._forward({sequence: [token]}) for token in ids]) for sequence, ids in requests.items()
        ]

    def popn(self, sequence: int, count: int) -> None:
        assert 0 < count < len(self.ids[sequence])
        del self.ids[sequence][-count:]
        while len(self.tables[sequence]) * PAGE - PAGE >= len(self.ids[sequence]):
            self.references[self.tables[sequence].pop()] -= 1

    def _forward(self, requests: Mapping[int, Sequence[int]]) -> np.ndarray:
        assert 0 < len(requests) <= self.max_batch
        self.rows = max(self.rows, len(requests))
        logits = np.zeros((len(requests), VOCAB), np.float32)
        for row, (sequence, ids) in zip(logits, requests.items(), strict=True):
            held = self.ids[sequence]
            held += ids
            self.reaches[sequence] = min(self.reaches[sequence] + 1, 15) if len(ids) == 1 else 0
            while self.page_size and len(self.tables[sequence]) * PAGE < len(held):
                page = self.references.index(0)  # ValueError: it was promised to too many
                self.references[page] = 1
                self.tables[sequence].append(page)
            row[following(held)] = 1
        return logits


class Asked:
    """A job that answers greedily, with what came of it."""

    def __init__(
        self, prompt: Sequence[int], count: int, leader: Job | None = None, rng: random.Random | None = None
    ) -> None:
        self.prompt, self.count, self.answer, self.rng = list(prompt), count, [], rng
        self.job = Job(list(prompt), self.take, leader=leader, draft=self.draft if rng else None)

    def draft(self, most: int) -> list[int]:
        """Guesses of which most are right."""
        most = min(most, self.rng.randrange(6), self.count - len(self.answer) - 1)
        ids = list(self.job.ids)
        for _ in range(most):
            ids.append(following(ids) if self.rng.random() < 0.7 else 5)
        return ids[len(self.job.ids) :]

    def take(self, logits: np.ndarray) -> int | None:
        token = int(np.argmax(logits))
        if token == END:
            return None
        self.answer.append(token)
        return None if len(self.answer) == self.count else token

    def right(self) -> bool:
        return self.answer == alone(self.prompt, self.count)


def drained(scheduler: Scheduler) -> None:
    for _ in range(100_000):
        if not scheduler.step():
            return
    raise AssertionError("it never ends")


@pytest.mark.parametrize("paged", [True, False])
def test_jobs_answer_as_if_each_were_alone(paged: bool) -> None:
    model = Counting(paged=paged)
    scheduler = Scheduler(model)
    asked = [Asked(range(1, 3 + 5 * n), 6 + n) for n in range(9)]
    for each in asked:
        scheduler.submit(each.job)
    drained(scheduler)
    assert all(each.right() and each.job.over for each in asked)
    assert model.rows == model.max_batch
    assert scheduler.step() is False


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_whatever_joins_leaves_and_shares(seed: int, paged: bool) -> None:
    """Prompts with common beginnings, calls off, and pages for only a few of them at a time."""
    rng = random.Random(seed)  # noqa: S311
    sizes = {"max_batch": rng.choice([1, 3, 4]), "spare": rng.choice([0, 2, 8]), "paged": paged}
    model = Counting(pages=rng.choice([20, 26, 64]), **sizes)
    scheduler = Scheduler(model, chunk=rng.choice([5, 16, 32]))
    systems = [[rng.randrange(1, VOCAB) for _ in range(rng.randrange(4, 30))] for _ in range(3)]
    asked: list[Asked] = []
    gone: set[Asked] = set()
    while len(asked) < 200 or scheduler.step():
        if len(asked) < 200 and rng.random() < 0.4:
            prompt = [*rng.choice(systems), *(rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 20)))]
            leader = asked[-1].job if asked and rng.random() < 0.2 else None
            guessing = rng if paged and rng.random() < 0.5 else None
            asked.append(Asked(prompt, rng.randrange(1, 80 - len(prompt)), leader, guessing))
            scheduler.submit(asked[-1].job)
        if asked and rng.random() < 0.05:
            each = rng.choice(asked)
            held = each.job.sequence
            scheduler.cancel(each.job)
            gone |= set() if each.right() else {each}
            assert held is None or held not in model.ids or each.right()
        scheduler.step()
    assert all(each.right() for each in asked if each not in gone)
    assert len(gone) < 60
    assert not paged or 0 < scheduler.accepted_tokens < scheduler.drafted_tokens
    assert scheduler.active == []
    assert model.ids.keys() == scheduler.prefixes._unused.keys()  # nothing is held that is not known
    while (sequence := scheduler.prefixes.oldest()) is not None:
        scheduler._forget(sequence)
    assert model.ids == {}
    if paged:
        assert model.free_pages == model.pages
        assert scheduler.prefixes._root.children == {}


def test_what_has_the_same_beginning_is_read_once() -> None:
    model = Counting()
    scheduler = Scheduler(model)
    system = list(range(1, 18))
    first = Asked([*system, 20, 21], 3)
    scheduler.submit(first.job)
    drained(scheduler)
    assert first.job.cached == 0
    read = sum(model.read)
    second = Asked([*system, 30, 31], 3)
    scheduler.submit(second.job)
    drained(scheduler)
    assert second.right()
    assert second.job.cached == 16, "whole pages of what both begin with"
    assert sum(model.read) - read == 19 - 16
    assert scheduler.cached_tokens == 16


def test_answers_to_one_prompt_wait_for_the_first_to_read_it() -> None:
    model = Counting()
    scheduler = Scheduler(model, chunk=8)
    first = Asked(range(1, 34), 4)
    others = [Asked(range(1, 34), 4, first.job) for _ in range(3)]
    for each in (first, *others):
        scheduler.submit(each.job)
    drained(scheduler)
    assert [each.job.cached for each in (first, *others)] == [0, 32, 32, 32]
    assert all(each.right() for each in (first, *others))


def test_a_state_is_kept_where_those_that_follow_begin() -> None:
    model = Counting(paged=False, spare=1)
    scheduler = Scheduler(model, chunk=8)
    first = Asked(range(1, 34), 40)
    others = [Asked(range(1, 34), 40, first.job) for _ in range(5)]
    for each in (first, *others):
        scheduler.submit(each.job)
    drained(scheduler)
    assert all(each.right() for each in (first, *others))
    assert [each.job.cached for each in (first, *others)][:4] == [0, 32, 32, 32], "rows for four at a time"
    assert len(model.ids) == 1


def test_a_state_goes_on_where_a_conversation_does_and_a_little_before() -> None:
    model = Counting(paged=False, spare=2)
    scheduler = Scheduler(model)

    def ask(prompt: list[int], count: int) -> Asked:
        each = Asked(prompt, count)
        scheduler.submit(each.job)
        drained(scheduler)
        assert each.right()
        return each

    first = ask(list(range(1, 21)), 10)
    said = [*first.prompt, *first.answer]
    assert ask([*said, 3, 4], 4).job.cached == len(said) - 1, "the last was not read"
    assert ask([*said[:25], 7, 8], 4).job.cached == 25
    assert ask([*said[:12], 7, 8], 4).job.cached == 0, "the prompt was read at once"


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_prompt_is_scored_once_whatever_was_read_before(paged: bool, length: int) -> None:
    """Also where the pages go in between."""
    model = Counting(pages=20, paged=paged)
    scheduler = Scheduler(model, chunk=16)
    prompt = [1 + at % (VOCAB - 1) for at in range(length)]
    heard: list[np.ndarray] = []
    before = Asked(prompt, 3)
    scheduler.submit(before.job)
    drained(scheduler)
    each, other = Asked(prompt, 5), Asked(range(1, 40), 30)
    each.job.score = heard.extend
    scheduler.submit(other.job)
    scheduler.submit(each.job)
    for _ in range(2):
        scheduler.step()
        if each.job in scheduler.active and not each.job.over and length == 40:
            scheduler._preempt()
    drained(scheduler)
    assert each.right()
    assert other.right()
    assert [int(np.argmax(row)) for row in heard] == [following(prompt[: at + 1]) for at in range(length - 1)]


def test_a_short_prompt_is_not_kept_by_a_long_one_and_decoding_goes_on() -> None:
    model = Counting(pages=200)
    scheduler = Scheduler(model, chunk=16)
    writing, long = Asked([5], 60), Asked([1 + n % 96 for n in range(400)], 2)
    scheduler.submit(writing.job)
    scheduler.step()
    scheduler.submit(long.job)
    scheduler.step()
    short = Asked([9, 8, 7, 6], 1)
    scheduler.submit(short.job)
    before = len(writing.answer)
    scheduler.step()
    scheduler.step()
    assert short.job.over
    assert len(writing.answer) == before + 2
    assert 0 < long.job.read < 400


def test_a_short_prompt_is_read_before_the_rest_of_a_long_one() -> None:
    model = Counting(pages=200)
    scheduler = Scheduler(model, chunk=16)
    scheduler.submit(Asked([1 + n % 96 for n in range(400)], 2).job)
    scheduler.step()
    short = Asked(range(1, 17), 1)
    scheduler.submit(short.job)
    scheduler.step()
    assert short.job.over, "it waits for the chunk under way alone"
    assert model.read == [16, 16]


def test_short_prompts_do_not_keep_a_long_one() -> None:
    model = Counting(pages=200)
    scheduler = Scheduler(model, chunk=16)
    long = Asked([1 + n % 96 for n in range(160)], 1)
    scheduler.submit(long.job)
    scheduler.step()
    for first in range(1, 20):
        scheduler.submit(Asked(range(first, first + 16), 1).job)
        scheduler.step()
    assert long.job.over
    assert long.right()


def test_without_pages_the_last_one_in_gives_way_and_reads_again() -> None:
    model = Counting(pages=12, max_batch=2)
    scheduler = Scheduler(model)
    first, second = Asked(range(1, 10), 38), Asked(range(40, 55), 30)
    assert (len(alone(first.prompt, 38)), len(alone(second.prompt, 30))) == (38, 30)
    scheduler.submit(first.job)
    scheduler.submit(second.job)
    drained(scheduler)
    assert first.right()
    assert second.right()
    assert scheduler.preemptions > 0


def test_guesses_that_are_right_save_steps_and_wrong_ones_change_nothing() -> None:
    model = Counting()
    scheduler = Scheduler(model)
    asked = Asked(range(1, 6), 12)
    answer = alone(asked.prompt, 12)
    asked.job.draft = lambda most: [*answer[len(asked.answer) :][:3], 0][:most] if len(asked.answer) < 8 else ()
    scheduler.submit(asked.job)
    drained(scheduler)
    assert asked.right()
    assert (asked.job.drafted, asked.job.accepted) == (8, 6)
    assert scheduler.steps == 1 + 2 + 3, "the prompt, twice three guesses and what follows them, three alone"


def test_what_is_drawn_with_guesses_has_the_distribution_of_the_model() -> None:
    """Two ids after one, drawn many times while the likeliest is guessed, against their exact probabilities."""
    table = np.random.default_rng(3).normal(size=(4, 4)).astype(np.float32)
    exact = np.exp(table) / np.exp(table).sum(axis=1, keepdims=True)

    class Markov(Counting):
        def _forward(self, requests: Mapping[int, Sequence[int]]) -> np.ndarray:
            super()._forward(requests)
            return np.array([table[ids[-1]] for ids in requests.values()])

    scheduler, counts, draws = Scheduler(Markov(spare=0)), np.zeros((4, 4, 4)), 6000
    for seed in range(draws):
        sampler, said = Sampler(4, Settings(temperature=1.0), seed=seed), [1]

        def take(logits: np.ndarray, sampler: Sampler = sampler, said: list[int] = said) -> int | None:
            said.append(sampler.pick(logits))
            return said[-1] if len(said) < 4 else None

        scheduler.submit(Job([1], take, draft=lambda most: [int(np.argmax(table[1]))] * 2))
        drained(scheduler)
        counts[tuple(said[1:])] += 1
    assert scheduler.accepted_tokens > draws / 4
    wanted = draws * exact[1][:, None, None] * exact[:, :, None] * exact[None]
    assert (np.abs(counts - wanted) < 4.5 * np.sqrt(wanted) + 1).all()


def test_calling_off_frees_pages_at_once() -> None:
    model = Counting()
    scheduler = Scheduler(model)
    asked = [Asked(range(n, n + 20), 30) for n in (1, 30)]
    for each in asked:
        scheduler.submit(each.job)
    scheduler.step()
    for each in asked:
        scheduler.cancel(each.job)
        scheduler.cancel(each.job)
    assert model.free_pages == model.pages
    assert not scheduler.step()


def test_no_more_are_kept_than_there_is_room_for() -> None:
    model = Counting(spare=2)
    scheduler = Scheduler(model)
    for first in (10, 20, 30, 40):
        scheduler.submit(Asked(range(first, first + 9), 2).job)
        drained(scheduler)
    assert len(model.ids) == 2
    assert scheduler.prefixes.longest(range(40, 49))[1] == 8, "the last ones"


def test_of_kept_beginnings_the_longest_unused_goes_first() -> None:
    prefixes = Prefixes(2)
    assert prefixes.release(1, [1, 2, 3, 4]) == []
    assert prefixes.release(2, [1, 2, 5, 6, 7]) == []
    assert prefixes.longest([1, 2, 3, 4, 9]) == (1, 4)
    assert prefixes.oldest() == 2
    assert prefixes.longest([1, 9]) == (None, 0)
    assert prefixes.release(3, [1, 2, 5, 6, 8, 8]) == [2], "3 holds all that 2 does in whole pages"
    assert prefixes.release(4, [1, 2]) == [4], "others hold that already"
    assert prefixes.release(5, [1]) == [5], "not a page"
    for sequence in (1, 3):
        prefixes.drop(sequence)
    assert prefixes.longest([1, 2, 3, 4]) == (None, 0)
