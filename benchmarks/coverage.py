"""Which of the causal model types that transformers knows can be built, each proven or refused with its reason.

Usage: python benchmarks/coverage.py [TYPE ...] [--only-trace] [--results FILE]   (status 1 if one is wrong)

Every type's default config is shrunk by one rule (SMALL), a random checkpoint of it is written by transformers, built
for llvm in q0f32 through the stages, and held against AutoModelForCausalLM on the same folder: prefills around a
chunk's length and 16 decode steps, the largest difference within 2e-5 of the largest |logit|. ``--results`` keeps
what was found, type by type; docs/models.md is made of that in stages/cli/traced.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BOUND = 2e-5
LAYERS, TOKENS, STEPS = 2, 80, 16
# Keys of configs -> what each is in a small model.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size", "moe_intermediate_size"), 96
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("head_dim", "kv_channels"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), 160),
    **dict.fromkeys(("sliding_window", "attention_window"), 20),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 131,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}


def shrunk(config: Any) -> Any:
    """Return the values of a config, those of :data:`SMALL` in the place of theirs, in nested configs too."""
    if not isinstance(config, dict):
        return config
    small = {}
    for key, value in config.items():
        if key in SMALL and (type(value) is int or (value is None and key != "sliding_window")):
            small[key] = SMALL[key]
        elif isinstance(value, list) and key in (
            "layer_types",
            "mlp_layer_types",
            "no_rope_layers",
            "layers_block_type",
        ):
            kinds = list(dict.fromkeys(value))[:LAYERS]
            small[key] = (kinds * LAYERS)[:LAYERS]
        else:
            small[key] = shrunk(value)
    return small


def attempt(model_type: str, folder: Path, *, only_trace: bool) -> tuple[str, str]:
    """Return (verdict, reason): proven, refused, unmade (transformers makes no such model), wrong or crashed."""
    import torch
    import transformers

    from stages.checkpoint.errors import ConfigError
    from stages.tracing.trace import trace
    from tests.stages import traced

    try:
        config = transformers.AutoConfig.for_model(model_type)
        values = {key: value for key, value in shrunk(config.to_dict()).items() if key != "model_type"}
        config = transformers.AutoConfig.for_model(model_type, **values)
        raw = json.loads(config.to_json_string(use_diff=False))
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the reason
        return "unmade", f"no small config: {type(error).__name__}: {str(error)[:150]}"
    try:
        trace(raw)
    except ConfigError as error:
        return "refused", "; ".join(error.problems)
    if only_trace:
        return "traced", ""
    try:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        traced.scramble(model)
        model.save_pretrained(folder / "checkpoint")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the reason
        return "unmade", f"{type(error).__name__}: {str(error)[:150]}"
    return compare(folder)


def compare(folder: Path) -> tuple[str, str]:
    """Build the checkpoint and hold it against transformers."""
    import numpy as np

    from stagegraph.stage import StageError
    from tests.stages import families

    try:
        case = families.Case("", {"vocab_size": SMALL["vocab_size"]}, context_window=160)
        made = families.build(
            folder, case, "q0f32", checkpoint=folder / "checkpoint", memo=folder.parent / "memo", frontend="traced"
        )
    except StageError as error:
        return "refused", "; ".join(error.problems)[:300]
    ids = np.random.default_rng(5).integers(3, SMALL["vocab_size"], TOKENS + STEPS).tolist()
    expected = made.reference(ids)
    session = made.session()
    worst = 0.0
    for length in (1, 17, families.CHUNK - 1, families.CHUNK, TOKENS):
        sequence = session.add()
        found = [session.prefill(sequence, ids[:length])]
        found += [session.decode(sequence, ids[length + step]) for step in range(STEPS)]
        wanted = expected[length - 1 : length + STEPS]
        worst = max(worst, *(families.error(*pair) for pair in zip(found, wanted, strict=True)))
        session.remove(sequence)
    return ("proven" if worst < BOUND else "wrong"), f"{worst:.1e}"


def in_a_child(model_type: str, folder: Path, *, only_trace: bool) -> tuple[str, str]:
    """Run an attempt in a process of its own, so that what crashes there ends nothing here."""
    answer = folder / "answer.json"
    child = os.fork()
    if child == 0:
        try:
            found = attempt(model_type, folder, only_trace=only_trace)
        except BaseException as error:  # noqa: BLE001 - a crash is a verdict
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = "crashed", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        answer.write_text(json.dumps(found))
        os._exit(0)
    os.waitpid(child, 0)
    return tuple(json.loads(answer.read_text())) if answer.exists() else ("crashed", "the process died")


def main() -> int:
    """Try every type, print what was found, and return 1 if one is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--only-trace", action="store_true", help="stop where the graph is traced")
    parser.add_argument("--results", type=Path, metavar="FILE", help="what is known, and where it is kept")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    import torch
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as EVERY

    from stages import profiles

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    profiles.compiler()
    attempt("llama", Path(), only_trace=True)  # what a first trace imports, every child then has
    known = json.loads(args.results.read_text()) if args.results and args.results.exists() else {}
    with tempfile.TemporaryDirectory() as scratch:
        for model_type in args.types or sorted(EVERY):
            started = time.perf_counter()
            folder = Path(scratch) / model_type
            folder.mkdir()
            verdict, reason = in_a_child(model_type, folder, only_trace=args.only_trace)
            known[model_type] = {"verdict": verdict, "reason": reason, "transformers": transformers.__version__}
            print(f"{model_type:<28}{verdict:<9}{time.perf_counter() - started:6.1f} s  {reason}", flush=True)
            if args.results:
                args.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    counts: dict[str, int] = {}
    for entry in known.values():
        counts[entry["verdict"]] = counts.get(entry["verdict"], 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return 1 if counts.keys() & {"wrong", "crashed"} else 0


if __name__ == "__main__":
    sys.exit(main())
