"""What quantization has cost: the figures against numpy's own, the original against transformers, and the limits."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from stagegraph.stage import StageError
from stages.checkpoint.headers import read_headers
from stages.config_parse import ConfigParse
from stages.quantization.rows import Row
from stages.quantization.schemes import SCHEMES, own_rows
from stages.verification import advice, apart, gates, lending, loss, original, probes, refusal, rounding, streaming
from stages.verification.apart import LiveError, call
from stages.verification.case import Case
from stages.verification.checks import Check
from tests.support import bundles, compiled_qwen
from tests.support.checkpoints import write_qwen
from tests.support.local_context import run_stage

VOCAB = 97


def logits(seed: int, rows: int, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, VOCAB)).astype(np.float32) * spread


class Reads:
    """A session that answers with given rows, some at a time."""

    def __init__(self, rows: np.ndarray, chunk: int) -> None:
        self.rows, self.chunk, self.at = rows, chunk, 0

    def add(self) -> int:
        return 0

    def remove(self, sequence: int) -> None:
        assert sequence == 0

    def score(self, _sequence, ids):
        mine = self.rows[self.at : self.at + len(ids)]
        self.at += len(ids)
        for start in range(0, len(ids), self.chunk):
            yield mine[start : start + self.chunk]


def kept(rows: np.ndarray, pieces, skipped: int) -> dict[str, np.ndarray]:
    """What the original has of its logits ``rows``, of all pieces one after the other."""
    found, start = [], 0
    for piece in pieces:
        mine = torch.tensor(rows[start : start + len(piece)])[skipped : len(piece) - 1]
        found.append(original._likeliest(mine, torch.tensor(piece[skipped + 1 :])))
        start += len(piece)
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    return dict(zip(original.ARRAYS[:4], [*columns, np.array("a model")], strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("top", [1024, 8])
def test_figures_are_those_of_the_plain_formula(monkeypatch, chunk, top):
    monkeypatch.setattr(original, "TOP", top)
    pieces = [[1, 5, 9, 30, 2, 7], [1, 8, 8, 3]]
    texts = probes.Probes(pieces, [["", *"aabbb"], ["", *"abb"]], prefix=[1])
    p, q = logits(0, 10, 3), logits(0, 10, 3) + logits(1, 10, 0.3)
    places = loss.measure(Reads(q, chunk), texts, kept(p, pieces, 0))

    rows = [0, 1, 2, 3, 4, 6, 7, 8]  # the last of each piece has nothing after it
    following = [5, 9, 30, 2, 7, 8, 8, 3]
    log_p, log_q = (
        x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p[rows].astype(float), q[rows].astype(float))
    )
    exact = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    if top == 1024:
        np.testing.assert_allclose(places.kl, exact, rtol=1e-5)
    else:
        assert (places.kl <= exact + 1e-9).all()
        assert (places.kl > 0.3 * exact).all()
    np.testing.assert_allclose(places.chosen, log_q[range(8), following], rtol=1e-5)
    np.testing.assert_allclose(places.chosen_original, log_p[range(8), following], rtol=1e-5)
    assert (places.same == (log_p.argmax(-1) == log_q.argmax(-1))).all()
    figures = loss.report(places, texts, "a model")
    assert figures["all"]["tokens"] == 8
    assert {kind: each["tokens"] for kind, each in figures["kinds"].items()} == {"a": 3, "b": 5}


def test_logits_that_are_not_finite_fail_every_limit():
    pieces = [[1, 5, 9]]
    texts = probes.Probes(pieces, [["a"] * 3], prefix=[])
    rows = logits(0, 3)
    rows[1, 4] = np.nan
    figures = loss.measure(Reads(rows, 8), texts, kept(logits(0, 3), pieces, 0)).figures()
    assert [check.ok for check in gates.check(figures, gates.LIMITS[4])] == [False, False, False]


@pytest.mark.parametrize(
    ("scheme", "arithmetic", "bits"),
    [
        *(("q0f32", "float32", 16), ("q0f16", "int8", 8), ("q8f16_1", "float32", 8)),
        *(("e4m3_f16", "float16", 8), ("q4f16_1", "int8", 4), ("q3f16_1", "float32", 4)),
        *(("q4a32", "float32", 4), ("q4s32", "int8", 4)),
    ],
)
def test_the_class_of_a_bundle_is_what_it_keeps(scheme, arithmetic, bits):
    assert gates.bits_kept(SCHEMES[scheme], arithmetic) == bits


@pytest.mark.parametrize(
    ("in_bytes", "name", "instead"),
    [
        (("activations",), "int8 activations (max_activation_kl)", "activations: float"),
        (("KV cache",), "int8 KV cache (max_activation_kl)", "kv_dtype: auto"),
        (
            ("activations", "KV cache"),
            "int8 activations and KV cache (max_activation_kl)",
            "activations: float or kv_dtype: auto",
        ),
    ],
)
def test_what_is_rounded_as_it_is_computed_has_a_check_of_its_name(in_bytes, name, instead):
    rows = np.random.default_rng(3).standard_normal((5, VOCAB)).astype(np.float32)
    assert gates.activations(rows, rows, gates.LIMITS[8], in_bytes).ok
    found = gates.activations(rows, rows[::-1], gates.LIMITS[8], in_bytes)
    assert (found.ok, found.name) == (False, name)
    assert found.detail.endswith(f"set {instead}")


def test_the_reference_reads_keys_and_values_in_bytes_where_it_is_asked_to(tmp_path):
    checkpoint(tmp_path, torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        plain = model(ids).logits
        with rounding.cache_in_bytes(model):
            moved = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
    assert 1e-5 < float((moved - plain).abs().max() / plain.abs().max()) < 0.1


def test_a_reference_whose_attention_cannot_read_bytes_says_so():
    with (
        pytest.raises(LiveError, match="Linear attends in a way of its own"),
        rounding.cache_in_bytes(torch.nn.Linear(1, 1)),
    ):
        pass


def checkpoint(folder, dtype, **config):
    """Write a small random Llama with ``config`` and return transformers' model of it."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **config))
    made.to(dtype).save_pretrained(folder, max_shard_size="100KB")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_original_is_what_transformers_computes_in_float32(tmp_path, monkeypatch, dtype, tied):
    monkeypatch.setattr(lending, "ROWS", 5)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    model = checkpoint(tmp_path, dtype, tie_word_embeddings=tied, rope_parameters=yarn)
    random = np.random.default_rng(3)
    pieces = [random.integers(0, VOCAB, 100).tolist(), random.integers(0, VOCAB, 37).tolist()]
    files = {path.name: path for path in tmp_path.iterdir()}
    said = []
    asked = original.OriginalRequest(tmp_path, files, tmp_path / "none", pieces, skipped=2)
    found = original.compute(asked, lambda *progress: said.append(progress))
    start = 0
    for piece in pieces:
        with torch.inference_mode():
            wanted = model(torch.tensor([piece])).logits[0, 2:-1].log_softmax(-1).numpy()
        rows = slice(start, start + len(wanted))
        ids = found["original_ids"][rows].astype(int)
        np.testing.assert_allclose(found["original_log_probs"][rows], np.take_along_axis(wanted, ids, -1), atol=2e-5)
        np.testing.assert_allclose(found["original_chosen"][rows], wanted[range(len(wanted)), piece[3:]], atol=2e-5)
        start = rows.stop
    assert start == len(found["original_chosen"])
    assert "LlamaForCausalLM" in str(found["original_origin"])
    assert "the checkpoint's own files" in str(found["original_origin"])
    assert said[-1][0] == said[-1][1]


