"""Entries and nodes: keys, stages, needs, cycles, foreach, resources, timeouts and typed parameters."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagegraph import registry
from stagegraph.spec.model import Resources
from stagegraph.spec.settings import EXPECTED
from tests.support.spec_files import SpecFiles

USES = "an entry of another name says which it is with `uses`"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


def shape(with_: str) -> str:
    """A pipeline of one entry; its parameters start at column 2 of line 4."""
    return f"\nstages: {{shape: {{with: {{target: llvm,\n {with_}}}}}}}"


def plain(keys: str) -> str:
    """A pipeline of one entry without parameters; its keys start at column 18 of line 3."""
    return f"\nstages: {{plain: {{{keys}}}}}"


def test_foreach_is_a_product_in_the_written_order(spec: SpecFiles) -> None:
    nodes = spec.entries("""
        vars: {targets: [llvm, cuda]}
        stages:
          plain: {}
          build:
            uses: shape
            needs: [plain]
            foreach: {target: "${vars.targets}", size: [2, 010], fast: [true]}
            with: {target: "${each.target}", size: "${each.size}", fast: "${each.fast}", tags: ["${each.size}-x"]}
    """)
    assert list(nodes) == [
        "plain",
        *(f"build[{target},{size},true]" for target in ("llvm", "cuda") for size in (2, 10)),
    ]
    node = nodes["build[cuda,10,true]"]
    assert (node.entry, node.stage.id, node.needs) == ("build", "shape", ("plain",))
    assert node.each == {"target": "cuda", "size": "10", "fast": "true"}
    assert node.params == type(node.params)("cuda", size=10, fast=True, tags=("10-x",))
    assert {name: str(place) for name, place in node.places.items()} == {
        "target": "p.yaml:3:24",  # the element of the variable that the foreach takes
        "size": "p.yaml:9:52",
        "fast": "p.yaml:9:65",
        "tags": "p.yaml:10:88",
    }


def test_foreach_values_are_records_and_paths_with_exclusions(spec: SpecFiles) -> None:
    nodes = spec.entries("""
        stages:
          build:
            uses: shape
            foreach:
              target: [llvm, cuda]
              how: [{name: small, size: 2, tag: s}, {name: big, size: 9, tag: b}]
              tag: [models/one, /models/two]
              exclude: [{target: cuda, how: big}, {tag: /elsewhere/two, how: small}]
              include: [{target: cuda, how: {name: huge, size: 99, tag: h}, tag: models/one}]
            with: {target: "${each.target}", size: "${each.how.size}", tags: ["${each.how.tag}", "${each.tag}"]}
    """)
    assert list(nodes) == [
        "build[llvm,small,one]",
        "build[llvm,big,one]",
        "build[llvm,big,two]",
        "build[cuda,small,one]",
        "build[cuda,huge,one]",
    ]
    huge = nodes["build[cuda,huge,one]"]
    assert huge.each == {"target": "cuda", "how": "huge", "tag": "one"}
    assert (huge.params.size, huge.params.tags) == (99, ("h", "models/one"))
    assert nodes["build[llvm,big,two]"].params.tags == ("b", "/models/two")


def test_a_key_named_like_a_rule_may_hold_values(spec: SpecFiles) -> None:
    assert list(spec.entries(plain("foreach: {include: [a, b]}"))) == ["plain[a]", "plain[b]"]


def test_entries_share_what_defaults_say(spec: SpecFiles) -> None:
    nodes = spec.entries("""
        defaults:
          with: {size: 7, target: "${each.target}"}
          foreach: {target: [llvm, cuda]}
          timeout: 2m
        stages:
          plain: {foreach: null, timeout: 5}
          shape: {with: {tags: [x]}}
          other: {uses: shape, foreach: {target: [cuda]}, with: {size: 1}}
    """)
    assert list(nodes) == ["plain", "shape[llvm]", "shape[cuda]", "other[cuda]"]
    assert [(n.params.size, n.params.target) for n in list(nodes.values())[1:]] == [
        (7, "llvm"),
        (7, "cuda"),
        (1, "cuda"),
    ]
    assert [n.timeout for n in nodes.values()] == [5.0, 120.0, 120.0, 120.0]


def test_defaults_that_are_wrong(spec: SpecFiles) -> None:
    assert spec.wrong("""
        defaults:
          needs: [plain]
          with: {syze: 7}
        stages:
          plain: {}
    """) == [
        "p.yaml:4:3: unknown key 'needs'; known: foreach, resources, timeout, with",
        "p.yaml:5:10: defaults.with: no stage of this pipeline has a parameter 'syze'",
    ]


def test_parameters_take_defaults_and_become_immutable(spec: SpecFiles) -> None:
    node = spec.entries(shape("archs: [90], ratio: 2"))["shape"]
    assert node.params == type(node.params)("llvm", archs=(90,), ratio=2.0)  # type: ignore[call-arg]
    assert isinstance(node.params.ratio, float)
    assert set(node.places) == {"target", "archs", "ratio"}


def test_optional_sources_may_be_empty(spec: SpecFiles) -> None:
    node = spec.entries("\nstages: {fetch: {with: {checkpoint: data, extra: ''}}}")["fetch"]
    assert (node.params.extra, node.params.files) == ("", ())


@pytest.mark.parametrize(
    ("with_", "problem"),
    [
        ("size: '3'", "4:8: shape.size: found the text '3'; expected a whole number"),
        ("size: 1.0", "4:8: shape.size: found the number 1.0; expected a whole number"),
        ("size: true", "4:8: shape.size: found true; expected a whole number"),
        ("size: 0", "4:8: shape.size: found the number 0; expected at least 1"),
        ("size: null", "4:8: shape.size: found null; expected a whole number"),
        ("limit: x", "4:9: shape.limit: found the text 'x'; expected a whole number or null"),
        ("ratio: x", "4:9: shape.ratio: found the text 'x'; expected a number"),
        ("ratio: false", "4:9: shape.ratio: found false; expected a number"),
        ("fast: yes", "4:8: shape.fast: found the text 'yes'; expected true or false"),
        ("fast: 1", "4:8: shape.fast: found the number 1; expected true or false"),
        ("mode: 5", "4:8: shape.mode: found the number 5; expected text, in quotes"),
        ("mode: manuel", "4:8: shape.mode: unknown value 'manuel'; did you mean 'manual'?"),
        ("mode: zzz", "4:8: shape.mode: unknown value 'zzz'; known: auto, manual"),
        ("mode: {a: 1}", "4:8: shape.mode: found a mapping; expected text"),
        ("archs: 80", "4:9: shape.archs: found the number 80; expected a list, each a whole number"),
        ("archs: [80, x]", "4:14: shape.archs: found the text 'x'; expected a whole number"),
        ("archs: [80, 40]", "4:14: shape.archs: found the number 40; expected at least 50"),
        ("tags: [[a]]", "4:9: shape.tags: found a list; expected text"),
        ("sise: 1", "4:2: unknown parameter 'sise' of stage 'shape'; did you mean 'size'?"),
    ],
)
def test_parameters_that_are_wrong(spec: SpecFiles, with_: str, problem: str) -> None:
    assert spec.wrong(shape(with_)) == [f"p.yaml:{problem}"]


@pytest.mark.parametrize("path", ["''", '"a\\0b"', "5", "[a]"])
def test_sources_are_paths(spec: SpecFiles, path: str) -> None:
    (problem,) = spec.wrong(f"\nstages: {{fetch: {{with: {{checkpoint: {path}}}}}}}")
    assert problem.startswith("p.yaml:3:37: fetch.checkpoint: found ")
    assert "path" in problem


def test_missing_and_unknown_parameters(spec: SpecFiles) -> None:
    assert spec.wrong("\nstages: {shape: {}, fetch: {with: {}}, plain: {with: {a: 1}}}") == [
        "p.yaml:3:10: missing parameter 'target' of stage 'shape'; expected text: what to build for",
        "p.yaml:3:29: missing parameter 'checkpoint' of stage 'fetch'; expected a path: directory to read",
        "p.yaml:3:55: unknown parameter 'a' of stage 'plain'; it has none",
    ]


@pytest.mark.parametrize(
    ("stages", "problem"),
    [
        ("{plane: {}}", "10: unknown stage 'plane'; did you mean 'plain'?"),
        ("{a: {uses: plane}}", "20: unknown stage 'plane'; did you mean 'plain'?"),
        ("{a: {uses: zzz}}", "20: unknown stage 'zzz'; known: fetch, plain, shape, shell"),
        ("{zzz: {}}", f"10: unknown stage 'zzz'; known: fetch, plain, shape, shell; {USES}"),
        ("{a: {uses: [plain]}}", "20: a.uses: found a list; expected the name of a stage"),
        (
            "{a: [plain]}",
            ("13: a: found a list; expected a mapping with keys of uses, needs, with, foreach, resources, timeout"),
        ),
        ("{plain: {need: []}}", "18: unknown key 'need'; did you mean 'needs'?"),
        ("{A_b: {uses: plain}}", "10: 'A_b' cannot name an entry; expected lower-case letters, digits and hyphens"),
        ("{plain: {with: 1}}", "24: plain.with: found the number 1; expected a mapping"),
        ("{plain: {needs: [plain]}}", "26: plain.needs: 'plain' needs itself; expected other entries"),
        ("{plain: {needs: other}}", "25: plain.needs: found the text 'other'; expected a list of entries, as [other]"),
        ("{plain: {needs: [1]}}", "26: plain.needs: found the number 1; expected the name of an entry"),
        ("{plain: {needs: [plian]}}", "26: plain.needs: unknown entry 'plian'; did you mean 'plain'?"),
    ],
)
def test_entries_that_are_wrong(spec: SpecFiles, stages: str, problem: str) -> None:
    assert spec.wrong(f"\nstages: {stages}") == [f"p.yaml:3:{problem}"]


def test_needs_listed_twice(spec: SpecFiles) -> None:
    assert spec.wrong("\nstages: {plain: {}, late: {uses: plain, needs: [plain, plain]}}") == [
        "p.yaml:3:56: late.needs: 'plain' is listed twice; expected each entry once"
    ]


def test_a_stage_that_cannot_be_loaded(spec: SpecFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.shipped().stages, "gone", "no_such_module:Gone")
    monkeypatch.setitem(registry.shipped().stages, "other", "tests.support.spec_files:Plain")
    assert spec.wrong("\nstages: {gone: {}, other: {}}") == [
        "p.yaml:3:10: stage 'gone' cannot be loaded: No module named 'no_such_module'",
        (
            "p.yaml:3:20: stage 'other' cannot be loaded: tests.support.spec_files:Plain: "
            "provides stage 'plain' but is registered as 'other'"
        ),
    ]


def test_cycles_name_their_path_and_every_edge(spec: SpecFiles) -> None:
    body = """
        stages:
          a: {uses: plain, needs: [b]}
          b: {uses: plain, needs: [d, c]}
          c: {uses: plain, needs: [a]}
          d: {uses: plain, needs: [e, a]}
          e: {uses: plain, needs: [d]}
          f: {uses: plain, needs: [a]}
    """
    assert spec.wrong(body) == [
        (
            "p.yaml:4:28: entries need each other in a circle: a -> b -> c -> a (a needs b: p.yaml:4:28, "
            "b needs c: p.yaml:5:31, c needs a: p.yaml:6:28); expected one of them to need less"
        ),
        (
            "p.yaml:7:28: entries need each other in a circle: d -> e -> d (d needs e: p.yaml:7:28, "
            "e needs d: p.yaml:8:28); expected one of them to need less"
        ),
    ]


@pytest.mark.parametrize(
    ("foreach", "problem"),
    [
        ("[a]", "27: plain.foreach: found a list; expected a mapping"),
        ("{}", "27: plain.foreach: found an empty mapping; expected a mapping of names to lists"),
        ("{x: a}", "31: plain.foreach.x: found the text 'a'; expected a list of at least one scalar, as [a]"),
        ("{x: []}", "31: plain.foreach.x: found an empty list; expected a list of at least one scalar"),
        ("{x: [[a]]}", "32: plain.foreach.x: found a list; expected a scalar, or a record of a name and other values"),
        ("{x: [{a: 1}]}", "32: plain.foreach.x: a record without 'name'; expected what its nodes are called"),
        ("{x: [/m/a, /n/a]}", "38: plain.foreach.x: 'a' is written twice; expected distinct values"),
        ("{x: [a], exclude: [{y: a}]}", "47: plain.foreach: no key 'y' in it; known: x"),
        (
            "{x: [a], exclude: [{x: b}]}",
            "46: plain.foreach: excludes nothing; expected values of a combination there is",
        ),
        ("{x: [a], exclude: [{x: a}]}", "45: plain.foreach: excludes every combination; expected some to be left"),
        ("{x: [a], z: [b], include: [{x: c}]}", "54: plain.foreach: does not say z; expected every key"),
        ("{x: [a], include: [{x: a}]}", "46: plain.foreach: is there already; expected another combination"),
        ("{x: [a, b, a]}", "38: plain.foreach.x: 'a' is written twice; expected distinct values"),
        ("{x: [1, '1']}", "35: plain.foreach.x: '1' is written twice; expected distinct values"),
        (
            "{x: [/]}",
            (
                "32: plain.foreach.x: '/' cannot be part of a node's name; "
                "expected letters, digits, '.', '_', '+' and '-'"
            ),
        ),
        (
            "{x: ['a,b']}",
            (
                "32: plain.foreach.x: 'a,b' cannot be part of a node's name; "
                "expected letters, digits, '.', '_', '+' and '-'"
            ),
        ),
        (
            "{x: ['']}",
            (
                "32: plain.foreach.x: '' cannot be part of a node's name; "
                "expected letters, digits, '.', '_', '+' and '-'"
            ),
        ),
        (
            "{x: ['${each.x}']}",
            (
                "32: '${each.x}' means nothing here; "
                "expected it under 'with', 'resources' or 'timeout' of an entry with 'foreach'"
            ),
        ),
    ],
)
def test_foreach_that_is_wrong(spec: SpecFiles, foreach: str, problem: str) -> None:
    assert spec.wrong(plain(f"foreach: {foreach}")) == [f"p.yaml:3:{problem}"]


def test_too_many_nodes_and_too_long_names(spec: SpecFiles) -> None:
    keys = ", ".join(f"k{i}: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]" for i in range(30))
    (problem,) = spec.wrong(plain(f"foreach: {{{keys}}}"))
    assert problem == f"p.yaml:3:27: plain.foreach: makes {10**30:,} nodes; expected at most 30,000"
    (problem,) = spec.wrong(plain(f"foreach: {{x: [{'长' * 70}]}}"))
    assert problem == f"p.yaml:3:10: 'plain[{'长' * 70}]' is too long a name; expected at most 200 bytes"


def test_an_unsound_foreach_does_not_hide_or_multiply_other_problems(spec: SpecFiles) -> None:
    body = """
        stages:
          shape:
            foreach: {target: [llvm, llvn], size: []}
            with: {target: "${each.target}", size: "${each.size}", mode: zzz, tags: "${each.nope}"}
    """
    assert spec.wrong(body) == [
        "p.yaml:5:43: shape.foreach.size: found an empty list; expected a list of at least one scalar",
        "p.yaml:6:66: shape.mode: unknown value 'zzz'; known: auto, manual",
        "p.yaml:6:77: unknown '${each.nope}'; known: size, target",
    ]


@pytest.mark.parametrize(
    ("keys", "resources", "timeout"),
    [
        ("resources: {memory: 2 GiB, exclusive: true}", Resources(2048, True), None),
        ("resources: {memory: 1.5GiB}", Resources(1536), None),
        ("resources: {labels: [big, card=2]}", Resources(0, False, {"big": 0, "card": 2}), None),
        ("resources: {memory: 300}, timeout: 90", Resources(300), 90.0),
        ("resources: {memory: 0.5 MiB}, timeout: 0.5", Resources(1), 0.5),
        ("resources: {}, timeout: 10m", Resources(), 600.0),
        ("timeout: 1.5 h", Resources(), 5400.0),
        ("timeout: 2d", Resources(), 172800.0),
        ("timeout: 30s", Resources(), 30.0),
    ],
)
def test_resources_and_timeouts(spec: SpecFiles, keys: str, resources: Resources, timeout: float | None) -> None:
    node = spec.entries(plain(keys))["plain"]
    assert (node.resources, node.timeout) == (resources, timeout)


def test_resources_may_differ_by_instance(spec: SpecFiles) -> None:
    nodes = spec.entries(
        plain("foreach: {mem: [1, 2]}, resources: {memory: '${each.mem} GiB'}, timeout: '${each.mem}h'")
    )
    assert [(node.resources.memory, node.timeout) for node in nodes.values()] == [(1024, 3600.0), (2048, 7200.0)]


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        (
            "resources: [1]",
            "29: plain.resources: found a list; expected a mapping with keys of memory, exclusive, labels",
        ),
        ("resources: {memroy: 1}", "30: unknown key 'memroy'; did you mean 'memory'?"),
        *(
            (
                f"resources: {{memory: {memory}}}",
                f"38: plain.resources.memory: found {found}; expected a size such as '2 GiB', or a number of MiB",
            )
            for memory, found in [
                ("2 GB", "the text '2 GB'"),
                ("-1", "the number -1"),
                ("true", "true"),
                ("[1]", "a list"),
                (".inf", "the number inf"),
            ]
        ),
        (
            "resources: {labels: big}",
            "38: plain.resources.labels: found the text 'big'; expected a list such as [fast, NAME=2]",
        ),
        (
            "resources: {labels: [a b]}",
            "39: plain.resources.labels: found the text 'a b'; expected a name, or NAME=AMOUNT",
        ),
        ("resources: {exclusive: 1}", "41: plain.resources.exclusive: found the number 1; expected true or false"),
        *(
            (
                f"timeout: {timeout}",
                f"27: plain.timeout: found {found}; expected a time such as '10m', or a number of seconds",
            )
            for timeout, found in [
                ("10 minutes", "the text '10 minutes'"),
                ("0", "the number 0"),
                (".nan", "the number nan"),
                ("null", "null"),
            ]
        ),
    ],
)
def test_resources_and_timeouts_that_are_wrong(spec: SpecFiles, keys: str, problem: str) -> None:
    assert spec.wrong(plain(keys)) == [f"p.yaml:3:{problem}"]


def test_one_mistake_in_a_variable_is_one_problem(spec: SpecFiles) -> None:
    body = """
        vars: {target: cudo}
        stages:
          shape: {foreach: {size: [1, 2, 3]}, with: {target: "${vars.target}", size: "${each.size}"}}
          s1: {uses: shape, with: {target: "${vars.target}"}}
          s2: {uses: shape, with: {target: "${vars.target}"}}
          s3: {uses: shape, with: {target: "${vars.target}"}}
          s4: {uses: shape, with: {target: "${vars.target}"}}
    """
    assert spec.wrong(body) == [
        (
            "p.yaml:3:16: shape.target, s1.target, s2.target, s3.target and 1 more: "
            "unknown value 'cudo'; did you mean 'cuda'?"
        )
    ]


def test_all_problems_together_sorted_by_place(spec: SpecFiles) -> None:
    text = """version: 3
