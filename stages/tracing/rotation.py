"""Recognises rotary positions in a traced graph by what they compute, and moves them to the KV cache.

A modelling file rotates queries and keys before attention; the cache's kernel does the same as it appends them. Where
every layer rotates the two halves of its heads by the same angles, the rotation is removed from the graph.
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from stages.tracing.graph import GraphPart
from stages.tracing.merge import read, renumbered

if TYPE_CHECKING:
    from stages.documents.files import JsonObject
    from stages.tracing.nodes import Arguments, Node


PROBE = np.array([[0, 1, 2, 7, 40, 155]])  # positions at which angles are compared


@dataclass(frozen=True)
class Rotation:
    """``frequencies`` in radians a position, float32, of each pair of channels, and what cosine and sine are
    multiplied by.
    """

    frequencies: tuple[float, ...]
    factor: float


def hoisted(part: GraphPart, constants: Sequence[JsonObject]) -> tuple[GraphPart, Rotation | None]:
    """Return the body without the rotation that all its layers share, and that; the body itself where there is none."""
    graph = _Graph(part, constants)
    nodes, rotations = list(part.nodes), set()
    for number, (name, arguments) in enumerate(part.nodes):
        if name == "attention":
            found = [graph.turned(arguments[each]) for each in ("q", "k")]
            if found[0] is None or found[1] is None:
                return part, None
            rotations |= {found[0][1], found[1][1]}
            nodes[number] = name, {**arguments, "q": found[0][0], "k": found[1][0]}
    if len(rotations) != 1:
        return part, None
    return pruned(replace(part, nodes=nodes)), rotations.pop()


def packed(part: GraphPart) -> GraphPart:
    """Return the body with attention on what is laid out by token where that is only turned for it: on q, k and v as
    they came out of one matrix, where nothing else is done to them.
    """
    nodes = list(part.nodes)

    def node(value: Any) -> Node:
        number = value["value"] - part.inputs if isinstance(value, Mapping) and "value" in value else -1
        return part.nodes[number] if number >= 0 else ("", {})

    def by_token(value: Any) -> Any:
        """Return what a value of heads by token is the transpose of, None where it is none."""
        name, arguments = node(value)
        return arguments["x"] if name == "transpose" and {arguments["dim0"], arguments["dim1"]} == {1, 2} else None

    def item(value: Any) -> tuple[int, int]:
        """Return which value ``value`` is an item of, and which one; negative numbers if of none."""
        name, view = node(value)
        inner, taken = node(view.get("x"))
        return (taken["x"]["value"], taken["index"]) if (name, inner) == ("reshape", "item") else (-1, -1)

    for number, (name, arguments) in enumerate(part.nodes):
        if name != "attention":
            continue
        inner = {each: found for each in "qkv" if (found := by_token(arguments[each])) is not None}
        nodes[number] = name, {**arguments, **inner, "by_token": "".join(inner)}
        items = [item(inner.get(each)) for each in "qkv"]
        if arguments["width"] != arguments["value_width"]:
            continue
        split, taken = node({"value": items[0][0]})
        if split == "split" and len(taken["sizes"]) == 3 and items == [(items[0][0], at) for at in range(3)]:
            others = {key: value for key, value in arguments.items() if key not in ("q", "k", "v")}
            nodes[number] = name, {**others, "qkv": taken["x"]}
    return pruned(replace(part, nodes=nodes))


def by_part(part: GraphPart, apart: set[str]) -> tuple[GraphPart, dict[str, int]]:
    """Return the body with attention on matrices whose rows go head by head, each with its q, k and v, as if they were
    all q, all k, all v; and those matrices and biases, with how many heads they have, which are to be stored so. Those
    ``apart`` are stored in another way already.
    """
    nodes, found = list(part.nodes), dict[str, int]()
    readers = Counter(value for _, arguments in part.nodes for value in read_values(arguments))
    uses = Counter(name for _, arguments in part.nodes for name in read(list(arguments.values()), "parameter"))

    def behind(value: Any, name: str) -> Arguments:
        """Return the arguments of the node that makes a value, nothing if it has another name."""
        number = value["value"] - part.inputs if isinstance(value, Mapping) and "value" in value else -1
        return part.nodes[number][1] if number >= 0 and part.nodes[number][0] == name else {}

    for number, (name, arguments) in enumerate(part.nodes):
        if name != "attention" or arguments["kv_heads"] != arguments["heads"]:
            continue
        heads, width = arguments["heads"], arguments["width"]
        items = [behind(arguments.get(each), "item") for each in "qkv"]
        parts = behind(items[0].get("x"), "split")
        if (
            not parts
            or [each.get("index") for each in items] != [0, 1, 2]
            or any(each["x"] != items[0]["x"] for each in items)
        ):
            continue
        turned = behind(parts["x"], "transpose")
        rows = behind(turned.get("x"), "reshape")
        product = behind(rows.get("x"), "linear")
        names = read([product.get("weight"), product.get("bias")], "parameter")
        alone = [turned["x"]["value"], rows["x"]["value"]] if product else []
        if (
            parts["sizes"] == [width] * 3
            and parts["dim"] == 3
            and {turned.get("dim0"), turned.get("dim1")} == {1, 2}
            and rows.get("shape", [])[2:] == [heads, 3 * width]
            and all(readers[value] == 1 for value in alone)
            and all(uses[each] == 1 and each not in apart for each in names)
        ):
            others = {key: value for key, value in arguments.items() if key not in ("q", "k", "v")}
            nodes[number] = name, {**others, "qkv": rows["x"]}
            found |= dict.fromkeys(names, heads)
    return pruned(replace(part, nodes=nodes)), found


def pruned(part: GraphPart) -> GraphPart:
    """Return a graph without nodes that its output is not made of."""
    needed, waiting = set(), [part.output]
    while waiting:
        value = waiting.pop()
        if value >= part.inputs and value not in needed:
            needed.add(value)
            waiting += read_values(part.nodes[value - part.inputs][1])
    values = {number: number for number in range(part.inputs)}
    nodes: list[Node] = []
    for number, (name, arguments) in enumerate(part.nodes, start=part.inputs):
        if number in needed:
            values[number] = part.inputs + len(nodes)
            nodes.append((name, renumbered(arguments, values)))
    return replace(part, nodes=nodes, output=values[part.output])


def read_values(arguments: Arguments) -> list[int]:
    """Return the numbers of the values that a node reads."""
    found = read(list(arguments.values()), "value")
    return [value for value in found if isinstance(value, int) and not isinstance(value, bool)]


class _Graph:
    """Looks behind values of a body."""

    def __init__(self, part: GraphPart, constants: Sequence[JsonObject]) -> None:
        self.part = part
        self.constants = [
            np.frombuffer(base64.b85decode(entry["data"]), entry["dtype"]).reshape(entry["shape"])
            for entry in constants
        ]
        self.known: dict[int, np.ndarray | None] = {1: PROBE}

    def node(self, value: Any) -> Node:
        number = value.get("value", -1) - self.part.inputs if isinstance(value, Mapping) else -1
        return self.part.nodes[number] if number >= 0 else ("", {})

    def turned(self, value: Any) -> tuple[Any, Rotation] | None:
        """Return what is turned and how, if ``value`` is the sum of x cos and x, its halves exchanged, sin."""
        name, arguments = self.node(value)
        if name == "cat" and len(arguments["tensors"]) == 2:  # the first channels alone
            first, rest = arguments["tensors"]
            inner, taken, left = self.turned(first), None, self.node(rest)
            if inner is not None:
                taken = self.node(inner[0])
            if taken is None or taken[0] != "slice" or left[0] != "slice" or taken[1]["x"] != left[1]["x"]:
                return None
            sizes = taken[1]["start"], taken[1]["end"], left[1]["start"]
            whole = 2 * len(inner[1].frequencies) if inner else 0
            return (taken[1]["x"], inner[1]) if inner and sizes == (0, whole, whole) else None
        if name != "add":
            return None
        products = [self.node(arguments[each]) for each in ("x", "other")]
        if any(product != "mul" for product, _ in products):
            return None
        (straight, by_cosine), (halves, by_sine) = (self.factors(product) for _, product in products)
        if by_cosine is None or by_sine is None or not self.exchanged(halves, straight):
            return None
        rotation = self.rotation(by_cosine[0, 0], by_sine[0, 0])
        return None if rotation is None else (straight, rotation)

    def factors(self, product: Arguments) -> tuple[Any, np.ndarray | None]:
        """Return the factor that is of the input, and the values of the one that is of positions."""
        for one, other in (("x", "other"), ("other", "x")):
            table = self.computed(product[other])
            if table is not None and table.ndim == 4:
                return product[one], table
        return None, None

    def exchanged(self, value: Any, source: Any) -> bool:
        """Say whether ``value`` is the source's second half, negated, before its first."""
        name, arguments = self.node(value)
        if name != "cat" or len(arguments["tensors"]) != 2:
            return False
        minus, first = (self.node(each) for each in arguments["tensors"])
        second = self.node(minus[1].get("x"))
        if (minus[0], first[0], second[0]) != ("neg", "slice", "slice"):
            return False
        ends = first[1]["start"], first[1]["end"], second[1]["start"]
        return first[1]["x"] == second[1]["x"] == source and ends == (0, ends[1], ends[1])

    def rotation(self, cosine: np.ndarray, sine: np.ndarray) -> Rotation | None:
        """Return the rotation whose tables these are, [positions, channels]; None for any other."""
        half = cosine.shape[-1] // 2
        factor = float(cosine[0, 0])
        for frequencies in self.constants:
            if frequencies.dtype == np.float32 and frequencies.size == half:
                angles = PROBE[0][:, None].astype(np.float32) * frequencies.reshape(1, half)
                wanted = [np.tile(function(angles), 2) * np.float32(factor) for function in (np.cos, np.sin)]
                if all(np.allclose(*pair, 0, 1e-6) for pair in zip(wanted, (cosine, sine), strict=True)):
                    return Rotation(tuple(map(float, frequencies.reshape(-1))), factor)
        return None

    def computed(self, value: Any) -> np.ndarray | None:
        """Return what a value is at the positions of :data:`PROBE`, None where it depends on more than them."""
        if not isinstance(value, Mapping):
            return np.asarray(value) if isinstance(value, int | float) else None
        if "constant" in value:
            return self.constants[value["constant"]]
        number = value.get("value", 0)
        if number not in self.known:
            name, arguments = self.node(value)
            self.known[number] = None
            inputs = [self.computed(arguments[each]) for each in ("x", "other", "mat2") if each in arguments]
            if name == "cat":
                inputs = [self.computed(each) for each in arguments["tensors"]]
            if name in _COMPUTED and all(each is not None for each in inputs):
                self.known[number] = _COMPUTED[name](arguments, *inputs)
        return self.known[number]


def _shape(arguments: Arguments) -> list[int]:
    return [size["tokens"] * PROBE.size if isinstance(size, Mapping) else size for size in arguments["shape"]]


_COMPUTED: dict[str, Any] = {
    "cast": lambda arguments, x: x.astype(arguments["dtype"]),
    "reshape": lambda arguments, x: x.reshape(_shape(arguments)),
    "broadcast": lambda arguments, x: np.broadcast_to(x, _shape(arguments)),
    "transpose": lambda arguments, x: np.swapaxes(x, arguments["dim0"], arguments["dim1"]),
    "mul": lambda _arguments, x, other: x * np.asarray(other, x.dtype),
    "matmul": lambda _arguments, x, other: x @ other,
    "cat": lambda arguments, *tensors: np.concatenate(tensors, arguments.get("dim", 0)),
    "cos": lambda _arguments, x: np.cos(x),
    "sin": lambda _arguments, x: np.sin(x),
}
