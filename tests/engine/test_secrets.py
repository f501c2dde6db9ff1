"""Secrets reach their stage and nothing else: every file of the store and every verb is searched for their text."""

from __future__ import annotations

import json
import os
import stat
import textwrap
from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.cli import live
from stagegraph.planning.secrets import Mask
from tests.support.demo import Demo

WORDS = 'hunter2/"quoted" \\ und mehr'
KEEP = '''
    """Uses a secret, and says it wherever a stage can."""
    from __future__ import annotations
    import dataclasses, json, os, subprocess, sys
    from dataclasses import dataclass
    from fakes.counting import count
    from stagegraph.stage import Context, Out, Stage, StageError, param

    class Keep(Stage):
        """Uses a secret."""
        id = "keep"
        parts = {"piece": "fakes.keep"}

        @dataclass(frozen=True)
        class Params:
            """Parameters."""
            token: str = param("what nobody may see")
            tokens: list[str] = param("more of them", default=())
            header: str = param("made of it", default="")
            size: int = param("a number", default=0)
            kind: str = param("how", default="good")

        outputs = {"out": Out("out.txt", "a file")}

        def resolve(self, params):
            if params.kind == "unsound":
                raise StageError(f"{params.token} is no good")
            return dataclasses.replace(params, header=f"Bearer {params.token}")

        def tools(self, params):
            return {"remote": f"as told {params.token}"}

        def run(self, ctx: Context) -> None:
            count("keep")
            p = ctx.params
            assert p.header == f"Bearer {p.token}"
            (ctx.out / "out.txt").write_text(str(len(p.token)) + str("MY_TOKEN" in os.environ))
            print("begin", p.token, repr(p.token), json.dumps({"token": p.token}), flush=True)
            os.write(1, b"x" * 100_000 + p.token[:7].encode())
            os.write(1, p.token[7:].encode() + b" end\\n")
            subprocess.run([sys.executable, "-c", "import sys; print(sys.stdin.read())"], input=p.token, text=True)
            ctx.warn(f"warned of {p.token}")
            ctx.fact("heard", {p.token: [p.token]})
            ctx.summary(f"summed up {p.token}")
            ctx.progress(1, 1, f"things of {p.token}", p.token)
            if p.kind == "fails":
                raise StageError(f"refused {p.token}")
            if p.kind == "bug":
                raise KeyError(p.token)
            if p.kind == "writes":
                (ctx.out / "out.txt").write_text("a" * 5_000_000 + p.token)
            if p.kind == "views":
                ctx.view("page", p.token)
            if p.kind == "remembers":
                (ctx.out / "piece").write_text("piece")
                ctx.remember("piece", {"of": p.token}, ctx.out / "piece")
            if p.kind == "crashes":
                os.abort()
'''
PIPELINE = """\
version: 1
name: demo
vars: {kind: good, token: "${secret.MY_TOKEN}"}
stages:
  keep: {with: {token: "${vars.token}", tokens: ["a ${secret.MY_TOKEN} b"], kind: "${vars.kind}"}}
  read: {with: {text: words}}
"""


@pytest.fixture
def keeper(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    (demo.package / "keep.py").write_text(textwrap.dedent(KEEP).lstrip())
    registry.shipped().stages["keep"] = "fakes.keep:Keep"
    demo.pipeline.write_text(PIPELINE)
    monkeypatch.setenv("MY_TOKEN", WORDS)
    return demo


def nowhere(folder: Path, *texts: str, secret: str = WORDS) -> None:
    """Search every file, and every name, below a folder, and texts, for a secret however it is written."""
    forms = {secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], "hunter2"}
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    for form in forms:
        for path in files:
            assert form.encode() not in path.read_bytes(), path
            assert form not in str(path)
        for text in texts:
            assert form not in text


VERBS = [
    ["status"],
    ["status", "--json"],
    ["explain", "keep"],
    ["explain", "keep", "--json"],
    ["show", "keep"],
    ["show", "keep", "--json"],
    ["log", "keep"],
    ["log", "keep", "--json"],
    ["lineage", "keep"],
    ["lineage", "keep", "--json"],
    ["runs"],
    ["runs", "--json"],
    ["diff", "keep", "keep@~0"],
    ["diff", "@~1", "@~0", "--json"],
    ["graph"],
    ["run"],
    ["run", "--dry-run", "--json"],
    ["run", "--force", "--json"],
    ["run", "--check-reproducible"],
    ["du"],
    ["gc", "--dry-run", "--json"],
    ["fsck"],
]


def test_a_secret_is_used_and_nowhere_to_be_seen(keeper: Demo, monkeypatch) -> None:
    monkeypatch.setattr(live, "PLAIN_SECONDS", 0.0)  # so that progress is shown
    first = keeper.run()
    assert "keep: 1 of 1 things of ***, ***" in first.err
    assert first.outcomes == {"keep": "BUILT", "read": "BUILT"}
    assert keeper.path("keep", "out.txt").read_text() == f"{len(WORDS)}False"
    log = keeper("log", "keep", str(keeper.pipeline)).out
    assert 'begin *** \'***\' {"token": "***"}' in log
    assert "x*** end\n***\n" in log, "also what comes in two writes and from a child"
    record = keeper("show", "keep", str(keeper.pipeline), "--json").json["keep"]
    assert record["warnings"] == ["warned of ***"]
    assert record["facts"] == {"heard": {"***": ["***"]}}
    monkeypatch.setenv("MY_TOKEN", WORDS + "!")
    second = keeper.run()
    assert second.outcomes == {"keep": "BUILT", "read": "HIT"}
    reasons = second.json["nodes"][0]["reasons"]
    assert [reason.partition(":")[0] for reason in reasons if reason.count("***") == 2] == ["header", "token", "tokens"]
    monkeypatch.setenv("MY_TOKEN", WORDS)
    assert set(keeper.run().outcomes.values()) == {"HIT"}, "the same secret is the same key"
    said = [first.out, first.err, second.out, second.err, log]
    for verb, *rest in VERBS:
        names = [word for word in rest if not word.startswith("--")]
        result = keeper(verb, *names, str(keeper.pipeline), *rest[len(names) :])
        assert result.code in {0, 4}, (verb, rest, result.err)
        said += [result.out, result.err]
    target = keeper.folder / "exported"
    keeper("export", "keep", str(keeper.pipeline), "--to", str(target))
    nowhere(keeper.folder / "artifacts", *said)
    assert "***" in said[VERBS.index(["show", "keep"]) * 2 + 5]