@pytest.mark.slow
def test_what_the_original_says_is_kept_for_the_files_that_it_is_loaded_from(tmp_path):
    (tmp_path / "config.json").write_text("{}")

    def kept(**changed: str) -> str:
        digests = {"model.gguf": "1", "quantize_config.json": "1", "reference/reference.json": "1", **changed}
        files = {name: tmp_path / name for name in digests if "/" not in name}
        asked = original.OriginalRequest(tmp_path, files, tmp_path / "config.json", [[1, 2, 3]], skipped=0)
        return json.dumps(original.document(asked, digests), sort_keys=True)

    assert kept(**{"reference/reference.json": "2"}) == kept()
    assert len({kept(), kept(**{"model.gguf": "2"}), kept(**{"quantize_config.json": "2"})}) == 3


def test_the_original_is_computed_once_for_all_schemes_and_refuses_by_default(quantized, tmp_path, monkeypatch):
    memo = tmp_path / "memo"
    first = bundles.verify(quantized, tmp_path / "first", memo=memo)
    with monkeypatch.context() as patch:
        patch.setattr(original, "keep", lambda *_: pytest.fail("the original was asked again"))
        again = bundles.verify(quantized, tmp_path / "again", memo=memo)
    one, other = (json.loads((context.out / "verify.json").read_text()) for context in (first, again))
    assert one == other
    figures = one["quantization"]["all"]
    assert 0.2 < figures["kl_mean"] < 1  # random weights: much is lost, and none of it matters
    limits = {"max_kl": None, "min_top1": None, "max_ppl_ratio": None}
    with pytest.raises(
        StageError, match=r"KL divergence \(max_kl\): 0\.\d+ nats per token from the original .* at most 0.25"
    ):
        bundles.verify(quantized, tmp_path / "refused", memo=memo, **limits)
    bundles.verify(quantized, tmp_path / "own", memo=memo, **limits | {"max_kl": 1.0, "min_top1": 0.3})


