"""What benchmarks/serve.py starts: llama.cpp's server, or steps of our scheduler and what Python itself takes of them.

Usage: python benchmarks/serve_work.py llama MODEL.gguf THREADS ANSWERS CONTEXT   (needs xllamacpp; till its input ends)
       python benchmarks/serve_work.py steps BUNDLE THREADS ANSWERS               (prints milliseconds a step)
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 40


def llama(model: str, threads: int, answers: int, context: int) -> None:
    """Serve a GGUF file with llama.cpp's own server, which the wheel of xllamacpp has; print its address."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx = answers, answers * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port, params.verbosity, params.ui = 0, 0, False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)


def steps(bundle: str, _threads: int, answers: int) -> None:
    """Print how long a step that decodes so many answers takes, and how much of that is Python's own, in milliseconds.

    The processor's time of the thread counts, which another process does not lengthen; all of it that is not spent in
    calls of the library and of its KV cache is Python's: what is asked for, copied, checked, picked and told.
    """
    from stages.runtime import manifest
    from stages.runtime.server.answer import Answer, AnswerOptions
    from stages.runtime.server.jobs import Job
    from stages.runtime.server.scheduler import Scheduler
    from stages.runtime.session import Session
    from stages.runtime.tokenizer import BundleTokenizer

    found = manifest.read(Path(bundle))
    session = Session(found, sequences=answers, spare=8)
    tokenizer = BundleTokenizer(found.folder)
    inside = 0.0

    def timed(call: Any) -> Any:
        def inner(*arguments: Any) -> Any:
            nonlocal inside
            began = time.thread_time()
            result = call(*arguments)
            inside += time.thread_time() - began
            return result

        return inner

    for name in ("_run", "_embed", "_call"):  # where it enters the library
        setattr(session, name, timed(getattr(session, name)))
    scheduler = Scheduler(session)
    for at in range(answers):
        ids = [3 + (7919 * (97 * at + n)) % 3000 for n in range(32)]
        options = AnswerOptions(max_tokens=10_000, logit_bias=dict.fromkeys(tokenizer.stop, -100.0))
        answer = Answer(
            tokenizer, ids, options, vocab_size=session.vocab_size, seed=at, room=None, deliver=lambda _: None
        )
        scheduler.submit(Job(answer.ids, answer.take))
    while any(job.pending != 1 for job in [*scheduler.waiting, *scheduler.active]):
        scheduler.step()
    whole, own = [], []
    for _ in range(STEPS):
        inside, began, clock = 0.0, time.thread_time(), time.perf_counter()
        scheduler.step()
        own.append(1e3 * (time.thread_time() - began - inside))
        whole.append(1e3 * (time.perf_counter() - clock))
    print(json.dumps({"step": statistics.median(whole), "own": statistics.median(own)}))


if __name__ == "__main__":
    os.environ["TVM_NUM_THREADS"] = sys.argv[3]
    {"llama": llama, "steps": steps}[sys.argv[1]](sys.argv[2], *map(int, sys.argv[3:]))