@pytest.mark.parametrize("kind", ["fails", "bug", "writes", "views", "remembers", "crashes", "unsound"])
def test_a_failure_tells_no_secret_either(keeper: Demo, kind: str) -> None:
    result = keeper.run("--set", f"vars.kind={kind}")
    assert result.code == (2 if kind == "unsound" else 1)
    log = keeper("log", "keep", str(keeper.pipeline))
    explained = keeper("explain", "keep", str(keeper.pipeline))
    keeper.run()  # a sound one, so that there is something to search
    nowhere(keeper.folder / "artifacts", result.out, result.err, log.out, log.err, explained.out)
    expected = {"writes": "out.txt holds a secret", "views": "page holds a secret", "remembers": "no part may"}
    assert expected.get(kind, "") in result.out


def test_the_key_of_the_store_is_its_users_alone_and_a_key_is_told_by_no_guess(keeper: Demo) -> None:
    assert keeper("status", str(keeper.pipeline)).code == 0
    path = keeper.folder / "artifacts" / ".stagegraph" / "secret.key"
    assert not path.exists(), "looking makes none"
    keeper.run()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = keeper("show", "keep", str(keeper.pipeline), "--json").json["keep"]["document"]["params"]
    path.write_bytes(os.urandom(32))
    assert keeper.run().outcomes == {"keep": "UNCHANGED", "read": "HIT"}
    after = keeper("show", "keep", str(keeper.pipeline), "--json").json["keep"]["document"]["params"]
    assert before["token"].keys() == after["token"].keys() == {"***"}
    assert before["token"] != after["token"]
    path.write_bytes(b"short")
    result = keeper.run()
    assert result.code == 3
    assert "secret.key is damaged; remove it" in result.err


@pytest.mark.parametrize(
    ("with_", "said"),
    [
        ("token: a, size: '${secret.MY_TOKEN}'", "keep.size: found a secret; expected a whole number, which is shown"),
        (
            "token: '${secret.NONE}'",
            "'${secret.NONE}': environment variable 'NONE' is not set; `export NONE=VALUE` sets it",
        ),
        (
            "token: '${secret.SHORT}'",
            "environment variable 'SHORT' has less than 4 characters; expected a longer secret",
        ),
    ],
)
def test_where_a_secret_cannot_be(keeper: Demo, monkeypatch, with_: str, said: str) -> None:
    monkeypatch.setenv("SHORT", "abc")
    keeper.pipeline.write_text(f"version: 1\nname: demo\nstages:\n  keep: {{with: {{{with_}}}}}\n")
    result = keeper.run()
    assert result.code == 2
    assert said in result.err


@pytest.mark.parametrize(
    "text",
    [
        "name: '${secret.MY_TOKEN}'\nstages:\n  read: {with: {text: words}}\n",
        "name: demo\nstages:\n  read: {with: {text: '${secret.MY_TOKEN}'}}\n",
        "name: demo\nstages:\n  it: {uses: '${secret.MY_TOKEN}'}\n",
        "name: demo\nstages:\n  read: {needs: ['${secret.MY_TOKEN}'], with: {text: words}}\n",
        "name: demo\nstages:\n  read: {foreach: {a: ['${secret.MY_TOKEN}']}, with: {text: words}}\n",
        "name: demo\nstages:\n  read: {timeout: '${secret.MY_TOKEN}', with: {text: words}}\n",
    ],
)
def test_a_secret_is_refused_unseen_where_it_would_be_shown(keeper: Demo, text: str) -> None:
    keeper.pipeline.write_text(f"version: 1\n{text}")
    result = keeper.run()
    assert result.code == 2
    assert "a secret" in result.err
    assert "hunter2" not in result.out + result.err


def test_a_public_variable_that_looks_secret_is_warned_of(keeper: Demo, monkeypatch, caplog) -> None:
    monkeypatch.setenv("HF_TOKEN", "abc")
    monkeypatch.setenv("MONKEY", "abc")
    text = PIPELINE.replace('${secret.MY_TOKEN}"', '${env.HF_TOKEN}${env.MONKEY}"', 1)
    keeper.pipeline.write_text(text)
    assert keeper("status", str(keeper.pipeline)).code == 0
    (record,) = caplog.records
    place = f"{keeper.pipeline}:3:27"
    advice = "write ${secret.HF_TOKEN} if nobody may see it"
    assert record.getMessage() == f"warning: {place}: ${{env.HF_TOKEN}} is kept and shown in clear; {advice}"


def test_a_mask_finds_what_comes_in_pieces() -> None:
    mask = Mask(["secret", "secretive"])
    for cut in range(1, 30):
        data = b"a secretive secret of secre and secrets secr"
        out, held = b"", b""
        for start in range(0, len(data), cut):
            said, held = mask.split(held + data[start : start + cut], ended=False)
            out += said
        out += mask.split(held, ended=True)[0]
        assert b"secret" not in out, cut
        assert out.endswith(b"of secre and ***s secr")
