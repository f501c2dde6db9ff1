"""``hf://`` sources, against a local server that speaks the hub's API: redirects, ETags, digests, what is missing."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stagegraph.spec.load import load

pytest.importorskip("huggingface_hub")
REPOSITORY = Path(__file__).parents[2]
COMMIT = "c0ffee" + "0" * 34
FILES = {"config.json": b'{"a": 1}', "big.bin": bytes(range(256)) * 400, "other/config.json": b"{}", "notes.md": b"no"}
LARGE = "big.bin"
STAGE = '''
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from stagegraph.stage import Context, Out, Source, Stage, source


class Copy(Stage):
    """List what a source has, and check that planning sees the same."""

    id = "copy"

    @dataclass(frozen=True)
    class Params:
        model: Source = source("files", include=("*.json", "*.bin"))

    outputs = {"out": Out("out.txt", "names")}

    def tools(self, params):
        return {"config": str((Path(params.model) / "config.json").stat().st_size)}

    def run(self, ctx: Context) -> None:
        (ctx.out / "out.txt").write_text(" ".join(sorted(ctx.source("model").files)))
'''


class Hub:
    """A server with one repository; ``asked`` are the paths that were asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.sent = dict(FILES)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self, body=True)

            def do_HEAD(self) -> None:
                outer.answer(self, body=False)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.elsewhere = f"http://localhost:{self._server.server_port}/cdn"  # large files are on another host

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.asked.append(path)
        api, resolve = f"/api/models/org/name/revision/{COMMIT}", f"/org/name/resolve/{COMMIT}/"
        if path in {api, "/api/models/org/name/revision/main", "/api/models/org/name"}:
            siblings = [_listed(name, content) for name, content in FILES.items()]
            self._send(request, json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode(), {}, body)
        elif path.startswith(resolve) and (name := path.removeprefix(resolve)) in FILES:
            content = self.sent[name]
            if name == LARGE:
                linked = {"X-Linked-Etag": f'"{_sha256(FILES[name])}"', "X-Linked-Size": str(len(content))}
                self._send(request, b"", {"X-Repo-Commit": COMMIT, "Location": self.elsewhere, **linked}, body, 302)
            else:
                self._send(request, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{_git(FILES[name])}"'}, body)
        elif path == "/cdn":
            self._send(request, self.sent[LARGE], {"ETag": '"anything"'}, body)
        else:
            code = "RepoNotFound" if "/name/" not in path else "EntryNotFound"
            self._send(request, b"{}", {"X-Error-Code": code}, body, 404)

    @staticmethod
    def _send(
        request: BaseHTTPRequestHandler, content: bytes, headers: dict[str, str], body: bool, status: int = 200
    ) -> None:
        request.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            request.send_header(name, value)
        request.end_headers()
        if body:
            request.wfile.write(content)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _listed(name: str, content: bytes) -> dict[str, object]:
    lfs = {"lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}} if name == LARGE else {}
    return {"rfilename": name, "size": len(content), "blobId": _git(content), **lfs}


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.stop()


def pipeline(hub: Hub, folder: Path, source: str, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "copy_it.py").write_text(STAGE)
    file = f'version: 1\nname: p\nstages: {{copy: {{uses: "./copy_it.py:Copy", with: {{model: "{source}"}}}}}}\n'
    (folder / "pipeline.yaml").write_text(file)
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name.lower()
    }
    env |= {"PYTHONPATH": str(REPOSITORY), "HF_ENDPOINT": hub.url, "HF_HOME": str(folder / "home")}
    command = [sys.executable, "-m", "stagegraph.cli.main", *(words or ("run",))]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def test_a_commit_is_fetched_once_and_only_what_the_stage_reads(hub: Hub, tmp_path: Path) -> None:
    source = f"hf://org/name@{COMMIT}"
    looked = pipeline(hub, tmp_path, source, "status")
    assert (looked.returncode, hub.asked) == (2, [])
    assert "is not here yet; `pipeline run` fetches it" in looked.stderr
    ran = pipeline(hub, tmp_path, source)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "artifacts" / "p" / "copy" / "out.txt").read_text() == "big.bin config.json"
    assert not [path for path in hub.asked if path.endswith(("notes.md", "other/config.json"))]
    hub.stop()
    again = pipeline(hub, tmp_path, source)
    assert (again.returncode, "1 HIT" in again.stdout) == (0, True)


def safetensors() -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(16)


@pytest.mark.parametrize("named", ["", "@main", f"@{COMMIT}"])
def test_a_pipeline_is_begun_with_the_commit_that_a_name_means_now(
    hub: Hub, tmp_path: Path, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FILES", FILES | {"model.safetensors": safetensors()})
    hub.sent = dict(FILES)
    begun = pipeline(hub, tmp_path, "-", "init", "new", "--checkpoint", f"hf://org/name{named}")
    assert begun.returncode == 0, begun.stderr
    assert (f"is hf://org/name@{COMMIT} now" in begun.stderr) == (named != f"@{COMMIT}")
    written = (tmp_path / "new" / "pipeline.yaml").read_text()
    assert f'checkpoint: "hf://org/name@{COMMIT}"' in written
    assert not [path for path in hub.asked if path.endswith(("notes.md", "other/config.json", "big.bin"))]
    assert load(tmp_path / "new" / "pipeline.yaml").name == "name"


def test_one_file_of_a_repository(hub: Hub, tmp_path: Path) -> None:
    ran = pipeline(hub, tmp_path, f"hf://org/name@{COMMIT}/nothing.json")
    assert ran.returncode == 2
    assert "there is no file nothing.json in org/name at that commit" in ran.stderr


@pytest.mark.parametrize("name", ["config.json", LARGE])
def test_what_came_damaged_is_refused_and_removed(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.sent[name] = FILES[name][:-1] + b"!"
    ran = pipeline(hub, tmp_path, f"hf://org/name@{COMMIT}")
    assert (ran.returncode, f"{name} came damaged, and was removed" in ran.stderr) == (2, True)
    hub.sent = dict(FILES)
    assert pipeline(hub, tmp_path, f"hf://org/name@{COMMIT}").returncode == 0


def test_a_repository_that_is_not_there_and_a_hub_that_is_away(hub: Hub, tmp_path: Path) -> None:
    ran = pipeline(hub, tmp_path, f"hf://org/else@{COMMIT}")
    assert "pipeline.yaml:3:" in ran.stderr
    assert "the hub has no such repository, or not for you" in ran.stderr
    hub.stop()
    ran = pipeline(hub, tmp_path, f"hf://org/name@{COMMIT}")
    assert (ran.returncode, "Traceback" in ran.stderr) == (2, False)
    assert "the hub cannot be asked" in ran.stderr