name: demo
vars: {a: "${vars.b}", t: cudo, a: 1}
stages:
  late: {uses: plain, needs: [shape, lat], color: red}
  shape:
    with: {target: "${vars.t}", size: "${env.SIZE}", zize: 1}
    needs: [late]
    timeout: soon
  plane: {}
"""
    found = spec.problems(text, "vars.c=1", "foo")
    assert found == [
        f"--set foo: has no name and value; expected {EXPECTED}",
        "--set vars.c: unknown variable 'c'; known: a, t; `pipeline params` lists parameters",
        "p.yaml:1:10: version: found the number 3; expected 1, the only version of the format there is",
        "p.yaml:3:11: unknown variable 'b'; known: a, t",
        "p.yaml:3:27: shape.target: unknown value 'cudo'; did you mean 'cuda'?",
        "p.yaml:3:33: duplicate key 'a'; it is already written at p.yaml:3:8",
        (
            "p.yaml:5:31: entries need each other in a circle: late -> shape -> late "
            "(late needs shape: p.yaml:5:31, shape needs late: p.yaml:8:13); expected one of them to need less"
        ),
        "p.yaml:5:38: late.needs: unknown entry 'lat'; did you mean 'late'?",
        "p.yaml:5:44: unknown key 'color'; known: foreach, needs, resources, timeout, uses, with",
        "p.yaml:7:39: '${env.SIZE}': environment variable 'SIZE' is not set; `export SIZE=VALUE` sets it",
        "p.yaml:7:54: unknown parameter 'zize' of stage 'shape'; did you mean 'size'?",
        "p.yaml:9:14: shape.timeout: found the text 'soon'; expected a time such as '10m', or a number of seconds",
        "p.yaml:10:3: unknown stage 'plane'; did you mean 'plain'?",
    ]
