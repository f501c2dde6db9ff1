"""transformers' attention with keys and values that torch rounds as a KV cache in 8 bits keeps them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest


def in_bytes(monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    """Let models of this type attend so from now on."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    __import__(f"transformers.models.{model_type}.modeling_{model_type}")
    file = sys.modules[f"transformers.models.{model_type}.modeling_{model_type}"]
    monkeypatch.setattr(file, "eager_attention_forward", _rounding(file.eager_attention_forward))
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", _rounding(ALL_ATTENTION_FUNCTIONS["sdpa"]))


def _rounding(attend: Callable[..., Any]) -> Callable[..., Any]:
    def attend_in_bytes(module: Any, query: Any, key: Any, value: Any, *rest: Any, **keywords: Any) -> Any:
        return attend(module, query, _rounded(key), _rounded(value), *rest, **keywords)

    return attend_in_bytes


def _rounded(x: Any) -> Any:
    """Return heads of tokens, the last axis of ``x``, as integers of -127 to 127 times a scale of each."""
    peak = x.abs().amax(-1, keepdim=True)
    return (x / peak * 127).round() * peak / 127
