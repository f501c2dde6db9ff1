"""``pipeline models``: every family by name, with its keys."""

from __future__ import annotations

import json

import pytest

from stagegraph.cli.main import dispatch, main
from stages.models import FAMILIES, load_family, native
from tests.support.output_schema import validate


def test_every_family_is_listed_with_what_it_honours(capsys):
    assert dispatch(["models"]) == 0
    text = capsys.readouterr().out
    for name in filter(native, FAMILIES):
        family = load_family(name)
        assert f"{name}  {', '.join(family.architectures)}" in text
        assert family.supports
    assert "use_parallel_residual" in text
    assert "pruned_heads" not in text


def test_one_family_has_all_its_keys_in_one_document(capsys):
    assert dispatch(["models", "gpt_neox", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["gpt_neox"]
    validate(found, "models")
    keys = found["gpt_neox"]["keys"]
    assert {key: kind for kind, names in keys.items() for key in names} == dict(load_family("gpt_neox").keys)


def test_an_unknown_family_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["models", "gpt5"])
    assert caught.value.code == 2
    assert "unknown value 'gpt5'; did you mean 'gptj'?" in capsys.readouterr().err
