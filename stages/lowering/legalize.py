"""Turns operators into kernels as TVM does, but each only once: the layers of a model differ in their weights alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tvm
import tvm_ffi
from tvm import relax as rx

from stages.lowering.rewriter import is_call

RULE = "FLegalize"  # attribute of an operator: how it becomes a call of a kernel


class _Legal(NamedTuple):
    """What an operator became: the signature of its call, the call of the kernel, and which arguments that takes."""

    signature: Sequence[Any]
    call: rx.Call
    taken: Sequence[int]


@tvm.transform.module_pass(opt_level=0, name="Legalize")
def legalize(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Call a kernel for every operator but a reshape, which stays the view that it is.

    TVM would compute the kernel of every call anew, to find that it has one like it.
    """
    known: dict[int, list[_Legal]] = {}
    rules = {
        name: _once(operator.get_attr(RULE), known)
        for name in tvm.ir.Op.list_op_names()
        if name.startswith("relax.") and (operator := tvm.ir.Op.get(name)).has_attr(RULE)
    }
    return rx.transform.LegalizeOps(rules, skip_ops=["relax.reshape"])(module)


def _once(rule: Callable[..., rx.Expr], known: dict[int, list[_Legal]]) -> Callable[..., rx.Expr]:
    """Return ``rule`` that calls the kernel of an earlier call of the same signature again."""

    def legalized(builder: rx.BlockBuilder, call: rx.Call) -> rx.Expr:
        arguments = call.args[:]
        first = [next(i for i, other in enumerate(arguments) if other.same_as(each)) for each in arguments]
        # Sizes that are variables of a function are only equal inside of it.
        types = [each.ty if isinstance(each, rx.Var) else each for each in arguments]
        signature = [call.op, call.attrs, call.ty_args, types, first]
        found = known.setdefault(tvm_ffi.structural_hash(signature), [])
        for legal in found:
            if tvm_ffi.structural_equal(legal.signature, signature):
                taken = rx.Tuple([arguments[index] for index in legal.taken])
                return rx.Call(
                    legal.call.op, [legal.call.args[0], taken, *legal.call.args[2:]], None, legal.call.ty_args
                )
        made = rule(builder, call)
        if is_call(made, "call_tir"):
            taken = [next((i for i, other in enumerate(arguments) if other.same_as(each)), -1) for each in made.args[1]]
            if -1 not in taken:
                found.append(_Legal(signature, made, taken))
        return made

    return legalized
