"""Converts all parameters of a model in parallel threads, and reuses those that were converted before."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from threading import Lock, local
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from blake3 import blake3
from threadpoolctl import threadpool_limits

from stages.checkpoint.stored import NUMPY_DTYPES
from stages.checkpoint.tensors import Weights, as_dtype, working_dtype
from stages.conversion import compiled
from stages.conversion.digests import Digests
from stages.conversion.memory import Memory
from stages.models import transforms
from stages.problems import ProblemsError
from stages.quantization.blocks import UnfitError
from stages.quantization.feedback import load
from stages.quantization.parameter import convert, kernel_names
from stages.quantization.rows import Row
from stages.quantization.tensor_cache import Tensor, shard_name, shards
from stages.targets import processor

if TYPE_CHECKING:
    from collections.abc import Container, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from stages.conversion.plan import Plan
    from stages.documents.files import JsonObject
    from stages.documents.params import Parameter
    from stages.documents.weights import ErrorLine
    from stages.memo import Memo, NewPart, Part
    from stages.quantization.compiled import Kernels

KERNELS_FROM = 16 * 2**20  # bytes of weights; below, NumPy is done before a kernel is compiled
KEPT = 128 * 2**20  # bytes of memory that all threads together keep for a use
KEPT_EVERY = 64 * 2**20  # bytes of sources: parts of so many are saved together; a kill loses those that are not
TELLING = 0.02  # of all bytes: before so many are done nothing tells how long the others will take
SHARE = 3  # times the largest parameter as float32: what the conversions that run at once may take together


class ConversionError(ProblemsError):
    """Parameters that cannot be converted, each named."""


class Conversion:
    """Writes ``folder``'s shards; ``scratch`` takes what is no output. Both are made and, failing, left behind.

    ``only`` names the parameters that are converted, of which the parts are made and no shards. ``known`` are digests
    of the checkpoint's tensors that were taken elsewhere: what was made of those is reused.
    """

    def __init__(
        self,
        plan: Plan,
        memo: Memo,
        folder: Path,
        scratch: Path,
        *,
        only: Container[str] | None = None,
        known: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        stored = {e["name"]: Tensor(e["name"], tuple(e["shape"]), e["dtype"]) for e in plan.register["params"]}
        self._plan = plan
        self._memo = memo
        self._known = known
        self._logical = [entry for entry in plan.register["logical"] if only is None or entry["name"] in only]
        self._stored = [[stored[name] for name in entry["stored"]] for entry in self._logical]
        self._weights = Weights(plan.files, plan.tensors)
        self._sizes = [sum(self._weights.nbytes(name) for name in entry["sources"]) for entry in self._logical]
        self._folder = folder
        self._scratch = scratch
        self._shards = shards(self._stored)
        self.contents = [[tensor for index in shard for tensor in self._stored[index]] for shard in self._shards]
        alone = {shard[0]: shard_name(number) for number, shard in enumerate(self._shards) if len(shard) == 1}
        self._targets = [
            folder / alone[index] if index in alone else scratch / str(index) for index in range(len(self._logical))
        ]
        self.total = sum(self._sizes)
        whole = sum(self._weights.nbytes(name) for entry in plan.register["logical"] for name in entry["sources"])
        self._compiles = whole >= KERNELS_FROM
        self.stored_bytes = sum(tensor.nbytes for tensors in self._stored for tensor in tensors)
        self.done = self._written = self._finished = 0
        self._lock = Lock()
        self._local = local()
        self._threads = plan.threads or len(os.sched_getaffinity(0))
        self._began = time.monotonic()
        self._repeated = False
        self._unkept: list[NewPart] = []
        self._unkept_bytes = 0

    def run(self) -> list[ErrorLine]:
        """Make every parameter and every shard; return a line for each parameter, in packed order.

        :class:`ConversionError` names every parameter that was found wrong until the first one ended the work.
        """
        report, _ = self._make_all()
        self._join_small()
        shutil.rmtree(self._scratch)
        return report

    def parts(self) -> dict[str, str]:
        """Make the parts of every parameter; return the digests of the checkpoint's tensors that they are made of."""
        _, digests = self._make_all()
        names = [name for entry in self._logical for name in entry["sources"]]
        return dict(zip(names, digests.take(names), strict=True))

    def _make_all(self) -> tuple[list[ErrorLine], Digests]:
        self._folder.mkdir()
        self._scratch.mkdir()
        plan, memo = self._plan, self._memo
        library = None
        if self._compiles:
            library = compiled.load(memo, self._kernel_names(), self._scratch, plan.tools)
        self._repeated = library is None or self._begun_before()
        # Of all parameters, also where some are converted: what is kept of a file is known to be all.
        names = [name for entry in plan.register["logical"] for name in entry["sources"]]
        digests = Digests(memo, self._weights, plan.tensors, names, plan.digests, self._scratch, self._known)
        memory = Memory(SHARE * max(4 * math.prod(entry["shape"]) for entry in self._logical))
        try:
            # A thread a parameter, and one within: NumPy's sums depend on how many it has, which is in no key.
            with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(self._threads) as pool:
                jobs = {index: pool.submit(self._make, index, library, digests, memory) for index in self._order()}
                wait(jobs.values(), return_when=FIRST_EXCEPTION)
                pool.shutdown(cancel_futures=True)
            _raise_failures(list(jobs.values()))
        except BaseException:
            with contextlib.suppress(Exception):  # what ended the work is what is said
                self._keep()
            raise
        self._keep()
        return [jobs[index].result() for index in range(len(self._logical))], digests

    def _order(self) -> list[int]:
        """Return parameters in the order in which they lie in files, after the largest: begun last, as a head would be,
        that leaves one thread with work and the others without.
        """
        largest = max(self._sizes)

        def place(index: int) -> tuple[bool, str, int]:
            return (self._sizes[index] < largest, *self._weights.place(self._logical[index]["sources"][0]))

        return sorted(range(len(self._logical)), key=place)

    def _begun_before(self) -> bool:
        """Say whether such a conversion was begun before, of whatever values: only then may sources be known.

        To find out costs kernels, which take what is just read, a second reading of those that are not.
        """
        document = {"parameters": self._logical, "scales": self._plan.scales}
        if self._memo.recall("conversion", document):
            return True
        path = self._scratch / "begun"
        path.touch()
        self._memo.remember("conversion", document, path)
        return False

    def _kernel_names(self) -> list[str]:
        sources = {str(self._dtype(entry)) for entry in self._logical}
        quantizing = {(Row(**e["quantize"]), e["layout"]) for e in self._logical if e["quantize"]}
        dtypes = sorted({entry["dtype"] for entry in self._logical if not entry["quantize"]})
        chosen = sorted({self._plan.how(entry)[0] for entry in self._logical if entry["quantize"]}) or ["max"]
        names = (
            name
            for source in sorted(sources)
            for scales in chosen
            for name in kernel_names(source, sorted(quantizing, key=str), scales, dtypes)
        )
        return [*dict.fromkeys(names)]

    def _dtype(self, entry: Parameter) -> np.dtype:
        """Return the dtype that a parameter is made in, before it is stored."""
        if entry["name"] in self._plan.factors:
            return np.dtype(np.float32)
        return working_dtype(self._plan.tensors[name]["dtype"] for name in entry["sources"])

    def _source_dtypes(self, entry: Parameter) -> list[str]:
        """Return the dtypes of the tensors that a parameter is made of, each once."""
        return sorted({str(np.dtype(NUMPY_DTYPES[self._plan.tensors[name]["dtype"]])) for name in entry["sources"]})

    def _make(self, index: int, library: Kernels | None, digests: Digests, memory: Memory) -> ErrorLine:
        """Make one parameter unless it is known, and say how far all are; runs in a thread."""
        entry, target = self._logical[index], self._targets[index]
        values = math.prod(entry["shape"])
        as_it_is = [str(self._dtype(entry))] == self._source_dtypes(entry) and entry["transform"] in (
            "copy",
            "stacked_copy",
        )
        copied = 0 if as_it_is else 4 * values
        copied += 4 * values if entry["name"] in self._plan.factors else 0
        made = sum(tensor.nbytes for tensor in self._stored[index]) * (1 if entry["layout"] == "nk" else 2)
        if self._plan.how(entry)[0] == "gptq":
            made += 24 * entry["shape"][-1] ** 2  # the feedback, and what errors cost together while that is computed
        with memory.reserved(self._sizes[index] + copied + made):
            try:
                part = self._recall(entry, digests)
                if part is not None:
                    _link(part.path, target)
                facts = part.facts if part is not None else self._convert(index, digests, library)
            except UnfitError as error:
                raise ConversionError(self._located(entry, error)) from None
            except ValueError as error:
                made_of = ", ".join(entry["sources"])
                raise ConversionError(f"parameter {entry['name']} (from {made_of}): {error}") from None
        with self._lock:
            self._finished += 1
            self.done += self._sizes[index]
            self._written += sum(tensor.nbytes for tensor in self._stored[index])
            self._memo.progress(self.done, self.total, "B", self._note())
        return {
            "name": entry["name"],
            "kind": entry["kind"],
            "scheme": Row(**entry["quantize"]).name if entry["quantize"] else entry["dtype"],
            "shape": entry["shape"],
            "quantize": entry["quantize"],
            "layout": entry["layout"],
            "bytes": sum(tensor.nbytes for tensor in self._stored[index]),
            "source_dtype": facts["source_dtype"],
            "rmse": facts["rmse"],
            "max_error": facts["max_error"],
        }

    def _located(self, entry: Parameter, error: UnfitError) -> str:
        """Say of a value that cannot be stored where it stands in the checkpoint."""
        source, place = transforms.source_of(entry["transform"], error.index, entry["source_shapes"])
        name = entry["sources"][source]
        value, reason = float(self._weights[name][tuple(place)]), error.reason
        if math.isfinite(value) and not math.isfinite(error.value):
            reason = ", which does not fit float32"
        of = f" (of parameter {entry['name']})" if name != entry["name"] else ""
        return f"{self._plan.tensors[name]['file']}: tensor {name}{of}: the value at {place} is {value:g}{reason}"

    def _recall(self, entry: Parameter, digests: Digests) -> Part | None:
        """Return the part that was made of equal sources before; sources are read for it only where one may be."""
        if not self._repeated and not all(name in digests for name in entry["sources"]):
            return None
        return self._memo.recall("tensor", self._document(entry, digests.take(entry["sources"])))

    def _document(self, entry: Parameter, digests: Sequence[str]) -> JsonObject:
        """Return all that the stored bytes of a parameter depend on beside code; its name is not among it."""
        how: dict[str, Any] = {"dtype": entry["dtype"]}
        if entry["quantize"]:
            scales, importance = self._plan.how(entry)
            counts = {} if importance is None else {"importance": blake3(importance.tobytes()).hexdigest()}
            how = {**entry["quantize"], "scales": scales, **counts}
            if scales == "gptq":  # multiplies matrices, and how those are summed up is the processor's
                how |= {"feedback": self._feedback_digest(entry), "processor": processor.exact_cpu()}
        factor = self._plan.factors.get(entry["name"])
        if factor is not None:
            how["factors"] = blake3(factor.tobytes()).hexdigest()
        tensors = [self._plan.tensors[name] for name in entry["sources"]]
        sources = [[digest, found["dtype"], found["shape"]] for digest, found in zip(digests, tensors, strict=True)]
        made = {"transform": entry["transform"], "shape": entry["shape"], "sources": sources}
        return {"layout": entry["layout"], **made, **how}

    def _feedback_digest(self, entry: Parameter) -> str:
        path = self._plan.feedback_of(entry)
        assert path
        return blake3(path.read_bytes()).hexdigest()

    def _convert(self, index: int, digests: Digests, library: Kernels | None) -> JsonObject:
        """Write what a parameter is stored as, to be kept with others; return facts."""
        entry, target, plan = self._logical[index], self._targets[index], self._plan
        names, transform, dtype = entry["sources"], entry["transform"], self._dtype(entry)

        row, factor = entry["shape"][1:], plan.factors.get(entry["name"])

        def whole() -> np.ndarray:
            made = transforms.apply(transform, [as_dtype(digests.tensor(name), dtype) for name in names])
            return made if factor is None else made * factor

        def rows() -> Iterator[np.ndarray]:
            # Nothing but the tensors, one under the other.
            if factor is None and transform in ("copy", "concat0", "stacked_copy"):
                for name in names:
                    yield from (as_dtype(block, dtype).reshape(-1, *row) for block in digests.blocks(name))
            else:
                yield whole()

        scales, importance = plan.how(entry)
        data = self._memory("stored", sum(tensor.nbytes for tensor in self._stored[index]))
        made = convert(
            rows(),
            Row(**entry["quantize"]) if entry["quantize"] else None,
            shape=entry["shape"],
            whole=whole,
            into=data,
            dtype=entry["dtype"],
            scales=scales,
            layout=entry["layout"],
            kernels=library,
            importance=importance,
            feedback=load(path) if scales == "gptq" and (path := plan.feedback_of(entry)) else None,
        )
        with target.open("xb", buffering=0) as file:
            _write(file, data.data)
        # Four digits: kernels and NumPy add up in another order.
        rmse, worst = (float(f"{error:.4g}") for error in (made.rmse, made.worst))
        facts = {"source_dtype": ", ".join(self._source_dtypes(entry)), "rmse": rmse, "max_error": worst}
        document = self._document(entry, digests.take(names))
        for name in names:
            self._weights.check_unchanged(name)
        digest = blake3(data.data).hexdigest()
        with self._lock:
            self._unkept.append((document, target, digest, facts))
            self._unkept_bytes += self._sizes[index]
            enough = self._unkept_bytes >= KEPT_EVERY
        if enough:
            self._keep()
        return facts

    def _keep(self) -> None:
        """Keep what was finished since the last time."""
        with self._lock:
            parts, self._unkept, self._unkept_bytes = self._unkept, [], 0
        if parts:
            self._memo.remember_all("tensor", parts)

    def _memory(self, use: str, size: int) -> np.ndarray:
        """Return memory for one use by this thread, which keeps it: fresh memory each time costs as much as kernels."""
        buffers = vars(self._local)
        if use not in buffers or size > buffers[use].size:
            memory = np.empty(size, np.uint8)
            if size > KEPT // self._threads:
                return memory
            buffers[use] = memory
        found: np.ndarray = buffers[use][:size]
        return found

    def _join_small(self) -> None:
        """Write the shards that several parameters share."""
        for number, shard in enumerate(self._shards):
            if len(shard) > 1:
                with (self._folder / shard_name(number)).open("xb") as file:
                    for index in shard:
                        file.write(self._targets[index].read_bytes())

    def _note(self) -> str:
        note = f"{self._finished} of {len(self._logical)} tensors, {self._written / 1e6:,.0f} MB out"
        if self.done < self.total * TELLING:
            return note
        rate = self.done / max(time.monotonic() - self._began, 1e-6)
        return f"{note}, {rate / 1e6:,.0f} MB/s, {(self.total - self.done) / max(rate, 1):,.0f} s left"


def _write(file: Any, data: memoryview) -> None:
    """Write all bytes; a raw file takes at most 2 GiB at once."""
    while len(data):
        data = data[file.write(data) :]


def _link(source: Path, target: Path) -> None:
    """Give ``source`` a second name; a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _raise_failures(jobs: Sequence[Future[Any]]) -> None:
    """Raise what ended the work: every wrong parameter at once, or the first failure of another kind."""
    failed = [error for job in jobs if not job.cancelled() and (error := job.exception())]
    for error in failed:
        if not isinstance(error, ConversionError):
            raise error
    if failed:
        raise ConversionError(*(problem for error in failed for problem in getattr(error, "problems", ())))
