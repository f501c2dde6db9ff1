"""The JSON Schema for editors: it accepts what the engine accepts and knows every stage's parameters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from stagegraph.spec.schema import json_schema
from tests.support.spec_files import SpecFiles

VALID = """
version: 1
name: demo-${vars.size}
vars: {checkpoint: data, size: 4, targets: [llvm, cuda], maybe: null}
stages:
  fetch: {with: {checkpoint: "${vars.checkpoint}", files: [a, "${vars.checkpoint}/b"]}}
  shape:
    needs: [fetch]
    foreach: {target: "${vars.targets}", size: [1, 2]}
    with: {target: "${each.target}", size: "${each.size}", ratio: 0.25, mode: manual, archs: [80, 90], limit: null}
    resources: {memory: 2 GiB, exclusive: false}
    timeout: 10m
  late: {uses: plain, needs: [shape], resources: {memory: 300}, timeout: 1.5}
  other: {uses: shape, with: {target: llvm}}
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SpecFiles:
    return SpecFiles(tmp_path, monkeypatch)


@pytest.fixture
def validator(spec: SpecFiles) -> jsonschema.Draft202012Validator:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_a_pipeline_that_loads_validates(spec: SpecFiles, validator: jsonschema.Draft202012Validator) -> None:
    assert len(spec.load(VALID).nodes) == 7
    assert [error.message for error in validator.iter_errors(yaml.safe_load(VALID))] == []


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("version: 1", "version: 2"),
        ("version: 1", ""),
        ("name: demo-${vars.size}", "name: ../up"),
        ("name: demo-${vars.size}", "nmae: demo"),
        ("maybe: null", "maybe: {a: 1}"),
        ("needs: [fetch]", "needs: fetch"),
        ("needs: [fetch]", "need: [fetch]"),
        ("size: [1, 2]", "size: []"),
        ("size: [1, 2]", "size: 3"),
        ("2 GiB", "2 GB"),
        ("exclusive: false", "exclusive: 0"),
        ("timeout: 10m", "timeout: 10 minutes"),
        ("timeout: 1.5", "timeout: 0"),
        ("uses: plain,", ""),
        ("uses: plain", "uses: plane"),
        ("uses: plain", "uses: ./plain.py"),
        ("uses: plain", "uses: './plain.py:'"),
        ("ratio: 0.25", "ratio: much"),
        ("mode: manual", "mode: manuel"),
        ("archs: [80, 90]", "archs: [80, 40]"),
        ("archs: [80, 90]", "archs: 80"),
        ('size: "${each.size}"', "size: 0"),
        ('size: "${each.size}"', "sise: 1"),
        ('checkpoint: "${vars.checkpoint}", files', "files"),
        ("  fetch: {with: {", "  fetch: {}\n  fitch: {uses: fetch, with: {bad: 1, "),
        ("with: {target: llvm}", "with: {target: llvn}"),
    ],
)
def test_what_the_engine_refuses_for_itself_does_not_validate(
    spec: SpecFiles, validator: jsonschema.Draft202012Validator, right: str, wrong: str
) -> None:
    assert right in VALID
    text = VALID.replace(right, wrong, 1)
    assert spec.problems(text)
    assert not validator.is_valid(yaml.safe_load(text))


def test_an_overlay_may_leave_out_what_it_extends(validator: jsonschema.Draft202012Validator) -> None:
    over: dict[str, Any] = {"extends": "base.yaml", "stages": {"shape": {"with": {"size": 2}}, "late": {"timeout": 5}}}
    assert validator.is_valid(over)
    assert not validator.is_valid({**over, "stages": {"shape": {"with": {"sise": 2}}}})


def test_parameters_carry_their_documentation(spec: SpecFiles) -> None:
    schema = json_schema()
    own = schema["properties"]["stages"]["properties"]["shape"]
    assert own["description"] == "Has a parameter of every type."
    parameters = schema["$defs"]["with-shape"]["properties"]
    reference = {"type": "string", "pattern": r"^.*\$\{.*$"}
    assert parameters["target"] == {
        "description": "what to build for",
        "anyOf": [{"enum": ["llvm", "cuda"]}, reference],
    }
    assert parameters["archs"] == {
        "description": "architectures",
        "anyOf": [
            {"type": "array", "items": {"anyOf": [{"type": "integer", "minimum": 50}, reference]}},
            reference,
        ],
        "default": [80, 86],
    }
    assert parameters["limit"] == {
        "description": "at most",
        "anyOf": [{"type": "integer"}, reference, {"type": "null"}],
        "default": None,
    }
    assert json.loads(json.dumps(schema)) == schema
