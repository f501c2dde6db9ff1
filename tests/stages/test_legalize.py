"""Operators become the kernels that TVM's own pass makes of them, each made once."""

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm import tirx

from stages.lowering.legalize import legalize

ROWS = rx.TensorType([4, 8], "float32")


def module(*functions):
    """Return a module of functions: (name, types of its parameters, what emits its result)."""
    builder = rx.BlockBuilder()
    for name, types, emit in functions:
        variables = [rx.Var(f"x{number}", ty) for number, ty in enumerate(types)]
        with builder.function(name, variables):
            with builder.dataflow():
                result = builder.emit_output(emit(builder, *variables))
            builder.emit_func_output(result)
    return builder.finalize()


def chain(builder, *calls):
    """Emit calls of the result before and return the last one's."""
    value = None
    for call in calls:
        value = builder.emit(call(value))
    return value


def symbolic(name="s"):
    rows = tirx.Var(name, "int64")
    return [rx.TensorType([rows, 8], "float32"), rx.TensorType([8], "float32")]


def norm(builder, x, weight):
    layer = (lambda v: rx.op.nn.rms_norm(v if v is not None else x, weight, [-1], 1e-5), rx.op.nn.silu)
    return chain(
        builder, *layer, *layer, lambda v: rx.op.add(v, v), lambda v: rx.op.add(v, x), lambda v: rx.op.add(x, v)
    )


CASES = {  # name -> functions, how often a kernel is made
    "layers": ([("main", symbolic(), norm)], {"rms_norm": 1, "silu": 1, "add": 2}),
    "functions": ([("main", symbolic(), norm), ("other", symbolic(), norm)], {"rms_norm": 2, "silu": 2, "add": 4}),
    "attributes": (
        [("main", [ROWS], lambda b, x: chain(b, *(
            lambda _, axis=axis, keep=keep: rx.op.sum(x, [axis], keep)
            for axis in (0, 1) for keep in (True, False) for _ in range(2)
        )))],
        {"sum": 4},
    ),
    "constants and shapes": (
        [("main", [ROWS], lambda b, x: chain(
            b,
            *(lambda v, n=n: rx.op.multiply(x if v is None else v, rx.const(n, "float32")) for n in (2.0, 3.0, 2.0)),
            lambda v: rx.op.broadcast_to(v, [2, 4, 8]),
            lambda v: rx.op.reshape(v, [8, 8]),
            lambda v: rx.op.broadcast_to(v, [3, 8, 8]),
            lambda v: rx.op.concat([v, v], 0),
            lambda v: rx.op.split(v, 2, 0),
            lambda v: rx.op.strided_slice(v[1], [0], [0], [2]),
        ))],
        {"multiply": 2, "broadcast_to": 2, "concatenate": 1, "split": 1, "strided_slice": 1},
    ),
    "types": (
        [("main", [ROWS], lambda b, x: chain(
            b, *(lambda v, to=to: rx.op.astype(x if v is None else v, to) for to in ("float16", "float32") * 2)
        ))],
        {"cast": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_result_is_that_of_tvm(case, monkeypatch):
    functions, made = CASES[case]
    before = module(*functions)
    with tvm.target.Target("llvm"):
        expected = rx.transform.LegalizeOps(skip_ops=["relax.reshape"])(before)
        counts, call_te = {}, rx.BlockBuilder.call_te

        def counted(self, *arguments, **more):
            call = call_te(self, *arguments, **more)
            name = call.args[0].name_hint.rstrip("0123456789")
            counts[name] = counts.get(name, 0) + 1
            return call

        monkeypatch.setattr(rx.BlockBuilder, "call_te", counted)
        found = legalize(before)
    tvm.ir.assert_structural_equal(found, expected)
    assert {var.name_hint for var in found.get_global_vars()} == {var.name_hint for var in expected.get_global_vars()}
    assert counts == made


def test_an_argument_given_twice_is_not_two_that_are_alike():
    def emit(builder, x, y):
        return chain(builder, lambda _: rx.op.add(x, x), lambda v: rx.op.multiply(v, rx.op.add(x, y)))

    with tvm.target.Target("llvm"):
        lowered = legalize(module(("main", [ROWS, ROWS], emit)))
    machine = rx.VirtualMachine(tvm.compile(lowered, target="llvm"), tvm.cpu())
    x, y = (np.random.default_rng(seed).normal(size=(4, 8)).astype("float32") for seed in range(2))
    found = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(y)).numpy()
    assert np.array_equal(found, (x + x) * (x + y))
