"""Continuous batching: chooses which tokens of which jobs the model reads next, and preempts jobs if pages run out.

A step decodes one token of every job that is ready for one, then reads a chunk of the prompts that are still being
read. Steps take turns: one reads the prompts with the least left first, so that a short one does not wait for a long
one, the next one the prompt that was passed over, so that short ones cannot keep it waiting. Jobs join and leave
between steps. Nothing here knows of threads, sockets, text or time: its caller calls :meth:`Scheduler.step` while
there are jobs.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING

from stages.runtime.server.prefixes import Prefixes
from stages.runtime.server.snapshots import Snapshots

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from stages.runtime.server.jobs import Job, JobModel

CHUNK = 64  # tokens of prompts in one step, which decoding and a prompt that has just come wait for


class Scheduler:
    """Drives the jobs of one ``model``.

    ``waiting`` are those that have no sequence, ``active`` those that have, in the order in which they were let in; the
    counters say what happened since the beginning.
    """

    def __init__(self, model: JobModel, *, chunk: int = CHUNK) -> None:
        self._model = model
        self._chunk = min(chunk, model.prefill_chunk)
        self._passed: Job | None = None  # whose prompt came first, and was not read in the last step
        self.waiting: deque[Job] = deque()
        self.active: list[Job] = []
        self._stateful = model.page_size is None
        self.prefixes: Prefixes | Snapshots = Snapshots(model.reach) if self._stateful else Prefixes(model.page_size)
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = self.preemptions = self.steps = 0
        self.drafted_tokens = self.accepted_tokens = 0

    def submit(self, job: Job) -> None:
        """Queue a job; the pages of all must hold its longest form alone, which is for the caller to see to."""
        self.waiting.append(job)

    def cancel(self, job: Job) -> None:
        """Forget a job, and free its pages at once."""
        if job.over:
            return
        job.over = True
        if job.sequence is None:
            self.waiting.remove(job)
        else:
            self._leave(job)

    def step(self) -> bool:
        """Do one step; False if there was nothing to do."""
        self._admit()
        if not self.active:
            return False
        self.steps += 1
        ready = [job for job in self.active if job.pending == 1]
        for job in ready:
            if self._leads(job) and 0 < job.read < job.prompt:
                self._share(job)
        if drafts := self._drafts(ready):
            self._verify(ready, drafts)
        else:
            self._read([(job, 1) for job in ready], self._decode)
        shares = self._shares()
        scoring = bool(shares) and shares[0][0].scores
        self._read(shares, functools.partial(self._score, shares[0][0]) if scoring else self._model.batch_prefill)
        return True

    # Who is read

    def _admit(self) -> None:
        """Let jobs in, first come first served, for as long as there are rows, and pages for all of their ids."""
        while len(self.active) < self._model.max_batch:
            job = next((job for job in self.waiting if not job.follows), None)
            if job is None:
                return
            self._begin(job)
            promised = sum(self._pages(other, other.pending) for other in self.active)
            if not self._free(promised + self._pages(job, job.pending)):
                self._drop(job)
                return
            self.waiting.remove(job)
            self.active.append(job)
            self.prompt_tokens += 0 if job.begun else job.prompt
            if not job.begun:
                job.begun, job.cached = True, job.read
                self.cached_tokens += job.cached

    def _begin(self, job: Job) -> None:
        """Give a job a sequence, with as many of its ids as another one holds; the last must be read for its logits."""
        source, length = (None, 0) if job.scores else self.prefixes.longest(job.ids[:-1])
        if source is None:
            job.sequence, job.read = self._model.add(), 0
        else:
            job.sequence, job.read = self._model.fork(source, length), length

    def _shares(self) -> list[tuple[Job, int]]:
        """Return which prompts are read in this step, and how many ids of each.

        Whole ones, the shortest first, as many as fit a chunk; one that is longer alone, and so is one that is scored,
        in parts that give the logits after each id. The one that came first of all is next wherever it was passed over.
        """
        reading = [job for job in self.active if job.pending > 1]
        if not reading:
            return []
        first = reading[0]
        order = [first] if first is self._passed else sorted(reading, key=lambda job: job.pending)
        left = self._chunk
        chosen: list[tuple[Job, int]] = []
        if order[0].scores:
            chosen, left = [(order[0], min(order[0].pending - 1, self._model.verify_chunk or 1))], 0
        for job in order if left else ():
            if job.scores or (chosen and job.pending > left):
                break
            chosen.append((job, min(job.pending - self._leads(job), left)))
            left -= chosen[-1][1]
            if not left:
                break
        self._passed = None if any(job is first for job, _ in chosen) else first
        return chosen

    def _read(self, work: Sequence[tuple[Job, int]], read: Callable[[dict[int, list[int]]], np.ndarray]) -> None:
        """Read so many ids of each of these jobs in one pass, where pages can be had for them."""
        enough = self._free(sum(self._pages(job, count) for job, count in work))
        remaining = [*work] if enough else []
        for job, count in () if enough else work:
            while job.sequence is not None and not self._free(
                sum(self._pages(other, many) for other, many in [*remaining, (job, count)])
            ):
                self._preempt()
                remaining = [(other, many) for other, many in remaining if other.sequence is not None]
            if job.sequence is not None:
                remaining.append((job, count))
        if not remaining:
            return
        parts = {}
        for job, count in remaining:
            assert job.sequence is not None
            parts[job.sequence] = job.ids[job.read : job.read + count]
        rows = read(parts)
        for (job, count), logits in zip(remaining, rows, strict=True):
            job.read += count
            if not job.pending:
                self._took(job, job.take(logits))

    def _score(self, job: Job, parts: dict[int, list[int]]) -> np.ndarray:
        """Read ids of a prompt and tell the job the logits after each; those that it was told before are left out."""
        assert job.score is not None
        rows = self._model.batch_verify(parts)[0] if self._model.verify_chunk else self._decode(parts)
        fresh = rows[max(0, job.scored - job.read) :]
        job.scored += len(fresh)
        job.score([*fresh])
        return rows[-1:]

    def _decode(self, parts: dict[int, list[int]]) -> np.ndarray:
        return self._model.batch_decode({sequence: ids[0] for sequence, ids in parts.items()})

    # What is guessed

    def _drafts(self, ready: Sequence[Job]) -> dict[Job, list[int]]:
        """Return what may follow the newest ids of jobs: no more than the model verifies at once, or has pages for."""
        left, found = self._model.verify_chunk - len(ready), {}
        for job in ready:
            draft = [*job.draft(left)] if job.draft is not None and left > 0 else []
            if draft:
                found[job] = draft
                left -= len(draft)
        if found and not self._free(sum(self._pages(job, 1 + len(found.get(job, ()))) for job in ready)):
            return {}
        return found

    def _verify(self, ready: Sequence[Job], drafts: Mapping[Job, list[int]]) -> None:
        """Read the newest id of each job and what may follow it, and keep of that what the job picks by itself."""
        parts = {}
        for job in ready:
            assert job.sequence is not None
            parts[job.sequence] = [*job.ids[job.read :], *drafts.get(job, ())]
        for job, rows in zip(ready, self._model.batch_verify(parts), strict=True):
            draft = drafts.get(job, [])
            right = self._accept(job, draft, rows)
            job.drafted, job.accepted = job.drafted + len(draft), job.accepted + right
            self.drafted_tokens, self.accepted_tokens = self.drafted_tokens + len(draft), self.accepted_tokens + right

    def _accept(self, job: Job, draft: Sequence[int], rows: np.ndarray) -> int:
        """Let a job pick after each id that it has, or that was guessed as it picks; how many guesses were right."""
        assert job.sequence is not None
        for place, logits in enumerate(rows):
            job.read += 1
            token = job.take(logits)
            right = place < len(draft) and token == draft[place]
            if not right and place < len(draft):
                self._model.popn(job.sequence, len(draft) - place)
            self._took(job, token)
            if not right:
                return place
        return len(draft)

    def _took(self, job: Job, token: int | None) -> None:
        assert job.sequence is not None
        if job.read == job.prompt:
            self.prefixes.hold(job.sequence, job.ids)
        if token is None:
            self._finish(job)
        else:
            self.generated_tokens += 1
            job.ids.append(token)

    # Whose pages go

    def _pages(self, job: Job, count: int) -> int:
        """Return how many pages the next ``count`` ids of a job take: sequences are forked between pages only."""
        page = self._model.page_size
        return 0 if page is None else -(-(job.read + count) // page) - -(-job.read // page)

    def _free(self, pages: int) -> bool:
        """Forget what no job needs, the longest unused first, until so many pages are free; False if they never are."""
        while pages and self._model.free_pages < pages:
            sequence = self.prefixes.oldest()
            if sequence is None:
                return False
            self._forget(sequence)
        return True

    def _preempt(self) -> None:
        """Send the job that was let in last back to the queue's head; it will read again what it has read."""
        job = self.active[-1]
        self._leave(job)
        self.waiting.appendleft(job)
        self.preemptions += 1

    def _finish(self, job: Job) -> None:
        """Let a job go, and keep what it has read for those that begin alike, as long as there is room."""
        assert job.sequence is not None
        job.over = True
        self.active.remove(job)
        if not self._model.spare:
            self._drop(job)
            return
        self._keep(job.sequence, job)
        job.sequence = None

    def _keep(self, sequence: int, job: Job) -> None:
        """Keep a sequence that holds what a job has read."""
        for other in self.prefixes.release(sequence, job.ids[: job.read]):
            self._model.remove(other)
        self._keep_at_most(self._model.spare)

    def _keep_at_most(self, count: int) -> None:
        while self.prefixes.kept > count:
            self._forget(self.prefixes.oldest())

    def _share(self, job: Job) -> None:
        """Keep a copy of the state that a job has come to."""
        assert job.sequence is not None
        self._keep_at_most(self._model.spare - 1)
        self._keep(self._model.fork(job.sequence, job.read), job)

    def _leads(self, job: Job) -> bool:
        """Whether a state is to be kept before the last id of its prompt, from which those that follow it begin."""
        return self._stateful and self._model.spare > 0 and any(other.leader is job for other in self.waiting)

    def _leave(self, job: Job) -> None:
        self.active.remove(job)
        self._drop(job)

    def _drop(self, job: Job) -> None:
        self._forget(job.sequence)
        job.sequence, job.read = None, 0

    def _forget(self, sequence: int | None) -> None:
        assert sequence is not None
        self.prefixes.drop(sequence)
        self._model.remove(sequence)
