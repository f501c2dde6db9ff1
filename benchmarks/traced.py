"""What it costs to get from a config.json of 7 and of 70 billion parameters to every graph where a model is traced.

Usage: python benchmarks/traced.py [--only NAME ...]   (exit status 1 if a figure is missed)

As benchmarks/families.py: config-parse, param-register and graph-build in one process, on a checkpoint whose weights
are a hole. Seconds are those of processors, imports of torch, transformers and TVM among them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
MAX_SECONDS, MAX_BYTES = 30.0, 2e9
SHAPE: dict[str, Any] = {
    "vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "float16", "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SMALL = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
         "num_key_value_heads": 32}  # fmt: skip
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
OLMO = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
ROWS = {
    "llama-7b": {**SHAPE, **SMALL, **LLAMA},
    "olmo2-7b": {**SHAPE, **SMALL, **OLMO},
    "llama-70b": {**SHAPE, **LARGE, **LLAMA},
    "olmo2-70b": {**SHAPE, **LARGE, **OLMO},
}


def main() -> int:
    """Measure, print, and return 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help=", ".join(ROWS))
    args = parser.parse_args()
    from families import measured

    ok = True
    for name in args.only:
        with tempfile.TemporaryDirectory() as scratch:
            found = measured(Path(scratch), ROWS[name], "q4f16_1", "traced")
        met = found["processors"] < MAX_SECONDS and found["peak"] < MAX_BYTES
        ok = ok and met
        print(f"{name:<12}{found['processors']:>7.1f} CPU s{found['peak'] / 1e9:>7.2f} GB   ", end="")
        print(f"required < {MAX_SECONDS:.0f} s, < {MAX_BYTES / 1e9:.0f} GB   {'met' if met else 'MISSED'}", flush=True)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
