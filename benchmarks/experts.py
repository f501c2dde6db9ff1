"""What a mixture of experts costs per token beside the dense model of its active size: ratios of medians of one run.

Usage: python benchmarks/experts.py [--scheme SCHEME] [--activations KIND] [--layers N] [--experts N] [--rounds N]
                                    [--keep DIR]

Two checkpoints of random weights, a mixture of which two experts are chosen for each token and a dense model with as
many features as two of them, are built by the same front end. In each round each decodes 32 tokens after a prompt of
64, one after the other. If the weights of chosen experts alone are read, the ratio stays near one however many experts
there are.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {
    "vocab_size": 4096, "hidden_size": 768, "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
FEATURES, CHOSEN, PROMPT, STEPS = 1024, 2, 64, 32


def build(folder: Path, model_type: str, scheme: str, activations: str, config: dict[str, Any]) -> Any:
    """Write a checkpoint and build it; return a session of its bundle, and how many parameters it has."""
    import torch
    import transformers

    from tests.support import family_models

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        torch.manual_seed(0)
        made = transformers.AutoConfig.for_model(model_type, **SIZES, **config)
        model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
        print(f"{model_type}: {model.num_parameters() / 1e6:.0f} M parameters", flush=True)
        model.save_pretrained(checkpoint)
    shutil.rmtree(folder / "built", ignore_errors=True)  # of --keep, the checkpoints are kept
    case = family_models.Case("", SIZES)
    options = {"checkpoint": checkpoint, "frontend": "traced", "activations": activations}
    built = family_models.build(folder / "built", case, scheme, **options)
    return built.session()


def measure(session: Any) -> tuple[float, float]:
    """Return seconds of a prefill, and of one decoding step."""
    sequence = session.add()
    begin = time.perf_counter()
    session.prefill(sequence, [1 + at * 31 % 4000 for at in range(PROMPT)])
    middle = time.perf_counter()
    for step in range(STEPS):
        session.decode(sequence, 5 + step * 17 % 4000)
    end = time.perf_counter()
    session.remove(sequence)
    return middle - begin, (end - middle) / STEPS


def main() -> None:
    """Print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--activations", choices=("float", "int8"), default="float")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--keep", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        layers = {"num_hidden_layers": options.layers}
        routed = {
            "num_experts": options.experts, "num_experts_per_tok": CHOSEN, "moe_intermediate_size": FEATURES,
        }  # fmt: skip
        how = options.scheme, options.activations
        active = {"intermediate_size": CHOSEN * FEATURES}
        sides = {
            "mixture": build(folder / "mixture", "qwen3_moe", *how, {**layers, **routed}),
            "dense": build(folder / "dense", "qwen3", *how, {**layers, **active}),
        }
        rounds = [{name: measure(session) for name, session in sides.items()} for _ in range(options.rounds)]
    for number, what in enumerate((f"prefill of {PROMPT}", "decoding step")):
        medians = {name: statistics.median(found[name][number] for found in rounds) for name in sides}
        shown = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in medians.items())
        print(f"{what}: {shown}, ratio {medians['mixture'] / medians['dense']:.2f}")


if __name__ == "__main__":
    main()
