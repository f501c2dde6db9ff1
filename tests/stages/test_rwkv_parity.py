"""CPU libraries of a tiny RWKV-4, driven by the runtime's session, against transformers with the same weights."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest

from stages.runtime import state
from stages.runtime.errors import RequestError
from tests.support import rwkv_models
from tests.support.compiled_qwen import relative

TOLERANCES = {"q0f32": 1e-3, "q4f32_1": 2e-3, "q4f16_1": 2e-2}
IDS = [int(token) for token in np.random.default_rng(3).integers(0, rwkv_models.MODEL["vocab_size"], 110)]
OTHER = [int(token) for token in np.random.default_rng(4).integers(0, rwkv_models.MODEL["vocab_size"], 110)]
STEPS = 32


class Case:
    """A build and the reference's logits of IDS and OTHER."""

    def __init__(self, folder, scheme, rescale_every, **options):
        changes = {"rescale_every": rescale_every}
        if scheme == "q0f32":  # no groups, so that nothing is a multiple of anything; a norm that sees the halving
            changes |= {"hidden_size": 90, "attention_hidden_size": 131, "intermediate_size": 205}
            changes |= {"layer_norm_epsilon": 0.02, "num_hidden_layers": 3 if rescale_every == 0 else 5}
        checkpoint = rwkv_models.write_checkpoint(folder / "checkpoint", **changes)
        self.built = rwkv_models.build(folder, checkpoint, scheme, **options)
        self.tolerance = TOLERANCES[scheme]
        if scheme == "q0f32":
            self.ids, self.other = (rwkv_models.published_logits(checkpoint, ids) for ids in (IDS, OTHER))
        else:
            self.ids, self.other = (rwkv_models.held_logits(self.built, ids) for ids in (IDS, OTHER))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    @functools.cache
    def build(scheme, rescale_every, sep_embed):
        return Case(tmp_path_factory.mktemp(scheme), scheme, rescale_every, sep_embed=sep_embed)

    return lambda scheme="q0f32", rescale_every=2, *, sep_embed=True: build(scheme, rescale_every, sep_embed)


BUILDS = [
    ("q0f32", 2),
    ("q0f32", 0),
    *(pytest.param(scheme, 2, marks=pytest.mark.slow) for scheme in ("q4f32_1", "q4f16_1")),
]


@pytest.mark.parametrize(("scheme", "rescale_every"), BUILDS)
def test_every_step_after_prefills_of_any_length_equals_the_reference(case, scheme, rescale_every):
    found = case(scheme, rescale_every)
    session = found.built.session()
    errors = []
    for length in (1, 7, 64, rwkv_models.CHUNK + 1):
        sequence = session.add()
        errors.append(relative(session.prefill(sequence, IDS[:length]), found.ids[length - 1]))
        for position in range(length, length + STEPS):
            errors += [relative(session.decode(sequence, IDS[position]), found.ids[position])]
        session.remove(sequence)
    assert len(errors) == 4 * (STEPS + 1)
    print(f"{scheme}, rescale_every {rescale_every}: largest error {max(errors):.1e}")  # pytest -rP shows it
    assert max(errors) <= found.tolerance, errors


@pytest.mark.parametrize(("scheme", "rescale_every"), BUILDS)
def test_sequences_of_a_batch_do_not_see_each_other(case, scheme, rescale_every):
    found = case(scheme, rescale_every)
    session = found.built.session(sequences=3)
    _, a, b = session.add(), session.add(), session.add()
    errors = []

    def compare(rows, first, second):
        errors.extend([relative(rows[0], found.ids[first - 1]), relative(rows[1], found.other[second - 1])])

    compare(session.batch_prefill({a: IDS[:5], b: OTHER[:12]}), 5, 12)
    compare(session.batch_prefill({a: IDS[5:14], b: OTHER[12:13]}), 14, 13)  # a state of the one and of the other
    for step in range(STEPS):
        compare(session.batch_decode({a: IDS[14 + step], b: OTHER[13 + step]}), 15 + step, 14 + step)
    first = 14 + STEPS
    compare(session.batch_decode({b: OTHER[first - 1], a: IDS[first]})[::-1], first + 1, first)
    errors.append(relative(session.decode(a, IDS[first + 1]), found.ids[first + 1]))
    errors.append(relative(session.prefill(b, OTHER[first : first + 9]), found.other[first + 8]))
    assert max(errors) <= found.tolerance, errors


@pytest.mark.parametrize(("scheme", "rescale_every"), BUILDS)
def test_tokens_taken_back_leave_no_trace(case, scheme, rescale_every):
    found = case(scheme, rescale_every)
    session = found.built.session()
    sequence = session.add()
    session.prefill(sequence, IDS[:30])
    for token in OTHER[: state.HISTORY - 1]:  # as many as can be taken back
        session.decode(sequence, token)
    session.popn(sequence, state.HISTORY - 1)
    rows = [session.decode(sequence, token) for token in IDS[30:40]]
    session.popn(sequence, 4)
    rows += [session.decode(sequence, token) for token in IDS[36:60]]
    expected = np.concatenate([found.ids[30:40], found.ids[36:60]])
    assert session.length(sequence) == 60
    assert max(map(relative, rows, expected)) <= found.tolerance
    session.popn(sequence, 3)
    assert relative(session.prefill(sequence, IDS[57:66]), found.ids[65]) <= found.tolerance


