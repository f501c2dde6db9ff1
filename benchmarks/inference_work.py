"""One side of benchmarks/inference.py, measured in a process of its own; prints one line of JSON.

Usage: python benchmarks/inference_work.py ours|llama|torch MODEL THREADS

MODEL is a bundle, a GGUF file, or the config.json of a Llama, which torch fills with random weights itself. Everything
runs twice, the first time to warm up. Of our runtime the memory is measured as well; random weights have no vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPTS, CONTEXTS, STEPS = (128, 512), (128, 1000), 16
CHUNK = 512  # tokens read at once
HELD_BY_C: list[Any] = []
Step = Callable[[list[int]], object]
Begin = Callable[[], tuple[Step, Step, Callable[[], None]]]


def ids_of(count: int, start: int = 0) -> list[int]:
    """Return ids that look drawn at random, the same on all sides."""
    return [3 + (7919 * (start + i)) % 31000 for i in range(count)]


def measure(begin: Begin) -> Iterator[tuple[str, float, float]]:
    """Yield (measure, tokens per second by the clock, per second of the processors).

    ``begin`` returns, for a new sequence, what prefills ids, what decodes one, and what forgets the sequence.
    """
    for kind, sizes in (("prefill", PROMPTS), ("decode", CONTEXTS)):
        for size in sizes:
            prefill, decode, forget = begin()
            if kind == "decode":
                prefill(ids_of(size))
            clock, processor = time.perf_counter(), time.process_time()
            if kind == "prefill":
                prefill(ids_of(size))
            else:
                for token in ids_of(STEPS, size):
                    decode([token])
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            count = size if kind == "prefill" else STEPS
            forget()
            yield f"{kind} {size}", count / clock, count / processor


def status(field: str) -> int:
    """Return VmRSS (held now) or VmHWM (the most ever) of this process in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def ours(bundle: str, _threads: int) -> tuple[Begin, Callable[[], dict[str, int]]]:
    """Load a bundle with its runtime; return what begins a sequence, and what tells the memory."""
    from stages.runtime import backend, manifest, tensor_cache
    from stages.runtime.session import Session

    backend.tvm()
    imported, root = status("VmRSS"), Path(bundle)
    bundle = manifest.read(root)
    session = Session(bundle)
    sizes = json.loads((root / "bundle.json").read_text())["model"]

    def begin() -> tuple[Step, Step, Callable[[], None]]:
        sequence = session.add()
        return (
            lambda ids: session.prefill(sequence, ids),
            lambda ids: session.decode(sequence, ids[0]),
            lambda: session.remove(sequence),
        )

    def memory() -> dict[str, int]:
        return {
            "imported": imported,
            "peak": status("VmHWM"),
            "weights": sum(record.nbytes for record in tensor_cache.records(bundle.folder).values()),
            "kv": sizes["cache_bytes_per_token"] * sizes["context_window"],
        }

    return begin, memory


def served(model: str, threads: int) -> Callable[[], Iterator[tuple[str, float, float]]]:
    """Return what yields as :func:`measure` does, of llama.cpp's server with a GGUF file, by that server's own clock.

    Its decoding picks the likeliest token, too. A request for decoding finds its prompt in the cache.
    """
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = 1, 2048, CHUNK, CHUNK
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port, params.verbosity, params.ui = 0, 0, False
    server = xllamacpp.Server(params)

    def ask(size: int, count: int, *, cached: bool) -> tuple[dict[str, float], float]:
        asked = {"prompt": ids_of(size), "max_tokens": count, "cache_prompt": cached}
        processor = time.process_time()
        answer = server.handle_completions({**asked, "temperature": 0, "ignore_eos": True})
        return answer["timings"], time.process_time() - processor

    def measured() -> Iterator[tuple[str, float, float]]:
        for size in PROMPTS:
            timings, processor = ask(size, 1, cached=False)
            yield f"prefill {size}", timings["prompt_per_second"], timings["prompt_n"] / processor
        for size in CONTEXTS:
            ask(size, 1, cached=True)
            timings, processor = ask(size, STEPS, cached=True)
            yield f"decode {size}", timings["predicted_per_second"], timings["predicted_n"] / processor

    return measured


def llama(model: str, threads: int) -> Begin:
    """Load a GGUF file with llama.cpp."""
    import ctypes

    import llama_cpp

    HELD_BY_C.append(llama_cpp.llama_log_callback(lambda *_: None))
    llama_cpp.llama_log_set(HELD_BY_C[-1], ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = 2048, CHUNK, CHUNK
    params.n_threads = params.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(loaded, params)

    def feed(ids: list[int]) -> None:
        for at in range(0, len(ids), CHUNK):
            part = ids[at : at + CHUNK]
            tokens = (llama_cpp.llama_token * len(part))(*part)
            assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, len(part))) == 0
        llama_cpp.llama_get_logits_ith(context, -1)[0]  # waits for the result

    def begin() -> tuple[Step, Step, Callable[[], None]]:
        return feed, feed, lambda: llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    return begin


def transformers(config: str, threads: int) -> Begin:
    """Make a Llama of random bfloat16 weights with transformers."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig.from_json_file(config)).eval()

    def begin() -> tuple[Step, Step, Callable[[], None]]:
        cache = DynamicCache(config=model.config)

        @torch.inference_mode()
        def feed(ids: list[int]) -> None:
            for at in range(0, len(ids), CHUNK):
                part = torch.tensor([ids[at : at + CHUNK]])
                model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1, 0].item()

        return feed, feed, lambda: None

    return begin


def main() -> None:
    """Measure one side: once to warm up, then for real."""
    side, model, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    os.environ["TVM_NUM_THREADS"] = str(threads)
    found: dict[str, Any] = {}
    if side == "llama" and importlib.util.find_spec("llama_cpp") is None:
        measured = served(model, threads)
    else:
        if side == "ours":
            begin, memory = ours(model, threads)
        else:
            begin = (llama if side == "llama" else transformers)(model, threads)
        measured = functools.partial(measure, begin)
    for _ in range(2):
        found = {name: [clock, processor] for name, clock, processor in measured()}
    if side == "ours":
        found["memory"] = memory()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
