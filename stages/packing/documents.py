"""The documents of a bundle: bundle.json, mlc-chat-config.json as MLC-LLM reads it, and the card."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stages.packing import mlc
from stages.runtime import seal

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.documents.bundle import BundleDocument, BundleParts, FileEntry
    from stages.documents.files import JsonObject
    from stages.documents.library import BuiltModel, Metadata
    from stages.documents.weights import Shard

# The form of mlc-chat-config.json that this is written in.
MLC_CONFIG_VERSION = "0.1.0"
_SIZES = ("context_window", "prefill_chunk", "max_batch", "page_size", "vocab_size", "hidden_size", "num_layers")


def disagreements(target: str, found: BundleParts) -> list[str]:
    """Return where the parts of one bundle contradict one another; each would load and then give wrong text."""
    metadata, config, tokenizer_info = found["metadata"], found["config"], found["tokenizer_info"]
    model = metadata["model"]
    stored = {
        record["name"]: (record["dtype"], record["shape"])
        for shard in found["tensors"]["records"]
        for record in shard["records"]
    }
    taken = {entry["name"]: (entry["dtype"], list(entry["shape"])) for entry in metadata["params"]}
    problems = []
    if metadata["target"]["target"] != target:
        problems.append(f"the library was built for {metadata['target']['target']} and the bundle is for {target}")
    problems += [
        f"{name}: the library takes {taken.get(name)}, the weights hold {stored.get(name)}; compile and quantize must "
        "see one param-register"
        for name in sorted({*stored, *taken})
        if stored.get(name) != taken.get(name)
    ]
    problems += [
        f"{name}: the library was built for {dict(model)[name]} and the model's config says {dict(config)[name]}"
        for name in ("vocab_size", "hidden_size", "num_layers", "context_window")
        if dict(model)[name] != dict(config)[name]
    ]
    if tokenizer_info["active_vocab_size"] > model["vocab_size"]:
        problems.append(
            f"the tokenizer has {tokenizer_info['active_vocab_size']} ids and the model {model['vocab_size']} rows"
        )
    unknown = sorted(set(found["generation"]["stop"]) - set(tokenizer_info["stop"]))
    if unknown:
        problems.append(f"stop ids {unknown} of generation_config.json are not stop ids of the tokenizer")
    return problems


def manifest(
    name: str,
    target: str,
    machine: str,
    found: BundleParts,
    files: Mapping[str, FileEntry],
) -> JsonObject:
    """Return bundle.json: what the loader checks before it loads anything, and how the checkpoint draws tokens."""
    metadata = found["metadata"]
    document: BundleDocument = {
        "schema": 1,
        "name": name,
        "target": target,
        "machine": machine,
        "tvm": {dist: metadata["tools"][dist] for dist in ("apache-tvm", "apache-tvm-ffi")},
        "cpu": metadata["cpu"],
        "device_code": metadata.get("device_code", []),
        "model": metadata["model"],
        "sampling": found["generation"].get("sampling") or {},
        "files": files,
    }
    return {**document, seal.KEY: seal.seal(document)}


def chat_config(
    found: BundleParts, tables: JsonObject | None, tokenizer_files: Sequence[str], conversation: mlc.Conversation
) -> JsonObject:
    """Return mlc-chat-config.json; ``tables`` are those of tokenizer.json, ``conversation`` is its conv_template."""
    model, info = found["metadata"]["model"], found["tokenizer_info"]
    sampling = found["generation"].get("sampling") or {}
    config = found["config"]["config"]
    return {
        "version": MLC_CONFIG_VERSION,
        "model_type": config.get("model_type", model["family"]),  # of a traced model
        "quantization": model["scheme"],
        "model_config": {
            **config.get("source", config),
            "context_window_size": model["context_window"],
            "prefill_chunk_size": model["prefill_chunk"],
            "max_batch_size": model["max_batch"],
            "tensor_parallel_shards": 1,
        },
        "vocab_size": model["vocab_size"],
        "active_vocab_size": info["active_vocab_size"],
        "context_window_size": model["context_window"],
        "sliding_window_size": -1,
        "prefill_chunk_size": model["prefill_chunk"],
        "attention_sink_size": -1,
        "tensor_parallel_shards": 1,
        "temperature": sampling.get("temperature", 1.0),
        "top_p": sampling.get("top_p", 1.0),
        "repetition_penalty": sampling.get("repetition_penalty", 1.0),
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "tokenizer_files": [name for name in tokenizer_files if name != "tokenizer_info.json"],
        "tokenizer_info": mlc.tokenizer_info(tables),
        "conv_template": conversation,
        "bos_token_id": info["bos"],
        "eos_token_id": info["stop"],
        "pad_token_id": info["pad"],
    }


def card(name: str, target: str, target_needs: Sequence[str], found: BundleParts) -> str:
    """Return README.md: what the bundle is, what it was made of and with, and the command that runs it.

    ``target_needs`` is what pip installs for the target beside TVM.
    """
    metadata, model = found["metadata"], found["metadata"]["model"]
    shards = found["tensors"]["records"]
    tools = ", ".join(f"{tool} {version}" for tool, version in sorted(metadata["tools"].items()))
    rows = [
        ("model family", found["config"]["config"].get("model_type", model["family"])),
        ("architecture", found["config"]["architecture"]),
        ("quantization", model["scheme"]),
        ("target", f"{target}, code for {_processors(metadata)}"),
        ("arithmetic", f"{model['compute_dtype']}, {_activations(model)}{_state(model)}"),
        *((size.replace("_", " "), dict(model)[size]) for size in _SIZES if dict(model)[size] is not None),
        ("tokens with a text", found["tokenizer_info"]["active_vocab_size"]),
        ("weights", f"{len(metadata['params'])} tensors in {len(shards)} files, {_bytes(shards):,} bytes"),
        ("tokenizer", f"{found['tokenizer_info']['family']}, fingerprint {found['tokenizer_info']['fingerprint']}"),
        ("built with", tools),
    ]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    needs = " ".join(f"{dist}=={metadata['tools'][dist]}" for dist in ("apache-tvm", "apache-tvm-ffi"))
    needs += "".join(f" '{dist}'" for dist in target_needs)
    # Templates are rendered by it; the format that is built piece by piece needs no more.
    chats = " 'jinja2>=3.1.6'" if found["tokenizer_info"]["chat"]["format"] == "template" else ""
    return f"""# {name} ({model["scheme"]}, {target})

| | |
| --- | --- |
{table}

Run it on a machine with Python, this directory and the folder `stages/runtime` of the project that built it:

```sh
pip install {needs} numpy tokenizers{chats}
python -m stages.runtime BUNDLE --prompt "Once upon a time"
```

The loader checks every file against `bundle.json`, TVM's version and the processor before it loads anything.
Whether the bundle computes what its checkpoint computes is said by the card of the verify stage, not here.
"""


def _activations(model: BuiltModel) -> str:
    return "8-bit activations in layers with quantized weights, " if model.get("activations") == "int8" else ""


def _state(model: BuiltModel) -> str:
    cache = f"KV cache {model['kv_dtype']}"
    kinds = {"rnn": "recurrent state in place of a KV cache", "hybrid": f"{cache} and recurrent state"}
    return kinds.get(model["state"], cache)


def _processors(metadata: Metadata) -> str:
    code = [f"{entry['kind']} {entry['arch']}" for entry in metadata.get("device_code") or ()]
    return ", ".join([str(metadata["cpu"]["mcpu"]), *code])


def _bytes(shards: Sequence[Shard]) -> int:
    return sum(shard["nbytes"] for shard in shards)