def test_what_cannot_be_taken_back_is_said_and_harms_nothing(case):
    found = case()
    session = found.built.session()
    sequence = session.add()
    session.prefill(sequence, IDS[:5])
    with pytest.raises(RequestError, match="never into tokens read together; 0 can be taken back now"):
        session.popn(sequence, 1)
    for token in IDS[5:30]:
        session.decode(sequence, token)
    with pytest.raises(RequestError, match=f"at most {state.HISTORY - 1} of them"):
        session.popn(sequence, state.HISTORY)
    with pytest.raises(RequestError, match="cannot take back 31 tokens of a sequence that holds 30"):
        session.popn(sequence, 31)
    session.popn(sequence, 2)
    with pytest.raises(RequestError, match=f"{state.HISTORY - 3} can be taken back now"):
        session.popn(sequence, state.HISTORY - 2)
    assert relative(session.decode(sequence, IDS[28]), found.ids[28]) <= found.tolerance


def test_a_fork_goes_on_where_it_is_or_a_few_tokens_before(case):
    found = case()
    session = found.built.session(2)
    first = session.add()
    session.prefill(first, IDS[:30])
    for token in IDS[30:36]:
        session.decode(first, token)
    child = session.fork(first, 33)
    rows = [session.decode(first, IDS[36]), session.decode(child, IDS[33])]
    session.popn(child, 4)
    rows += [*session.batch_decode({first: IDS[37], child: IDS[30]})]
    expected = found.ids[[36, 33, 37, 30]]
    assert max(map(relative, rows, expected)) <= found.tolerance
    session.remove(child)
    with pytest.raises(RequestError, match="cannot take back 9 tokens: the state of this recurrent model"):
        session.fork(first, 29)
    assert relative(session.decode(session.fork(first, 38), IDS[38]), found.ids[38]) <= found.tolerance


def test_the_length_trained_on_is_no_limit(case):
    found = case()
    session = found.built.session()
    assert session.context_window == 48
    sequence = session.add()
    rows = [session.prefill(sequence, IDS[:90]), *(session.decode(sequence, token) for token in IDS[90:])]
    assert max(map(relative, rows, found.ids[89:])) <= found.tolerance
    assert not session.full(sequence)


def test_embedding_inside_prefill_and_decode(case):
    found = case("q4f32_1", sep_embed=False)
    session = found.built.session(sequences=2)
    a, b = session.add(), session.add()
    errors = [relative(session.prefill(a, IDS[:40]), found.ids[39])]
    errors.append(relative(session.decode(a, IDS[40]), found.ids[40]))
    session.decode(b, OTHER[0])
    rows = session.batch_decode({b: OTHER[1], a: IDS[41]})
    errors += [relative(rows[0], found.other[1]), relative(rows[1], found.ids[41])]
    assert max(errors) <= found.tolerance


def swap_mixes(tensors):
    names = [f"rwkv.blocks.1.attention.time_mix_{part}" for part in ("key", "value")]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def turn_decay(tensors):
    tensors["rwkv.blocks.1.attention.time_decay"] *= -1


def drop_bias(tensors):
    tensors["rwkv.blocks.2.ln2.bias"] *= 0


def drop_bonus(tensors):
    tensors["rwkv.blocks.0.attention.time_first"] *= 0


@pytest.mark.parametrize("change", [swap_mixes, turn_decay, drop_bias, drop_bonus])
def test_wrong_weights_leave_the_tolerance(case, tmp_path, change):
    """Negative control: the same library with one tensor of the checkpoint changed."""
    found = case()
    wrong = rwkv_models.edit_tensors(found.built.checkpoint, tmp_path / "wrong", change)
    session = rwkv_models.build(tmp_path, wrong, "q0f32", library=found.built.root).session()
    assert relative(session.prefill(session.add(), IDS[:20]), found.ids[19]) > 10 * found.tolerance


@pytest.mark.parametrize(
    "change", [{"rescale_every": 0}, pytest.param({"layer_norm_epsilon": 1e-5}, marks=pytest.mark.slow)]
)
def test_a_wrong_config_leaves_the_tolerance(case, tmp_path, change):
    """Negative control: with these epsilons the halving is seen, and so is whether the graph stands for it."""
    found = case()
    wrong = rwkv_models.edit_tensors(found.built.checkpoint, tmp_path / "wrong", lambda _: None)
    config = json.loads((wrong / "config.json").read_text())
    (wrong / "config.json").write_text(json.dumps({**config, **change}))
    session = rwkv_models.build(tmp_path, wrong, "q0f32").session()
    assert relative(session.prefill(session.add(), IDS[:20]), found.ids[19]) > found.tolerance
