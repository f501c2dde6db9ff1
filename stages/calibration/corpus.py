"""The sample text that comes along: of the kinds that verify's probes are of, and none of their texts."""

from __future__ import annotations

from pathlib import Path

DEFAULT = Path(__file__).with_name("samples.jsonl")
