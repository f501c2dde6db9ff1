"""Each pass of the lowering: the IR before and after, and what the result computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm
from tvm import relax as rx
from tvm import te, tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import op

from stages.graph.views import kernels, operators
from stages.lowering.fold_states import fold_states
from stages.lowering.fuse_dequantize import fuse_dequantize_matmul
from stages.lowering.fuse_operators import fuse_operators
from stages.lowering.fuse_transpose import fuse_transpose_matmul
from stages.lowering.memory_plan import planned_bytes
from stages.lowering.merge import merge
from stages.lowering.metadata import attach_metadata
from stages.lowering.pipeline import lower, phases
from stages.lowering.scatter_get_item import scatter_tuple_get_item
from stages.lowering.schedules.cpu_elementwise import CPUElementwise
from stages.lowering.schedules.cpu_matmul import CPUMatmul
from stages.models.layers import Linear
from stages.models.matrices import FloatMatrix, GroupMatrix, Layout, take
from stages.targets.table import TARGETS
from stages.targets.tvm_target import build_target

LLVM = tvm.target.Target("llvm")
K, N = 64, 24
ROWS = Layout("nk")


def function(inputs, emit, attrs=None):
    """Return a module with one function ``main`` of ``inputs``: (name, shape, dtype); ``emit(builder, *vars)``."""
    builder = rx.BlockBuilder()
    names = {dim: tirx.Var(dim, "int64") for _, shape, _ in inputs for dim in shape if isinstance(dim, str)}
    types = [rx.TensorType([names.get(dim, dim) for dim in shape], dtype) for _, shape, dtype in inputs]
    variables = [rx.Var(name, ty) for (name, _, _), ty in zip(inputs, types, strict=True)]
    with builder.function("main", variables, attrs=attrs):
        with builder.dataflow():
            result = builder.emit_output(emit(builder, *variables))
        builder.emit_func_output(result)
    return builder.finalize()


def export(module, **inputs):
    spec = {name: nn.spec.Tensor(shape, dtype) for name, (shape, dtype) in inputs.items()}
    modes = {"param_mode": "packed", "effect_mode": "none"}
    raw = {"forward": {**spec, "$": modes}}
    return module.export_tvm(spec=nn.spec.ModuleSpec.from_raw(raw, module), allow_extern=True)[0]


def run(module, name, *arrays):
    target = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})
    library = tvm.compile(module, target=target, relax_pipeline=rx.get_default_pipeline(target))
    machine = rx.VirtualMachine(library, tvm.cpu())
    tensors = [
        tvm.runtime.tensor(a) if isinstance(a, np.ndarray) else [tvm.runtime.tensor(b) for b in a] for a in arrays
    ]
    return machine[name](*tensors).numpy()


def to_kernels(module):
    passes = rx.transform
    steps = [passes.LegalizeOps(), passes.AnnotateTIROpPattern(), passes.FuseOps(), passes.FuseTIR()]
    with LLVM:
        return tvm.transform.Sequential(steps)(module)


def random(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


def packed_matrix(n=N, k=K):
    return GroupMatrix(
        nn.Parameter((n, k // 8), "uint32"),
        nn.Parameter((n, k // 32), "float32"),
        shape=(n, k),
        bits=4,
        group_size=32,
        compute_dtype="float32",
        layout=ROWS,
    )


def test_a_transpose_before_matmul_is_folded_and_nothing_else():
    def emit(builder, x, w, plain):
        y = builder.emit(rx.op.matmul(x, builder.emit(rx.op.permute_dims(w))))
        return builder.emit(rx.op.matmul(y, plain))

    before = function([("x", (1, "s", K), "float32"), ("w", (N, K), "float32"), ("p", (N, 8), "float32")], emit)
    assert operators(before)["main"] == {"matmul": 2, "permute_dims": 1}
    after = fuse_transpose_matmul(before)
    assert operators(after)["main"] == {"NT_matmul": 1, "matmul": 1}
    x, w, p = random(1, 5, K), random(N, K), random(N, 8)
    assert np.allclose(run(after, "main", x, w, p), x @ w.T @ p, atol=1e-3)


def test_a_transpose_of_other_axes_stays():
    def emit(builder, x, w):
        return builder.emit(rx.op.matmul(x, builder.emit(rx.op.permute_dims(w, [0, 2, 1]))))

    before = function([("x", (2, 5, K), "float32"), ("w", (2, N, K), "float32")], emit)
    assert operators(fuse_transpose_matmul(before))["main"] == {"matmul": 1, "permute_dims": 1}


def test_products_of_half_precision_are_summed_in_single():
    def emit(builder, x, w):
        return builder.emit(rx.op.matmul(x, builder.emit(rx.op.permute_dims(w))))

    after = fuse_transpose_matmul(function([("x", (1, 1, 4096), "float16"), ("w", (2, 4096), "float16")], emit))
    assert operators(after)["main"] == {"NT_matmul": 1, "astype": 1}
    ones = np.ones((2, 4096), "float16")
    assert run(after, "main", ones[:1, None], ones).tolist() == [[[4096, 4096]]], "float16 counts to 2048"


@pytest.mark.parametrize("stored", ["group", "float16"])
def test_a_linear_with_bias_and_residual_becomes_one_kernel(stored):
    class Block(nn.Module):
        def __init__(self):
            half = FloatMatrix(nn.Parameter((N, K), "float16"), N, "float32", ROWS)
            self.linear = Linear(packed_matrix() if stored == "group" else half, nn.Parameter((N,), "float32"))

        def forward(self, x, residual):
            return self.linear(x) + residual

    shapes = {"x": ([1, "s", K], "float32"), "residual": ([1, "s", N], "float32")}
    before = to_kernels(fuse_transpose_matmul(export(Block(), **shapes)))
    assert sorted(operators(before)["forward"]) == ["dequantize", "fused_NT_matmul_add_add1"]
    with LLVM:
        after = tvm.transform.Sequential([fuse_dequantize_matmul, rx.transform.DeadCodeElimination()])(before)
    assert list(operators(after)["forward"].values()) == [1]
    (kernel,) = kernels(after)
    assert "dequantize" in kernel
    assert "NT_matmul" in kernel

    x, residual, bias = random(1, 6, K), random(1, 6, N), random(N)
    if stored == "group":
        words = np.random.default_rng(1).integers(0, 2**32, (N, K // 8), dtype="uint32")
        scale = random(N, K // 32)
        elements = (words[:, np.arange(K) // 8] >> (np.arange(K) % 8 * 4).astype("uint32")) & 15
        weight = (elements.astype("float32") - 7) * np.repeat(scale, 32, axis=1)
        packed = [words, scale, bias]
    else:
        half = random(N, K).astype("float16")
        weight, packed = half.astype("float32"), [half, bias]
    found = run(after, "forward", x, residual, packed)
    assert np.allclose(found, x @ weight.T + bias + residual, atol=1e-3)


def test_rows_of_a_quantized_table_are_taken_before_they_are_rebuilt():
    class Table(nn.Module):
        def __init__(self):
            self.matrix = packed_matrix(n=1000)

        def forward(self, ids):
            return self.matrix.rows(ids)

    module = to_kernels(export(Table(), ids=(["s"], "int32")))
    largest = [max(_elements(buffer) for buffer in _outputs(module, name)) for name in kernels(module)]
    assert max(largest) <= 1000, "a kernel writes the whole table"


def _outputs(module, name):
    return [module[name].params[-1]] if isinstance(module[name].params[-1], tirx.Buffer) else []


def _elements(buffer):
    return int(np.prod([int(dim) if isinstance(dim, tirx.IntImm) else 1 for dim in buffer.shape]))


def test_fields_are_taken_where_they_are_used_first():
    class Two(nn.Module):
        def __init__(self):
            self.first = Linear(FloatMatrix(nn.Parameter((K, K), "float32"), K, "float32", ROWS))
            self.unused = nn.Parameter((3,), "float32")
            self.second = Linear(FloatMatrix(nn.Parameter((K, K), "float32"), K, "float32", ROWS))

        def forward(self, x):
            return op.silu(self.second(op.silu(self.first(x))))

    before = export(Two(), x=([1, "s", K], "float32"))
    after = scatter_tuple_get_item(before)
    assert _kinds(before).startswith("fff")
    kinds = _kinds(after)
    assert kinds.count("f") == 2, "the unused parameter is not taken"
    assert not kinds.startswith("ff"), "the second weight is taken before the first is used"
    arrays = random(1, 4, K), [random(K, K), random(3), random(K, K)]
    assert np.allclose(run(before, "forward", *arrays), run(after, "forward", *arrays), atol=1e-5)


def test_a_field_that_is_only_returned_is_still_taken():
    builder = rx.BlockBuilder()
    packed = rx.Var("packed", rx.TupleType([rx.TensorType((K,), "float32")] * 2))
    with builder.function("forward", [packed]):
        builder.emit(rx.TupleGetItem(packed, 0))
        builder.emit_func_output(builder.emit(rx.TupleGetItem(packed, 1)))
    after = scatter_tuple_get_item(builder.finalize())
    assert _kinds(after) == "f"
    assert np.array_equal(run(after, "forward", [np.zeros(K, "float32"), random(K)]), random(K))


def _kinds(module):
    """Return one letter per binding: f for a field taken, o for anything else."""
    bindings = [binding for block in module["forward"].body.blocks for binding in block.bindings]
    return "".join("f" if isinstance(binding.value, rx.TupleGetItem) else "o" for binding in bindings)


def test_merge_shares_equal_kernels_and_renames_others():
    def scaled(factor):
        def emit(builder, x):
            return builder.emit_te(
                lambda a: te.compute(a.shape, lambda i: a[i] * factor), x, primfunc_name_hint="scale"
            )

        return function([("x", ("s",), "float32")], emit)

    def named(module, name):
        out = tvm.IRModule({var: fn for var, fn in module.functions_items() if isinstance(fn, tirx.PrimFunc)})
        out[name] = module["main"].with_attr("global_symbol", name)
        return out

    same = merge([named(scaled(2.0), "a"), named(scaled(2.0), "b")])
    assert kernels(same) == ["scale"]
    both = merge([named(scaled(2.0), "a"), named(scaled(3.0), "b")])
    assert len(kernels(both)) == 2
    x = random(5)
    assert np.allclose(run(both, "a", x), 2 * x)
    assert np.allclose(run(both, "b", x), 3 * x)
    with pytest.raises(ValueError, match="two graphs define the function a"):
        merge([named(scaled(2.0), "a"), named(scaled(3.0), "a")])


@pytest.mark.parametrize(("rows", "n", "k"), [("s", 24, 64), (1, 13, 32), ("s", 8, 4096)])
def test_cpu_matmul_runs_features_in_parallel_and_sums_in_lanes(rows, n, k):
    module = _nt_matmul(rows, n, k)
    schedule = CPUMatmul().apply(module["NT_matmul"], LLVM, False)
    text = schedule.mod["main"].script()
    assert "T.parallel" in text
    assert "T.vectorized(T.int64(16))" in text
    module["NT_matmul"] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    x, w = random(1, 3 if rows == "s" else rows, k), random(n, k)
    assert np.allclose(run(module, "main", x, w), x @ w.T, atol=1e-2)


@pytest.mark.parametrize(("n", "k"), [(24, 40), (24, 16), ("n", 64)])
def test_cpu_matmul_leaves_other_shapes_alone(n, k):
    assert CPUMatmul().apply(_nt_matmul("s", n, k)["NT_matmul"], LLVM, False) is None


def _gelu(rows):
    made = function([("x", (1, rows, 40), "float32")], lambda builder, x: builder.emit(rx.op.nn.gelu(x)))
    return rx.transform.LegalizeOps()(made)


@pytest.mark.parametrize("rows", ["s", 3])
def test_chained_elementwise_operators_become_one_pass(rows):
    module = _gelu(rows)
    before = module["gelu"].script()
    assert before.count("T.axis.remap(") > 1
    assert "alloc_buffer" in before
    schedule = CPUElementwise().apply(module["gelu"], LLVM, False)
    after = schedule.mod["main"].script()
    assert after.count("T.axis.remap(") == 1
    assert "alloc_buffer" not in after
    assert "T.parallel" in after
    module["gelu"] = schedule.mod["main"].with_attr("tirx.is_scheduled", True)
    x = random(1, 3, 40)
    assert np.allclose(run(module, "main", x), torch.nn.functional.gelu(torch.from_numpy(x)).numpy(), atol=1e-6)


def test_what_reduces_is_not_taken_for_elementwise():
    made = function([("x", (3, 40), "float32")], lambda builder, x: builder.emit(rx.op.nn.softmax(x)))
    assert CPUElementwise().apply(rx.transform.LegalizeOps()(made)["softmax"], LLVM, False) is None


def test_a_sum_of_one_term_is_right_in_what_follows_it():
    """TVM inlines what follows into such a sum, and reads it from the result: garbage of an earlier call."""

    def chosen(x, index):
        place = te.reduce_axis((0, 1), "place")
        hits = te.compute((3, 8), lambda r, c: te.sum(tirx.Select(index[r, place] == c, 1, 0), axis=place))
        return te.compute((3, 8), lambda r, c: tirx.Select(hits[r, c] > 0, tirx.const(-1, "float32"), x[r, c]))

    x, index = te.placeholder((3, 8), "float32", "x"), te.placeholder((3, 1), "int32", "index")
    kernel = te.create_prim_func([x, index, chosen(x, index)]).with_attr("global_symbol", "main")
    schedule = CPUElementwise().apply(kernel, LLVM, False)
    made = schedule.mod["main"] if schedule else kernel
    found = tvm.runtime.empty((3, 8), "float32")
    found.copyfrom(np.full((3, 8), 5, "float32"))
    values, places = random(3, 8), np.array([[6], [3], [5]], "int32")
    with LLVM:
        built = tvm.compile(tvm.IRModule({"main": made}), LLVM)
    built["main"](tvm.runtime.tensor(values), tvm.runtime.tensor(places), found)
    wanted = values.copy()
    wanted[np.arange(3), places[:, 0]] = -1
    assert np.array_equal(found.numpy(), wanted)


def _nt_matmul(rows, n, k):
    def emit(builder, x, w):
        return builder.emit(rx.op.matmul(x, builder.emit(rx.op.permute_dims(w))))

    return fuse_transpose_matmul(function([("x", (1, rows, k), "float32"), ("w", (n, k), "float32")], emit))


def test_take_clips_where_the_default_would_read_outside():
    class Table(nn.Module):
        def __init__(self):
            self.table = nn.Parameter((4, 3), "float32")

        def forward(self, ids):
            return take(self.table, ids)

    module = export(Table(), ids=(["s"], "int32"))
    assert 'mode="clip"' in module.script()
    table = random(4, 3)
    assert np.array_equal(run(module, "forward", np.array([9, -2, 1], "int32"), [table]), table[[3, 0, 1]])


def test_the_pipeline_plans_memory_at_the_bounds_and_tells_it():
    def emit(builder, x):
        y = builder.emit(rx.op.nn.softmax(x))
        return builder.emit(rx.op.nn.softmax(builder.emit(rx.op.matmul(y, y))))

    bound = 32
    module = function([("x", (1, "s", "s"), "float32")], emit, {"tir_var_upper_bound": {"s": bound}, "num_input": 1})
    told: dict[str, int] = {}
    steps: list[int] = []
    row = TARGETS["llvm"]
    lowered = lower(
        module, row, LLVM, lambda memory: told.update(memory) or {"memory": told}, lambda i, n: steps.append(i)
    )
    assert told["main"] >= 2 * bound * bound * 4
    assert told["main"] % (bound * bound * 4) == 0
    assert steps == list(range(len(phases(row)) + 1))
    machine = rx.VirtualMachine(tvm.compile(lowered, target=LLVM, relax_pipeline=None), tvm.cpu())
    assert machine["_metadata"]() == f'{{"memory": {{"main": {told["main"]}}}}}'


def test_planned_bytes_counts_nothing_before_planning():
    module = function([("x", (4,), "float32")], lambda builder, x: builder.emit(rx.op.add(x, x)))
    assert planned_bytes(module) == {"main": 0}


def test_metadata_is_one_more_function():
    module = function([("x", (4,), "float32")], lambda builder, x: builder.emit(rx.op.add(x, x)))
    assert sorted(operators(attach_metadata({"a": 1})(module))) == ["_metadata", "main"]


def _ones(builder, *_):
    return builder.emit(rx.op.full((3, 4), rx.const(1.0, "float32"), "float32"))


@pytest.mark.parametrize(
    ("fill", "wanted"),
    [
        (_ones, np.ones((3, 4), "float32")),
        (
            lambda builder: builder.emit(rx.op.full((2,), rx.const(-1e30, "float32"), "float32")),
            np.float32([-1e30] * 2),
        ),
        (lambda builder: builder.emit(rx.op.zeros((2, 3), "float16")), np.zeros((2, 3), "float16")),
        (lambda builder: builder.emit(rx.op.ones((), "float32")), np.ones((), "float32")),
        (lambda builder: builder.emit(rx.op.zeros((2,), "bfloat16")), np.zeros((2,), "bfloat16")),
    ],
)
def test_what_a_state_begins_with_is_computed_at_compile_time(fill, wanted):
    made = function([], fill)
    folded = fold_states(made)
    assert operators(made)["main"]
    assert not operators(folded)["main"]
    found = run(folded, "main")
    assert found.dtype == wanted.dtype
    assert np.array_equal(found, wanted)


def test_a_function_of_tensors_is_not_searched_for_constants():
    made = function([("x", (2,), "float32")], _ones)
    assert fold_states(made)["main"].script() == made["main"].script()


def test_a_state_whose_size_is_known_at_run_time_stays():
    made = function([], lambda builder: builder.emit(rx.op.zeros((tirx.Var("n", "int64"), 2), "float32")))
    assert fold_states(made)["main"].script() == made["main"].script()


def test_what_follows_a_kernel_is_fused_and_a_module_without_that_is_left_alone():
    def legal(emit):
        made = function([("x", ("s", N), "float32"), ("y", ("s", N), "float32")], emit)
        with LLVM:
            return tvm.transform.Sequential([rx.transform.LegalizeOps(), rx.transform.AnnotateTIROpPattern()])(made)

    two = legal(lambda builder, x, y: builder.emit(rx.op.multiply(builder.emit(rx.op.add(x, y)), y)))
    one = legal(lambda builder, x, y: builder.emit(rx.op.add(x, y)))
    assert operators(two)["main"] == {"add": 1, "multiply": 1}
    assert operators(fuse_operators(two))["main"] == {"fused_add_multiply": 1}
    assert operators(fuse_operators(one))["main"] == {"add": 1}
    assert fuse_operators(one)["add"].same_as(one["add"])


@pytest.mark.parametrize("name", ["llvm", "cuda"])
def test_a_reshape_is_a_view_and_no_kernel(name):
    row = TARGETS[name]
    target = build_target(row, "x86-64-v3", (), opt=3, attributes={"arch": "sm_80"})
    made = function(
        [("x", ("s", 8, 4), "float32")],
        lambda builder, x: builder.emit(rx.op.reshape(x, (x.ty.shape.values[0], 32))),
    )
    lowered = lower(made, row, target, lambda _: {}, lambda *_: None)
    assert "vm.builtin.reshape" in lowered["main"].script()
    assert not [var for var, found in lowered.functions_items() if "reshape" in var.name_hint]
