"""Reads the weights of GGUF files independently: by the ``gguf`` package, with the order of rows from transformers.

So a misreading of this project cannot be on both sides of a comparison.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


def tensors(paths: Sequence[Path], config: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the checkpoint's tensors by transformers' names, in the order of the files of one model; ``config`` is
    transformers' own.
    """
    import torch
    import transformers
    from gguf import GGUFReader, dequantize
    from transformers import modeling_gguf_pytorch_utils as theirs

    readers = [GGUFReader(path) for path in paths]
    architecture = str(readers[0].fields["general.architecture"].contents())
    cls: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        model = cls(config)
    untyped: Any = theirs
    processor = untyped.TENSOR_PROCESSORS.get(architecture, untyped.TensorProcessor)(config=config.to_dict())
    names = untyped.get_gguf_hf_weights_map(model, processor, architecture)
    for tensor in (tensor for reader in readers for tensor in reader.tensors):
        if tensor.name not in names:
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        if architecture == "gptneox" and ".attn_qkv." in tensor.name:  # which transformers does not read
            values = _by_head(values, config.num_attention_heads)
        made = processor.process(values, tensor.name)
        yield names[tensor.name], np.ascontiguousarray(made.weights)


def _by_head(values: np.ndarray, heads: int) -> np.ndarray:
    """Return q, k and v of each head together, as GPT-NeoX has them; the converter joined all q, all k and all v."""
    parts = [part.reshape(heads, -1, *values.shape[1:]) for part in np.split(values, 3)]
    return np.stack(parts, 1).reshape(values.shape)
