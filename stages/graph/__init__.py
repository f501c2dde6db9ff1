"""The functions a model is exported as: one module each, all written against stages/graph/export.py.

A row is ``"module:function"``; the function takes a :class:`stages.graph.export.Build` and returns the IRModule of
that one function (with its batch form). Nothing shared imports these modules, so that editing one leaves the others.
A recurrent model takes the rows of ``RECURRENT`` where there is one: it has a state in place of the KV cache; one with
both takes those of ``HYBRID``. :data:`OTHERS` names them by a model's kind of state.
"""

FUNCTIONS: dict[str, str] = {
    "embed": "stages.graph.embed:export",
    "prefill": "stages.graph.prefill:export",
    "decode": "stages.graph.decode:export",
    "kv": "stages.graph.kv:export",
    "softmax": "stages.graph.softmax:export",
}

RECURRENT: dict[str, str] = {
    "prefill": "stages.graph.recurrent_prefill:export",
    "decode": "stages.graph.recurrent_decode:export",
    "kv": "stages.graph.recurrent_state:export",
}

HYBRID: dict[str, str] = {
    "prefill": "stages.graph.hybrid:export_prefill",
    "decode": "stages.graph.hybrid:export_decode",
    "kv": "stages.graph.hybrid:export_state",
}

OTHERS = {"rnn": RECURRENT, "hybrid": HYBRID}
