"""Interpolation, variables, the environment and ``--set``: values, places, paths and problems."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagegraph.spec.settings import EXPECTED
from tests.support.spec_files import SpecFiles

FORMS = "${vars.NAME}, ${each.NAME}, ${env.NAME} or ${secret.NAME}"


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


def tags(spec: SpecFiles, variables: str, text: str, *overrides: str, **env: str) -> tuple[str, ...]:
    """Return the texts that a list parameter gets."""
    body = f"\nvars: {variables}\nstages: {{shape: {{with: {{target: llvm, tags: {text}}}}}}}"
    found: tuple[str, ...] = spec.entries(body, *overrides, env=env)["shape"].params.tags
    return found


def test_a_whole_reference_is_typed(spec: SpecFiles) -> None:
    shape = spec.entries("""
        vars: {n: 3, x: 1e-2, yes: true, list: [a, b], none: null, alias: "${vars.list}"}
        stages:
          shape:
            with:
              target: llvm
              size: ${vars.n}
              ratio: ${ vars.x }
              fast: "${vars.yes}"
              tags: ${vars.alias}
              limit: ${vars.none}
    """)["shape"]
    assert shape.params == type(shape.params)("llvm", size=3, ratio=0.01, fast=True, tags=("a", "b"), limit=None)
    assert str(shape.places["size"]) == "p.yaml:3:11", "where the variable is defined"
    assert str(shape.places["tags"]) == "p.yaml:3:40", "followed to the end"


def test_references_within_text_are_concatenated(spec: SpecFiles) -> None:
    variables = '{n: 010, x: 0.5, yes: true, none: ~, who: "w${vars.n}"}'
    assert tags(
        spec,
        variables,
        '["a${vars.n}b", "${vars.x}/${vars.yes}", "${vars.none}", "<${vars.who}>"]'.replace(
            '"${vars.none}"', '"-${vars.none}"'
        ),
    ) == ("a10b", "0.5/true", "-null", "<w10>")


def test_escapes(spec: SpecFiles) -> None:
    assert tags(
        spec, "{n: 1, raw: '$${vars.n}'}", "['$${vars.n}', '$$${x}', '$n', '$${a}${vars.n}', '${vars.raw}']"
    ) == (
        "${vars.n}",
        "$${x}",
        "$n",
        "${a}1",
        "${vars.n}",
    )


def test_environment_values_are_core_scalars(spec: SpecFiles) -> None:
    shape = spec.entries(
        "\nstages: {shape: {with: {target: '${env.T}', size: '${env.N}', tags: ['x${env.N}']}}}",
        env={"T": "cuda", "N": "010"},
    )["shape"]
    assert (shape.params.target, shape.params.size, shape.params.tags) == ("cuda", 10, ("x10",))


def test_overrides_are_scalars_or_lists(spec: SpecFiles) -> None:
    body = """
        vars: {target: llvm, size: 1, tags: []}
        stages: {shape: {with: {target: "${vars.target}", size: "${vars.size}", tags: "${vars.tags}"}}}
    """
    shape = spec.entries(body, "vars.target=cuda", "vars.size=3", "vars.size=0x10", "vars.tags=[a, '1', \"b c\"]")[
        "shape"
    ]
    assert shape.params == type(shape.params)("cuda", size=16, tags=("a", "1", "b c"))
    assert {str(place) for place in shape.places.values()} == {
        "--set vars.target",
        "--set vars.size",
        "--set vars.tags",
    }


@pytest.mark.parametrize("text", ["a: b", "a #b", "*x", "!x", "{a: 1}", "x=y", "- a", "${env.T}x"])
def test_unquoted_overrides_stand_for_themselves(spec: SpecFiles, text: str) -> None:
    assert tags(spec, "{a: b}", "['${vars.a}']", f"vars.a={text}", T="t") == (text.replace("${env.T}", "t"),)


def test_relative_paths_start_where_they_are_written(spec: SpecFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    spec.write("base/base.yaml", "vars: {root: data, name: tiny, given: x}")
    spec.write(
        "p.yaml",
        """version: 1
