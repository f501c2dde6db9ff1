"""Mistakes that people make, and what they are told: each message says what to do instead."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.demo import Demo

PATH = "that is a path, and a result is named by its node, NODE@RUN or a digest"
HOME = Path.home()
SHOWN = "that is a path, and a result is named by its node; what it shows is named"
NODE = "a node is named as in"
LIST = "expected a list of at least one scalar"
BOTH = "expected two results, runs or files"
HELP = "`pipeline {} --help` lists its arguments"
POSITIONS = "expected positions, or 0 for all there are"
BUNDLE = "give the folder that `pipeline export` or stage bundle wrote"
EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-qwen"
HUB = "if it is a name on the hub, write hf://some/Model-1B"
TABLE = [
    ("run pipline.yaml", "pipline.yaml: no such file; did you mean 'pipeline.yaml'?"),
    ("run join", f"join: no such pipeline file; {NODE} `pipeline run --stage join`"),
    ("run --stage read join", f"join: no such pipeline file; {NODE} `pipeline run --stage join`"),
    ("run pipeline.yaml --stage read join", f"'join' is one argument too many; {NODE} `pipeline run --stage join`"),
    ("run pipeline.yaml b.yaml", "'b.yaml' is one argument too many; `pipeline run` takes one pipeline file"),
    ("pipeline.yaml", "no verb 'pipeline.yaml'; here it is `pipeline run pipeline.yaml`"),
    ("-v", "no verb before '-v'; options follow it, as in `pipeline run -v`"),
    ("help statsu", "no verb 'statsu'; did you mean 'status'?"),
    ("run -j many", "--jobs: found 'many'; expected a whole number; `pipeline run --help` lists its arguments"),
    ("run --set", "--set: has no value; expected --set NAME=VALUE"),
    ("run --json=yes", "--json: found 'yes'; expected no value; `pipeline run --help` lists its arguments"),
    ("run --set 'glue = x'", "--set 'glue = x': has a space before its '='; expected NAME=VALUE without one"),
    ("run --set shapes=line", f"--set shapes: shape.foreach.shape: found the text 'line'; {LIST}, as [line]"),
    ("run ../pipeline.yaml", "../pipeline.yaml: no such file; expected a pipeline file"),
    ("params join", f"join: no such pipeline file; {NODE} `pipeline params --stage join`"),
    ("status join", "join: no such pipeline file; `pipeline status` takes a pipeline file alone"),
    ("runs @~0", "@~0: no such pipeline file; a run is named as in `pipeline runs --run @~0`"),
    ("report a.html", "a.html: no such pipeline file; a file to write is named as in `pipeline report -o a.html`"),
    ("report -o words", "words: Is a directory; name a file that can be written"),
    ("schema pipeline.yaml", "'pipeline.yaml' is one argument too many; `pipeline schema` takes options alone"),
    ("show read join", "join: no such pipeline file; `pipeline show` takes one REF"),
    ("show --stage read", f"unknown argument '--stage'; {NODE} `pipeline show REF`"),
    ("show read@yesterday", "no run begins with 'yesterday'; `pipeline runs` lists them"),
    ("diff read pipeline.yaml", f"pipeline.yaml is a pipeline file, and the other is none; {BOTH}"),
    ("graph --entries --instances", f"--instances and --entries contradict each other; {HELP.format('graph')}"),
    ("graph -o dag.png", "dag.png: .png is no format of a graph; known: .svg, .dot, .mmd, .txt"),
    ("completion tcsh", "SHELL: unknown value 'tcsh'; known: bash, fish, zsh"),
    ("generate words --temperature hot", f"--temperature: found 'hot'; expected a number; {HELP.format('generate')}"),
    ("generate x", "x: no such file or directory, and no node is named 'x'; known: join, read, shape"),
    ("compare nope", "no node is named 'nope'; known: join, read, shape"),
    ("init {example}", "{example} is a checkpoint: `pipeline init --checkpoint {example}` is for it"),
    ("init words/a.txt --checkpoint {example}", "words/a.txt: is a file; expected the folder to write into"),
    ("init new --checkpoint {example} --context-window -1", f"--context-window -1: {POSITIONS}"),
    ("chat words/nowhere", f"words/nowhere: no such folder; {BUNDLE}"),
    ("chat words", f"words: no bundle.json there, so it is not a bundle; {BUNDLE}"),
    ("init new --checkpoint", "--checkpoint: has no value; expected --checkpoint PATH"),
    ("build words -o out more", "'more' is one argument too many; `pipeline build` takes one CHECKPOINT"),
    ("run words", "words: is a folder; expected a pipeline file"),
    ("run --stage jion", "no node is named 'jion'; did you mean 'join'?"),
    ("run --stage shape.lime", "no node is named 'shape.lime'; did you mean 'shape.line'?"),
    ("run --stage shape[lime]", "no node is named 'shape[lime]'; did you mean 'shape[line]'?"),
    ("run --stages join", "unknown argument '--stages'; did you mean '--stage'?"),
    ("run --dryrun", "unknown argument '--dryrun'; did you mean '--dry-run'?"),
    ("run --set glue", "--set glue: has no name and value; expected NAME=VALUE, a variable, or ENTRY.PARAMETER=VALUE"),
    ("run --set glu=x", "--set glu: unknown variable 'glu'; did you mean 'glue'?"),
    ("run --set joln.glue=x", "--set joln.glue: no entry 'joln'; did you mean 'join'?"),
    ("du join", "join: no such pipeline file; `pipeline du` takes a pipeline file alone"),
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
    (f"run {'a' * 256}.yaml", f"{'a' * 256}.yaml: File name too long; expected a pipeline file"),
    ("build nowhere", "nowhere: no such file or folder; expected a checkpoint's folder, or a GGUF file"),
]  # fmt: skip


# What stands in the place of the stages of a pipeline file -> where, and what the message ends with.
FILES = [
    ("", "1:1: ", "missing key 'stages'; expected a mapping of entries"),
    ("stages:\n\tread: {}", "4:1: ", "; YAML is indented with spaces, and this is a tab"),
    ("stages: a: b", "3:10: ", "; a text that has ': ' in it needs quotes, or the line above lacks its ':'"),
    ("stages: {read: {with: {text: ${vars.x}}}}", "3:31: ", "inside braces and brackets a text with ${ } needs quotes"),
    ("stages: {read: {text: w}}", "3:17: ", "it is a parameter: write it under 'with', as with: {text: ...}"),
    ("stages: {read: }", "3:16: ", "keys of uses, needs, with, foreach, resources, timeout, or {}"),
    ("stages:\n  with: {}", "4:3: ", "it is a key of an entry: indent it further than the entry's name"),
    ("stages: {join: {needs: shape}}", "3:24: ", "found the text 'shape'; expected a list of entries, as [shape]"),
    ("stages: {shape: {foreach: {shape: line}}}", "3:35: ", f"found the text 'line'; {LIST}, as [line]"),
    ("stages: {read: {with: {text: '${env.NO}'}}}", "3:30: ", "variable 'NO' is not set; `export NO=VALUE` sets it"),
]  # fmt: skip


@pytest.mark.parametrize(("stages", "place", "said"), FILES, ids=[stages for stages, *_ in FILES])
def test_a_mistake_in_a_file_is_told_with_what_to_do(
    demo: Demo, stages: str, place: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo.folder)
    monkeypatch.delenv("NO", raising=False)
    (demo.folder / "p.yaml").write_text(f"version: 1\nname: p\n{stages}\n")
    done = demo("status", "p.yaml")
    assert (done.code, done.out) == (2, "")
    assert [line for line in done.err.splitlines() if line.startswith(f"error: p.yaml:{place}") and line.endswith(said)]


@pytest.mark.parametrize(("command", "said"), TABLE, ids=[command for command, _ in TABLE])
def test_a_mistake_is_told_with_what_to_do(
    demo: Demo, command: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo.folder)
    command, said = (text.replace("{example}", str(EXAMPLE)) for text in (command, said))
    done = demo(*shlex.split(command))
    assert done.code == 2
    assert done.err == f"error: {said.replace('{folder}', str(demo.folder))}\n"
    assert done.out == ""
