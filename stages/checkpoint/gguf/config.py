"""Makes config.json and generation_config.json of a GGUF file's metadata."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from stages.checkpoint.errors import ConfigError
from stages.checkpoint.gguf.architectures import ARCHITECTURES, ROPE_FACTORS
from stages.checkpoint.gguf.container import peek
from stages.checkpoint.strict_json import shown
from stages.problems import capped

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from stages.checkpoint.gguf.architectures import Architecture
    from stages.checkpoint.gguf.container import Contents
    from stages.documents.files import JsonObject

ARCHITECTURE = "general.architecture"
# Keys of an architecture that make another model of it if they are more than zero.
UNBUILT = ("expert_count", "attention.clamp_kqv", "attention.max_alibi_bias", "logit_scale", "embedding_scale")
GEMMA3_ACTIVATION, GEMMA3_PERIOD, GEMMA3_NEAR_THETA, GEMMA3_27B_LAYERS = "gelu_pytorch_tanh", 6, 10_000.0, 62
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}


def architecture(contents: Contents) -> Architecture:
    """Return the architecture of the file's model; :class:`ConfigError` for one that is not supported."""
    named = contents.metadata.get(ARCHITECTURE)
    if not isinstance(named, str) or named not in ARCHITECTURES:
        raise ConfigError(
            f"{ARCHITECTURE} = {shown(named)}: of GGUF files, the architectures {', '.join(ARCHITECTURES)} are read; "
            "take the model's repository in Hugging Face format"
        )
    return ARCHITECTURES[named]


def model_types(path: Path) -> list[str]:
    """Return the possible model_types of the file at ``path``, by its first keys; [] if it is not supported."""
    try:
        named = peek(path, (ARCHITECTURE,)).get(ARCHITECTURE)
    except (OSError, ValueError):
        return []
    known = ARCHITECTURES.get(named) if isinstance(named, str) else None
    if known is None:
        return []
    return [known.model_type, *(["mistral"] if known.model_type == "llama" else [])]


def config(contents: Contents, factors: Sequence[float] = ()) -> JsonObject:
    """Return config.json; ``factors`` are the divisors of the rotary frequencies that the file holds as a tensor.

    :class:`ConfigError` lists what is missing or says a model that is not supported.
    """
    read = _Metadata(contents, architecture(contents).model_type)
    own = {"gpt_neox": read.neox, "gemma3_text": read.gemma3}.get(read.model_type, read.decoder)()
    found = {**own, **read.shared(factors)}
    if read.problems:
        raise ConfigError(*capped(read.problems))
    return found


def generation(contents: Contents) -> JsonObject:
    """Return generation_config.json: the bos, eos and pad ids."""
    ids = {
        role: contents.metadata.get(f"tokenizer.ggml.{role}_token_id")
        for role in ("bos", "eos", "eot", "eom", "padding")
    }
    ends = [*dict.fromkeys(ids[role] for role in ("eos", "eot", "eom") if ids[role] is not None)]
    found = {"bos_token_id": ids["bos"], "eos_token_id": ends or None, "pad_token_id": ids["padding"]}
    return {key: value for key, value in found.items() if value is not None}


def heads(contents: Contents) -> tuple[int, int]:
    """Return the numbers of query heads and of key-value heads, by which their rows are ordered."""
    read = _Metadata(contents, architecture(contents).model_type)
    count = read.integer("attention.head_count")
    key_value = read.integer("attention.head_count_kv", count)
    if read.problems:
        raise ConfigError(*read.problems)
    return count, key_value


