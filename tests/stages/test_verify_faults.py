"""verify is tested by mutation: a right bundle, then the same with one fault each, of which every one must fail.

Faults are put into the graph (the code or config that it is built by), into what a bundle holds, or into its
tokenizer; the bundle is signed again after each, as a build that went wrong would have signed it. The table in
docs/verification.md says which check saw which fault, and is compared with what happens here.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tvm.relax.frontend.nn import op

from stagegraph.stage import StageError
from stages import profiles
from stages.bundle import Bundle
from stages.models import layers
from tests.support import bundles, family_models
from tests.support.compiled_qwen import Registered, build_graphs, compile_library
from tests.support.local_context import run_stage
from tests.support.tokenizer_folders import FOLDERS, SIZE, write_folder

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs" / "verification.md"
ROWS = SIZE + 35
MODELS = {
    # as many heads of k and v as of q, so that each could be taken for another
    "llama": ("llama3 model", dataclasses.replace(family_models.CASES["llama"], config={
        **family_models.CASES["llama"].config, "num_key_value_heads": 6, "rms_norm_eps": 1e-3, "hidden_size": 192,
    })),
    "qwen3": ("qwen2 vocab", family_models.CASES["qwen3"]),
    "mistral": ("llama3 tables", family_models.CASES["mistral"]),
    "gpt_neox": ("neox", family_models.CASES["gpt_neox"]),
}  # fmt: skip


@dataclass(frozen=True)
class Right:
    """A bundle that verify passes, and how another one like it is built."""

    built: bundles.Built
    memo: Path

    def rebuilt(self, folder: Path, config: Path | None = None) -> bundles.Built:
        """The same bundle with a library that is built anew, by the code as it is now and by ``config``."""
        profiles.compiler()
        registered = Registered(config or self.built.config, self.built.params)
        graphs = build_graphs(folder, registered, "llvm", prefill_chunk=48, max_batch=2)
        compile_library(folder / "compile", graphs, registered, target="llvm", memo=self.memo)
        made = self.built.folder
        inputs = {
            "library": folder / "compile" / "model.so",
            "metadata": folder / "compile" / "metadata.json",
            "weights": made / "quantize" / "weights",
            "tokenizer": made / "tokenizer" / "tokenizer",
            "config": self.built.config,
            "generation": made / "config" / "generation.json",
        }
        run_stage(Bundle(), folder / "bundle", {"target": "llvm", "name": "tiny"}, inputs)
        return dataclasses.replace(self.built, bundle=folder / "bundle" / "bundle")

    def verify(self, built: bundles.Built, out: Path) -> str:
        """What verify finds wrong with a bundle, empty if it passes."""
        try:
            bundles.verify(built, out, memo=self.memo, reference="live", probe_tokens=64)
        except StageError as error:
            return str(error)
        return ""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Right]:
    found: dict[tuple[str, str], Right] = {}

    def get(name: str, scheme: str = "q0f32") -> Right:
        if (name, scheme) not in found:
            folder = tmp_path_factory.mktemp(f"{name}-{scheme}")
            tokenizer, case = MODELS[name]
            files, _, eos = FOLDERS[tokenizer]
            control = {"bos_token_id": SIZE if "llama3" in tokenizer else eos, "eos_token_id": eos}
            checkpoint = write_folder(folder / "checkpoint", files)
            family_models.write(
                checkpoint, dataclasses.replace(case, config={**case.config, "vocab_size": ROWS, **control})
            )
            built = bundles.build(folder, scheme, checkpoint=checkpoint, prefill_chunk=48, max_batch=2)
            found[name, scheme] = Right(built, folder / "memo")
            assert found[name, scheme].verify(built, folder / "verify") == ""
        return found[name, scheme]

    return get


# In the graph: a method of a layer as somebody might have written it.


def _attention(qkv: Callable[..., Any] | None = None, scale: float = 1.0, norms: bool = True) -> Callable[..., Any]:
    def forward(self: Any, x: Any, cache: Any, layer: int) -> Any:
        batch, seq, _ = x.shape
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        rows = op.reshape(self.qkv(x), (batch, seq, sum(heads), self.head_dim))
        q, k, v = op.split(rows, [heads[0], heads[0] + heads[1]], axis=2)
        if self.q_norm is not None and norms:
            q, k = self.q_norm(q), self.k_norm(k)
        rows = op.concat([*(qkv(self, q, k, v) if qkv else (q, k, v))], dim=2)
        y = cache.attention_with_fused_qkv(layer, rows, self.num_heads, sm_scale=scale * self.head_dim**-0.5)
        return self.out(op.reshape(y, (batch, seq, self.num_heads * self.head_dim)))

    return forward


def _pairs(self: Any, x: Any) -> Any:
    """Channels 0, 1, 2, ... in the order 0, 2, 4, ..., 1, 3, ...: as neighbours are turned where halves should be."""
    batch, seq, heads, width = x.shape
    halves = op.permute_dims(op.reshape(x, (batch, seq, heads, width // 2, 2)), (0, 1, 2, 4, 3))
    return op.reshape(halves, (batch, seq, heads, width))


def _mlp(self: Any, x: Any) -> Any:
    gate, up = op.split(self.gate_up(x), 2, axis=-1)
    return self.down(gate * op.silu(up))


def _ungated(self: Any, x: Any) -> Any:
    gate, up = op.split(self.gate_up(x), 2, axis=-1)
    return self.down(gate * up)


def _gelu(self: Any, x: Any) -> Any:
    gate, up = op.split(self.gate_up(x), 2, axis=-1)
    return self.down(op.gelu(gate) * up)


def _no_bias(self: Any, x: Any) -> Any:
    return op.matmul(x, op.permute_dims(self.weight.matrix()), out_dtype=self.out_dtype or None)


def _swapped_norms(self: Any, x: Any, cache: Any, layer: int) -> Any:
    x = x + self.attention(self.mlp_norm(x), cache, layer)
    return x + self.mlp(self.attention_norm(x))


def _post_norms(self: Any, x: Any, cache: Any, layer: int) -> Any:
    x = x + self.attention_norm(self.attention(x, cache, layer))
    return x + self.mlp_norm(self.mlp(x))


def _no_residual(self: Any, x: Any, cache: Any, layer: int) -> Any:
    x = self.attention(self.attention_norm(x), cache, layer)
    return x + self.mlp(self.mlp_norm(x))


def _parallel(self: Any, x: Any, cache: Any, layer: int) -> Any:
    return x + self.attention(self.attention_norm(x), cache, layer) + self.mlp(self.mlp_norm(x))


def _hidden(change: Callable[..., Any]) -> Callable[..., Any]:
    def hidden(self: Any, x: Any, cache: Any) -> Any:
        return change(self, x, cache)

    return hidden


def _reversed(self: Any, x: Any, cache: Any) -> Any:
    for number in range(len(self.layers))[::-1]:
        x = self.layers[number](x, cache, number)
    return self.norm(x)


def _shared_cache(self: Any, x: Any, cache: Any) -> Any:
    for layer in self.layers:
        x = layer(x, cache, 0)
    return self.norm(x)


def _scaled_embedding(self: Any, x: Any, cache: Any) -> Any:
    x = x * float(x.shape[-1]) ** 0.5
    for number, layer in enumerate(self.layers):
        x = layer(x, cache, number)
    return self.norm(x)


def _norm_offset(self: Any, x: Any) -> Any:
    return op.rms_norm(x, self.weight.astype(x.dtype) + 1.0, axes=-1, epsilon=self.eps)


def _softcap(self: Any, x: Any) -> Any:
    y = self.embedding.project(x) if self.head is None else self.head(x)
    return op.tanh(y / 30.0) * 30.0


GRAPH: dict[str, tuple[str, type, str, Any]] = {
    "gate and up swapped": ("llama", layers.GatedMLP, "forward", _mlp),
    "gate without its activation": ("llama", layers.GatedMLP, "forward", _ungated),
    "another activation": ("llama", layers.GatedMLP, "forward", _gelu),
    "q and k swapped": ("llama", layers.Attention, "forward", _attention(lambda _, q, k, v: (k, q, v))),
    "k and v swapped": ("llama", layers.Attention, "forward", _attention(lambda _, q, k, v: (q, v, k))),
    "attention not scaled": ("llama", layers.Attention, "forward", _attention(scale=32**0.5)),
    "rope of the other pairing": (
        "llama", layers.Attention, "forward", _attention(lambda self, q, k, v: (_pairs(self, q), _pairs(self, k), v)),
    ),
    "norms of q and k left out": ("qwen3", layers.Attention, "forward", _attention(norms=False)),
    "biases left out": ("llama", layers.Linear, "forward", _no_bias),
    "norms of a layer swapped": ("llama", layers.DecoderLayer, "forward", _swapped_norms),
    "norms after the layers and not before": ("llama", layers.DecoderLayer, "forward", _post_norms),
    "residual around attention left out": ("llama", layers.DecoderLayer, "forward", _no_residual),
    "attention and MLP in parallel": ("llama", layers.DecoderLayer, "forward", _parallel),
    "attention and MLP one after the other": (
        "gpt_neox", layers.ParallelDecoderLayer, "forward", layers.DecoderLayer.forward,
    ),
    "layers in the opposite order": ("llama", layers.CausalLM, "hidden", _reversed),
    "all layers in one layer of the cache": ("llama", layers.CausalLM, "hidden", _shared_cache),
    "embedding scaled": ("llama", layers.CausalLM, "hidden", _scaled_embedding),
    "norm weights of another convention (1 + w)": ("llama", layers.RMSNorm, "forward", _norm_offset),
    "a softcap that the model has not": ("llama", layers.CausalLM, "logits", _softcap),
}  # fmt: skip

# In the config that the graph is built by: a key misread.
CONFIG: dict[str, tuple[str, Callable[[dict[str, Any]], Any]]] = {
    "another epsilon": ("llama", lambda config: config.update(rms_eps=1e-5)),
    "another theta": ("qwen3", lambda config: config["rope_parameters"].update(rope_theta=1e4)),
    "rope scaling left out": ("llama", lambda config: config["rope_parameters"].update(rope_type="default")),
    "window off by one": ("mistral", lambda config: config.update(sliding_window=config["sliding_window"] + 1)),
    "part of a head turned that is not": (
        "gpt_neox", lambda config: config.update(rotary_dim=2 * config["rotary_dim"]),
    ),
}  # fmt: skip


def parameter(built: bundles.Built, end: str) -> tuple[np.memmap, str]:
    """The first stored tensor whose name ends so, mapped to be written, and its name."""
    records = json.loads((built.bundle / "tensor-cache.json").read_text())["records"]
    shard, record = next((s, r) for s in records for r in s["records"] if r["name"].endswith(end))
    path = built.bundle / shard["dataPath"]
    array = np.memmap(path, record["dtype"], "r+", record["byteOffset"], tuple(record["shape"]))
    return array, record["name"]


def _change(end: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[bundles.Built], None]:
    def apply(built: bundles.Built) -> None:
        array, _ = parameter(built, end)
        changed = change(np.array(array))
        assert not np.array_equal(changed, array)
        array[...] = changed

    return apply


def _exchange(first: str, second: str) -> Callable[[bundles.Built], None]:
    def apply(built: bundles.Built) -> None:
        (one, _), (other, _) = parameter(built, first), parameter(built, second)
        kept = np.array(one)
        one[...] = other
        other[...] = kept

    return apply


def _transposed(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.reshape(192, 192).T).reshape(array.shape)


def _neighbours(array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, 1)


def _nibbles(words: np.ndarray) -> np.ndarray:
    return (words >> 4) & 0x0F0F0F0F | (words & 0x0F0F0F0F) << 4


def _one_value(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[7] *= np.float32(1.25)
    return array


WEIGHTS: dict[str, tuple[str, str, Callable[[bundles.Built], None]]] = {
    "one weight of all": ("llama", "q0f32", _change("down_proj.weight", _one_value)),
    "a matrix transposed": (
        "llama", "q0f32", _change("0.self_attn.o_proj.weight", _transposed),
    ),
    "rows of the embedding off by one": ("llama", "q0f32", _change("embed_tokens.weight", lambda a: np.roll(a, 1, 0))),
    "a head of zeros": ("llama", "q0f32", _change("lm_head.weight", np.zeros_like)),
    "a bias of zeros": ("llama", "q0f32", _change("proj.bias", np.zeros_like)),
    "norm weights less one": ("llama", "q0f32", _change("input_layernorm.weight", lambda a: a - 1)),
    "two layers' matrices exchanged": ("llama", "q0f32", _exchange("0.mlp.down_proj.weight", "1.mlp.down_proj.weight")),
    "scale of a neighbouring group": ("llama", "q4f32_1", _change("0.mlp.down_proj.q_scale", _neighbours)),
    "codes off by one": ("llama", "q4f32_1", _change("1.mlp.down_proj.q_weight", lambda a: a ^ np.uint32(0x11111111))),
    "nibbles of a word in the opposite order": (
        "llama", "q4f32_1", _change("0.mlp.down_proj.q_weight", _nibbles),
    ),
    "scales doubled": ("llama", "q4f32_1", _change("0.self_attn.o_proj.q_scale", lambda a: a * 2)),
}  # fmt: skip


def _json(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[bundles.Built], None]:
    def apply(built: bundles.Built) -> None:
        path = built.bundle / name
        document = json.loads(path.read_text())
        before = json.dumps(document)
        change(document)
        assert json.dumps(document) != before
        path.write_text(json.dumps(document))

    return apply


def _swap_tokens(document: dict[str, Any]) -> None:
    vocabulary = document["model"]["vocab"]
    first, second = "a", "e"
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _drop_merges(document: dict[str, Any]) -> None:
    document["model"]["merges"] = document["model"]["merges"][:5]


def _bots(document: dict[str, Any]) -> None:
    document["chat_template"] += "{# of another model #}"


PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False}
TOKENIZER: dict[str, tuple[str, Callable[[bundles.Built], None]]] = {
    "two tokens exchanged": ("llama", _json("tokenizer.json", _swap_tokens)),
    "merges lost": ("llama", _json("tokenizer.json", _drop_merges)),
    "another split pattern": (
        "llama", _json("tokenizer.json", lambda d: d.update(pre_tokenizer=PRE_TOKENIZER)),
    ),
    "what goes before every text left out": ("llama", _json("tokenizer_info.json", lambda d: d.update(prefix=[]))),
    "ends of text missing": ("llama", _json("tokenizer_info.json", lambda d: d.update(stop=[]))),
    "another end of text": ("llama", _json("tokenizer_info.json", lambda d: d.update(stop=[5]))),
    "chat template of another model": (
        "qwen3", _json("tokenizer_config.json", _bots),
    ),
}  # fmt: skip


def table() -> dict[str, str]:
    """Fault -> the check that sees it, as the page has them."""
    rows = re.findall(r"^\| ([^|]+) \| `([^`|]+)` \|$", DOCS.read_text(), re.MULTILINE)
    return {fault.strip(): check for fault, check in rows}


def test_the_page_has_every_fault():
    assert list(table()) == [*GRAPH, *CONFIG, *WEIGHTS, *TOKENIZER]
    assert len(table()) >= 40


def judge(fault: str, message: str) -> None:
    """The check that the page names has failed, whatever others did."""
    failed = {line.split(": ")[1] for line in message.splitlines() if line.count(": ") >= 2}
    assert table()[fault] in failed, f"{fault}: {message or 'verify passes it'}"


@pytest.mark.parametrize("fault", GRAPH)
def test_a_fault_of_the_graph_fails(right, tmp_path, monkeypatch, fault):
    name, cls, method, replacement = GRAPH[fault]
    model = right(name)
    monkeypatch.setattr(cls, method, replacement)
    judge(fault, model.verify(model.rebuilt(tmp_path), tmp_path / "verify"))


@pytest.mark.parametrize("fault", CONFIG)
def test_a_misread_config_fails(right, tmp_path, fault):
    name, change = CONFIG[fault]
    document = json.loads(right(name).built.config.read_text())
    before = json.dumps(document)
    change(document["config"])
    assert json.dumps(document) != before
    config = tmp_path / "config.json"
    config.write_text(json.dumps(document))
    judge(fault, right(name).verify(right(name).rebuilt(tmp_path, config), tmp_path / "verify"))


@pytest.mark.parametrize("fault", WEIGHTS)
def test_wrong_weights_fail(right, tmp_path, fault):
    name, scheme, change = WEIGHTS[fault]
    built = right(name, scheme).built.copy(tmp_path)
    change(built)
    built.sign()
    judge(fault, right(name, scheme).verify(built, tmp_path / "verify"))


@pytest.mark.parametrize("fault", TOKENIZER)
def test_a_wrong_tokenizer_fails(right, tmp_path, fault):
    name, change = TOKENIZER[fault]
    built = right(name).built.copy(tmp_path)
    change(built)
    built.sign()
    judge(fault, right(name).verify(built, tmp_path / "verify"))
