"""Counts FLOPs and bytes of exported functions, and lists their calls so that two builds can be compared.

Counted before lowering: two per multiply-add of a matmul, one per element that another operator yields. Attention over
the cache is a call of the runtime whose work depends on what the cache holds; it is not in the counts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import tvm
import tvm_ffi
from tvm import relax as rx
from tvm import tirx

from stages.documents.files import json_text
from stages.graph.views import bindings, calls, dim_text, operator_name, relax_functions, type_text

# Operators that yield a view of what they are given.
FREE = frozenset({"reshape", "permute_dims", "split", "squeeze", "expand_dims"})


Term = tuple[tuple[str, ...], int]  # names of symbolic sizes, and what their product is multiplied by


class Amount(Counter[tuple[str, ...]]):
    """A number that may depend on symbolic sizes: names of sizes -> factor; ``()`` is the constant part."""

    def plus(self, term: Term) -> None:
        """Add a term."""
        names, factor = term
        self[names] += factor

    def text(self, bounds: Mapping[str, int]) -> str:
        """Return it in full, with its value where every symbolic size is at its bound."""
        terms = [" * ".join([f"{factor:,}", *names]) for names, factor in sorted(self.items()) if factor]
        names = sorted({name for term in self for name in term})
        if names and all(name in bounds for name in names):
            value = sum(factor * math.prod(bounds[name] for name in term) for term, factor in self.items())
            at = ", ".join(f"{name} = {bounds[name]}" for name in names)
            return f"{' + '.join(terms)} ({value:,} at {at})"
        return " + ".join(terms) or "0"


@dataclass
class Cost:
    """The cost of one function: FLOPs, bytes of parameters read, bytes of other operands and results."""

    flops: Amount = field(default_factory=Amount)
    weights: Amount = field(default_factory=Amount)
    moved: Amount = field(default_factory=Amount)
    runtime_calls: int = 0


def costs(module: tvm.IRModule) -> dict[str, Cost]:
    """Return function name -> its FLOPs and bytes."""
    return {name: _cost(function) for name, function in relax_functions(module)}


def _cost(function: rx.Function) -> Cost:
    cost = Cost()
    packed = function.params[-1]
    parameters: set[Any] = set()  # as they are stored
    derived: set[Any] = set()  # computed from parameters alone: fusion never writes them to memory
    for binding in bindings(function):
        value = binding.value
        if isinstance(value, rx.TupleGetItem) and value.tuple_value.same_as(packed):
            parameters.add(binding.var)
        if not isinstance(value, rx.Call):
            continue
        name, operands = operator_name(value), list(_operands(value))
        if name.startswith("vm.builtin.attention"):
            cost.runtime_calls += 1
        if not isinstance(value.ty, rx.TensorType) or name.startswith("vm.builtin"):
            continue
        known = bool(operands) and all(operand in parameters or operand in derived for operand in operands)
        if name in FREE:
            (parameters if known and operands[0] in parameters else derived if known else set()).add(binding.var)
            continue
        cost.flops.plus(_work(value, name))
        if known:
            derived.add(binding.var)
        else:
            cost.moved.plus(_bytes(value.ty))
        rows, operands = _rows_taken(value, name, operands, parameters)
        for row in rows:
            cost.weights.plus(row)
        for operand in operands:
            if operand in parameters:
                cost.weights.plus(_bytes(operand.ty))
            elif operand not in derived:
                cost.moved.plus(_bytes(operand.ty))
    return cost


def _rows_taken(call: rx.Call, name: str, operands: list[Any], parameters: set[Any]) -> tuple[list[Term], list[Any]]:
    """Return the bytes of the rows that ``call`` takes of tables, and its operands without those."""
    if name == "take" and operands[0] in parameters:
        return [_bytes(call.ty)], operands[1:]
    if name == "rows":  # of a table in blocks of features: all columns that are stored of each row
        count = call.ty.shape.values[0]
        return [_product([count, table.ty.shape.values[1]], _itemsize(table.ty)) for table in operands[1:]], operands[
            :1
        ]
    return [], operands


def _work(call: rx.Call, name: str) -> Term:
    sizes = call.ty.shape.values[:]
    return _product([*sizes, call.args[0].ty.shape.values[-1]], 2) if name == "matmul" else _product(sizes, 1)


def _operands(call: rx.Call) -> Iterator[Any]:
    for arg in call.args[:]:  # lists: an array's own iterator takes three times as long
        for value in arg.fields[:] if isinstance(arg, rx.Tuple) else [arg]:
            if isinstance(getattr(value, "ty", None), rx.TensorType):
                yield value


def _bytes(ty: rx.TensorType) -> Term:
    return _product(ty.shape.values[:], _itemsize(ty))


def _itemsize(ty: rx.TensorType) -> int:
    return int(tvm.DataType(str(ty.dtype)).itemsize)


def _product(sizes: list[Any], factor: int) -> Term:
    names = []
    for size in sizes:
        if isinstance(size, tirx.IntImm):
            factor *= size.value
        else:
            names.append(dim_text(size))
    return tuple(sorted(names)), factor


def cost_table(module: tvm.IRModule) -> str:
    """Render :func:`costs` as a page."""
    lines = []
    for name, function in relax_functions(module):
        cost = _cost(function)
        bounds = {key: int(value) for key, value in (function.attrs or {}).get("tir_var_upper_bound", {}).items()}
        lines += [f"{name}", f"  FLOPs                  {cost.flops.text(bounds)}"]
        lines += [f"  parameters read, bytes {cost.weights.text(bounds)}"]
        lines += [f"  other values, bytes    {cost.moved.text(bounds)}"]
        if cost.runtime_calls:
            lines += [f"  not counted            {cost.runtime_calls} calls of attention over the cache"]
    return "\n".join([*lines, "", "Counted before lowering: fusion moves fewer bytes."]) + "\n"


def structure(module: tvm.IRModule) -> str:
    """Return JSON for comparing two builds: function -> its calls with types, and kernel -> structural hash."""
    functions = {name: _lines(function) for name, function in relax_functions(module)}
    kernels = {
        var.name_hint: f"{tvm_ffi.structural_hash(function, map_free_vars=True) & (1 << 64) - 1:016x}"
        for var, function in module.functions_items()
        if isinstance(function, tirx.PrimFunc)
    }
    return json_text({"schema": 1, "functions": functions, "kernels": kernels})


def _lines(function: rx.Function) -> list[str]:
    types: dict[Any, str] = {}  # of what is read several times
    found = []
    for call in calls(function):
        operands = list(_operands(call))
        types.update((operand, type_text(operand.ty)) for operand in operands if operand not in types)
        texts = ", ".join(types[operand] for operand in operands)
        found.append(f"{operator_name(call)}({texts}) -> {type_text(call.ty)}")
    return found
