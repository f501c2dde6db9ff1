"""A loaded bundle and the sequences it holds: prefill in chunks, decode, take tokens back, alone or in batches."""

from __future__ import annotations

import json
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.runtime import backend, state, tensor_cache
from stages.runtime.errors import BundleError, RequestError
from stages.runtime.manifest import capability_problems, disagreements

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from stages.runtime.manifest import Manifest

_KV = "vm.builtin.kv_state_"


class Session:
    """One library with its weights on a device and the state of up to ``sequences`` sequences that are read at once.

    ``spare`` more may be held beside them, and ``tokens`` is what the KV cache holds of all together (default: the
    context window of each that is read).

    The state is a KV cache, which ends at the context window and can go back to any token, or that of a recurrent
    model, which does not end and goes back over the newest tokens that were read one at a time.
    Every call that reads tokens returns float32 logits as numpy arrays on the host: [V] for one sequence, [b, V] for
    several. Token ids and lengths are checked before anything runs; :class:`RequestError` says what was wrong, and
    the session stays usable.
    """

    def __init__(self, manifest: Manifest, *, sequences: int = 1, spare: int = 0, tokens: int | None = None) -> None:
        self.manifest = manifest
        self.context_window: int = manifest.model["context_window"]
        self.prefill_chunk: int = manifest.model["prefill_chunk"]
        self.vocab_size: int = manifest.model["vocab_size"]
        self.max_batch: int = manifest.model["max_batch"]
        self.verify_chunk: int = manifest.model.get("verify_chunk") or 0  # 0 for a recurrent model
        self.sequences, self.spare = sequences, spare
        self._sep_embed: bool = manifest.model["sep_embed"]
        self._tvm = backend.tvm()
        self._device = backend.device(manifest.device)
        if manifest.device == "cuda":
            problems = capability_problems(manifest, backend.capability(self._device))
            if problems:
                raise BundleError(*problems)
        self._vm = self._open_library()
        self._params = self._load_params()
        self._free = list(range(sequences + spare))[::-1]
        self._lengths: dict[int, int] = {}
        self._reach: dict[int, int] = {}  # how many tokens of each sequence can be taken back
        self._state = self._create_state(sequences, tokens)

    def _open_library(self) -> Any:
        path = self.manifest.folder.check("model.so")
        with _refusing(f"{path}: not a library that can be loaded"):
            module = self._tvm.runtime.load_module(str(path))
            return self._tvm.runtime.vm.VirtualMachine(module, self._device)

    def _load_params(self) -> Any:
        folder = self.manifest.folder
        with _refusing(f"{folder.root / 'model.so'}: does not say what it takes"):
            metadata = json.loads(self._vm["_metadata"]())
            expected, problems = metadata["params"], disagreements(self.manifest, metadata)
        if problems:
            raise BundleError(*problems)
        stored = tensor_cache.records(folder)
        problems = [
            f"{param['name']}: the library takes {param['dtype']} {param['shape']} and the weights hold "
            f"{stored[param['name']].dtype} {list(stored[param['name']].shape)}"
            for param in expected
            if param["name"] in stored
            and (stored[param["name"]].dtype, list(stored[param["name"]].shape)) != (param["dtype"], param["shape"])
        ]
        if problems:
            raise BundleError(*problems)
        names = [param["name"] for param in expected]
        return backend.array(tensor_cache.upload(folder, stored, names, self._device, digest=not self.manifest.quick))

    def _create_state(self, sequences: int, tokens: int | None) -> state.SessionState:
        limit = self.max_batch
        if not 1 <= sequences <= limit:
            raise RequestError(f"{sequences} sequences asked for; the library was built for 1 to {limit} (max_batch)")
        wanted = self.context_window if tokens is None else tokens
        with _refusing(
            f"{self.manifest.root}: no room for the state of {wanted:,} tokens: lower context_window, or free memory"
        ):
            shape = self._tvm.runtime.ShapeTuple
            return state.create(self._vm, shape, self.manifest.model, sequences, spare=self.spare, tokens=tokens)

    # Sequences

    def add(self) -> int:
        """Start an empty sequence and return its number."""
        sequence = self._place()
        self._call("add_sequence", sequence)
        self._lengths[sequence] = self._reach[sequence] = 0
        return sequence

    def fork(self, sequence: int, length: int) -> int:
        """Start a sequence with the first ``length`` tokens of another; its number.

        They share whole pages. The state of a recurrent model is copied, and goes back from where it is.
        """
        available = self.length(sequence)
        if not 0 < length <= available:
            raise RequestError(f"cannot begin with {length} tokens of a sequence that holds {available}")
        recurrent = self.page_size is None
        if recurrent:
            self._check_reach(sequence, available - length)
        child = self._place()
        self._call("fork_sequence", sequence, child, -1 if recurrent else length)
        self._lengths[child], self._reach[child] = (available, self._reach[sequence]) if recurrent else (length, length)
        if recurrent and length < available:
            self.popn(child, available - length)
        return child

    def remove(self, sequence: int) -> None:
        """Forget a sequence and free its place."""
        self.length(sequence)
        self._call("remove_sequence", sequence)
        del self._lengths[sequence]
        self._free.append(sequence)

    def popn(self, sequence: int, count: int) -> None:
        """Take the last ``count`` tokens of a sequence back."""
        if not 0 <= count <= self.length(sequence):
            raise RequestError(f"cannot take back {count} tokens of a sequence that holds {self.length(sequence)}")
        self._check_reach(sequence, count)
        self._call("popn", sequence, count)
        self._lengths[sequence] -= count
        self._reach[sequence] -= count

    def _check_reach(self, sequence: int, count: int) -> None:
        if count > self._reach[sequence]:
            raise RequestError(
                f"cannot take back {count} tokens: the state of this recurrent model goes back over tokens read one at "
                f"a time, at most {(self._state.history or 1) - 1} of them, and never into tokens read together; "
                f"{self._reach[sequence]} can be taken back now. Remove the sequence and read it again"
            )

    def _place(self) -> int:
        if not self._free:
            raise RequestError(f"all {len(self._lengths)} sequences of this session are in use; remove one first")
        return self._free.pop()

    @property
    def page_size(self) -> int | None:
        """How many tokens a page of the KV cache has; None for the state of a recurrent model."""
        return self._state.page

    @property
    def free_pages(self) -> int:
        """How many pages of the KV cache no sequence has; 0 for a recurrent model."""
        count = "vm.builtin.attention_kv_cache_get_num_available_pages"
        return 0 if self.page_size is None else int(self._tvm.get_global_func(count)(self._state.objects[0]))

    def length(self, sequence: int) -> int:
        """Return how many tokens a sequence holds."""
        try:
            return self._lengths[sequence]
        except KeyError:
            raise RequestError(f"there is no sequence {sequence} in this session") from None

    @property
    def limit(self) -> int | None:
        """The most tokens that a sequence may hold; None where there is no such limit."""
        return self._state.limit

    def full(self, sequence: int) -> bool:
        """Say whether a sequence can take no more tokens."""
        return self.length(sequence) == self.limit

    def reach(self, sequence: int) -> int:
        """Return how many tokens of a sequence can be taken back."""
        self.length(sequence)
        return self._reach[sequence]

    # Tokens in, logits out

    def prefill(self, sequence: int, ids: Sequence[int], *, chunk: int | None = None) -> np.ndarray:
        """Read ``ids`` in chunks of at most ``chunk`` (default: what the library was built for); logits of the last."""
        self._check(sequence, ids)
        size = min(chunk or self.prefill_chunk, self.prefill_chunk)
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            last: np.ndarray = self._forward("prefill", {sequence: part}, self._states(part, (1, len(part))))[0]
        return last

    def decode(self, sequence: int, token: int) -> np.ndarray:
        """Read one token; its logits."""
        self._check(sequence, [token])
        logits: np.ndarray = self._forward("decode", {sequence: [token]}, self._states([token], (1, 1)))[0]
        return logits

    def batch_prefill(self, requests: Mapping[int, Sequence[int]]) -> np.ndarray:
        """Read the ids of several sequences in one pass; logits of each one's last, in the order of ``requests``."""
        for sequence, ids in requests.items():
            self._check(sequence, ids)
        flat = [token for ids in requests.values() for token in ids]
        if len(flat) > self.prefill_chunk:
            raise RequestError(
                f"{len(flat)} tokens in one batch; the library takes {self.prefill_chunk} (prefill_chunk)"
            )
        last = np.cumsum([len(ids) for ids in requests.values()], dtype=np.int32) - np.int32(1)
        return self._forward("batch_prefill", requests, self._states(flat, (1, len(flat))), self._tensor(last))

    def batch_decode(self, tokens: Mapping[int, int]) -> np.ndarray:
        """Read one token of each of several sequences in one pass; their logits, in the order of ``tokens``."""
        for sequence, token in tokens.items():
            self._check(sequence, [token])
        requests = {sequence: [token] for sequence, token in tokens.items()}
        return self._forward("batch_decode", requests, self._states(list(tokens.values()), (len(tokens), 1)))

    def batch_verify(self, requests: Mapping[int, Sequence[int]]) -> list[np.ndarray]:
        """Read the ids of several sequences in one pass; the logits [n, V] after each id of each, in their order. A
        model that keeps a recurrent state has no such function.
        """
        if not self.verify_chunk:
            raise RequestError(
                "the library has no batch_verify: its model keeps a recurrent state of a sequence, from which a row of "
                "tokens cannot be taken back; read them with decode"
            )
        for sequence, ids in requests.items():
            self._check(sequence, ids)
        flat = [token for ids in requests.values() for token in ids]
        if len(flat) > self.verify_chunk:
            raise RequestError(
                f"{len(flat)} tokens to be verified; the library takes {self.verify_chunk} (verify_chunk)"
            )
        logits = self._forward("batch_verify", requests, self._states(flat, (1, len(flat))))
        return np.split(logits, np.cumsum([len(ids) for ids in requests.values()])[:-1])

    def score(self, sequence: int, ids: Sequence[int]) -> Iterator[np.ndarray]:
        """Read ``ids`` and yield the logits [n, V] after each of them, as many at once as the library gives."""
        size = self.verify_chunk
        for start in range(0, len(ids), size or 1):
            part = ids[start : start + (size or 1)]
            yield self.batch_verify({sequence: part})[0] if size else self.decode(sequence, part[0])[None]

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Return the embeddings [n, h] of ``ids`` in the compute dtype; needs a library with ``sep_embed``."""
        self._check_ids(ids)
        if not self._sep_embed:
            raise RequestError("this library embeds inside prefill and decode (sep_embed is false)")
        return _on_host(self._embed(ids))

    def softmax(self, logits: np.ndarray, temperature: np.ndarray) -> np.ndarray:
        """Return the library's softmax of float32 ``logits`` [b, V] divided by ``temperature`` [b]."""
        scaled = self._tensor(np.ascontiguousarray(logits[:, None, :], dtype=np.float32))
        result = self._vm["softmax_with_temperature"](scaled, self._tensor(temperature.astype(np.float32)))
        return _on_host(result)[:, 0, :]

    def instrument(self, watch: Callable[[str, bool], None]) -> None:
        """From now on call ``watch`` with the name of each function that is called: True before it, False after it."""

        def around(_: Any, name: str, begins: bool, *__: Any) -> int:
            watch(name, begins)
            return 0  # go on

        self._vm.set_instrument(around)

    # Below: what touches TVM

    def _forward(self, function: str, requests: Mapping[int, Sequence[int]], *arguments: Any) -> np.ndarray:
        shape = self._tvm.runtime.ShapeTuple
        counts = [len(ids) for ids in requests.values()]
        self._call("begin_forward", shape(list(requests)), shape(counts))
        try:
            logits = self._run(function, *arguments)
        finally:
            self._call("end_forward")
        for sequence, count in zip(requests, counts, strict=True):
            self._lengths[sequence] += count
            self._reach[sequence] = self._state.reach(self._reach[sequence], count)
        return logits.reshape(-1, logits.shape[-1])

    def _run(self, function: str, *arguments: Any) -> np.ndarray:
        return _on_host(self._vm[function](*arguments, *self._state.objects, self._params)[0])

    def _states(self, ids: Sequence[int], shape: tuple[int, int]) -> Any:
        if not self._sep_embed:
            return self._tensor(np.array(ids, dtype=np.int32).reshape(shape))
        embedded = self._embed(ids)
        view = self._tvm.runtime.ShapeTuple([*shape, embedded.shape[-1]])
        return self._tvm.get_global_func("vm.builtin.reshape")(embedded, view)

    def _embed(self, ids: Sequence[int]) -> Any:
        return self._vm["embed"](self._tensor(np.array(ids, dtype=np.int32)), self._params)

    def _tensor(self, array: np.ndarray) -> Any:
        return self._tvm.runtime.tensor(array, self._device)

    def _call(self, function: str, *arguments: Any) -> None:
        for stored in self._state.objects:
            self._tvm.get_global_func(_KV + function)(stored, *arguments)

    def _check(self, sequence: int, ids: Sequence[int]) -> None:
        used = self.length(sequence)
        if not ids:
            raise RequestError("there are no tokens to read")
        self._check_ids(ids)
        limit = self.limit
        if limit is not None and used + len(ids) > limit:
            raise RequestError(
                f"the context holds {limit} tokens: {used} are in use, {len(ids)} more were asked for; "
                "shorten the prompt, or build the bundle with a larger context_window"
            )

    def _check_ids(self, ids: Sequence[int]) -> None:
        # The kernels gather rows without looking: an id outside the vocabulary would read foreign memory.
        wrong = [token for token in ids if not 0 <= token < self.vocab_size]
        if wrong:
            raise RequestError(f"token ids {wrong[:5]} are outside the vocabulary of {self.vocab_size}")


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    # Errors of TVM come as classes of many kinds, whatever a function of its own raised.
    try:
        yield
    except Exception as error:  # noqa: BLE001
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise BundleError(f"{what} ({reason})") from None


def _on_host(tensor: Any) -> np.ndarray:
    """Return a tensor as an array: its own memory where that is the host's, so that nothing is copied."""
    array: np.ndarray = np.from_dlpack(tensor) if tensor.device.dlpack_device_type() == 1 else tensor.numpy()
    return array