def test_a_float_bundle_is_the_original(recorded, tmp_path):
    limits = {"max_kl": 1e-6, "min_top1": 1.0, "max_ppl_ratio": 1.0001}
    context = bundles.verify(recorded, tmp_path, reference="live", **limits)
    assert "KL " in context.summary_text
    card = (tmp_path / "card.md").read_text()
    assert "by this project's reading" in card  # transformers has no class for the first Qwen
    assert {"prose", "code"} & set(json.loads((tmp_path / "verify.json").read_text())["quantization"]["kinds"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "too little text: it has 0 tokens"),
        ("a.txt", b"abc\xff", "not UTF-8 at byte 3"),
        ("a.jsonl", b'{"text": "a"}\n{"text": 1}', r"a.jsonl:2: expected {\"kind\""),
        ("a.jsonl", b'\n{"text": "a"', r"a.jsonl:2: not JSON"),
        ("a.jsonl", b"[" * 100_000, r"a.jsonl:1: not JSON"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"a.jsonl:1: expected"),
        ("a.jsonl", b'{"text": "a \\ud800"}', r"a.jsonl:1: not JSON: .*surrogates not allowed"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_a_message(quantized, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=message):
        bundles.verify(quantized, tmp_path / "verify", reference="live", corpus=str(tmp_path / name))


@pytest.mark.slow
def test_a_corpus_of_ones_own_is_read(quantized, tmp_path):
    (tmp_path / "own.jsonl").write_text('{"kind": "mine", "text": "one two three four"}\n' * 3)
    bundles.verify(quantized, tmp_path / "verify", reference="live", corpus=str(tmp_path / "own.jsonl"))
    figures = json.loads((tmp_path / "verify" / "verify.json").read_text())["quantization"]
    assert list(figures["kinds"]) == ["mine"]


SMALL = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("gpt_neox", {**SMALL, "num_attention_heads": 4, "use_parallel_residual": False}),
        ("rwkv", {**SMALL, "attention_hidden_size": 64, "rescale_every": 2}),
        ("qwen3", {**SMALL, **HEADS, "head_dim": 32}),
        ("mistral", {**SMALL, **HEADS, "sliding_window": 12}),
        # No family of this project: whatever transformers does with a head's output is done.
        ("gemma2", {**SMALL, **HEADS, "head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 8}),
        ("granite", {**SMALL, **HEADS, "logits_scaling": 3.0}),
    ],
)
def test_any_class_of_transformers_is_an_original(tmp_path, kind, sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **sizes)
    made = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in made.parameters():  # so that no norm, bias or decay is what it is in every new model
        parameter.data += 0.1 * torch.randn_like(parameter)
    made.to(torch.bfloat16).save_pretrained(tmp_path)
    piece = np.random.default_rng(3).integers(0, VOCAB, 50).tolist()
    files = {path.name: path for path in tmp_path.iterdir()}
    asked = original.OriginalRequest(tmp_path, files, tmp_path / "none", [piece], skipped=0)
    found = original.compute(asked, lambda *_: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        wanted = model(torch.tensor([piece])).logits[0, :-1].log_softmax(-1).numpy()
    np.testing.assert_allclose(found["original_chosen"], wanted[range(49), piece[1:]], atol=5e-5)


def test_advice_is_what_transformers_says_of_the_same_changes(tmp_path):
    """The worst tensors and the scheme that would pass, against a model whose weights are quantized by hand, one in a
    row of its own, one not at all.
    """
    model = checkpoint(tmp_path, torch.bfloat16, tie_word_embeddings=True)
    coarse, whole_one = "model.layers.1.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.weight"
    row = Row("group", 3, 40, "float16")
    piece = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    files = {path.name: path for path in tmp_path.iterdir()}
    asked = asdict(original.OriginalRequest(tmp_path, files, tmp_path / "none", [piece], skipped=0))
    limits = {"max_kl": 1e-4, "min_top1": 0.0, "max_ppl_ratio": 2.0}
    names = [(name, "float32") for name in ("q4f16_2", "q8f16_1", "q0f16")]
    rows = {coarse: asdict(row), whole_one: None}
    found = advice.compute(advice.AdviceRequest(asked, "q4f32_1", "max", names, limits, rows=rows), lambda *_: None)

    def log_probs():
        with torch.inference_mode():
            return model(torch.tensor([piece[:-1]])).logits[0].log_softmax(-1)

    wanted = log_probs()
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and name != whole_one:
            whole = parameter.data
            parameter.data = advice.stored(whole, row if name == coarse else SCHEMES["q4f32_1"].body, "max")
            expected[name] = float((wanted.exp() * (wanted - log_probs())).sum(-1).mean())
            parameter.data = whole
    assert dict(zip(found["names"].tolist(), found["kl"].tolist(), strict=True)) == pytest.approx(expected, rel=1e-2)
    assert "model.embed_tokens.weight" in expected
    assert expected[coarse] > 2 * expected[coarse.replace("1", "0")]
    four, eight = json.loads(found["tried"])  # and no further
    assert 0 < eight["kl_mean"] < 1e-4 < four["kl_mean"]


def test_advice_for_int8_activations_tries_float_ones_and_keeps_the_rounding_of_the_others(tmp_path, monkeypatch):
    checkpoint(tmp_path, torch.bfloat16)
    piece = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    files = {path.name: path for path in tmp_path.iterdir()}
    asked = asdict(original.OriginalRequest(tmp_path, files, tmp_path / "none", [piece], skipped=0))
    seen = []

    def refuse(figures, _limits):
        seen.append(figures)
        return [Check("refused", ok=False, detail="")]

    monkeypatch.setattr(gates, "check", refuse)
    tried = [("q8f16_1", "float32"), ("q8f16_1", "int8"), ("q0f16", "int8"), ("q0f16", "float16")]
    found = advice.compute(advice.AdviceRequest(asked, "q8f16_1", "max", tried, {}), lambda *_: None)
    assert len(json.loads(found["tried"])) == 4
    eight, eight_int8, half_int8, half = (figures.kl_mean for figures in seen)
    assert abs(half) < eight < eight_int8  # of float16 there is next to nothing, below what float32 adds up
    assert abs(half_int8) < eight / 10  # layers of floats read floats


def test_the_layers_that_int8_activations_cost_most_are_those_that_read_channels_far_above_the_rest(tmp_path):
    """A channel of a norm times 1,000, and what reads it divided by as much: the same function, but not in bytes."""
    model = checkpoint(tmp_path, torch.float32)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.input_layernorm.weight[5] *= 1000
        for name in "qkv":
            getattr(layer.self_attn, f"{name}_proj").weight[:, 5] /= 1000
    model.save_pretrained(tmp_path)
    piece = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()
    files = {path.name: path for path in tmp_path.iterdir()}
    asked = asdict(original.OriginalRequest(tmp_path, files, tmp_path / "none", [piece], skipped=0))
    found = advice.compute(advice.AdviceRequest(asked, "q4a16", "max", [], {}, (), activations=True), lambda *_: None)

    def log_probs():
        with torch.inference_mode():
            return model(torch.tensor([piece[:-1]])).logits[0].log_softmax(-1)

    def read_in_bytes(module, inputs):
        group = 32 if module is model.lm_head else 16
        return (torch.from_numpy(compiled_qwen.in_bytes(inputs[0].numpy(), group)).float(),)

    wanted, expected = log_probs(), {}
    for name, module in model.named_modules():
        if type(module) is torch.nn.Linear:
            hook = module.register_forward_pre_hook(read_in_bytes)
            expected[name] = float((wanted.exp() * (wanted - log_probs())).sum(-1).mean())
            hook.remove()
    costs = dict(zip(found["layers"].tolist(), found["layer_kl"].tolist(), strict=True))
    assert costs == pytest.approx(expected, rel=2e-2, abs=1e-8)
    assert max(costs, key=costs.__getitem__) == "model.layers.1.self_attn.v_proj"
    assert costs["model.layers.1.self_attn.q_proj"] > 10 * costs["model.layers.0.self_attn.q_proj"]


@pytest.mark.slow
def test_a_refusal_stands_where_nothing_better_could_be_measured(quantized, tmp_path, monkeypatch):
    first = bundles.verify(quantized, tmp_path / "first", memo=tmp_path / "memo", reference="live")
    assert "not compared" not in first.summary_text

    def failing(module, *rest):
        if "advice" in module:
            raise apart.LiveError("killed")
        return call(module, *rest)

    monkeypatch.setattr(apart, "call", failing)
    limits = {"max_kl": 1e-6, "min_top1": 0.0, "max_ppl_ratio": 100.0}
    with pytest.raises(StageError, match=r"(?s)max_kl.*could not be measured: killed"):
        bundles.verify(quantized, tmp_path / "second", memo=tmp_path / "memo", reference="live", **limits)


def test_a_refused_bundle_says_what_cost_most_and_what_would_pass(quantized, tmp_path, monkeypatch):
    """Of scales that calibration has chosen, whose results verify does not read: by the nearest that need none."""
    asked = []
    monkeypatch.setattr(
        apart, "call", lambda module, request, *rest: asked.append(request) or call(module, request, *rest)
    )
    report = json.loads(quantized.report.read_text())
    (tmp_path / "report.json").write_text(json.dumps({**report, "scales": "gptq"}))
    limits = {"max_kl": None, "min_top1": None, "max_ppl_ratio": None}
    with pytest.raises(StageError) as refused:
        bundles.verify(replace(quantized, report=tmp_path / "report.json"), tmp_path, reference="live", **limits)
    said = str(refused.value)
    assert "whose quantization alone costs most (KL of 48 tokens), with scales: mse: " in said
    assert asked[-1]["scales"] == "mse"
    assert "stays within the limits on 256 tokens (KL " in said


def test_a_bundle_with_rows_of_its_own_is_told_of_schemes_with_more_bits_than_these_have(monkeypatch):
    def entry(kind, row):
        return {"kind": kind, "shape": [64, 64], "quantize": row and asdict(row)}

    kept = SCHEMES["q4k"]
    plain = [entry("linear", kept.body), entry("embedding", kept.embedding), entry("norm", None)]
    case = SimpleNamespace(arithmetic="float32", scales="gptq", limits={})
    good, asked = loss.Loss(256, *(0.01,) * 6, 0.99, *(1.0,) * 4), []

    def measured(_case, _scheme, candidates, *_):
        asked[:] = [name for name, _ in candidates]
        return {}, {}, dict.fromkeys(candidates, good)

    monkeypatch.setattr(refusal, "_measured", measured)
    case.registry = {"scheme": "q4k", "logical": plain}
    assert not own_rows(case.registry)
    assert "use it, or set higher limits" in refusal.ask(case, lambda *_: None)[0]
    assert asked == ["q4f16_2", "q8f16_1", "q0f16", "q0f32"]
    mixed = [*plain, *[entry("linear", SCHEMES["q2k"].body)] * 3, entry("linear", None)]
    case.registry = {"scheme": "q4k", "logical": mixed}  # (4 + 8 + 3 * 2 + 16) / 6 bits
    assert len(own_rows(case.registry)) == 4
    assert "q8f16_1 stays within the limits" in (said := refusal.ask(case, lambda *_: None)[0])
    assert "give the rows of their own more bits, or use it without them, or set" in said
    mixed[-1] = entry("linear", SCHEMES["q2k"].body)
    assert "q4s32 stays within the limits" in refusal.ask(case, lambda *_: None)[0]
    case.registry = {"scheme": "q4k", "logical": [entry("linear", None)]}
    assert "q0f32 stays within the limits" in refusal.ask(case, lambda *_: None)[0]


@pytest.mark.slow
def test_what_was_measured_for_a_refusal_is_not_measured_again(quantized, tmp_path, monkeypatch):
    asked = []

    def noted(module, request, progress):
        asked.extend([request] if "advice" in module else [])
        return call(module, request, progress)

    call = apart.call
    monkeypatch.setattr(apart, "call", noted)

    def refused(name, **limits):
        limits = {"max_kl": None, "min_top1": None, "max_ppl_ratio": None, **limits}
        with pytest.raises(StageError) as error:
            bundles.verify(quantized, tmp_path / name, memo=tmp_path / "memo", reference="live", **limits)
        assert not (tmp_path / name / "advice").exists()
        return error.value.problems[-2:]

    first = refused("first")
    assert len(asked) == 1
    assert refused("again") == first
    assert len(asked) == 1, "all of it was known"
    costly, other = refused("other limits", max_kl=1e-9)
    assert costly == first[0]
    assert "q0f32 stays within the limits" in other
    assert len(asked) == 2
    before, after = ([name for name, _ in each["candidates"]] for each in asked)
    assert after == before[-len(after) :] != before, "what is known of the others fails by itself"
    assert "model.embed_tokens.weight" in asked[1]["known"]


def test_ranges_are_what_transformers_modules_read_and_give(tmp_path):
    model = checkpoint(tmp_path, torch.bfloat16, tie_word_embeddings=False)
    random = np.random.default_rng(3)
    pieces = [random.integers(0, VOCAB, 40).tolist(), random.integers(0, VOCAB, 9).tolist()]
    files = {path.name: path for path in tmp_path.iterdir()}
    asked = original.OriginalRequest(tmp_path, files, tmp_path / "none", pieces, skipped=0)
    found = original.compute(asked, lambda *_: None)
    largest = {}

    def note(name):
        def after(_module, inputs, output):
            seen = [float(x.abs().max()) for x in (*inputs, output) if torch.is_tensor(x) and x.is_floating_point()]
            largest[name] = max([*seen, largest.get(name, 0.0)])

        return after

    for name, module in model.named_modules():
        if next(module.parameters(recurse=False), None) is not None and name != "lm_head":
            module.register_forward_hook(note(name))
    with torch.inference_mode():
        for piece in pieces:
            model(torch.tensor([piece]))
    ranges = dict(zip(found["original_modules"].tolist(), found["original_largest"].tolist(), strict=True))
    assert ranges.pop("lm_head") > 0  # the logits of a piece's last token are not asked for
    assert ranges == pytest.approx(largest, rel=1e-4)


def test_a_model_that_leaves_float16_is_refused_in_it_and_by_the_layer_s_name():
    names, values = ["model.layers.0.mlp", "model.layers.7.mlp.down_proj"], [12.0, 70_000.0]
    assert gates.ranges(names, values, "float32").ok
    assert gates.ranges(names, values, "bfloat16").ok
    refused = gates.ranges(names, values, "float16")
    assert not refused.ok
    assert "model.layers.7.mlp.down_proj reaches 7e+04" in refused.detail
    assert "bfloat16 or float32" in refused.detail
    assert gates.ranges(names, [12.0, 65_504.0], "float16").ok


def rewritten(folder, change):
    """Write the tensors of a checkpoint of one file anew, each pair of name and tensor by ``change``."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(dict(change(name, tensor) for name, tensor in tensors.items()), folder / "model.safetensors")
    return {path.name: path for path in folder.iterdir()}


def chosen(folder, files, piece, config=None):
    asked = original.OriginalRequest(folder, files, config or folder / "none", [piece], skipped=0)
    found = original.compute(asked, lambda *_: None)
    return found["original_chosen"], str(found["original_origin"])


def wanted(model, piece):
    with torch.inference_mode():
        return model(torch.tensor([piece])).logits[0, :-1].log_softmax(-1).numpy()[range(len(piece) - 1), piece[1:]]


PIECE = np.random.default_rng(3).integers(0, VOCAB, 40).tolist()


def test_wider_tensors_of_a_narrow_checkpoint_keep_their_digits(tmp_path):
    model = checkpoint(tmp_path, torch.bfloat16)
    norms = {name: torch.rand_like(p) + 0.5 for name, p in model.named_parameters() if p.dim() == 1}
    files = rewritten(tmp_path, lambda name, tensor: (name, norms.get(name, tensor)))
    model.load_state_dict({**model.state_dict(), **norms})
    found, _ = chosen(tmp_path, files, PIECE)
    np.testing.assert_allclose(found, wanted(model, PIECE), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_an_original_in_any_float_is_read_exactly(tmp_path, dtype):
    model = checkpoint(tmp_path, torch.float32)
    files = rewritten(tmp_path, lambda name, tensor: (name, tensor.to(dtype)))
    model.load_state_dict({name: p.to(dtype).float() for name, p in model.state_dict().items()})
    found, _ = chosen(tmp_path, files, PIECE)
    np.testing.assert_allclose(found, wanted(model, PIECE), atol=2e-5)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_that_transformers_does_not_know_are_told_to_it(tmp_path, prefix):
    model = checkpoint(tmp_path / "checkpoint", torch.bfloat16, tie_word_embeddings=True)
    files = rewritten(tmp_path / "checkpoint", lambda name, tensor: (prefix + name, tensor))
    run_stage(ConfigParse(), tmp_path / "config", {"checkpoint": str(tmp_path / "checkpoint")})
    config = tmp_path / "config" / ConfigParse.outputs["config"].path
    found, origin = chosen(tmp_path / "checkpoint", files, PIECE, config)
    np.testing.assert_allclose(found, wanted(model, PIECE), atol=2e-5)
    assert origin.endswith("by the names that this project reads there")


def test_weights_that_transformers_would_draw_at_random_are_an_error(tmp_path, monkeypatch):
    checkpoint(tmp_path, torch.bfloat16)
    files = rewritten(tmp_path, lambda name, tensor: (name.replace("layers.1.mlp", "layers.9.mlp"), tensor))
    known = streaming.Mapped(files, read_headers(files).tensors)
    monkeypatch.setattr(streaming, "_named", lambda *_: (None, None, known.tensors))
    with pytest.raises(apart.LiveError, match=r"LlamaForCausalLM finds no weights for model\.layers\.1\.mlp"):
        chosen(tmp_path, files, PIECE)


def test_a_quantization_config_that_is_left_over_changes_nothing(tmp_path):
    model = checkpoint(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found, _ = chosen(tmp_path, {path.name: path for path in tmp_path.iterdir()}, PIECE)
    np.testing.assert_allclose(found, wanted(model, PIECE), atol=2e-5)


def test_a_token_that_the_original_rules_out_counts_for_nothing():
    pieces = [[1, 5, 9]]
    texts = probes.Probes(pieces, [["a"] * 3], prefix=[])
    p = logits(0, 3)
    p[:, 7] = -np.inf
    figures = loss.measure(Reads(logits(0, 3), 8), texts, kept(p, pieces, 0)).figures()
    assert 0 < figures.kl_mean < 0.5


def test_a_conversation_whose_template_writes_the_date_is_read_as_plain_text(tmp_path):
    """Its ids would be others tomorrow, and with them what is measured and kept."""
    built = bundles.build(tmp_path / "built", "q0f32", checkpoint=dated(tmp_path / "checkpoint"))
    case = Case(built.bundle, built.params, built.config, built.checkpoint, {}, {}, "llvm", "none", "none")
    said = [{"role": "user", "content": "every morning"}]
    assert case.tokenizer.decode(case.chat(said)).strip() == "user: every morning"


def dated(folder):
    write_qwen(folder)
    path = folder / "tokenizer_config.json"
    template = "{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    return folder


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
def test_marks_within_a_line_of_json_end_no_line(tmp_path, mark):
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"kind": "a", "text": f"one{mark}two"}, ensure_ascii=False) + "\n", "utf-8")
    assert list(probes.segments(path)) == [("a", f"one{mark}two")]


def test_a_long_text_is_read_as_far_as_it_is_needed(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("abc " * 100_000)
    read = []

    def encode(text):
        read.append(text)
        return [2] * len(text)

    found = probes.of(path, 3000, window=64, prefix=[1], encode=encode, chat=list)
    assert found.count == 3000
    assert len(read) == 1
