"""A server asked for three times what it can do, by clients of which many leave: nothing leaks, all are answered.

Minutes by default 10; STAGEGRAPH_SOAK says others, STAGEGRAPH_SOAK_BUNDLE a bundle that exists already.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("starlette")

from stages.runtime import manifest
from stages.runtime.server import app as apps
from stages.runtime.server.engine import Engine
from tests.support import bundles
from tests.support.local_server import Served, idle, serve

QUEUE, VOCAB = 8, 200
GROWTH = 1.02


def held() -> int:
    """Bytes of this process that are in memory: the server's and its clients'."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def client(there: Served, seed: int, until: float, ended: Counter) -> None:
    rng = random.Random(seed)
    headers = {"Content-Type": "application/json"}
    while time.monotonic() < until:
        prompt = [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, 300))]
        stream = rng.random() < 0.7
        asked = {"prompt": prompt, "max_tokens": rng.randrange(1, 120), "stream": stream, "n": rng.choice([1, 1, 1, 3])}
        body = json.dumps({"model": "tiny", **asked, "speculate": rng.choice([0, 4])})
        if rng.random() < 0.3:
            with socket.create_connection(("127.0.0.1", there.port)) as gone:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
                gone.sendall(f"{head}Content-Type: application/json\r\n\r\n{body}".encode())
                time.sleep(rng.random() * 0.2)
            ended["left"] += 1
            continue
        connection = http.client.HTTPConnection("127.0.0.1", there.port, timeout=3600)
        connection.request("POST", "/v1/completions", body, headers)
        response = connection.getresponse()
        said = response.read()
        connection.close()
        whole = said.endswith(b"data: [DONE]\n\n") if stream else b'"usage"' in said
        ended[response.status if response.status != 200 or whole else "broken"] += 1
        if response.status != 200:
            time.sleep(0.02)


class _Nowhere(io.TextIOBase):
    """Keeps nothing: a line of each of a hundred thousand requests would count as the server's memory."""

    def write(self, text: str) -> int:
        return len(text)


@pytest.mark.endurance
@pytest.mark.timeout(0)
def test_three_times_what_it_can_do(tmp_path: Path) -> None:
    given = os.environ.get("STAGEGRAPH_SOAK_BUNDLE")
    bundle = Path(given) if given else bundles.build(tmp_path, "q0f32").bundle
    engine = Engine(manifest.read(bundle), tokens=1024, queue=QUEUE)
    seconds = 60 * float(os.environ.get("STAGEGRAPH_SOAK", "10"))
    ended: Counter = Counter()
    marks = []
    limits = apps.RequestLimits(sending=3600, seconds=3600)  # a busy machine may be slow
    for there in serve(engine, limits=limits, log=_Nowhere()):
        began = time.monotonic()
        count = 3 * (engine._session.max_batch + QUEUE)
        clients = [threading.Thread(target=client, args=(there, seed, began + seconds, ended)) for seed in range(count)]
        for each in clients:
            each.start()
        while any(each.is_alive() for each in clients):
            time.sleep(1)
            marks.append(held())
        assert idle(engine)
        assert engine.alive
    print(f"\n{seconds / 60:g} minutes, {count} clients: {dict(ended)}, {engine.scheduler.preemptions} preemptions")
    settled, last = max(marks[len(marks) // 5 : 2 * len(marks) // 5]), max(marks[-len(marks) // 5 :])
    print(f"memory {settled / 1e6:.1f} MB after warm-up, {last / 1e6:.1f} MB at the end: {last / settled - 1:+.2%}")
    kept = engine.scheduler.prefixes
    while (sequence := kept.oldest()) is not None:
        engine.scheduler._forget(sequence)
    assert engine._session.free_pages == engine.pages, "pages that nobody knows of"
    engine.close()
    assert not {*ended} - {200, 429, 503, "left"}, ended
    assert ended[200] > 0
    assert ended[429] > 0
    assert last < GROWTH * settled
