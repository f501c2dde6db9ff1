"""Schedules are kept kernel by kernel, and what comes from the memo is what the rules make."""

import pytest
import tvm
from tvm import te

from stagegraph.store.index import Index
from stagegraph.store.memo import Memo, PartCode
from stagegraph.store.objects import Store
from stages.ir.text import SCHEDULED
from stages.lowering.schedules import cache, rules

RULES = ("gpu-reduction", "gpu-fallback")
TARGET = tvm.target.Target({"kind": "cuda", "arch": "sm_80"}, host={"kind": "llvm"})
HOW = {"target": "cuda", "tools": {"apache-tvm": "0"}}


def elementwise(scale):
    data = te.placeholder((64, 32), name="x")
    return te.create_prim_func([data, te.compute((64, 32), lambda i, j: data[i, j] * scale, name="y")])


def summed():
    data, k = te.placeholder((64, 32), name="x"), te.reduce_axis((0, 32), name="k")
    return te.create_prim_func([data, te.compute((64,), lambda i: te.sum(data[i, k], axis=k), name="y")])


def module(scale=2.0):
    mine = elementwise(5.0).with_attr(SCHEDULED, True)
    return tvm.IRModule({"scale": elementwise(scale), "sum": summed(), "mine": mine})


@pytest.fixture
def run(tmp_path):
    """Return what schedules a module with the memo of this test, and tells how many kernels were made and reused."""
    index = Index(tmp_path / "index")
    (tmp_path / "out").mkdir()

    def scheduled(*arguments, how=HOW, rules=RULES):
        memo = Memo(Store(tmp_path, index), {cache.KIND: PartCode("of this test", {})})
        with TARGET:
            found = cache.scheduled(module(*arguments), rules, how, memo, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())
        counts = memo.counts["schedule"]
        return found, (counts["made"], counts["reused"])

    yield scheduled
    index.close()


def test_a_kept_schedule_is_the_one_that_the_rules_make(run, monkeypatch):
    with TARGET:
        expected = rules.schedule_kernels(RULES)(module())
    assert "blockIdx.x" in expected["scale"].script()
    first, counts = run()
    assert counts == (2, 0), "the one that was written with its schedule is none of ours"
    monkeypatch.delattr(rules, "schedule_kernels")  # nor are the rules imported
    again, counts = run()
    assert counts == (0, 2)
    for found in (first, again):
        tvm.ir.assert_structural_equal(found, expected)


def test_only_a_changed_kernel_is_scheduled(run):
    run()
    found, counts = run(3.0)
    assert counts == (1, 1)
    with TARGET:
        tvm.ir.assert_structural_equal(found, rules.schedule_kernels(RULES)(module(3.0)))


def test_other_rules_and_targets_schedule_anew(run):
    run()
    for change in ({"rules": RULES[1:]}, {"how": {**HOW, "target": "other"}}):
        assert run(**change)[1] == (2, 0)


def test_a_kernel_that_no_rule_takes_stays_as_it_is(run):
    found, counts = run(rules=("gpu-gemv",))
    assert counts == (2, 0)
    tvm.ir.assert_structural_equal(found, module())
