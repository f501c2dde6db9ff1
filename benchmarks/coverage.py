"""Which of the causal model types that transformers knows can be built, each proven or refused with its reason.

Usage: python benchmarks/coverage.py [TYPE ...] [--only-trace] [--scheme NAME] [--jobs N] [--results FILE]

Every type's default config is shrunk by one rule (SMALL), a random checkpoint of it is written by transformers, built
for llvm in q0f32 through the stages, and compared with AutoModelForCausalLM on the same folder: prefills around a
chunk's length, 64 decode steps and batches, the largest difference within 2e-5 of the largest logit. With another
``--scheme`` transformers' model is given the values that the bundle stores. ``--results``
keeps what was found, type by type, and compiled kernels in a folder beside it; types that are in it are not tried again
unless they are named. docs/models.md is made of it: stages/cli/traced.json. Status 1 if a type is wrong or crashed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
BOUND = 2e-5
LAYERS, CONTEXT = 2, 160
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
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length"), CONTEXT),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size"), 20),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "vocab_size": 131,
    "rotary_dim": 8,
    "word_embed_proj_dim": 64,
    "hidden_size_per_layer_input": 16,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "num_expert_group"), 4),
    "topk_group": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "linear_num_heads": 4,
    "linear_head_dim": 16,
    "laurel_rank": 8,
    "vocab_size_per_layer_input": 131,
    "index_topk": 40,
    "index_n_heads": 16,  # a score of zero, at which tokens are equal, is that of all heads
    "index_head_dim": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}

# What the rule cannot know of a type.
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 8, "moe_top_k": 2},
    },
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
        "num_hidden_layers": 6,
        "n_input_layers": 2,
        "n_recurrent_layers": 2,
        "n_output_layers": 2,
        "initializer_range": 1.0,  # factors are stored as multiples of it: of one like the others, scores are thousands
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "head_dim": 24,
        "layer_types": ["indexed_attention", "sliding_attention"],
        "num_key_value_heads": 4,
        "per_layer_config": {
            1: {
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "q_lora_rank": 24,
                "kv_lora_rank": 48,
                "head_dim": 32,
                "qk_nope_head_dim": 24,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
            }
        },
    },
    "falcon_h1": {"mamba_d_ssm": 128, "mamba_d_state": 16, "mamba_n_groups": 2},
    **{
        name: {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            **more,
        }
        for name, more in {
            "gemma3n_text": {"activation_sparsity_pattern": [0.9, 0.9, 0.0, 0.0], "intermediate_size": 96},
            "gemma4_text": {"per_layer_config": {at: {"head_dim": 32, "num_key_value_heads": 1} for at in (1, 3)}},
        }.items()
    },
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "gpt_neo": {
        "attention_types": [[["global", "local"], 1]],
        "attention_layers": ["global", "local"],
        "window_size": 20,
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    **{name: {"layer_types": ["conv", "full_attention"]} for name in ("lfm2", "lfm2_moe")},
    "llama4_text": {"moe_layers": [1], "intermediate_size_mlp": 96, "floor_scale": 32},
    **{name: {"intermediate_size": 128, "time_step_rank": 4} for name in ("mamba", "falcon_mamba")},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "mamba_dt_rank": 4},
    "zaya": {
        "num_experts_per_tok": 1,
        "layer_types": ["hybrid", "hybrid_sliding"],
        "router_hidden_size": 32,
        "sliding_window": 20,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "hybrid_layer_ids": [1],
        "mamba_headdim": 16,
        "mamba_d_state": 16,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "longcat_flash": {"qk_head_dim": 24, "num_layers": 1, "expert_ffn_hidden_size": 96, "zero_expert_num": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"]},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 20, "lru_width": 64},
    "hrm_text": {"H_cycles": 2, "L_cycles": 2, "num_layers_per_stack": 2, "num_hidden_layers": 12},
    **{name: {"indexer_types": ["full", "shared"]} for name in ("glm_moe_dsa", "hy_v4")},
    # Loading one, transformers makes the row of its padding zeros, which a tied head reads; the published one has none.
    "youtu": {"pad_token_id": None},
}

# Keys of what is listed layer by layer, or behind other keys of the same.
PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")


def shrunk(config: Any) -> Any:
    """Return the values of a config, those of :data:`SMALL` in the place of theirs, in nested configs too."""
    if not isinstance(config, dict):
        return config
    small: dict[str, Any] = {}
    for key, value in config.items():
        if key in SMALL and (type(value) is int or (value is None and key != "sliding_window")):
            small[key] = SMALL[key]
        elif key == "per_layer_config" and value:  # in the last layer as much more or less as it is there
            own = next(iter(value.values()))
            small[key] = {LAYERS - 1: {name: SMALL[name] * own[name] // config[name] for name in own if name in SMALL}}
        elif isinstance(value, list) and (key in PER_LAYER or len(value) == config.get("num_hidden_layers")):
            kinds = list(dict.fromkeys(value))[:LAYERS]
            kinds = [SMALL.get(key, kind) for kind in kinds]
            small[key] = (kinds * LAYERS)[:LAYERS]
        else:
            small[key] = shrunk(value)
    if "qk_rope_head_dim" in config:  # one latent vector for all heads, of which these channels alone are turned
        small |= {"head_dim": SMALL["qk_rope_head_dim"], "num_key_value_heads": SMALL["num_attention_heads"]}
    return small


def own(values: Any) -> Any:
    """Return the values of a small config with what :data:`OWN` says of its type, and of those nested in it."""
    if not isinstance(values, dict):
        return values
    return {key: own(value) for key, value in values.items()} | OWN.get(values.get("model_type", ""), {})


def attempt(model_type: str, folder: Path, *, scheme: str = "q0f32", only_trace: bool = False) -> tuple[str, str]:
    """Return (verdict, reason): proven, refused, unmade (transformers makes no such model), wrong or crashed."""
    import torch
    import transformers

    from stages.checkpoint.errors import ConfigError
    from stages.tracing.trace import trace
    from tests.support import traced_models

    try:
        config = transformers.AutoConfig.for_model(model_type)
        values = {key: value for key, value in own(shrunk(config.to_dict())).items() if key != "model_type"}
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
        traced_models.scramble(model)
        model.save_pretrained(folder / "checkpoint")
    except Exception as error:  # noqa: BLE001 - whatever transformers raises is the reason
        return "unmade", f"{type(error).__name__}: {str(error)[:150]}"
    return compare(folder, scheme)


def compare(folder: Path, scheme: str) -> tuple[str, str]:
    """Build the checkpoint and hold it against transformers."""
    from stagegraph.stage import StageError
    from tests.support import family_models, traced_models

    try:
        case = family_models.Case("", {"vocab_size": SMALL["vocab_size"]}, context_window=CONTEXT)
        made = family_models.build(folder, case, scheme, checkpoint=folder / "checkpoint", frontend="traced")
    except StageError as error:
        return "refused", "; ".join(error.problems)[:300]
    worst = max(traced_models.differences(made, CONTEXT))
    if worst < BOUND:
        return "proven", f"within {worst:.1e} of the largest logit"
    # Rounding may move logits of random weights by as much: where float32 is sure of half of all tokens, float64 tells.
    errors, moved = traced_models.beside_float64(made, CONTEXT)
    told = f"within {max(errors):.1e} of the largest logit in float64, transformers' float32 within {max(moved):.1e}"
    right = max(errors) < 2 * max(moved) and statistics.median(moved) < BOUND / 4
    return ("proven" if right else "wrong"), told


def begin(model_type: str, folder: Path, scheme: str, *, only_trace: bool) -> int:
    """Begin an attempt in a process of its own, which has all that this one imported, and return its number: what
    crashes there ends nothing here.
    """
    folder.mkdir()
    child = os.fork()
    if child == 0:
        try:
            found = attempt(model_type, folder, scheme=scheme, only_trace=only_trace)
        except BaseException as error:  # noqa: BLE001 - a crash is a verdict
            last = traceback.extract_tb(error.__traceback__)[-1]
            found = "crashed", f"{type(error).__name__}: {str(error)[:200]} ({Path(last.filename).name}:{last.lineno})"
        verdict, reason = found
        reason = " ".join(reason.replace(f"{folder / 'checkpoint'}: ", "").split())
        (folder / "answer.json").write_text(json.dumps([verdict, reason]))
        os._exit(0)
    return child


def verdicts(
    types: list[str], scratch: Path, jobs: int, scheme: str, *, only_trace: bool
) -> Iterator[tuple[str, str, str, float]]:
    """Yield (type, verdict, reason, seconds of processors) of all ``types``, so many at a time."""
    waiting, running = [*reversed(types)], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            model_type = waiting.pop()
            running[begin(model_type, scratch / model_type, scheme, only_trace=only_trace)] = model_type
        child, _, used = os.wait4(-1, 0)
        if child in running:
            model_type = running.pop(child)
            answer = scratch / model_type / "answer.json"
            verdict, reason = json.loads(answer.read_text()) if answer.exists() else ("crashed", "the process died")
            shutil.rmtree(scratch / model_type)
            yield model_type, verdict, reason, used.ru_utime + used.ru_stime


def main() -> int:
    """Try every type, print what was found, and return 1 if one is wrong or crashed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--only-trace", action="store_true", help="stop where the graph is traced")
    parser.add_argument("--scheme", default="q0f32", metavar="NAME", help="what the bundles store (default: q0f32)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="types that are tried at the same time")
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
    types = args.types or sorted(name for name in EVERY if name not in known)
    with tempfile.TemporaryDirectory() as scratch:
        memo = args.results.with_suffix(".kernels") if args.results else Path(scratch) / "memo"
        memo.mkdir(exist_ok=True)
        os.environ["STAGEGRAPH_TEST_KERNELS"] = str(memo)  # kernels that models share are compiled once
        tried = verdicts(types, Path(scratch), args.jobs, args.scheme, only_trace=args.only_trace)
        for model_type, verdict, reason, seconds in tried:
            known[model_type] = {"verdict": verdict, "reason": reason, "transformers": transformers.__version__}
            print(f"{model_type:<28}{verdict:<9}{seconds:6.1f} CPU s  {reason}", flush=True)
            if args.results:
                args.results.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    counts = Counter(entry["verdict"] for entry in known.values())
    print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return 1 if counts.keys() & {"wrong", "crashed"} else 0


if __name__ == "__main__":
    sys.exit(main())
