"""What a traced model costs beside its own family here: ratios of medians of one run.

Usage: python benchmarks/frontends.py [--type TYPE...] [--activations KIND...] [--scheme SCHEME] [--layers N]
                                      [--rounds N]

Of each type one checkpoint of random weights in the shape of 125 million parameters is built by both front ends, with
float and with int8 activations. In each round each bundle reads a prompt of 64 tokens and decodes 32 more, in turns.
The native family is the baseline: 1.00 is as fast. How many operators a layer has beyond views, and how far the logits
of both are apart, is printed too. Status 1 if a median ratio is below 0.95, if a layer has more operators or if logits
differ by more than 2e-5 of the largest, with int8 activations too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SIZES = {
    "vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 12,
    "num_key_value_heads": 12, "max_position_embeddings": 512,
}  # fmt: skip
FRONTENDS = ("native", "traced")
TYPES = ("llama", "qwen2", "qwen3", "mistral", "gpt_neox")
LEAST, BOUND = 0.95, 2e-5
ACTIVATIONS = ("float", "int8")
VIEWS = ("reshape", "tuple", "vm.builtin.attention_kv_cache_get_query_positions")  # operators that compute nothing


def written(folder: Path, model_type: str, layers: int) -> Path:
    """Write a checkpoint of random weights and return it."""
    import torch
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(model_type, **SIZES, num_hidden_layers=layers)
    model = transformers.AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    print(f"{model_type}: {model.num_parameters() / 1e6:.0f} M parameters", flush=True)
    model.save_pretrained(folder)
    return folder


def built(folder: Path, checkpoint: Path, scheme: str, activations: str) -> dict[str, Any]:
    """Build a checkpoint by each front end; return a session of each bundle."""
    from tests.support import family_models

    case, options = family_models.Case("", SIZES), {"checkpoint": checkpoint, "activations": activations}
    return {
        frontend: family_models.build(folder / frontend, case, scheme, frontend=frontend, **options).session()
        for frontend in FRONTENDS
    }


def operators(folder: Path) -> dict[str, int]:
    """Return how many operators the decode function of each front end's graph has, views left out."""
    counts = {}
    for frontend in FRONTENDS:
        graph = json.loads((folder / frontend / "graph-decode" / "graph.json").read_text())
        counts[frontend] = sum(n for name, n in graph["operators"]["decode"].items() if name not in VIEWS)
    return counts


def apart(sides: dict[str, Any]) -> float:
    """Return the largest difference of the logits of both, of a prompt and 32 decoding steps, over the largest."""
    from tests.support.family_models import error

    ids = [1 + at * 31 % 4000 for at in range(96)]
    found = {}
    for name, session in sides.items():
        sequence = session.add()
        found[name] = [session.prefill(sequence, ids[:64]), *(session.decode(sequence, each) for each in ids[64:])]
        session.remove(sequence)
    return max(error(have, want) for have, want in zip(found["traced"], found["native"], strict=True))


def compare(folder: Path, sides: dict[str, Any], count: int) -> bool:
    """Measure ``count`` rounds of two bundles, print what is found, and say whether all is met."""
    from experts import PROMPT, measure

    counts, difference = operators(folder), apart(sides)
    print(f"operators of decode: {counts}; logits within {difference:.1e} of the largest", flush=True)
    ok = difference < BOUND and counts["traced"] <= counts["native"]
    rounds = []
    for number in range(count):
        turn = FRONTENDS if number % 2 else FRONTENDS[::-1]
        rounds.append({name: measure(sides[name]) for name in turn})
    for number, what in enumerate((f"prefill of {PROMPT}", "decoding step")):
        medians = {name: statistics.median(found[name][number] for found in rounds) for name in FRONTENDS}
        ratios = sorted(found["native"][number] / found["traced"][number] for found in rounds)
        shown = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in medians.items())
        print(
            f"{what}: {shown}; traced at {statistics.median(ratios):.2f} x native's speed "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} rounds)",
            flush=True,
        )
        ok = ok and statistics.median(ratios) >= LEAST
    return ok


def main() -> int:
    """Print medians and ratios; return 1 if a figure is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--type", nargs="+", choices=TYPES, default=TYPES, help="model types that have a family")
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=ACTIVATIONS)
    parser.add_argument("--scheme", default="q4f16_1")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    missed = []
    for model_type in options.type:
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint = written(Path(scratch) / "checkpoint", model_type, options.layers)
            for activations in options.activations:
                print(f"{model_type}, {options.scheme}, {activations} activations", flush=True)
                folder = Path(scratch) / activations
                if not compare(folder, built(folder, checkpoint, options.scheme, activations), options.rounds):
                    missed.append(f"{model_type} {activations}")
    print(f"MISSED: {', '.join(missed)}" if missed else "all met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
