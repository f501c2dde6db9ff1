"""Traces layers that are alike once: torch takes as long for each, and a model has up to a hundred of a few kinds.

The first layer of a kind is traced between marks. The others are one node each, which is replaced by a copy of what was
traced, with their own parameters. The last of a kind is traced as well and compared, so that what tells layers apart
beyond what is looked at here is found: then all of them are traced.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stages.tracing.nodes import bases_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

FEWEST = 3  # alike layers that are worth it: two are traced
NUMBERS = ("layer_idx", "layer_id")  # attributes that number a layer
# What is done with a number.
_USES = """add radd sub rsub mul rmul mod rmod floordiv rfloordiv truediv rtruediv pow rpow neg and or xor lshift rshift
eq ne lt le gt ge bool int float index hash str format"""


class NotAlikeError(Exception):
    """Layers that look alike are not, or do what cannot be copied."""


def _used(*_: Any) -> Any:
    raise NotAlikeError("a layer uses its number")


# Stands for the number of a layer while alike ones are traced: one that uses its number, but for a cache, which is not
# there then, may compute what others do not.
_Number = type("_Number", (), {f"__{use}__": _used for use in _USES.split()})


@dataclass(frozen=True)
class Template:
    """A traced layer: the number of its ``call``, what ``made`` returns from the tensors of a copy, and for each of
    them which input has its shape and dtype.
    """

    call: int
    made: Callable[[Sequence[Any]], Any]
    like: Sequence[int]


@dataclass
class Repeats:
    """Which layers are alike, and what is found while they are called.

    ``names`` of layers and the ``kinds`` they are of; the layer of each of the ``calls`` that are traced; the ways in
    which each kind is called, its first layer, and ``proofs``: pairs of calls, the first and the last of a kind.
    """

    names: list[str] = field(default_factory=list)
    kinds: list[Any] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    ways: dict[Any, Sequence[str]] = field(default_factory=dict)
    first: dict[Any, Template] = field(default_factory=dict)
    proofs: list[tuple[int, int]] = field(default_factory=list)

    def call(self, number: int, module: Any, forward: Any, *arguments: Any, **keywords: Any) -> Any:
        """Take the place of ``forward`` of the layer ``number``."""
        import torch
        from torch.utils import _pytree as trees

        if not all(map(_fixed, (*arguments, *keywords.values()))):
            raise NotAlikeError("a layer is handed what it could hand something on in")
        given, form = trees.tree_flatten((arguments, keywords))
        at = [n for n, value in enumerate(given) if isinstance(value, torch.Tensor)]
        kind, way = self.kinds[number], (repr(form), *(_described(value) for value in given))
        if self.ways.setdefault(kind, way) != way:
            raise NotAlikeError("layers that look alike are called in several ways")
        first, last = self.first.get(kind), kind not in self.kinds[number + 1 :]
        if first is not None and not last:
            read = [given[n] for n in at]
            return first.made(torch.ops.stagegraph.again(read, first.like, first.call, number))
        call = len(self.calls)
        self.calls.append(number)
        marked = {n: torch.ops.stagegraph.enter(given[n], call, place) for place, n in enumerate(at)}
        read = [marked.get(n, value) for n, value in enumerate(given)]
        arguments, keywords = trees.tree_unflatten(read, form)
        results, shape = trees.tree_flatten(forward(*arguments, **keywords))
        if kind_of(module)[:-1] != self.kinds[number][:-1]:  # its forward is this method
            return trees.tree_unflatten(results, shape)
        out = [n for n, value in enumerate(results) if isinstance(value, torch.Tensor)]
        kinds = [_described(given[n]) for n in at]
        if any(_described(results[n]) not in kinds for n in out):
            return trees.tree_unflatten(results, shape)
        like = [kinds.index(_described(results[n])) for n in out]
        for place, n in enumerate(out):
            results[n] = torch.ops.stagegraph.leave(results[n], call, place)
        if first is None:
            others = [None if n in out else value for n, value in enumerate(results)]

            def made(tensors: Sequence[Any]) -> Any:
                own = iter(tensors)
                return trees.tree_unflatten([next(own) if n in out else v for n, v in enumerate(others)], shape)

            self.first[kind] = Template(call, made, like)
        else:
            self.proofs.append((first.call, call))
        return trees.tree_unflatten(results, shape)


@contextmanager
def folded(model: Any) -> Iterator[Repeats]:
    """Let alike layers of ``model`` be called by way of what is returned, and no layer know its number."""
    import torch

    repeats, before, inside = Repeats(), [], ""
    for name, stack in model.named_modules():
        if not isinstance(stack, torch.nn.ModuleList) or (inside and name.startswith(inside)):
            continue
        inside = f"{name}."
        kinds = [kind_of(layer) for layer in stack]
        for at, layer in enumerate(stack):
            if kinds.count(kinds[at]) >= FEWEST:
                before.append((layer, vars(layer).get("forward")))
                call = functools.partial(repeats.call, len(repeats.names), layer, layer.forward)
                repeats.names.append(f"{name}.{at}.")
                repeats.kinds.append(kinds[at])
                layer.forward = call
    modules = {id(module): module for layer, _ in before for module in layer.modules()}.values()
    numbers = [(module, name, vars(module)[name]) for module in modules for name in NUMBERS if name in vars(module)]
    for module, name, _ in numbers:
        setattr(module, name, _Number())
    try:
        yield repeats
    finally:
        for module, name, number in numbers:
            setattr(module, name, number)
        for layer, forward in before:
            del layer.forward
            if forward is not None:
                layer.forward = forward


def kind_of(module: Any) -> Any:
    """Return, hashable, all that a module computes by but the values of its parameters and its own number."""
    apart = (*NUMBERS, "forward", "_parameters", "_buffers", "_modules")
    own = ((name, _plain(value, module)) for name, value in vars(module).items() if name not in apart)
    parameters = ((name, _described(value)) for name, value in module._parameters.items())  # noqa: SLF001
    buffers = ((name, _contents(value)) for name, value in module._buffers.items())  # noqa: SLF001
    children = ((name, kind_of(child)) for name, child in module._modules.items())  # noqa: SLF001
    parts = sorted(own), [*parameters], [*buffers], [*children]
    return id(type(module)), repr(parts), _plain(vars(module).get("forward"), module)


def _plain(value: Any, module: Any) -> str:
    """Return a value as a text that others have which are the same for what a layer computes."""
    import torch

    if isinstance(value, torch.Tensor):
        return _contents(value)
    if value is module:
        return "itself"
    if isinstance(value, functools.partial):
        return repr([id(value.func), *(_plain(each, module) for each in (*value.args, value.keywords))])
    if isinstance(value, dict):
        value = [*value.items()]
    if isinstance(value, list | tuple):
        return repr([_plain(each, module) for each in value])
    if isinstance(value, set | frozenset):
        return repr(sorted(_plain(each, module) for each in value))
    return _described(value)


def _fixed(value: Any) -> bool:
    """Say whether a value is none that a layer could hand something on in, as in a dictionary of keys and values."""
    import torch

    if isinstance(value, tuple):
        return all(map(_fixed, value))
    return isinstance(value, torch.Tensor | str | int | float | torch.dtype | torch.SymInt | None)


def _described(value: Any) -> str:
    """Return a tensor as its dtype and shape, a number or name as it is, and any other object as itself alone."""
    import torch

    if isinstance(value, torch.Tensor):
        return f"{value.dtype}{[_size(size) for size in value.shape]}"
    return f"{type(value).__name__} {repr(value) if _fixed(value) else id(value)}"


def _size(size: Any) -> str:
    """Return a size of a tensor; where it follows from the number of tokens, by that of the example.

    Torch has two names for that number until a layer adds what has the one to what has the other.
    """
    return str(size) if isinstance(size, int) else f"~{size.node.hint}"


def _contents(tensor: Any) -> str:
    """Return a tensor that is no parameter, or None, by its values too, where it has any: none while it is traced."""
    import hashlib

    import torch

    if tensor is None or tensor.device.type == "meta" or type(tensor) not in (torch.Tensor, torch.nn.Buffer):
        return _described(tensor)
    once = tensor.detach()[tuple(slice(None) if stride else 0 for stride in tensor.stride())]  # what is repeated
    values = once.contiguous().reshape(-1).view(torch.uint8).numpy()  # which has no bfloat16
    return _described(tensor) + hashlib.sha256(values.tobytes()).hexdigest()


def unfold(program: Any, repeats: Repeats) -> None:
    """Replace each node that stands for a layer by a copy of the traced one; :class:`NotAlikeError` where that could be
    another layer.
    """
    graph = _Marked(program, repeats)
    again = [node for node in program.graph.nodes if _is(node, "again")]
    proven = {first for first, _ in repeats.proofs}
    if any(node.args[2] not in proven for node in again):
        raise NotAlikeError("layers whose last of the kind was called otherwise")
    for first, last in repeats.proofs:
        graph.compare(first, last)
    for node in again:
        graph.copy(node)
    for node in program.graph.nodes:
        if _is(node, "enter") or _is(node, "leave"):
            node.replace_all_uses_with(node.args[0])


def _is(node: Any, name: str) -> bool:
    return str(node.target) == f"stagegraph.{name}.default"


class _Marked:
    """A graph of torch with marked layers."""

    def __init__(self, program: Any, repeats: Repeats) -> None:
        signature = program.graph_signature
        self.repeats, self.program = repeats, program
        self.named = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.constants = signature.inputs_to_lifted_tensor_constants
        self.order = {node: number for number, node in enumerate(program.graph.nodes)}
        self.holders = {self.named[node.name]: node for node in self.order if node.name in self.named}
        self.enters: dict[int, dict[int, Any]] = {}
        self.leaves: dict[int, dict[int, Any]] = {}
        for node in self.order:
            for name, marks in (("enter", self.enters), ("leave", self.leaves)):
                if _is(node, name):
                    marks.setdefault(node.args[1], {})[node.args[2]] = node
        self.body = functools.cache(self._body)

    def _body(self, call: int) -> list[Any]:
        """Return the nodes of a layer, in order, without marks and without what is no tensor."""
        if call not in self.enters or call not in self.leaves:
            raise NotAlikeError("a layer that reads or makes nothing")
        begin = min(self.order[node] for node in self.enters[call].values())
        found: set[Any] = set()
        waiting = [node.args[0] for node in self.leaves[call].values()]
        while waiting:
            node = waiting.pop()
            if node in found or _is_size(node) or node.op == "placeholder" or node in self.enters[call].values():
                continue
            if self.order[node] < begin:
                raise NotAlikeError(f"{node.name} of before the layer is read")
            if set(bases_of(node)) & set(self.enters[call].values()):
                raise NotAlikeError(f"{node.name} changes what the layer is given")
            found.add(node)
            waiting += node.all_input_nodes
        return sorted(found, key=self.order.__getitem__)

    def compare(self, first: int, last: int) -> None:
        """Raise :class:`NotAlikeError` unless the two calls do the same, each with parameters of its own."""
        one, other = self.body(first), self.body(last)
        pairs = dict(zip(one, other, strict=False)) | {
            node: self.enters[last].get(place) for place, node in self.enters[first].items()
        }
        move = functools.partial(self._moved, pairs, self.repeats.calls[first], self.repeats.calls[last])
        same = len(one) == len(other) and all(
            a.target == b.target and self._alike(_mapped(a, move), (b.args, b.kwargs))
            for a, b in zip(one, other, strict=True)
        )
        ends = ((move(self._result(first, place)), self._result(last, place)) for place in self.leaves[first])
        if not same or not all(self._alike(*pair) for pair in ends):
            raise NotAlikeError("the last layer of a kind does something else")

    def _alike(self, one: Any, other: Any) -> bool:
        """Say whether arguments are the same: sizes by what they are, constants by their values."""
        import torch

        if isinstance(one, list | tuple):
            return len(one) == len(other) and all(map(self._alike, one, other))
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(self._alike(one[name], other[name]) for name in one)
        if isinstance(one, torch.fx.Node) and isinstance(other, torch.fx.Node):
            if _is_size(one):
                return str(one.meta["val"]) == str(other.meta.get("val"))
            tables = [self.constants.get(node.name) for node in (one, other)]
            if None not in tables:
                return torch.equal(*(self.program.constants[name] for name in tables))
            return one is other
        return type(one) is type(other) and repr(one) == repr(other)

    def copy(self, again: Any) -> None:
        """Put a copy of a traced layer in the place of one that was not."""
        read, _, call, layer = again.args
        values = {node: read[place] for place, node in self.enters[call].items()}
        move = functools.partial(self._moved, values, self.repeats.calls[call], layer)
        graph = self.program.graph
        with graph.inserting_before(again):
            for node in self.body(call):
                values[node] = graph.node_copy(node, move)
        for user in list(again.users):
            user.replace_all_uses_with(move(self._result(call, user.args[1])))

    def _result(self, call: int, place: int) -> Any:
        """Return a result of a layer, which torch may have dropped where nothing reads it."""
        if place not in self.leaves.get(call, {}):
            raise NotAlikeError("results are read of some layers alone")
        return self.leaves[call][place].args[0]

    def _moved(self, values: Mapping[Any, Any], one: int, other: int, node: Any) -> Any:
        """Return what stands in the layer ``other`` for a node of the layer ``one``."""
        if node in values:
            return values[node]
        if _is_size(node) or node.name in self.constants:
            return node
        name = self.named.get(node.name, "")
        before, after = (f"model.{self.repeats.names[number]}" for number in (one, other))
        moved = self.holders.get(after + name.removeprefix(before))
        if not name.startswith(before) or moved is None:
            raise NotAlikeError(f"{name or node.name} is no parameter of the layer")
        return moved


def _is_size(node: Any) -> bool:
    """Say whether a node is a number that depends on how many tokens there are: one for the whole model."""
    import torch

    return isinstance(node.meta.get("val"), torch.SymInt | int)


def _mapped(node: Any, move: Callable[[Any], Any]) -> Any:
    import torch

    return torch.fx.node.map_arg((node.args, node.kwargs), move)
