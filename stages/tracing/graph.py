"""Rewrites a function that torch exported in the operators of this project, as plain JSON values.

Rows are tokens. Only attention may combine rows, because the tokens of one call may belong to several sequences.
torch's symbolic sizes show it: at most one axis of a value has the number of tokens, and no operator but attention
works along that axis or reorders it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.tracing.nodes import dtype_of, encoded, is_lost, needed_nodes, outside, result_of
from stages.tracing.sizes import TOKENS, attention_sizes, state_sizes
from stages.tracing.vocabulary import ALONG, OPERATORS, RESHAPES, SAME, SPLITS

if TYPE_CHECKING:
    from stages.tracing.names import Names
    from stages.tracing.nodes import Arguments, Node

MAX_CONSTANT = 1 << 22  # numbers of a table that is computed and not stored
DROPPED = {"dtype_layout", "layout", "device", "pin_memory", "memory_format", "non_blocking", "copy", "implicit"}


@dataclass(frozen=True)
class GraphPart:
    """``nodes`` of a graph, each of which makes the value of its number behind the ``inputs``; ``output`` is one."""

    inputs: int
    nodes: Sequence[Node]
    output: int


class GraphWriter:
    """Writes down the nodes of an exported program."""

    def __init__(self, program: Any, names: Names) -> None:
        self.names = names
        self.values: dict[Any, Any] = {}  # node of torch -> what stands for it
        self.nodes: list[Node] = []
        self.signature = signature = program.graph_signature
        # torch makes these anew each time they are asked for.
        self.read, self.parameters, self.buffers = (
            frozenset(signature.user_inputs),
            signature.inputs_to_parameters,
            signature.inputs_to_buffers,
        )
        self.program = program
        nodes = list(program.graph.nodes)
        read = [node.meta["val"] for node in nodes if node.name in self.read]
        sizes = [size for value in read for size in value.shape if not isinstance(size, int)]
        self.symbol = sizes[0].node.expr if sizes else None
        self.inputs = len(signature.user_inputs)
        needed = needed_nodes(nodes)
        given = iter(range(self.inputs))
        self.positions = {"value": 1} if self.inputs > 1 else None
        for node in nodes:
            if node.op == "placeholder" and (node in needed or node.name in self.read):
                self.values[node] = self._placeholder(node, given)
            elif node.op == "call_function":
                if is_lost(node, needed):
                    raise self._refusal(node, f"{node.target.__name__}, which changes a value in place,")
                if node in needed:
                    self._node(node)
            elif node.op == "output":
                out = result_of(node)
        self.shape = self._shape(out)
        self.part = GraphPart(self.inputs, self.nodes, self.values[out]["value"])

    def _placeholder(self, node: Any, given: Any) -> Any:
        if node.name in self.parameters:
            return self.names.parameter(self.parameters[node.name].removeprefix("model."))
        if node.name in self.buffers:
            name = self.buffers[node.name]
            if name not in self.signature.non_persistent_buffers:
                return self.names.parameter(name.removeprefix("model."))
            return self._constant(dict(self.program.named_buffers()) | dict(self.program.constants), name)
        if node.name in self.signature.inputs_to_lifted_tensor_constants:
            return self._constant(self.program.constants, self.signature.inputs_to_lifted_tensor_constants[node.name])
        return {"value": next(given)}

    def _constant(self, found: Mapping[str, Any], name: str) -> Any:
        import torch

        tensor = found[name].detach()
        if tensor.numel() > MAX_CONSTANT:
            raise ConfigError(
                f"{name}: a table of {tensor.numel():,} numbers that is computed is too large to build in"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.dtype in (torch.float64, torch.bfloat16):
            tensor, dtype = tensor.float(), "float32"
        return self.names.constant(dtype, [*tensor.shape], encoded(tensor))

    def _shape(self, node: Any) -> list[Any]:
        """Return sizes, {"tokens": k} for k times the number of tokens."""
        value = node.meta["val"]
        return [*(self._size(size) for size in value.shape), *([2] if value.is_complex() else [])]

    def _size(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        factor = size.node.expr / self.symbol
        if not factor.is_Integer:
            raise ConfigError(
                f"a size of {size.node.expr} tokens: only multiples of the number of tokens are supported"
            )
        return {"tokens": int(factor)}

    def _node(self, node: Any) -> None:
        import torch

        value = node.meta.get("val")
        if isinstance(value, torch.SymInt | int):
            self.values[node] = self._size(value)
            return
        if getattr(node.target, "__name__", "") == "getitem":
            self._add(node, "item", {"x": self.values[node.args[0]], "index": node.args[1]})
            return
        if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 - torch has no other name for it
            raise self._refusal(node, str(node.target))
        name = node.target.overloadpacket.__name__
        arguments = self._arguments(node)
        self._check_shape(node, value)
        same = name in SAME or node.target.__name__ in SAME or (name == "to" and value.is_complex())
        if same or (name == "repeat" and self._shape(node.args[0]) == self._shape(node)):
            self.values[node] = arguments["x"]
        elif name in RESHAPES:
            self._reshape(node, arguments)
        elif name in SPLITS:
            axis = arguments.get("dim", 0) % node.args[0].meta["val"].dim()
            sizes = [int(part.shape[axis]) for part in value]
            self._along(node, "split", axis)
            self._add(node, "split", {"x": arguments["x"], "sizes": sizes, "dim": axis})
        elif name == "unbind":
            axis = arguments.get("dim", 0) % node.args[0].meta["val"].dim()
            self._along(node, "unbind", axis)
            self._add(node, "unbind", {"x": arguments["x"], "dim": axis})
        elif ours := OPERATORS.get(node.target.__name__, OPERATORS.get(name)):
            self._operator(node, name, ours, arguments)
        else:
            raise self._refusal(node, node.target.__name__)

    def _operator(self, node: Any, name: str, ours: str, arguments: Arguments) -> None:
        special: dict[str, Callable[..., Node]] = {
            "broadcast": self._broadcast,
            "full": self._full,
            "arange": self._arange,
            "cumsum": self._counted,
            "baddbmm": self._biased,
            "cast": self._cast,
            "addmm": self._projection,
            "index": self._rows,
            "attention": self._heads,
            "mul": self._product,
            "copy": lambda _node, arguments: ("cast", {"x": arguments["src"], "dtype": dtype_of(node)}),
            "repeat": self._repeat,
            "rms_norm": self._norm,
            "topk": lambda _node, arguments: ("topk", {"dim": -1, **arguments}),
            "expert_linear": self._experts,
            "causal_conv": self._kept,
            "ssm_scan": self._kept,
            "selective_scan": self._kept,
            "linear_scan": self._kept,
            "delta_rule": self._kept,
            "choose": self._kept,
        }
        if ours == "slice":
            self._slice(node, arguments)
            return
        if ours in special:
            ours, arguments = special[ours](node, arguments)
        if ours == "matmul" and not isinstance(node.args[0].meta["val"].shape[-1], int):
            raise self._refusal(node, f"{name} over the tokens")
        if ours in ALONG:
            first = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
            axes = arguments.get(ALONG[ours], 0 if ours in ("cat", "select") else None)
            every = range(first.meta["val"].dim())
            for axis in every if axes is None or axes == [] else axes if isinstance(axes, list) else [axes]:
                self._along(node, name, axis, first)
        if ours == "cast" or str(getattr(node.meta["val"], "dtype", "")) != "torch.bfloat16":
            self._add(node, ours, arguments)
            return
        # A modelling file that computes in half precision rounds what it reads and what it makes.
        rounded = {
            name: self._rounded(each) if isinstance(each, Mapping) and "value" in each else each
            for name, each in arguments.items()
        }
        self._add(node, ours, rounded)
        self.values[node] = self._rounded(self.values[node])

    def _broadcast(self, node: Any, arguments: Arguments) -> Node:
        return "broadcast", {"x": arguments["x"], "shape": self._shape(node)}

    def _norm(self, node: Any, arguments: Arguments) -> Node:
        """Return torch's own norm as ours, whose gain may be none, which is of ones."""
        import torch

        if "normalized_shape" not in arguments:
            return "rms_norm", dict(arguments)
        if len(arguments["normalized_shape"]) != 1:
            raise self._refusal(node, "a norm over several axes")
        ones = torch.ones(arguments["normalized_shape"])
        gain = arguments.get("weight") or self.names.constant("float32", ones.shape, encoded(ones))
        return "rms_norm", {
            "x": arguments["x"],
            "weight": gain,
            "eps": arguments.get("eps", torch.finfo(torch.float32).eps),
            "offset": 0.0,
        }

    def _repeat(self, node: Any, arguments: Arguments) -> Node:
        """Return x several times along axes, new ones in front among them, but not along that of the tokens."""
        times, shape = arguments["repeats"], self._shape(node.args[0])
        own = times[len(times) - len(shape) :]
        if any(isinstance(size, dict) and n != 1 for n, size in zip(own, shape, strict=True)):
            raise self._refusal(node, f"repeat of {shape} by {times}")
        return "repeat", {"x": arguments["x"], "repeats": times}

    def _full(self, node: Any, arguments: Arguments) -> Node:
        """Return what is filled with one number, however torch says so."""
        name, dtype = node.target.overloadpacket.__name__, str(node.meta["val"].dtype)
        given = arguments.get("fill_value", arguments.get("s"))
        value = given if given is not None else float("ones" in name)
        return "full", {"value": value, "dtype": dtype.removeprefix("torch."), "shape": self._shape(node)}

    def _arange(self, node: Any, arguments: Arguments) -> Node:
        if any(isinstance(argument, dict) for argument in arguments.values()):
            # Numbers of all tokens from the first on are their positions, which only the cache knows.
            counted = (arguments.get("start", 0), arguments["end"], arguments.get("step", 1)) == (0, {"tokens": 1}, 1)
            if not counted or self.positions is None:
                raise self._refusal(node, "arange over the tokens, whose positions only the cache knows,")
            return "cast", {"x": self._reshaped(self.positions, [{"tokens": 1}]), "dtype": dtype_of(node)}
        limits = {"start": arguments.get("start", 0), "end": arguments["end"], "step": arguments.get("step", 1)}
        return "arange", {**limits, "dtype": dtype_of(node)}

    def _counted(self, node: Any, arguments: Arguments) -> Node:
        """Return how many tokens there are up to each, of a mask of ones: positions, counted from one on."""
        before = arguments["x"].get("value", -1) - self.inputs
        made, given = self.nodes[before] if before >= 0 else ("", {})
        shape = self._shape(node)
        counted = made == "full" and given["value"] == 1 and shape[arguments["dim"]] == TOKENS
        if not counted or any(size != 1 for size in shape if size != TOKENS) or self.positions is None:
            raise self._refusal(node, "cumsum of what is no mask of ones")
        self.nodes.append(("cast", {"x": self._reshaped(self.positions, shape), "dtype": dtype_of(node)}))
        return "add", {"x": {"value": self.inputs + len(self.nodes) - 1}, "other": 1}

    def _biased(self, node: Any, arguments: Arguments) -> Node:
        """Return x + batch1 @ batch2."""
        if any(arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
            raise self._refusal(node, "baddbmm with factors")
        self.nodes.append(("matmul", {"x": arguments["batch1"], "other": arguments["batch2"]}))
        return "add", {"x": arguments["x"], "other": {"value": self.inputs + len(self.nodes) - 1}}

    def _cast(self, node: Any, arguments: Arguments) -> Node:
        return "cast", {"x": arguments["x"], "dtype": dtype_of(node)}

    def _projection(self, node: Any, arguments: Arguments) -> Node:
        """Return bias + x @ w, w [k, n], as a linear layer, whose weight is stored the other way round."""
        weight = arguments["mat2"]
        if "parameter" not in weight or any(arguments.get(name, 1) != 1 for name in ("alpha", "beta")):
            raise self._refusal(node, "addmm of what is no weight")
        turned = self.names.transposed(weight["parameter"])
        return "linear", {"x": arguments["mat1"], "weight": turned, "bias": arguments["x"]}

    def _product(self, node: Any, arguments: Arguments) -> Node:
        """Return a product, of complex numbers if both are: they are pairs of floats."""
        both = all(hasattr(each, "meta") and each.meta["val"].is_complex() for each in node.args)
        return "complex_mul" if both else "mul", dict(arguments)

    def _rows(self, node: Any, arguments: Arguments) -> Node:
        """Return x[indices] as rows looked up in a table."""
        if "index" in arguments and arguments["dim"] == 0:  # index_select
            arguments = {**arguments, "indices": [arguments["index"]]}
        if len(arguments.get("indices", ())) != 1 or any(isinstance(size, dict) for size in self._shape(node.args[0])):
            raise self._refusal(node, "index.Tensor of what is no table")
        return "embedding", {"weight": arguments["x"], "indices": arguments["indices"][0]}

    def _heads(self, node: Any, arguments: Arguments) -> Node:
        """Add the sizes of an attention, of which one whole sequence after another is read."""
        shapes = [self._shape(each) for each in node.args[:3]]
        sizes = attention_sizes(*shapes)
        if sizes is None:
            raise self._refusal(node, f"attention of {shapes[0]} to {shapes[1]}")
        return "attention", {**arguments, **sizes}

    def _experts(self, node: Any, arguments: Arguments) -> Node:
        """Return a layer of chosen experts, whose matrices lie one under the other in one parameter."""
        weight = arguments["weight"]
        if "parameter" not in weight or [*map(len, (self._shape(each) for each in node.args[:3]))] != [2, 3, 1]:
            raise self._refusal(node, "a layer of experts of what is no weight")
        named = self.names.stacked(weight["parameter"], transposed=arguments["transposed"])
        features = self._shape(node)[1]
        arguments = {"x": arguments["x"], "weight": named, "chosen": arguments["chosen"], "features": features}
        return "expert_linear", arguments

    def _kept(self, node: Any, arguments: Arguments) -> Node:
        """Add the sizes of an operator that keeps a state of a sequence, which is one of one batch."""
        name = node.target.overloadpacket.__name__
        shapes = [self._shape(each) for each in node.args if hasattr(each, "meta")]
        sizes = state_sizes(name, shapes)
        if sizes is None:
            raise self._refusal(node, f"{name} of {shapes}")
        return name, {**arguments, **sizes}

    def _slice(self, node: Any, arguments: Arguments) -> None:
        source, axis = node.args[0], arguments.get("dim", 0) % node.args[0].meta["val"].dim()
        if self._shape(source) == self._shape(node) and arguments.get("step", 1) == 1:
            self.values[node] = arguments["x"]  # all of it
            return
        self._along(node, "slice", axis)
        size = source.meta["val"].shape[axis]
        start, end, step = slice(arguments.get("start"), arguments.get("end"), arguments.get("step", 1)).indices(size)
        self._add(node, "slice", {"x": arguments["x"], "dim": axis, "start": start, "end": end, "step": step})

    def _reshape(self, node: Any, arguments: Arguments) -> None:
        before, after = (outside(shape) for shape in (self._shape(node.args[0]), self._shape(node)))
        if before != after:
            raise self._refusal(node, f"{node.target.__name__} that reorders tokens")
        self._add(node, "reshape", {"x": arguments["x"], "shape": self._shape(node)})

    def _rounded(self, value: Any) -> dict[str, int]:
        """Add a node that rounds a value to half precision."""
        self.nodes.append(("cast", {"x": value, "dtype": "bfloat16"}))
        return {"value": self.inputs + len(self.nodes) - 1}

    def _reshaped(self, value: Any, shape: Sequence[Any]) -> dict[str, int]:
        """Add a node that no node of torch stands for."""
        self.nodes.append(("reshape", {"x": value, "shape": [*shape]}))
        return {"value": self.inputs + len(self.nodes) - 1}

    def _along(self, node: Any, name: str, axis: int, source: Any = None) -> None:
        """Refuse a node that works along the tokens, or along an axis that there is not."""
        shape = (source or node.args[0]).meta["val"].shape
        if not -len(shape) <= axis < len(shape):
            raise self._refusal(node, f"{name} of a single number")
        if not isinstance(shape[axis], int):
            raise self._refusal(node, f"{name} along the tokens")

    def _check_shape(self, node: Any, value: Any) -> None:
        for each in value if isinstance(value, list | tuple) else [value]:
            if sum(not isinstance(size, int) for size in each.shape) > 1:
                raise self._refusal(node, f"{node.target.__name__}, which combines different tokens")

    def _arguments(self, node: Any) -> dict[str, Any]:
        """Return the arguments by their names in torch's schema, of which ``self`` and ``input`` are x."""
        schema = node.target._schema.arguments  # noqa: SLF001 - public in C++ alone
        found = dict(zip((argument.name for argument in schema), node.args, strict=False)) | dict(node.kwargs)
        named = {"x" if name in ("self", "input") else name: value for name, value in found.items()}
        return {name: self._plain(value) for name, value in named.items() if name not in DROPPED and value is not None}

    def _plain(self, value: Any) -> Any:
        import torch

        if isinstance(value, torch.fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return [self._plain(each) for each in value]
        if isinstance(value, float) and not math.isfinite(value):
            return {"number": str(value)}  # which JSON cannot write
        if isinstance(value, torch.dtype):
            return str(value).removeprefix("torch.")
        return value

    def _add(self, node: Any, name: str, arguments: Arguments) -> None:
        self.values[node] = {"value": self.inputs + len(self.nodes)}
        self.nodes.append((name, arguments))

    def _refusal(self, node: Any, what: str) -> ConfigError:
        stack = node.meta.get("nn_module_stack") or {}
        path = next((path for path, _ in reversed(stack.values()) if path), "")
        where = path.removeprefix("L['self'].").removeprefix("model.") or "the model"
        return ConfigError(
            f"{where}: node {node.name}: {what} is not supported; a family of its own is needed (docs/extending.md)"
        )
