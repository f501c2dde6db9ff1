"""Sources by URL: single files pinned by their digest, fetched once, resumed, and compared with what was asked for."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from stagegraph import Pipeline
from stagegraph.errors import PlanError
from stagegraph.remote import web

STAGE = '''
from __future__ import annotations
from dataclasses import dataclass
from stagegraph.stage import Context, Out, Source, Stage, source


class Copy(Stage):
    """Write what a source says."""

    id = "copy"

    @dataclass(frozen=True)
    class Params:
        text: Source = source("a file", include=("*.txt",))

    outputs = {"out": Out("out.txt", "what it says")}

    def run(self, ctx: Context) -> None:
        (path,) = ctx.source("text").files.values()
        (ctx.out / "out.txt").write_bytes(path.read_bytes())
'''
CONTENT = b"".join(i.to_bytes(4, "big") for i in range(50_000))
PIN = f"#sha256={hashlib.sha256(CONTENT).hexdigest()}"


class Server:
    """Serves one text at ``/there.txt``, and at ``/moved.txt`` by a redirect; ``asked`` are the ranges asked for."""

    def __init__(self) -> None:
        self.content, self.breaks_after, self.ranges, self.asked = CONTENT, 0, True, [""]
        self.asked.clear()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.path == "/moved.txt":
            request.send_response(302)
            request.send_header("Location", "/there.txt")
            request.end_headers()
            return
        if request.path != "/there.txt":
            request.send_error(404)
            return
        span = request.headers.get("Range", "")
        self.asked.append(span)
        start = int(span.removeprefix("bytes=").rstrip("-")) if span and self.ranges else 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(self.content) - start))
        request.end_headers()
        end = self.breaks_after or len(self.content)
        request.wfile.write(self.content[start:end])

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.stop()


def lay(folder: Path, source: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "copy_it.py").write_text(STAGE)
    file = folder / "pipeline.yaml"
    file.write_text(
        f'version: 1\nname: p\nstages: {{copy: {{uses: "./copy_it.py:Copy", with: {{text: "{source}"}}}}}}\n'
    )
    return file


def run(file: Path) -> str:
    with Pipeline(file) as pipeline:
        (outcome,) = pipeline.run().outcomes
        assert outcome.record is not None
        return outcome.status


def test_a_file_is_fetched_once_through_a_redirect_and_looked_at_without_a_server(
    server: Server, tmp_path: Path
) -> None:
    file = lay(tmp_path / "here", f"{server.url}/moved.txt{PIN}")
    with Pipeline(file) as pipeline, pytest.raises(PlanError, match="not here yet; `pipeline run` fetches it"):
        pipeline.plan()
    assert server.asked == []
    assert run(file) == "BUILT"
    assert (tmp_path / "here" / "artifacts" / "p" / "copy" / "out.txt").read_bytes() == CONTENT
    server.stop()
    assert (run(file), len(server.asked)) == ("HIT", 1)
    assert run(lay(tmp_path / "beside", f"{server.url}/moved.txt{PIN}")) == "BUILT"  # from the user's cache
    local = lay(tmp_path / "here", "~/moved.txt")
    with Pipeline(local) as pipeline, pytest.raises(PlanError, match=r"no file or directory /.*/moved\.txt"):
        pipeline.plan()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_transfer_goes_on_where_it_broke_off(server: Server, tmp_path: Path, ranges: bool) -> None:
    file = lay(tmp_path / "here", f"{server.url}/there.txt{PIN}")
    server.breaks_after, server.ranges = 150_000, ranges
    with pytest.raises(PlanError, match=r"pipeline\.yaml:3:.*copy\.text.*150,000 of 200,000.*run again"):
        run(file)
    server.breaks_after = 0
    assert run(file) == "BUILT"
    assert server.asked == ["", "bytes=150000-"]


def test_what_is_another_file_now_is_refused_and_not_kept(server: Server, tmp_path: Path) -> None:
    file = lay(tmp_path / "here", f"{server.url}/there.txt{PIN}")
    server.content = CONTENT[::-1]
    with pytest.raises(PlanError, match=f"another sha256: {hashlib.sha256(CONTENT[::-1]).hexdigest()}"):
        run(file)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_what_it_went_on_from_may_have_been_of_another_file(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/there.txt{PIN}"
    part = web._path(url).with_name(".there.txt.part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"something else")
    assert run(lay(tmp_path / "here", url)) == "BUILT"
    assert len(server.asked) == 2


WRONG = {
    "https://a.b/c.txt": r"may be another file tomorrow; expected what it is: https://a.b/c.txt#sha256=",
    "https://me:word@a.b/c.txt" + PIN: "has a password in it",
    "https://a.b/" + PIN: "names no file",
    "ftp://a.b/c.txt" + PIN: "nothing brings files of ftp://",
    "hf://org/name": "no commit is named; expected the 40 digits of a commit",
    "hf://org/name@main": "'main' may be other files tomorrow",
    "org/name": "no file or directory .*; if it is the repository org/name, write hf://org/name@COMMIT",
}


@pytest.mark.parametrize("url", WRONG)
def test_mistakes_are_told_with_their_place_before_a_server_is_asked(tmp_path: Path, url: str) -> None:
    file = lay(tmp_path / "here", url)
    with pytest.raises(PlanError, match=f"pipeline.yaml:3:[0-9]+: copy.text: .*{WRONG[url]}"):
        run(file)
