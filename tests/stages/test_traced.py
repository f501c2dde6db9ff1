"""Models traced from transformers' code, built through the stages and compared with transformers on the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import coverage
from stagegraph.stage import StageError
from stages import profiles
from stages.checkpoint.errors import ConfigError
from stages.models import transforms
from stages.models.traced import FAMILY, context_window, family_of, for_context, parse, stored_as, to_reference
from stages.tracing.graph import GraphPart
from stages.tracing.merge import merged
from tests.support import family_models, traced_models
from tests.support.bytes_cache import in_bytes
from tests.support.compiled_qwen import Registered, build_graph

RECORD = Path(__file__).parents[2] / "stages" / "cli" / "traced.json"
BOUND = 2e-5  # of the largest |logit|
QUICK = {("olmo2", "q4f16_1")}  # the others wait for `-m slow`
BUILDS = [
    pytest.param(name, scheme, marks=[] if (name, scheme) in QUICK else pytest.mark.slow, id=f"{name}-{scheme}")
    for name in traced_models.FAMILIES
    for scheme in ("q0f32", "q4f16_1", "q8f16_1")
]


def built(
    folder: Path, model_type: str, scheme: str, *, kv_dtype: str = "auto", activations: str = "float", **sizes: int
) -> family_models.Built:
    checkpoint = traced_models.write(folder / "checkpoint", model_type, **sizes)
    case = family_models.Case("", traced_models.SIZES)
    options = {"kv_dtype": kv_dtype, "activations": activations}
    return family_models.build(folder, case, scheme, checkpoint=checkpoint, frontend="traced", **options)


def check(made: family_models.Built) -> None:
    errors = traced_models.differences(made)
    assert max(errors) < BOUND, errors


@pytest.mark.parametrize(("model_type", "scheme"), BUILDS)
def test_a_traced_model_says_what_transformers_says(tmp_path: Path, model_type: str, scheme: str) -> None:
    check(built(tmp_path, model_type, scheme))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "sizes"),
    [
        *(("gpt_oss", {}), ("lfm2", {}), ("qwen3_next", {}), ("llama", {"head_dim": 20}), ("gemma3_text", {})),
        *(("deepseek_v3", {}), ("deepseek_v32", {})),
    ],
)
def test_a_cache_in_bytes_loses_what_rounding_keys_and_values_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, sizes: dict[str, int]
) -> None:
    """Sinks, recurrent layers beside attention, heads that are filled up, windows with full layers between them,
    keys wider than values, sparse attention.
    """
    made = built(tmp_path, model_type, "q0f32", kv_dtype="int8", **sizes)
    exact, texts = made.reference, []

    def rounded(ids: list[int]) -> np.ndarray:
        before = exact(ids)
        with monkeypatch.context() as patch:
            in_bytes(patch, model_type.removesuffix("_text"))
            wanted = exact(ids)
        texts.append(family_models.error(before, wanted))
        return wanted

    errors = traced_models.differences(made, reference=rounded)
    assert max(errors) < max(texts) / 10, (max(errors), texts)


@pytest.mark.parametrize("number", [-2, 0, 7, None])
def test_a_part_beside_the_layers_attends_to_no_chunks(number: int | None) -> None:
    """Its number may be below zero, as in Phi-4 multimodal's encoders, or beyond those of the layers."""
    import torch

    from stages.tracing.doors import settle_chunks

    part = torch.nn.Identity()
    part.config, part.layer_idx = SimpleNamespace(layer_types=[], attention_chunk_size=8), number
    settle_chunks(torch.nn.Sequential(part))
    assert part.attended_chunk == 0


def test_every_operator_of_the_vocabulary_can_be_replayed() -> None:
    from stages.models.operators import OPERATORS
    from stages.tracing import vocabulary

    # Into linear layers, products and sums, rows of tables, casts, positions.
    rewritten = {"addmm", "baddbmm", "index", "copy", "cumsum"}
    special = {"complex_mul"}  # of mul, where both are complex
    shapes = {"reshape", "split", "unbind", "item"}
    assert {*vocabulary.OPERATORS.values()} - rewritten | shapes | special == set(OPERATORS)


def test_what_an_operator_does_not_compute_is_named_with_its_node(tmp_path: Path, monkeypatch) -> None:
    from stages.models import operators

    def refuses(*_: object, **_named: object) -> None:
        raise NotImplementedError("a norm of order 3")

    profiles.compiler()
    checkpoint = traced_models.write(tmp_path / "checkpoint", "olmo2")
    ports = family_models.parse_and_register(tmp_path, checkpoint, "q0f32", frontend="traced")
    monkeypatch.setitem(operators.OPERATORS, "silu", refuses)
    with pytest.raises(StageError, match=r"Olmo2ForCausalLM: node \d+ of its body, operator 'silu': a norm of order 3"):
        build_graph(tmp_path / "graph", Registered(ports["config"], ports["params"]), "llvm", "prefill")


