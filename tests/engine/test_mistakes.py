"""Mistakes that people make, and what they are told: each message says what to do instead."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.demo import Demo

PATH = "that is a path, and a result is named by its node, NODE@RUN or a digest"
HOME = Path.home()
SHOWN = "that is a path, and a result is named by its node; what it shows is named"
HUB = "if it is a name on the hub, write hf://some/Model-1B"
TABLE = [
    ("run pipline.yaml", "pipline.yaml: no such file; did you mean 'pipeline.yaml'?"),
    ("run join", "join: no such pipeline file; a node is named as in `pipeline run --stage join`"),
    ("run --stage read join", "join: no such pipeline file; a node is named as in `pipeline run --stage join`"),
    ("run words", "words: is a folder; expected a pipeline file"),
    ("run --stage jion", "no node is named 'jion'; did you mean 'join'?"),
    ("run --stage shape.lime", "no node is named 'shape.lime'; did you mean 'shape.line'?"),
    ("run --stage shape[lime]", "no node is named 'shape[lime]'; did you mean 'shape[line]'?"),
    ("run --stages join", "unknown argument '--stages'; did you mean '--stage'?"),
    ("run --dryrun", "unknown argument '--dryrun'; did you mean '--dry-run'?"),
    ("run --set glue", "--set glue: has no name and value; expected NAME=VALUE, a variable, or ENTRY.PARAMETER=VALUE"),
    ("run --set glu=x", "--set glu: unknown variable 'glu'; did you mean 'glue'?"),
    ("run --set joln.glue=x", "--set joln.glue: no entry 'joln'; did you mean 'join'?"),
    ("du join", "join: no such pipeline file; a node is named as in `pipeline run --stage join`"),
    ("run --bogus", "unknown argument '--bogus'; `pipeline run --help` lists its arguments"),
    ("remote kye", "WHAT: unknown value 'kye'; did you mean 'key'?"),
    ("gc --keep-runs x", "--keep-runs: found 'x'; expected a whole number; `pipeline gc --help` lists its arguments"),
    ("run --only", "--only needs a selection: add --stage NAME, --from NAME or --until NAME"),
    ("show words/a.txt", f"no node is named 'words/a.txt'; {PATH}"),
    ("show join@~9", "there is no run ~9: the history has 0; `pipeline runs` lists them"),
    ("show join", "join has no result yet; `pipeline run --stage join` makes it"),
    ("show shape.line", "shape[line] has no result yet; `pipeline run --stage shape.line` makes it"),
    ("log join", "join has no log yet: it has never run"),
    ("runs -n 0", "-n 0: expected at least 1"),
    ("statsu", "no verb 'statsu'; did you mean 'status'?"),
    ("xyzzy", "no verb 'xyzzy'; `pipeline help` lists them"),
    ("plan", "no verb 'plan'; here it is `pipeline run --dry-run`"),
    ("test", "no verb 'test'; here it is `pipeline verify`"),
    ("chta", "no verb 'chta'; did you mean 'chat'?"),
    ("chat", "the following arguments are required: BUNDLE; `pipeline chat --help` lists its arguments"),
    ("generate words --promt x", "unknown argument '--promt'; did you mean '--prompt'?"),
    ("show artifacts/demo/join", f"no node is named 'artifacts/demo/join'; {SHOWN} join"),
    ("lineage artifacts/demo/shape.line", f"no node is named 'artifacts/demo/shape.line'; {SHOWN} shape.line"),
    ("export words out", "no node is named 'words'; known: join, read, shape"),
    ("run --set text=nowhere", "--set text: read.text: there is no file or directory {folder}/nowhere"),
    ("run --set shape.shape=lime", "--set shape.shape: shape.shape: unknown value 'lime'; did you mean 'line'?"),
    ("gc --max-size 50", "--max-size 50: expected a size with its unit, such as 50GB, 20GiB or 500MB"),
    ("init", "what is it made for? add --checkpoint PATH"),
    ("init --checkpoint some/Model-1B", f"some/Model-1B: no such folder; {HUB}"),
    ("init new --checkpoint hf://Model-1B", "hf://Model-1B: is no repository; expected hf://ORG/NAME@COMMIT"),
    ("init new --checkpoint gs://bucket/x", "gs://bucket/x: nothing brings files of gs://; known: hf, http, https, s3"),
    ("init --checkpoint '~/words'", f"~/words: no such folder; `~` is read by the shell alone: write {HOME}/words"),
    ("build some/Model-1B", f"some/Model-1B: no such folder; {HUB}"),
    ("init --checkpoint words", "words: has no config.json; expected a checkpoint's folder, or a GGUF file"),
    ("init --checkpoint words/a.txt", "words/a.txt: is a file; expected a checkpoint's folder, or a .gguf file"),
    ("run --debug ''", "no node is named ''; known: join, read, shape"),
    ("remote add", "WHAT: unknown value 'add'; known: key, status"),
    (f"run {'a' * 256}.yaml", f"{'a' * 256}.yaml: File name too long"),
    ("build nowhere", "nowhere: no such file or folder; expected a checkpoint's folder, or a GGUF file"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "said"), TABLE, ids=[command for command, _ in TABLE])
def test_a_mistake_is_told_with_what_to_do(
    demo: Demo, command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo.folder)
    done = demo(*shlex.split(command))
    assert done.code == 2
    assert done.err == f"error: {said.replace('{folder}', str(demo.folder))}\n"
    assert done.out == ""
