"""A server in this process, and ways to talk with it; what imports this needs the extra ``serve``, and openai."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator

import openai
import uvicorn

from stages.runtime.server import app as apps
from stages.runtime.server.engine import Engine


@dataclasses.dataclass
class Served:
    """A server of this process, its engine, and a client of it."""

    engine: Engine
    port: int
    client: openai.OpenAI
    log: list[str]

    def post(self, path: str, body: bytes, **headers: str) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("POST", path, body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())

    def get(self, path: str, **headers: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()


class Lines(list):
    def write(self, line: str) -> None:
        self.append(line)

    def flush(self) -> None:
        pass


def serve(engine: Engine, **options) -> Iterator[Served]:
    log = Lines()
    options = {"limits": apps.Limits(body=1 << 16, sending=2, seconds=120), "log": log, **options}
    config = uvicorn.Config(apps.create({"tiny": engine}, **options), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    port = listening.getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0, timeout=60)
    while not server.started:
        time.sleep(0.01)
    yield Served(engine, port, client, log)
    client.close()
    server.should_exit = True
    thread.join()


def idle(engine: Engine) -> bool:
    """Wait until nothing is being answered; False if that never happens."""
    for _ in range(2000):
        if not engine.scheduler.active and not engine.waiting:
            return True
        time.sleep(0.01)
    return False