name: demo
extends: base/base.yaml
vars: {here: "own"}
stages:
  fetch:
    with:
      checkpoint: ${vars.given}
      extra: ${env.EXTRA}
      files: ["${vars.root}", "${vars.root}/x", "x/${vars.name}", "${vars.here}", "${env.EXTRA}/y", /abs]
""",
    )
    elsewhere = spec.root / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    from stagegraph.spec.load import load

    (fetch,) = load(Path("../p.yaml"), ["vars.given=mine"], {"EXTRA": "more"}).nodes
    above = spec.root
    assert fetch.params.checkpoint == f"{elsewhere}/mine"
    assert fetch.params.extra == f"{elsewhere}/more"
    assert fetch.params.files == (
        f"{above}/base/data",
        f"{above}/base/data/x",
        f"{above}/x/tiny",
        f"{above}/own",
        f"{elsewhere}/more/y",
        "/abs",
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("${vars.scheem}", "unknown variable 'scheem'; did you mean 'scheme'?"),
        ("a${vars.zzz}", "unknown variable 'zzz'; known: list, scheme"),
        (
            "${scheme}",
            (
                "unknown reference '${scheme}'; expected ${vars.NAME}, ${each.NAME}, ${env.NAME} or ${secret.NAME}; "
                "did you mean '${vars.scheme}'?"
            ),
        ),
        ("${var.scheme}", f"unknown reference '${{var.scheme}}'; expected {FORMS}"),
        ("${}", "unknown reference '${}'; expected ${vars.NAME}, ${each.NAME}, ${env.NAME} or ${secret.NAME}"),
        (
            "${vars.scheme",
            (f"'${{vars.scheme' has no closing brace; expected {FORMS}, or '$${{' for a literal '${{'"),
        ),
        ("x-${vars.list}", "'${vars.list}' is a list inside a text; expected a scalar there, or the list alone"),
        ("${env.NOPE}", "'${env.NOPE}': environment variable 'NOPE' is not set; `export NOPE=VALUE` sets it"),
        (
            "${each.target}",
            (
                "'${each.target}' means nothing here; "
                "expected it under 'with', 'resources' or 'timeout' of an entry with 'foreach'"
            ),
        ),
    ],
)
def test_references_that_cannot_be_resolved(spec: SpecFiles, text: str, problem: str) -> None:
    body = f"\nvars: {{scheme: q0, list: [a]}}\nstages: {{shape: {{with: {{target: llvm, mode: '{text}'}}}}}}"
    assert spec.wrong(body) == [f"p.yaml:4:45: {problem}"]


def test_unknown_each(spec: SpecFiles) -> None:
    body = "\nstages: {shape: {foreach: {target: [llvm]}, with: {target: '${each.tarjet}'}}}"
    assert spec.wrong(body) == ["p.yaml:3:60: unknown '${each.tarjet}'; did you mean 'target'?"]


def test_no_variables_at_all(spec: SpecFiles) -> None:
    body = "\nstages: {shape: {with: {target: '${vars.t}'}}}"
    assert spec.wrong(body) == ["p.yaml:3:33: unknown variable 't'; the pipeline defines none"]


def test_circular_variables_are_reported_once_with_their_path(spec: SpecFiles) -> None:
    body = """
        vars:
          a: ${vars.b}
          b: x${vars.c}
          c: ["${vars.a}"]
          d: ${vars.d}
          e: ${vars.a}
        stages: {shape: {with: {target: "${vars.e}", mode: "${vars.b}"}}}
    """
    assert spec.wrong(body) == [
        (
            "p.yaml:4:6: variables refer to each other in a circle: a -> b -> c -> a "
            "(a: p.yaml:4:6, b: p.yaml:5:6, c: p.yaml:6:6); expected one with a value"
        ),
        "p.yaml:7:6: variables refer to each other in a circle: d -> d (d: p.yaml:7:6); expected one with a value",
    ]
    assert (
        spec.entries(body, "vars.c=manual", "vars.a=llvm", "vars.b=auto", "vars.d=1")["shape"].params.target == "llvm"
    )


def test_a_long_chain_of_variables(spec: SpecFiles) -> None:
    chain = "".join(f"\n  v{i}: ${{vars.v{i + 1}}}" for i in range(3000))
    body = f"\nvars:{chain}\n  v3000: llvm\nstages: {{shape: {{with: {{target: '${{vars.v0}}'}}}}}}"
    assert spec.entries(body)["shape"].params.target == "llvm"


def test_variables_are_scalars_or_lists_of_them(spec: SpecFiles) -> None:
    body = """
        vars: {a: {b: 1}, c: [[1]], "d e": 1, f: ["${vars.g}"], g: [x]}
        stages: {plain: {}}
    """
    assert spec.wrong(body) == [
        "p.yaml:3:11: vars.a: found a mapping; expected a scalar or a list of scalars",
        "p.yaml:3:23: vars.c: found a list; expected a scalar or a list of scalars",
        "p.yaml:3:29: 'd e' cannot name a variable; expected letters, digits, '_' and '-'",
        "p.yaml:3:60: vars.f: found a list; expected a scalar or a list of scalars",
    ]


@pytest.mark.parametrize(
    ("setting", "targets"),
    [
        ("target=cuda", {"shape[a,x]": "cuda", "shape[a,y]": "cuda", "shape[b,x]": "cuda", "shape[b,y]": "cuda"}),
        ("shape.target=cuda", {"shape[a,x]": "cuda", "shape[a,y]": "cuda", "shape[b,x]": "cuda", "shape[b,y]": "cuda"}),
        ("shape[*,x].target=cuda", {"shape[a,x]": "cuda", "shape[b,x]": "cuda"}),
        ("shape.b,y.target=cuda", {"shape[b,y]": "cuda"}),
    ],
)
def test_a_parameter_of_all_instances_or_of_some(spec: SpecFiles, setting: str, targets: dict[str, str]) -> None:
    body = """
    vars: {target: llvm}
    stages: {shape: {foreach: {one: [a, b], two: [x, y]}, with: {target: "${vars.target}"}}}
    """
    nodes = spec.entries(body, setting)
    assert {name: node.params.target for name, node in nodes.items()} == dict.fromkeys(nodes, "llvm") | targets


def test_a_parameter_that_is_not_written(spec: SpecFiles) -> None:
    (node,) = spec.entries("\nstages: {shape: {with: {target: llvm}}}", "shape.size=7").values()
    assert (node.params.size, str(node.places["size"])) == (7, "--set shape.size")


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("foo", f"--set foo: has no name and value; expected {EXPECTED}"),
        ("vars.target", f"--set vars.target: has no name and value; expected {EXPECTED}"),
        ("=cuda", f"--set =cuda: has no name and value; expected {EXPECTED}"),
        ("tarjet=cuda", "--set tarjet: unknown variable 'tarjet'; did you mean 'target'?"),
        ("stages.shape=1", "--set stages.shape: no entry 'stages'; known: shape"),
        ("shapes.target=x", "--set shapes.target: no entry 'shapes'; did you mean 'shape'?"),
        ("shape.tarjet=a", "--set shape.tarjet: unknown parameter 'tarjet' of stage 'shape'; did you mean 'target'?"),
        ("shape.target=cudo", "--set shape.target: shape.target: unknown value 'cudo'; did you mean 'cuda'?"),
        ("shape[a].target=cuda", "--set shape[a].target: 'shape' has no such instance: it has no 'foreach'"),
        ("vars.tarjet=cuda", "--set vars.tarjet: unknown variable 'tarjet'; did you mean 'target'?"),
        ("vars.target=cudo", "--set vars.target: shape.target: unknown value 'cudo'; did you mean 'cuda'?"),
        ("vars.target=[llvm]", "--set vars.target: shape.target: found a list; expected text"),
        ("vars.target=", "--set vars.target: shape.target: found null; expected text"),
    ],
)
def test_overrides_that_are_wrong(spec: SpecFiles, setting: str, problem: str) -> None:
    body = "\nvars: {target: llvm}\nstages: {shape: {with: {target: '${vars.target}'}}}"
    assert spec.wrong(body, setting) == [problem]


def test_an_override_that_is_not_yaml(spec: SpecFiles) -> None:
    (problem,) = spec.wrong("\nvars: {a: 1}\nstages: {plain: {}}", "vars.a=[1")
    assert problem.startswith("--set vars.a: cannot be read as YAML: ")
    assert "\n" not in problem