@pytest.mark.parametrize(
    "model_type",
    ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "qwen3", "mistral", "gpt_neox"))],
)
def test_a_model_of_a_family_has_the_operators_of_the_family_when_it_is_traced(tmp_path: Path, model_type: str) -> None:
    """Rotation is the cache's, projections of one input are one: the same kernels, so the same logits and speed."""
    profiles.compiler()
    checkpoint = traced_models.write(tmp_path / "checkpoint", model_type)
    counts = {}
    for frontend in ("native", "traced"):
        ports = family_models.parse_and_register(tmp_path / frontend, checkpoint, "q4f16_1", frontend=frontend)
        folder = tmp_path / frontend / "graph"
        build_graph(folder, Registered(ports["config"], ports["params"]), "llvm", "decode")
        operators = json.loads((folder / "graph.json").read_text())["operators"]["decode"]
        views = ("reshape", "tuple", "vm.builtin.attention_kv_cache_get_query_positions")  # no kernels
        counts[frontend] = {name: count for name, count in operators.items() if name not in views}
    assert counts["traced"] == counts["native"]


def test_what_cannot_be_built_is_refused_in_one_line_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    refused = {
        "bert": r"'bert' is an encoder \(is_decoder is false\), whose tokens attend to later ones too",
        "inkling_text": "InklingAttention: attention with position_bias is not supported",
        "recurrent_gemma": "reads positions, which the KV cache counts, and none of its layers has attention",
        "t5": "'t5' is an encoder-decoder model",
        "vit": "'vit' is no causal language model",
        "xlm": "attentions.0: node cat: cat of a single number is not supported",
        "gpt-of-tomorrow": r"transformers \S+ does not know it either; the code that its auto_map names is never run",
    }
    for model_type, reason in refused.items():
        raw = {
            "model_type": model_type,
            "auto_map": {"AutoConfig": "x.Y"},
            "intermediate_size": 64,
            **small,
        }
        with pytest.raises(ConfigError, match=reason):
            parse(raw)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(
        ConfigError, match=r"needs torch: install the extra trace \(pip install 'stagegraph\[trace\]'\)"
    ):
        parse({"model_type": "olmo2", **small})


@pytest.mark.parametrize("shared", ["multi_query", "new_decoder_architecture", ""])
def test_a_bias_of_heads_is_read_with_the_keys_of_each(shared: str) -> None:
    """Falcon's ALiBi counts positions by the sum of a mask, and is another for each of the heads that share keys."""
    own = {"alibi": True, "multi_query": False, "new_decoder_architecture": False} | ({shared: True} if shared else {})
    config = parse({**traced_models.SIZES, "model_type": "falcon", "num_kv_heads": 2, **own})
    nodes = config.parts["body"]["nodes"]
    assert config.attention.num_kv_heads == 4
    assert [arguments["width"] for name, arguments in nodes if name == "attention"] == [17, 17]
    assert "bfloat16" in [arguments["dtype"] for name, arguments in nodes if name == "cast"]


def test_attention_that_chooses_among_tokens_is_built_for_as_many_as_it_reads_all_of() -> None:
    config = parse({**traced_models.SIZES, "model_type": "doge", "keep_window_size": 40})
    assert context_window(config, 0) == 40
    assert "attention chooses among more than 40 tokens" in for_context(config, 40)[1]
    with pytest.raises(ConfigError, match=r"exceeds the 40 tokens that \w+'s attention reads all of"):
        context_window(config, 41)


def test_a_matrix_that_is_computed_is_merged_with_no_other() -> None:
    """Two projections of a value are one; what multiplies it by another value is no parameter."""
    linear = [("linear", {"x": {"value": 0}, "weight": {"parameter": name}}) for name in ("q", "k")]
    computed = ("linear", {"x": {"value": 0}, "weight": {"value": 1}})
    part, made = merged(GraphPart(2, [*linear, computed], 4), {"q": (8, 4), "k": (8, 4)}, set(), {})
    assert list(made.values()) == [["q", "k"]]
    assert part.nodes[part.output - part.inputs] == computed


