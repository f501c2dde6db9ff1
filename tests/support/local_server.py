"""Runs a server in this process and talks to it. Needs the extra ``serve``, and openai."""

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
from stages.runtime.server import protocol
from stages.runtime.server.engine import Engine

CONNECTIONS, SENDING = 60, 2


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

    def metrics(self, name: str, **labels: str) -> float:
        """The value of a metric; 0 where it was never counted."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        lines = [line for line in self.get("/metrics")[1].splitlines() if line.startswith(f"stagegraph_{name}{{")]
        return sum(float(line.split()[-1]) for line in lines if all(label in line for label in wanted))


class Lines(list):
    def write(self, line: str) -> None:
        self.append(line)

    def flush(self) -> None:
        pass


def serve(engine: Engine, **options) -> Iterator[Served]:
    log = Lines()
    options = {"limits": apps.RequestLimits(body=1 << 16, sending=SENDING, seconds=120), "log": log, **options}
    http = protocol.protocol(CONNECTIONS, options["limits"].sending)
    config = uvicorn.Config(apps.create({"tiny": engine}, **options), log_level="error", access_log=False, http=http)
    server = uvicorn.Server(config)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # so that who does not read is soon noticed
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
    """Wait until nothing is being answered; False if that cannot be any more."""
    while engine.scheduler.active or engine.waiting:
        if not engine.alive:
            return False
        time.sleep(0.01)
    return True
