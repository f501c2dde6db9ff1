"""Tables of the operators of traced graphs: torch's names -> those of :mod:`stages.models.operators`.

An operator of torch that is in none of these tables is refused by its name, never guessed.
"""

from __future__ import annotations

# That hand on what they are given.
SAME = {
    *(
        "alias",
        "clone",
        "contiguous",
        "detach",
        "detach_",
        "dropout",
        "lift_fresh_copy",
        "to.device",
        "to.other",
        "type_as",
    ),
    *("view_as_complex", "view_as_real"),  # a complex number is a pair of floats
}
# That only see a tensor in another shape: what comes out says which.
RESHAPES = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as"}
# That take a tensor apart along one axis, in parts of what comes out.
SPLITS = {"split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split"}
# What torch calls as we do.
ALIKE = (
    "add sub rsub mul div pow neg abs sqrt rsqrt exp log sin cos tanh sigmoid silu gelu relu erf softplus square floor "
    "hardtanh clamp minimum maximum where masked_fill logical_not logical_and eq ne lt le gt ge transpose permute t "
    "slice select cat stack repeat_interleave mean sum softmax amax matmul linear layer_norm embedding index gather "
    "attention rms_norm linalg_vector_norm var addmm arange full topk scatter logical_or "
    "max argmax repeat expm1 log1p expert_linear reciprocal polar copy slice_scatter select_scatter "
    "causal_conv ssm_scan selective_scan linear_scan delta_rule choose cumsum baddbmm"
)
# Without their overload where all of one name mean the same of what they are given.
OPERATORS: dict[str, str] = {
    **{name: name for name in ALIKE.split()},
    "_softmax": "softmax",
    "clamp_min": "clamp",
    "clamp_max": "clamp",
    "numpy_T": "t",
    "index_select": "index",
    "multiply": "mul",
    "divide": "div",
    "min.other": "minimum",
    "max.other": "maximum",
    "concat": "cat",
    "concatenate": "cat",
    "bmm": "matmul",
    "mm": "matmul",
    "to": "cast",
    "_to_copy": "cast",
    "masked_fill_": "masked_fill",
    "scatter_": "scatter",
    "relu_": "relu",
    "silu_": "silu",
    "mul_": "mul",
    "add_": "add",
    "div_": "div",
    "clamp_": "clamp",
    "bitwise_not": "logical_not",
    "bitwise_and": "logical_and",
    "__and__": "logical_and",
    "expand": "broadcast",
    "expand_as": "broadcast",
    "broadcast_to": "broadcast",
    "ones": "full",
    "zeros": "full",
    "scalar_tensor": "full",
    "ones_like": "full",
    "zeros_like": "full",
    "full_like": "full",
    "new_zeros": "full",
    "new_empty": "full",
    "empty": "full",
    "new_ones": "full",
}
# Of an operator that works along an axis: the argument that says which. None may work along the tokens.
ALONG: dict[str, str] = {
    **dict.fromkeys(("cat", "softmax", "mean", "sum", "amax", "select", "gather", "linalg_vector_norm"), "dim"),
    **dict.fromkeys(("split", "var", "topk", "scatter", "max", "argmax", "slice_scatter", "select_scatter"), "dim"),
}