def test_an_indexer_is_built_for_the_context_that_is_asked_for() -> None:
    own = traced_models.MIXTURES["deepseek_v32"]
    config = parse({**traced_models.SIZES, **own, "model_type": "deepseek_v32", "num_hidden_layers": 1})
    (choose,) = [arguments for name, arguments in config.parts["body"]["nodes"] if name == "choose"]
    assert (choose["count"], choose["context"], config.unread) == (40, 160, [])
    assert (config.attention.chosen, config.attention.words) == (32, 3)  # of 11 words of 16 tokens, in 4 heads
    kinds = {entry["name"].rpartition("indexer.")[2]: entry["kind"] for entry in config.parameters}
    assert (kinds["weights_proj.weight"], kinds["wk.weight"]) == ("router", "linear")
    short, note = for_context(config, 40)
    assert (short.settled, short.attention.words, note) == (40, 1, "")
    assert family_of(FAMILY, short).state == "hybrid"


def test_projections_of_layers_that_run_several_times_are_one_in_the_order_of_the_checkpoint() -> None:
    """HRM's stacks run once in each cycle; its files have the gate, q, k and v of a layer in one tensor."""
    own = traced_models.FAMILIES["hrm_text"]
    config = parse({**traced_models.SIZES, **own, "model_type": "hrm_text"})
    old = "model.H_module.layers.0.attn.gqkv_proj.weight"
    (entry,) = [each for each in stored_as(config, [old]).parameters if each["sources"] == [old]]
    assert (entry["source_shapes"], entry["shape"], entry["transform"]) == ([[256, 64]], [256, 64], "copy")
    assert entry["name"] == "model.H_module.layers.0.self_attn.gate_proj+q_proj+k_proj+v_proj.weight"
    nodes = config.parts["body"]["nodes"]
    assert [arguments["weight"] for name, arguments in nodes if name == "linear"].count(
        {"parameter": entry["name"]}
    ) == 2


def test_rotation_goes_to_the_cache_only_where_every_layer_shares_it() -> None:
    """Llama's is taken out of the graph, with the frequencies that its model has; Gemma 3 has two of them."""
    for model_type, taken in (("stablelm", 2), ("gemma3_text", 0)):
        raw = {**traced_models.SIZES, **traced_models.FAMILIES[model_type], "model_type": model_type}
        config = parse(raw)
        cosines = [name for name, _ in config.parts["body"]["nodes"] if name == "cos"]
        assert (len(config.frequencies), bool(cosines)) == (taken, not taken)


def test_the_cache_is_told_of_layers_that_attend_within_chunks_and_holds_the_heads_of_the_largest() -> None:
    """Llama 4's first layer attends within chunks. Gemma 4's second has a key-value head of 32 channels, its first two
    of 16; the embeddings of its layers stand behind that of the model.
    """
    chunked, mixed = (
        parse({**traced_models.SIZES, **{**traced_models.MIXTURES, **traced_models.FAMILIES}[name], "model_type": name})
        for name in ("llama4_text", "gemma4_text")
    )
    layers = [arguments["chunk"] for name, arguments in chunked.parts["body"]["nodes"] if name == "attention"]
    assert (layers, chunked.attention.chunk) == ([20, 0], 20)
    assert (mixed.attention.num_kv_heads, mixed.attention.head_dim) == (2, 32)
    assert mixed.hidden_size == 64 + 4 * 16


def test_all_layers_are_counted_and_the_cache_has_those_that_attend() -> None:
    kinds = ["conv", "conv", "full_attention"]
    config = parse({**traced_models.SIZES, "model_type": "lfm2", "layer_types": kinds, "num_hidden_layers": len(kinds)})
    assert config.num_layers == 3
    assert config.attention is not None
    assert config.attention.num_layers == 1


def test_no_expert_is_read_that_a_matrix_does_not_have() -> None:
    """The last of LongCat's experts hand on what they are given: its second matrix has 6 experts of 8."""
    small = {
        "n_routed_experts": 6,
        "zero_expert_num": 2,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 32,
        "ffn_hidden_size": 64,
    }
    latent = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    heads = {"head_dim": 16, "num_key_value_heads": 4, "num_attention_heads": 4}
    config = parse({**traced_models.SIZES, **small, **latent, **heads, "model_type": "longcat_flash", "num_layers": 1})
    nodes, given = config.parts["body"]["nodes"], config.parts["body"]["inputs"]
    rows = {entry["name"]: entry["shape"][0] for entry in config.parameters}
    found = []
    for name, arguments in nodes:
        if name == "expert_linear":
            makes, bounds = nodes[arguments["chosen"]["value"] - given]
            experts = rows[arguments["weight"]["parameter"]] // arguments["features"]
            found.append((experts, bounds["max"] if makes == "clamp" else None))
    assert found == [(8, None), (6, 5)]


