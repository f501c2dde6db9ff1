"""Elementwise operators of traced graphs, against NumPy in float64: also where a result is near zero."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax as rx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec

from stages.models.arithmetic import ARITHMETIC, Values

EXACT = {
    "softplus": lambda x: np.log1p(np.exp(x)),
    "expm1": np.expm1,
    "log1p": lambda x: np.log1p(np.abs(x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


@pytest.fixture(scope="module")
def computed() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Numbers of both signs and all sizes, and what each operator makes of them."""

    class Operators(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            values = Values("float32", None)
            absolute = ARITHMETIC["abs"](values, x)
            return tuple(ARITHMETIC[name](values, absolute if name == "log1p" else x) for name in EXACT)

    near = np.geomspace(1e-7, 1, 500)
    x = np.concatenate([np.linspace(-20, 19, 1000), near, -near, [0]]).astype(np.float32)
    module, _ = Operators().export_tvm({"forward": {"x": spec.Tensor(x.shape, "float32")}})
    machine = rx.VirtualMachine(tvm.compile(rx.transform.LegalizeOps()(module), target="llvm"), tvm.cpu())
    found = machine["forward"](tvm.runtime.tensor(x))
    return x, {name: value.numpy() for name, value in zip(EXACT, found, strict=True)}


@pytest.mark.parametrize("name", EXACT)
def test_results_have_all_their_digits(computed: tuple[np.ndarray, dict[str, np.ndarray]], name: str) -> None:
    x, found = computed
    exact = EXACT[name](x.astype(np.float64))
    assert (np.abs(found[name] - exact) <= 4e-7 * np.abs(exact)).all()


def test_a_product_that_transformers_rounds_to_bfloat16_is_rounded_where_it_is_fused_too() -> None:
    """Falcon's ALiBi: slopes times positions."""
    torch = pytest.importorskip("torch")

    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            values = Values("float32", None)
            product = ARITHMETIC["mul"](values, x, y)
            return ARITHMETIC["mul"](values, ARITHMETIC["cast"](values, product, "bfloat16"), 0.5)

    x, y = (np.random.default_rng(seed).standard_normal(1000).astype(np.float32) * 100 for seed in (1, 2))
    sizes = {name: spec.Tensor(x.shape, "float32") for name in "xy"}
    module, _ = Product().export_tvm({"forward": sizes})
    machine = rx.VirtualMachine(tvm.compile(module, target="llvm"), tvm.cpu())
    found = machine["forward"](tvm.runtime.tensor(x), tvm.runtime.tensor(y)).numpy()
    assert np.array_equal(found, (torch.tensor(x * y).bfloat16().float() * 0.5).numpy())
