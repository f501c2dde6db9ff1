"""Stages in a file beside pipeline.yaml: what their key covers, and how each mistake is told."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from stagegraph import Pipeline
from tests.support.demo import Demo

STAGE = '''\
"""Rates words."""

from dataclasses import dataclass

from stagegraph.stage import Context, In, Out, Stage, param


class Rate(Stage):
    """Rates words."""

    id = "rate"

    @dataclass(frozen=True)
    class Params:
        factor: int = param("of every letter", default=1)

    inputs = {"words": In("read", "words", "the words")}
    outputs = {"rating": Out("rating.json", "a number")}

    def run(self, ctx: Context) -> None:
        import helper
        from json import dumps

        (ctx.out / "rating.json").write_text(dumps(helper.rate(ctx.input("words").read_text()) * ctx.params.factor))
'''
HELPER = '"""Helps."""\nfrom depth.deep import weight\n\ndef rate(text):\n    return len(text) * weight()\n'
DEEP = '"""Weighs."""\n\ndef weight():\n    return 1\n'
PIPELINE = """\
version: 1
name: demo
stages:
  read: {with: {text: words}}
  rate:
    uses: ./my_stage.py:Rate
    needs: [read]
"""


@pytest.fixture
def local(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> Demo:
    monkeypatch.chdir(demo.folder)
    files = {"my_stage.py": STAGE, "helper.py": HELPER, "depth/__init__.py": "", "depth/deep.py": DEEP}
    for name, text in {**files, "pipeline.yaml": PIPELINE}.items():
        (demo.folder / name).parent.mkdir(exist_ok=True)
        (demo.folder / name).write_text(text)
    return demo


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def rating(local: Demo) -> int:
    return int(json.loads(local.path("rate", "rating.json").read_text()))


def test_a_stage_beside_the_pipeline_runs_and_all_it_imports_counts(local: Demo) -> None:
    assert local.run().outcomes == {"read": "BUILT", "rate": "BUILT"}
    assert rating(local) == len("some words here\n")
    assert local.run().outcomes == {"read": "HIT", "rate": "HIT"}
    for file, old, new in (
        ("my_stage.py", "* ctx.params.factor", "+ 1"),
        ("helper.py", "len(text) *", "len(text) * 2 *"),
        ("depth/deep.py", "return 1", "return 3"),
        ("depth/__init__.py", "", "LOUD = 1\n"),
    ):
        replace(local.folder / file, old, new)
        status = local("status", "--json").json["nodes"]
        module = f"local.{file.removesuffix('.py').replace('/', '.').removesuffix('.__init__')}"
        assert [(node["status"], node["reasons"]) for node in status] == [
            ("HIT", []),
            ("STALE", [f"code {module} changed"]),
        ]
        assert local.run().outcomes["rate"] in {"BUILT", "UNCHANGED"}
    assert rating(local) == 16 * 2 * 3 + 1
    replace(local.folder / "helper.py", '"""Helps."""', '"""Helps, it says."""  # and this')
    assert local.run().outcomes["rate"] == "HIT"


def test_a_file_that_comes_to_lie_beside_it_counts_once_it_is_imported(local: Demo) -> None:
    """``from json import dumps`` means another module then, and in a file beside the pipeline alone."""
    local.run()
    (local.folder / "json.py").write_text("def dumps(number):\n    return '7'\n")
    assert local("status", "--check").code == 4
    assert local.run().outcomes["rate"] == "BUILT"
    assert rating(local) == 7


def test_where_the_folder_is_changes_no_key(local: Demo, tmp_path: Path) -> None:
    local.run()
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("my_stage.py", "helper.py", "pipeline.yaml"):
        shutil.copy(local.folder / name, moved / name)
    for name in ("depth", "words", "artifacts"):
        shutil.copytree(local.folder / name, moved / name)
    nodes = local("status", str(moved / "pipeline.yaml"), "--json").json["nodes"]
    assert [node["status"] for node in nodes] == ["HIT", "HIT"]


def test_two_pipelines_in_one_process_keep_their_own_files(local: Demo, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "my_stage.py").write_text(STAGE.replace("default=1", "default=5"))
    shutil.copy(local.folder / "pipeline.yaml", other / "pipeline.yaml")
    with Pipeline("pipeline.yaml") as one, Pipeline(other / "pipeline.yaml") as two:
        factors = [pipeline.dag.by_name["rate"].spec.params.factor for pipeline in (one, two)]
    assert factors == [1, 5]
    (other / "my_stage.py").write_text(STAGE.replace("default=1", "default=6"))
    with Pipeline(other / "pipeline.yaml") as two:
        assert two.dag.by_name["rate"].spec.params.factor == 6, "a pipeline that is opened again sees the edit"


@pytest.mark.parametrize(
    ("late", "use"),
    [
        ("import depth.deep", "depth.deep.weight()"),
        ("import depth.deep as d", "d.weight()"),
        ("from depth import deep", "deep.weight()"),
        ("from .depth.deep import weight", "weight()"),
        ("from . import depth, helper; from .depth import deep", "deep.weight()"),
        ("import sys, depth.deep, json as j", "depth.deep.weight() + len(j.dumps(sys.argv)) * 0"),
    ],
)
def test_every_way_to_import_a_file_beside_it(local: Demo, late: str, use: str) -> None:
    replace(local.folder / "my_stage.py", "import helper", late)
    replace(local.folder / "my_stage.py", 'helper.rate(ctx.input("words").read_text())', use)
    assert local.run().outcomes["rate"] == "BUILT"
    assert rating(local) == 1
    replace(local.folder / "depth" / "deep.py", "return 1", "return 2")
    assert local.run().outcomes["rate"] == "BUILT"


def test_what_it_takes_of_the_shipped_package_counts(local: Demo) -> None:
    """The stages that come with the engine change with its versions; so does what is made with their help."""
    replace(local.folder / "my_stage.py", "import helper", "import helper, stages.runtime.sampling")
    with Pipeline("pipeline.yaml") as pipeline:
        pipeline.run()
        (decision,) = [d for d in pipeline.planner.plan(pipeline.dag.nodes) if d.node.name == "rate"]
    assert decision.document is not None
    assert {"stages.runtime.sampling", "local.my_stage", "local.helper"} <= set(decision.document["code"])


@pytest.mark.parametrize("kind", ["rows", "parts"])
def test_rows_and_parts_are_named_by_the_module(local: Demo, kind: str) -> None:
    said = {
        "rows": '\n    def rows(self, params, facts):\n        return {f"{__name__}:TABLE": "a"}\n',
        "parts": '\n    parts = {"word": __name__}\n',
    }
    text = STAGE.replace("class Rate", 'TABLE = {"a": 1, "b": 2}\n\n\nclass Rate').replace(
        'id = "rate"\n', 'id = "rate"\n' + said[kind]
    )
    (local.folder / "my_stage.py").write_text(text)
    assert local.run().outcomes["rate"] == "BUILT"
    replace(local.folder / "my_stage.py", '"b": 2', '"b": 3')
    assert local.run().outcomes["rate"] == ("HIT" if kind == "rows" else "UNCHANGED")


def test_a_run_that_finds_it_in_place_imports_nothing_heavy(local: Demo) -> None:
    import subprocess

    replace(local.folder / "my_stage.py", "import helper", "import helper, numpy")
    assert local.run().outcomes["rate"] == "BUILT"
    code = (
        "import sys; from stagegraph import registry; from stagegraph.cli.main import dispatch\n"
        "registry.shipped = lambda: registry.Provider(stages={'read': 'fakes.read:Read'}, verbs={})\n"
        "dispatch(['run']); import json; print(json.dumps([*sys.modules]), file=sys.stderr)"
    )
    env_path = str(local.folder / "lib")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {env_path!r}); {code}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert "2 HIT" in done.stdout
    loaded = set(json.loads(done.stderr.splitlines()[-1]))
    assert not {"numpy", "tvm", "torch", "transformers"} & loaded


FILE, HERE = "./my_stage.py", "pipeline.yaml:6:11: "
TYPES = "expected str, int, float, bool, Source, a list[...] or tuple[..., ...] of one, or one of these | None"
DID_YOU_MEAN = "did you mean 'words'?"
MISTAKES = [  # (what uses says, files, what is said)
    ("./none.py:Rate", {}, f"{HERE}./none.py: no such file; expected a Python file in the pipeline's folder"),
    (f"{FILE}:Rata", {}, f"{HERE}{FILE} has no class 'Rata'; expected {FILE}:CLASS; did you mean 'Rate'?"),
    (FILE, {}, f"{HERE}{FILE} names no class; expected {FILE}:CLASS; known: Rate"),
    (
        "./helper.py:rate",
        {},
        f"{HERE}./helper.py:rate is no stage; expected a class derived from stagegraph.stage.Stage",
    ),
    ("../x.py:Rate", {}, f"{HERE}../x.py lies outside the pipeline's folder FOLDER; move it there"),
    ("/x.py:Rate", {}, f"{HERE}/x.py lies outside the pipeline's folder FOLDER; move it there"),
    (
        "./my-stage.py:Rate",
        {"my-stage.py": STAGE},
        f"{HERE}./my-stage.py cannot be imported; expected names of letters, digits and '_' before '.py'",
    ),
]
BROKEN = [  # (files, what is said)
    ({"my_stage.py": "x = 1\ndef f(:\n"}, f"my_stage.py:2:7: {FILE} cannot be loaded: invalid syntax"),
    (
        {"my_stage.py": "x = 1\ny = (z)\n"},
        f"my_stage.py:2:6: {FILE} cannot be loaded: NameError: name 'z' is not defined",
    ),
    (
        {"my_stage.py": "import helper\n", "helper.py": "import nothere\n"},
        f"helper.py:1:1: {FILE} cannot be loaded: ModuleNotFoundError: No module named 'nothere'",
    ),
    (
        {"my_stage.py": "import helper\n", "helper.py": "(\n"},
        f"helper.py:1:1: {FILE} cannot be loaded: '(' was never closed",
    ),
    ({"my_stage.py": "raise SystemExit(3)\n"}, f"my_stage.py:1:1: {FILE} cannot be loaded: SystemExit: 3"),
]
UNFIT = [  # (what of the stage, by what, what is said)
    ('id = "rate"', "", f'{HERE}{FILE}:Rate has no id; expected id = "...", the name by which others read its outputs'),
    (
        "Params:",
        "Parms:",
        f"{HERE}{FILE}:Rate has no parameters; expected a dataclass Params in it, which may be empty",
    ),
    ('Out("rating.json", "a number")', "3", f"{HERE}{FILE}:Rate: one of its outputs is no port; expected Out(...)"),
    (
        ": int",
        ": set",
        f"{HERE}stage '{FILE}:Rate' cannot be loaded: stage 'rate': parameter 'factor' is declared as set; {TYPES}",
    ),
    (
        '"words", "the',
        '"wards", "the',
        "pipeline.yaml:5:3: rate: port 'words' reads read.wards, but that stage has no such output; " + DID_YOU_MEAN,
    ),
    (
        "    def run",
        "    def tools(self, params):\n        return {}[1]\n\n    def run",
        "my_stage.py:21:16: rate: stage 'rate' cannot be planned: KeyError: 1",
    ),
]


@pytest.mark.parametrize(
    ("uses", "files", "says"),
    [
        *MISTAKES,
        *((f"{FILE}:Rate", files, says) for files, says in BROKEN),
        *((f"{FILE}:Rate", {"my_stage.py": STAGE.replace(old, new)}, says) for old, new, says in UNFIT),
    ],
)
def test_a_mistake_is_one_line_with_its_place(local: Demo, uses: str, files: dict[str, str], says: str) -> None:
    replace(local.folder / "pipeline.yaml", "./my_stage.py:Rate", uses)
    for name, text in files.items():
        (local.folder / name).write_text(text)
    result = local("status", "--json")
    assert (result.code, result.json["problems"]) == (2, [says.replace("FOLDER", str(local.folder))])


def test_a_file_that_a_base_names_lies_beside_the_base(local: Demo) -> None:
    (local.folder / "base").mkdir()
    (local.folder / "base" / "pipeline.yaml").write_text(PIPELINE.replace("text: words", "text: ../words"))
    (local.folder / "base" / "my_stage.py").write_text(STAGE)
    (local.folder / "base" / "helper.py").write_text("def rate(text):\n    return 9\n")
    (local.folder / "pipeline.yaml").write_text("extends: base/pipeline.yaml\n")
    assert local.run().outcomes["rate"] == "BUILT"
    assert rating(local) == 9
    replace(local.folder / "base" / "helper.py", "return 9", "return 8")
    assert "code local.base.helper changed" in local("status").out


def test_the_schema_for_editors_takes_it(local: Demo) -> None:
    import jsonschema
    import yaml

    from stagegraph.spec.schema import json_schema

    jsonschema.validate(yaml.safe_load((local.folder / "pipeline.yaml").read_text()), json_schema())


def test_completion_knows_its_node(local: Demo) -> None:
    from stagegraph.cli.completion import complete

    assert complete(["show", "ra"]) == ["rate"]


def test_a_stage_may_link_a_small_input_which_is_a_copy(local: Demo) -> None:
    replace(local.folder / "my_stage.py", "import helper", "import os")
    text = (local.folder / "my_stage.py").read_text()
    body = text.index("        from json")
    (local.folder / "my_stage.py").write_text(
        text[:body] + '        os.link(ctx.input("words"), ctx.out / "rating.json")\n'
    )
    assert local.run().outcomes == {"read": "BUILT", "rate": "BUILT"}
    assert local.path("rate", "rating.json").read_bytes() == local.path("read", "words.txt").read_bytes()
    assert local.run().outcomes == {"read": "HIT", "rate": "HIT"}
    assert local("fsck", str(local.pipeline)).code == 0