def test_projections_that_a_checkpoint_has_in_one_tensor_are_read_from_it() -> None:
    """Sarvam's q, k and v are one matrix in its files, and three in transformers' model; the way back cuts it again."""
    raw = {
        **traced_models.SIZES,
        **traced_models.MIXTURES["sarvam_moe"],
        "model_type": "sarvam_moe",
        "num_hidden_layers": 1,
    }
    config = parse({**raw, "first_k_dense_replace": 1})
    old = "model.layers.0.attention.query_key_value.weight"
    (entry,) = [each for each in stored_as(config, [old]).parameters if each["sources"] == [old]]
    assert (entry["source_shapes"], entry["shape"], entry["transform"]) == ([[128, 64]], [128, 64], "copy")
    tensor = np.arange(128 * 64, dtype=np.float32).reshape(128, 64)
    _, _, state = to_reference(config, {old: tensor})
    parts = [state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in ("q", "k", "v")]
    assert [len(part) for part in parts] == [64, 32, 32]
    assert np.array_equal(np.concatenate(parts), tensor)
    assert old not in state


DORY = {
    **traced_models.SIZES,
    "model_type": "dory",
    "head_dim": 16,
    "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp", "sliding_attention", "mlp"],
    "num_hidden_layers": 6,
    "n_input_layers": 2,
    "n_recurrent_layers": 2,
    "n_output_layers": 2,
}


@pytest.mark.parametrize("pairs", [True, False], ids=["as published", "as transformers writes it"])
def test_a_layer_may_be_stored_as_two(tmp_path: Path, pairs: bool) -> None:
    """Dory's attention and MLP are layers of their own in the published checkpoint, and everything has other names."""
    import torch
    import transformers
    from safetensors.numpy import load_file, save_file

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**DORY)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert "backbone.layers.2.self_attn.g_proj.weight" in tensors
    if pairs:
        parts = {".self_attn.": (0, ".mixer."), ".mlp.": (1, ".mixer."), ".lambda_1": (0, ".attn_alpha"),
                 ".lambda_2": (1, ".mlp_alpha")}  # fmt: skip
        for name in [name for name in tensors if ".layers." in name]:
            number, rest = name.removeprefix("backbone.layers.").split(".", 1)
            (part,) = [each for each in parts if each in f".{rest}"]
            after, new = parts[part]
            moved = f"backbone.layers.{2 * int(number) + after}{f'.{rest}'.replace(part, new)}"
            tensors[moved] = tensors.pop(name)
        save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    found = stored_as(parse(json.loads((tmp_path / "config.json").read_text())), tensors)
    assert {source for entry in found.parameters for source in entry["sources"]} == {*tensors}
    _, _, state = to_reference(found, tensors)
    assert {name: array.shape for name, array in state.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
    }
    assert all(np.array_equal(array, model.state_dict()[name].numpy()) for name, array in state.items())


def test_a_model_that_depends_on_how_a_text_is_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="recurrent_kv_cache_mode is 'last_loop'"):
        parse({**DORY, "recurrent_kv_cache_mode": "last_loop"})


def test_a_number_of_a_checkpoint_is_a_parameter_of_one_value() -> None:
    """Apertus's activations have two, beside two vectors of one value."""
    config = parse({**traced_models.SIZES, "model_type": "apertus", "num_hidden_layers": 1})
    (entry,) = [each for each in config.parameters if each["name"].endswith("act_fn.beta")]
    assert (entry["source_shapes"], entry["shape"], entry["transform"]) == ([[]], [1], "scalar")
    number = np.float32(0.5).reshape(())
    stored = transforms.apply("scalar", [number])
    assert stored.shape == (1,)
    assert transforms.invert("scalar", stored, [[]]) == [number]


def test_a_head_is_tied_where_the_wrapper_says_so() -> None:
    """The head is the wrapper's: what the config of its text part says of it counts for a text model alone."""
    text = {**traced_models.SIZES, "model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": False}
    for tied in (True, False):
        raw = {"model_type": "moss_transcribe_diarize", "text_config": text, "tie_word_embeddings": tied}
        assert parse(raw).tied is tied


