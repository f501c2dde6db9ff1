"""Weights lent to a model while each module computes, and a model that takes others' parameters by itself."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stages.verification import lending, live, weights


class Output(dict):
    """What transformers' bodies return: a mapping whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Body(torch.nn.Module):
    """Two layers; the second is computed by the body itself where it ``reaches_in``, as some models do."""

    def __init__(self, *, reaches_in: bool) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Embedding(8, 4), torch.nn.Linear(4, 4, bias=False)
        self.reaches_in = reaches_in

    def forward(self, ids, use_cache):
        x = self.first(ids)
        x = torch.nn.functional.linear(x, self.second.weight) if self.reaches_in else self.second(x)
        return Output(last_hidden_state=x)


class Model(torch.nn.Module):
    """A body and a head that is the embedding's."""

    base_model_prefix = "body"

    def __init__(self, **options) -> None:
        super().__init__()
        self.body = Body(**options)
        self.head = torch.nn.Linear(4, 8, bias=False)
        self.head.weight = self.body.first.weight

    def forward(self, ids, use_cache):
        return SimpleNamespace(logits=self.head(self.body(ids, use_cache).last_hidden_state))


@pytest.fixture
def state():
    torch.manual_seed(0)
    table = torch.randn(8, 4)
    return {"body.first.weight": table, "body.second.weight": torch.randn(4, 4), "head.weight": table}


def hollow_model(**options):
    model = Model(**options)
    for parameter in model.parameters():
        parameter.data = torch.zeros(())  # whoever computes with what was not lent fails, or finds nothing
    return model


def test_each_module_has_its_weights_while_it_computes_and_no_longer(state):
    model, asked = hollow_model(reaches_in=False), []

    def values(name, _parameter):
        held = [each for each, parameter in model.named_parameters(remove_duplicate=False) if parameter.dim()]
        asked.append((name, held))
        return state[name]

    progress = []
    with torch.inference_mode(), lending.lent(model, values, progress=lambda *done: progress.append(done)) as used:
        logits = model(torch.tensor([[1, 2, 3]]), use_cache=False).logits
    wanted = state["body.first.weight"][1:4] @ state["body.second.weight"].T @ state["head.weight"].T
    torch.testing.assert_close(logits[0], wanted)
    assert asked == [(name, []) for name in ("body.first.weight", "body.second.weight", "head.weight")]
    assert not any(parameter.dim() for parameter in model.parameters())
    assert used == {"body.first", "body.second", "head"}
    assert progress == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("reaches_in", [False, True])
def test_what_a_model_takes_by_itself_is_there_all_the_time(state, monkeypatch, reaches_in):
    opened = []

    @contextmanager
    def loaded(_request, _progress, whole):
        opened.append(sorted(whole))
        model = Model(reaches_in=reaches_in)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            there = name.rpartition(".")[0] in whole
            parameter.data = state[name] if there else torch.zeros_like(parameter.data)
        with lending.lent(model, lambda name, _: state[name]) as used:
            yield model, used, {}

    monkeypatch.setattr(live, "loaded", loaded)
    request = SimpleNamespace(active_vocab_size=6)
    pieces, places = [[1, 2, 3], [4, 5]], [range(3), range(1, 2)]
    first, second = live._read(request, pieces, places, lambda *_: None)
    table, layer = state["body.first.weight"], state["body.second.weight"]
    wanted = (table @ layer.T @ table.T).numpy()
    np.testing.assert_allclose(first, wanted[[1, 2, 3]], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(second, wanted[[5], :6], rtol=1e-5, atol=1e-6)
    assert opened == ([[], ["body.second"]] if reaches_in else [[]])


def test_a_bundle_of_other_parameters_than_the_model_has_is_refused(state):
    rows = {name: weights.Rows(lambda: None, tuple(value.shape)) for name, value in state.items()}
    live._check_names(Model(reaches_in=False), rows)
    for wrong in (
        {**rows, "body.second.weight": weights.Rows(lambda: None, (4, 5))},
        {name: each for name, each in rows.items() if name != "body.second.weight"},
        {**rows, "body.third.weight": rows["head.weight"]},
    ):
        with pytest.raises(
            live.apart.LiveError, match=r"transformers' Model has different parameters: body\.(second|third)"
        ):
            live._check_names(Model(reaches_in=False), wrong)