class _Metadata:
    """The metadata of one architecture; what is wrong with it is collected."""

    def __init__(self, contents: Contents, model_type: str) -> None:
        self.metadata, self.tensors = contents.metadata, contents.tensors
        self.model_type = model_type
        self.named = self.metadata[ARCHITECTURE]
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.named}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, list) and value and len(set(map(str, value))) == 1:  # the same in every layer
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is int and 0 < value < 2**31:
            return value
        problem = "is missing" if value is None else f"= {shown(value)}"
        more = " (layers that differ are not supported)" if isinstance(value, list) else ""
        self.problems.append(f"{self.named}.{key} {problem}; expected a positive whole number{more}")
        return 1

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) in (int, float) and math.isfinite(value) and value > 0:
            return float(value)
        problem = "is missing" if value is None else f"= {shown(value)}"
        self.problems.append(f"{self.named}.{key} {problem}; expected a positive number")
        return 1.0

    def shared(self, factors: Sequence[float]) -> JsonObject:
        """Return what all architectures have, after a look at what none of them may have."""
        for key in UNBUILT:
            if self.get(key):
                self.problems.append(f"{self.named}.{key} = {shown(self.get(key))}: such a model is not supported")
        if self.get("attention.causal") is False:
            self.problems.append(
                f"{self.named}.attention.causal = false: its tokens attend to later ones, as for embeddings; expected "
                "a model that generates text"
            )
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            self.problems.append("tensor token_embd.weight [vocabulary, hidden] is missing")
        return {
            "model_type": self.model_type,
            "architectures": [CLASSES[self.model_type]],
            "vocab_size": embedding.shape[0] if embedding else 1,
            "hidden_size": self.integer("embedding_length"),
            "intermediate_size": self.integer("feed_forward_length"),
            "num_hidden_layers": self.integer("block_count"),
            "num_attention_heads": self.integer("attention.head_count"),
            "max_position_embeddings": self.integer("context_length"),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            **self._rope(factors),
        }

    def decoder(self) -> dict[str, Any]:
        """Return what Llama, Mistral and Qwen have."""
        count = self.integer("attention.head_count")
        head = self.integer("attention.key_length", self.integer("embedding_length") // count)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self.integer(key, head) != head:
                self.problems.append(f"{self.named}.{key} = {self.get(key)}; expected the {head} channels of a head")
        found = {
            "hidden_act": "silu",
            "rms_norm_eps": self.number("attention.layer_norm_rms_epsilon"),
            "num_key_value_heads": self.integer("attention.head_count_kv", count),
            "head_dim": head,
        }
        if self.model_type == "llama" and self.get("attention.sliding_window"):
            self.model_type = "mistral"
            found["sliding_window"] = self.integer("attention.sliding_window")
        if self.model_type == "llama":
            found |= {
                "attention_bias": "blk.0.attn_q.bias" in self.tensors,
                "mlp_bias": "blk.0.ffn_up.bias" in self.tensors,
            }
        return found

    def gemma3(self) -> JsonObject:
        """Return what Gemma 3 has; what files leave out is llama.cpp's for all of them (gemma3.cpp)."""
        found = self.decoder()
        found["hidden_activation"] = GEMMA3_ACTIVATION
        del found["hidden_act"]
        layers, heads = self.integer("block_count"), self.integer("attention.head_count")
        # The largest one divides by what a head would have if all of them had the hidden width together.
        scalar = self.integer("embedding_length") // heads if layers == GEMMA3_27B_LAYERS else found["head_dim"]
        kinds = ["sliding_attention"] * (GEMMA3_PERIOD - 1) + ["full_attention"]
        found |= {
            "query_pre_attn_scalar": scalar,
            "sliding_window": self.integer("attention.sliding_window"),
            "layer_types": [kinds[layer % GEMMA3_PERIOD] for layer in range(layers)],
        }
        if self.get("final_logit_softcapping"):
            found["final_logit_softcapping"] = self.number("final_logit_softcapping")
        return found

    def neox(self) -> JsonObject:
        """Return what GPT-NeoX has."""
        return {
            "hidden_act": "gelu",
            "layer_norm_eps": self.number("attention.layer_norm_epsilon"),
            "use_parallel_residual": bool(self.metadata.get(f"{self.named}.use_parallel_residual", True)),
            "attention_bias": "blk.0.attn_qkv.bias" in self.tensors,
        }

    def _rope(self, factors: Sequence[float]) -> JsonObject:
        """Return rope_parameters; divisors of frequencies are what transformers' longrope has, the same for any length.

        Llama 3.1's, which its converter computes from four numbers, are such divisors in the file.
        """
        found: dict[str, Any] = {"rope_type": "default", "rope_theta": self.number("rope.freq_base", 10000.0)}
        if self.model_type == "gpt_neox":
            head = self.integer("embedding_length") // self.integer("attention.head_count") or 1
            found["partial_rotary_factor"] = self.integer("rope.dimension_count", head) / head
        kind = self.get("rope.scaling.type")
        trained = self.integer("rope.scaling.original_context_length", self.integer("context_length"))
        if kind in ("linear", "yarn") or (kind is None and self.get("rope.scale_linear")):
            key = "rope.scaling.factor" if kind else "rope.scale_linear"
            found |= {"rope_type": kind or "linear", "factor": self.number(key)}
        elif kind not in (None, "none"):
            self.problems.append(f"{self.named}.rope.scaling.type = {shown(kind)}; none, linear and yarn are read")
        if kind == "yarn":
            found["original_max_position_embeddings"] = trained
            for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
                if self.get(f"rope.scaling.{theirs}") is not None:
                    found[ours] = self.number(f"rope.scaling.{theirs}")
            if self.number("rope.scaling.attn_factor", 1.0) != 1:
                self.problems.append(f"{self.named}.rope.scaling.attn_factor is not 1, and only that is read")
        if factors:
            if found["rope_type"] != "default":
                self.problems.append(f"{ROPE_FACTORS} beside rope.scaling.type {shown(kind)} cannot be read")
            found |= {
                "rope_type": "longrope",
                "short_factor": [*factors],
                "long_factor": [*factors],
                "factor": 1.0,
                "attention_factor": 1.0,
                "original_max_position_embeddings": self.integer("context_length"),
            }
        if self.model_type == "gemma3_text":
            near = {"rope_type": "default", "rope_theta": self.number("rope.freq_base_swa", GEMMA3_NEAR_THETA)}
            return {"rope_parameters": {"full_attention": found, "sliding_attention": near}}
        return {"rope_parameters": found}


def unread(contents: Contents) -> list[str]:
    """Return the tensors for which the architecture has no name; they belong to another model."""
    known = architecture(contents)
    return [name for name in contents.tensors if name != ROPE_FACTORS and not known.name(name)]


def written(folder: Path, documents: JsonObject) -> dict[str, Path]:
    """Write JSON documents by file name; return where they are."""
    files = {}
    for name, document in documents.items():
        files[name] = folder / name
        files[name].write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")
    return files