# Layers that are alike and layers that are not: windows and experts of every other layer, the state of a layer that
# others read, numbers that depend on the layer's own, attention in chunks in some layers.
REPEATED = {
    "llama": {},
    "gemma2": {},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"] * 4},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 4,
        "activation_sparsity_pattern": [0.9] * 4 + [0.0] * 4,
        "num_kv_shared_layers": 4,
    },
    "qwen3_moe": {"decoder_sparse_step": 2},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0] * 2, "moe_layers": [1, 3, 5, 7]},
    "qwen3_next": {"layer_types": ["linear_attention", "linear_attention", "full_attention", "linear_attention"] * 2},
    "diffllama": {},
}
APART = ("diffllama",)  # each layer has a number of its own


def copied(raw: dict, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return how many layers are copied, and check that nothing is otherwise than where all are traced."""
    from stages.tracing import repeats, trace

    copies = []
    copy = repeats._Marked.copy
    monkeypatch.setattr(repeats._Marked, "copy", lambda self, node: (copies.append(node), copy(self, node)))
    found, count = trace.trace(raw), len(copies)
    monkeypatch.setattr(repeats, "FEWEST", 100)
    assert found == trace.trace(raw)
    assert len(copies) == count
    return count


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=[] if name == "gemma2" else pytest.mark.slow) for name in REPEATED]
)
def test_layers_that_are_alike_are_traced_once_and_nothing_else_is_changed(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**traced_models.FAMILIES, **traced_models.MIXTURES, **traced_models.HYBRIDS}.get(model_type, {})
    raw = {**traced_models.SIZES, **own, "num_hidden_layers": 8, **REPEATED[model_type], "model_type": model_type}
    assert (copied(raw, monkeypatch) == 0) == (model_type in APART)


def test_layers_that_only_their_code_tells_apart_are_all_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention

    forward = Olmo2Attention.forward

    def numbered(self, *arguments, **keywords):
        states, weights = forward(self, *arguments, **keywords)
        return states * (2.0 if self.layer_idx == 1 else 1.0), weights  # neither the first nor the last

    raw = {**traced_models.SIZES, "model_type": "olmo2", "num_hidden_layers": 4}
    monkeypatch.setattr(Olmo2Attention, "forward", numbered)
    assert copied(raw, monkeypatch) == 0


def test_layers_that_hold_other_tensors_are_of_another_kind() -> None:
    """Whether they are buffers or not, in a dtype that NumPy lacks, with no value to see, or below."""
    import torch

    from stages.tracing.repeats import kind_of

    def layer(value: float, *, buffer: bool = True, device: str = "cpu") -> torch.nn.Module:
        made, inner = torch.nn.Linear(2, 2, device="meta"), torch.nn.Identity()
        tensor = torch.tensor(value, dtype=torch.bfloat16, device=device)
        made.inner = inner
        if buffer:
            inner.register_buffer("scale", tensor)
        else:
            inner.scale = tensor
        return made

    for buffer in (True, False):
        assert kind_of(layer(1.0, buffer=buffer)) == kind_of(layer(1.0, buffer=buffer))
        assert kind_of(layer(1.0, buffer=buffer)) != kind_of(layer(2.0, buffer=buffer))
        assert kind_of(layer(1.0, buffer=buffer, device="meta")) == kind_of(layer(2.0, buffer=buffer, device="meta"))
    assert kind_of(layer(1.0)) != kind_of(layer(1.0, buffer=False))


def test_an_end_of_layers_that_does_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells layers apart may be nowhere that is looked at: here how often a function was called."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2MLP

    forward, calls = Olmo2MLP.forward, []

    def counting(self, x):
        calls.append(x)
        return forward(self, x) * (1.0 if len(calls) % 2 else 2.0)

    monkeypatch.setattr(Olmo2MLP, "forward", counting)
    assert copied({**traced_models.SIZES, "model_type": "olmo2", "num_hidden_layers": 4}, monkeypatch) == 0


def test_a_value_that_is_changed_in_place_where_it_is_a_part_of_another_is_traced_as_one_of_its_own() -> None:
    """CTRL multiplies the embeddings that it is given, which are a part of what a body's graph reads."""
    config = parse({**traced_models.GPT, **traced_models.FAMILIES["ctrl"], "model_type": "ctrl"})
    found = [name for name, _ in config.parts["body"]["nodes"]]
    assert "mul" in found
    assert not [name for name in found if "scatter" in name or name.endswith("_")]


PROVEN = [name for name, entry in json.loads(RECORD.read_text()).items() if entry["verdict"] == "proven"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", PROVEN)
def test_what_is_recorded_as_proven_can_be_traced(model_type: str) -> None:
    """benchmarks/coverage.py proves it anew; until then no type may be lost that no other test is about."""
    assert coverage.attempt(model_type, Path(), only_trace=True) == ("traced", "")
