"""verify end to end on a tiny random checkpoint, and that it fails for everything it exists to find."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from stagegraph.stage import StageError
from stages.allocate import Allocate
from stages.calibrate import Calibrate
from stages.runtime.errors import BundleError
from stages.targets import processor
from stages.tokenizer_bundle import TokenizerBundle
from stages.verification import checks as checks_of
from stages.verification import live, running
from stages.verification.tolerances import spread_bound
from stages.verify import Verify
from tests.support import bundles, family_models
from tests.support.checkpoints import qwen_tensors, write_qwen, write_safetensors, write_shards
from tests.support.local_context import Elsewhere

LOGIT_CHECKS = {
    "every step",
    "prefill, then decode",
    "every token scored",
    "prefill in chunks",
    "tokens taken back",
    "two sequences at once",
}


def checks(context):
    return {check["name"]: check for check in json.loads((context.out / "verify.json").read_text())["checks"]}


def failure(built, tmp_path, **params):
    with pytest.raises(StageError) as caught:
        bundles.verify(built, tmp_path / "verify", **{"reference": "recorded", **params})
    return str(caught.value)


# What holds


def test_a_recorded_reference_is_met_closely(recorded, tmp_path):
    context = bundles.verify(recorded, tmp_path, reference="recorded")
    found = checks(context)
    assert set(found) >= LOGIT_CHECKS
    assert all(check["ok"] for check in found.values())
    assert all(found[name]["measured"] < 2e-5 for name in LOGIT_CHECKS)  # the tolerance is 1e-3
    assert found["embed"]["measured"] == 0
    assert context.summary_text.startswith("verified, logits within")
    assert "24 ids equal" in found["greedy text after 'every morning'"]["detail"]
    again = bundles.verify(recorded, tmp_path / "again", reference="recorded")
    for name in ("verify.json", "card.md"):
        assert (context.out / name).read_bytes() == (again.out / name).read_bytes()


def test_a_live_reference_is_met_by_quantized_weights(quantized, tmp_path):
    context = bundles.verify(quantized, tmp_path)
    found = checks(context)
    assert context.params.reference == "live"
    assert found["every step"]["measured"] < 2e-5  # the tolerance is 2e-3
    assert found["weights"]["detail"].endswith("within half a step of q4f32_1")
    assert sum(name.startswith("greedy text") for name in found) == 2
    assert "embed" not in found  # sep_embed is false
    card = (tmp_path / "card.md").read_text()
    assert "verified" in card
    assert "batches: the library was built for one sequence" in card
    assert any("mean loss" in warning for warning in context.warnings)  # the weights are random, and it shows
    assert not any("proves little" in warning for warning in context.warnings)


@pytest.mark.slow
def test_a_comparison_that_no_difference_could_fail_is_said_to_prove_little(quantized, tmp_path, monkeypatch):
    monkeypatch.setattr(running, "spread_bound", lambda *_: 0.5)
    context = bundles.verify(quantized, tmp_path)
    assert any("within 0.5 of it proves little" in warning for warning in context.warnings)


@pytest.mark.skipif(
    not processor.byte_product(processor.required_features(processor.host_cpu())),
    reason="this processor does not multiply bytes",
)
@pytest.mark.slow
def test_quantized_activations_are_held_to_a_bound_of_their_own(tmp_path):
    built = bundles.build(tmp_path / "built", "q4f32_1", activations="int8", max_batch=2, prefill_chunk=24)
    found = checks(bundles.verify(built, tmp_path / "verify"))
    assert json.loads((built.bundle / "bundle.json").read_text())["model"]["activations"] == "int8"
    for name in ("every step", "prefill in chunks", "two sequences at once"):
        # Rounding moves the reference about as much as the bundle; the bound is four times that.
        assert 1e-3 < found[name]["bound"] / 40 < found[name]["measured"] < found[name]["bound"]
    assert 1e-5 < abs(found["perplexity of the prompt"]["measured"]) < found["perplexity of the prompt"]["bound"]
    cost = found["int8 activations (max_activation_kl)"]
    assert 1e-6 < cost["measured"] < cost["bound"] == 0.03
    less = failure(built, tmp_path, reference="live", max_activation_kl=cost["measured"] * 0.99)
    assert "from float activations on the same weights, at most" in less
    assert "set activations: float" in less
    assert "layers whose int8 activations alone cost most" in less
    assert "8-bit activations" in (built.bundle / "README.md").read_text()


@pytest.mark.slow
def test_a_cache_in_bytes_is_held_to_that_bound_too(tmp_path):
    built = bundles.build(tmp_path / "built", "q0f32", kv_dtype="int8", max_batch=2, prefill_chunk=24)
    found = checks(bundles.verify(built, tmp_path / "verify", max_kl=None))
    for name in ("every step", "prefill in chunks", "two sequences at once"):
        assert found[name]["bound"] / 40 < found[name]["measured"] < found[name]["bound"]
    cost = found["int8 KV cache (max_activation_kl)"]
    assert 1e-9 < cost["measured"] < cost["bound"] == 0.03
    assert found["KL divergence (max_kl)"]["bound"] == 0.03  # of eight bits, though weights keep 32
    less = failure(built, tmp_path, reference="live", max_activation_kl=cost["measured"] * 0.99)
    assert "from float KV cache on the same weights, at most" in less
    assert "set kv_dtype: auto" in less
    assert "KV cache int8" in (built.bundle / "README.md").read_text()


def test_a_checkpoint_whose_names_have_another_prefix_is_read_by_the_register(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    checkpoint = shutil.copytree(recorded.checkpoint, tmp_path / "checkpoint")
    (checkpoint / "model.safetensors.index.json").unlink()
    for shard in checkpoint.glob("*.safetensors"):
        save_file({f"module.{name}": tensor for name, tensor in load_file(shard).items()}, shard)
    ports = family_models.parse_and_register(tmp_path / "registered", checkpoint, built.scheme)
    renamed = bundles.replace(built, checkpoint=checkpoint, config=ports["config"], params=ports["params"])
    found = checks(bundles.verify(renamed, tmp_path / "out", reference="live"))
    assert {"weights", "embed", "every step"} <= set(found)


def test_without_a_reference_nothing_says_verified(recorded, tmp_path):
    context = bundles.verify(recorded, tmp_path, reference="none")
    assert context.summary_text == "runs, not checked against a reference"
    assert "verified" not in (tmp_path / "card.md").read_text()
    assert LOGIT_CHECKS - {"every step"} <= set(checks(context))


def test_a_scheme_that_is_not_recorded_is_said_plainly(quantized, recorded, tmp_path):
    checkpoint = shutil.copytree(recorded.checkpoint, tmp_path / "checkpoint")
    built = bundles.replace(quantized, checkpoint=checkpoint)
    context = bundles.verify(built, tmp_path / "out", reference="recorded")
    assert context.summary_text == "runs, not checked against a reference"
    assert "none are recorded for q4f32_1" in (tmp_path / "out" / "card.md").read_text()


def test_where_there_is_no_device_the_card_says_not_run(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    context = bundles.verify(built, tmp_path / "out", target="cuda", device="none", reference="recorded")
    assert context.summary_text == "NOT RUN (device is none)"
    text = (tmp_path / "out" / "card.md").read_text() + (tmp_path / "out" / "verify.json").read_text()
    assert "NOT RUN (device is none)" in text
    assert "verified" not in text
    assert checks(context)["weights"]["ok"]


def test_auto_takes_what_there_is(recorded, quantized, monkeypatch):
    def resolved(checkpoint, target="llvm"):
        found = Verify().resolve(Verify.Params(checkpoint=str(checkpoint), target=target))
        return found.reference, found.device

    assert resolved(recorded.checkpoint) == ("live", "cpu")
    monkeypatch.setattr("stages.verify.dist_versions", lambda *names: dict.fromkeys(names, "absent"))
    assert resolved(recorded.checkpoint) == ("recorded", "cpu")
    assert resolved(quantized.checkpoint, "cuda") == ("none", "auto")
    with pytest.raises(StageError, match="does not run on device cuda"):
        Verify().resolve(Verify.Params(checkpoint="", target="llvm", device="cuda"))


@pytest.mark.parametrize("driver", [False, True])
def test_without_a_device_that_can_be_used_auto_says_why_nothing_was_run(recorded, tmp_path, monkeypatch, driver):
    def none_there(_):
        raise BundleError("TVM finds no CUDA device")

    monkeypatch.setattr("stages.runtime.host.has_nvidia_driver", lambda: driver)
    monkeypatch.setattr("stages.runtime.backend.device", none_there)
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    context = bundles.verify(built, tmp_path / "out", target="cuda", reference="none")
    assert context.summary_text == f"NOT RUN ({'TVM finds no CUDA device' if driver else 'no NVIDIA driver is loaded'})"
    assert "no CUDA device" in failure(built, tmp_path, target="cuda", device="cuda") or not driver


def test_a_device_that_runs_none_of_the_code_is_not_run_on(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr("stages.runtime.host.has_nvidia_driver", lambda: True)
    monkeypatch.setattr("stages.runtime.backend.device", lambda _: None)
    monkeypatch.setattr("stages.runtime.backend.capability", lambda _: 75)
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    context = bundles.verify(built, tmp_path / "out", target="cuda", reference="none")
    assert "does not run on sm_75" in context.summary_text


@pytest.mark.parametrize(("window", "reference"), [(88, "live"), (16, "recorded"), (2, "recorded"), (1, "live")])
def test_any_context_window_is_verified_as_far_as_it_goes(recorded, tmp_path, window, reference):
    built = recorded.copy(tmp_path)
    built.edit(lambda document: document["model"].update(context_window=window))
    context = bundles.verify(built, tmp_path / "out", reference=reference)
    document = json.loads((context.out / "verify.json").read_text())
    assert document["verdict"] == "verified"
    assert ("every step" in checks(context), window < 3) == (
        True,
        any("too short" in text for text in document["unchecked"]),
    )
    assert any(text.startswith("text after 'every morning'") for text in document["unchecked"]) == (window < 88)


@pytest.mark.slow
def test_a_live_reference_meets_the_recorded_text_too(recorded, tmp_path):
    context = bundles.verify(recorded, tmp_path / "out", reference="live")
    assert checks(context)["greedy text after 'every morning', recorded"]["ok"]
    read, compared = context.progressed["tokens read"], context.progressed["tokens compared with the original"]
    assert read[1] == 0 < read[0], "the bundle decides when an answer ends: of how many is not known"
    assert compared[0] == compared[1] > 0
    assert recording_failure(recorded, tmp_path, other_text, reference="live").endswith("instead of 'another text'")


def test_no_text_compared_is_no_verified_text(recorded, tmp_path):
    def nothing_said(document):
        document["cases"][0].update(logits=None)
        document["cases"][0]["continuations"][0].update(ids=[], text="")

    built = with_recording(recorded, tmp_path, nothing_said)
    assert bundles.verify(built, tmp_path / "out", reference="recorded").summary_text == (
        "runs, not checked against a reference"
    )
    assert "text after 'every morning': the reference ends it there" in (tmp_path / "out" / "card.md").read_text()


def test_another_tokenizer_family_reruns_nothing(recorded):
    rows = Verify().rows(Verify.Params(checkpoint=str(recorded.checkpoint), target="llvm"), {"family": "qwen"})
    assert rows["stages.tokenizers:TOKENIZERS"] == rows["stages.tokenizers.resolution:RULES"] == "tiktoken-qwen"
    assert rows["stages.tokenizers:EMBEDDINGS"] == ()


def test_what_reads_the_checkpoint_is_among_the_tools():
    tools = Verify().tools(Verify.Params(checkpoint="", target="llvm", reference="none"))
    assert {"ml-dtypes", "unicode"} <= tools.keys()
    # It reads the vocabulary as tokenizer-bundle does, transformers included, which needs no live reference.
    read = TokenizerBundle().tools(TokenizerBundle.Params(checkpoint=""))
    assert read.keys() - {"python"} <= tools.keys()
    # Conversations of the probes and of sample text are what a template makes of them.
    for stage, own in ((Calibrate(), {}), (Allocate(), {"bits": 4})):
        assert {"jinja2", "tokenizers", "torch", "processor"} <= stage.tools(stage.Params(checkpoint="", **own)).keys()
    assert "nvidia-driver" in Verify().tools(Verify.Params(checkpoint="", target="cuda", device="auto"))


# What must fail


def test_a_bundle_for_another_target_is_refused(recorded, tmp_path):
    assert "built for llvm, and the target of verify is cuda" in failure(
        recorded, tmp_path, target="cuda", device="none"
    )


def swap_halves(built, name):
    """Exchange the gate and up halves of a fused tensor in the stored weights."""
    records = json.loads((built.bundle / "tensor-cache.json").read_text())["records"]
    shard, record = next((s, r) for s in records for r in s["records"] if r["name"] == name)
    path = built.bundle / shard["dataPath"]
    data = bytearray(path.read_bytes())
    start, half = record["byteOffset"], record["nbytes"] // 2
    whole = data[start : start + 2 * half]
    data[start : start + 2 * half] = whole[half:] + whole[:half]
    path.write_bytes(data)


def test_changed_weights_are_found_by_their_digest_and_without_it_by_their_values(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    shard = built.bundle / "params_shard_0.bin"
    data = bytearray(shard.read_bytes())
    data[1003] ^= 0x10
    shard.write_bytes(data)
    assert "params_shard_0.bin: its SHA-256 is not the one" in failure(built, tmp_path)
    built.sign()
    message = failure(built, tmp_path)
    assert "transformer.wte.weight: 1 of 32,768 values are not the checkpoint's" in message


def test_weights_of_exchanged_tensors_are_found(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    swap_halves(built, "transformer.h.1.mlp.gate_up_proj.weight")
    built.sign()
    message = failure(built, tmp_path)
    assert "transformer.h.1.mlp.w1.weight" in message
    assert "transformer.h.1.mlp.w2.weight" in message
    assert "every step" in message


def test_weights_that_others_compare_are_found_the_same(quantized, tmp_path):
    """In portions of one parameter each, which see the files of their tensors alone."""
    how = {"reference": "none", "device": "none"}
    alone = bundles.verify(quantized, tmp_path / "alone", **how)
    others = Elsewhere(Verify(), tmp_path / "others")
    together = bundles.verify(quantized, tmp_path / "together", batch=0, elsewhere=others, **how)
    assert len(list((tmp_path / "others").iterdir())) == len(json.loads(quantized.params.read_text())["logical"])
    for name in ("verify.json", "card.md"):
        assert (together.out / name).read_bytes() == (alone.out / name).read_bytes()
    assert "tensors compared" in alone.progressed.keys() - together.progressed.keys()
    spoilt = quantized.copy(tmp_path)
    for name in ("transformer.h.1.mlp.gate_up_proj.q_weight", "transformer.h.0.mlp.gate_up_proj.q_weight"):
        swap_halves(spoilt, name)
    spoilt.sign()
    others = Elsewhere(Verify(), tmp_path / "spoilt")
    messages = []
    for name, given in {"one": {}, "several": {"batch": 0, "elsewhere": others}}.items():
        with pytest.raises(StageError) as caught:
            bundles.verify(spoilt, tmp_path / name, **how, **given)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert messages[0].count("are not the checkpoint's") == 4


def test_a_wrong_mapping_that_agrees_with_itself_is_found_by_the_logits(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    name = "transformer.h.0.mlp.gate_up_proj.weight"
    swap_halves(built, name)
    built.sign()
    document = json.loads(built.params.read_text())
    entry = next(entry for entry in document["logical"] if entry["name"] == name)
    entry["sources"].reverse()
    built.params.write_text(json.dumps(document))
    message = failure(built, tmp_path)
    assert "not the checkpoint's" not in message  # the weights are all there, in the place that params.json says
    assert {line.split(": ")[1] for line in message.splitlines() if "at most" in line} == {
        *LOGIT_CHECKS,
        "perplexity of the prompt",
    }


def test_quantized_weights_of_another_checkpoint_are_found(quantized, tmp_path):
    checkpoint = write_qwen(tmp_path / "checkpoint")
    tensors = qwen_tensors(64, 2, 96, 512, 0)
    tensors["lm_head.weight"][17, 40] += np.float32(0.3)
    write_shards(checkpoint, tensors, "bfloat16")
    built = bundles.replace(quantized, checkpoint=checkpoint)
    assert (
        "lm_head.weight: 1 of 32,768 values are not the checkpoint's within what 4 bits/32 float32 explains"
        in failure(built, tmp_path, reference="none")
    )


def stored(built, name, dtype):
    """A stored tensor, mapped to be written."""
    records = json.loads((built.bundle / "tensor-cache.json").read_text())["records"]
    shard, record = next((s, r) for s in records for r in s["records"] if r["name"] == name)
    path = built.bundle / shard["dataPath"]
    return np.memmap(path, dtype, "r+", record["byteOffset"], tuple(record["shape"]))


def test_scales_that_excuse_wrong_codes_are_found(quantized, tmp_path):
    """Codes of zero everywhere, with steps so wide that each value lies within half of one."""
    built = quantized.copy(tmp_path)
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"):
        stored(built, f"{name}.q_weight", "<u4")[:] = 0x77777777
        scale = stored(built, f"{name}.q_scale", "<f4")
        scale[:] = scale * 14 + 1e-3
    built.sign()
    message = failure(built, tmp_path, reference="none")
    assert "transformer.h.0.attn.c_attn.weight: " in message
    assert "transformer.h.1.mlp.c_proj.weight: " in message


def test_a_tensor_that_the_bundle_does_not_hold_is_named(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    path = built.bundle / "tensor-cache.json"
    document = json.loads(path.read_text())
    shard = document["records"][-1]
    lost = shard["records"].pop()["name"]
    path.write_text(json.dumps(document))
    built.sign()
    assert f"{lost}: params.json has float32" in failure(built, tmp_path, reference="live")


def test_a_checkpoint_of_other_shapes_than_were_registered_is_refused(recorded, tmp_path):
    checkpoint = write_qwen(tmp_path / "checkpoint", ff=128)
    built = bundles.replace(recorded, checkpoint=checkpoint)
    problems = failure(built, tmp_path, reference="none").splitlines()
    assert len(problems) == 2 * 3
    name = "transformer.h.1.mlp.c_proj.weight"
    assert f"{name}: params.json is made of [64, 96], the checkpoint has [64, 128]; verify must see" in problems[-1]


def test_a_tensor_that_the_checkpoint_lost_or_cannot_give_is_named(recorded, tmp_path):
    checkpoint = write_qwen(tmp_path / "checkpoint")
    (checkpoint / "model.safetensors.index.json").unlink()
    for path in checkpoint.glob("*.safetensors"):
        path.unlink()
    tensors = qwen_tensors(64, 2, 96, 512, 0)
    del tensors["lm_head.weight"]
    write_safetensors(checkpoint / "model.safetensors", tensors, "bfloat16")
    built = bundles.replace(recorded, checkpoint=checkpoint)
    message = failure(built, tmp_path, reference="none")
    assert message.startswith("lm_head.weight: params.json is made of [512, 64], the checkpoint has none that can be")


def test_a_difference_from_zeros():
    zeros, ones = np.zeros(3), np.ones(3)
    assert checks_of.difference(zeros, zeros) == 0
    assert checks_of.difference(ones, zeros) == np.inf
    assert checks_of.difference(zeros * np.nan, zeros) == np.inf


def test_a_perplexity_above_the_references_fails():
    tokens, guessing = [3, *[1, 2] * 40], np.zeros((81, 4))
    knowing = np.log([[1, 3, 1, 1], *[[1, 1, 3, 1], [1, 3, 1, 1]] * 40])  # what comes next has half of the probability
    worse, better = (checks_of.perplexity(*rows, tokens, 0.02) for rows in ((guessing, knowing), (knowing, guessing)))
    assert not worse.ok
    assert (worse.measured, better.measured) == pytest.approx((1, -0.5))
    assert worse.detail.startswith("4.0000, the reference 2.0000")
    assert better.ok


def test_a_perplexity_off_by_the_luck_of_few_tokens_is_no_failure():
    """Logits moved at random mean as little in either direction: few tokens do not even out."""
    random = np.random.default_rng(0)
    wanted, refused, above = random.normal(size=(65, 50)) * 3, 0, 0
    for _ in range(200):
        rows = wanted + random.normal(size=wanted.shape) * 0.12
        following = (wanted + random.gumbel(size=wanted.shape)).argmax(-1)  # as likely as the reference has them
        found = checks_of.perplexity(rows, wanted, [0, *following[:-1].tolist()], 0.02)
        refused, above = refused + (not found.ok), above + (found.measured > 0.02)
    assert refused <= 1  # beyond three standard deviations
    assert above > 10


def test_a_tokenizer_with_two_ids_exchanged_is_found(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    path = built.bundle / "tokenizer.json"
    document = json.loads(path.read_text())
    vocabulary = document["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    path.write_text(json.dumps(document))
    built.sign()
    message = failure(built, tmp_path)
    assert "tokenizer against the source vocabulary: ids differ" in message
    assert "tokenizer against the reference" in message


def test_another_recorded_text_is_found(recorded, tmp_path):
    checkpoint = shutil.copytree(recorded.checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "reference" / "reference.json"
    document = json.loads(path.read_text())
    continuation = document["cases"][0]["continuations"][0]
    continuation["ids"][3] = (continuation["ids"][3] + 1) % 500
    path.write_text(json.dumps(document))
    message = failure(bundles.replace(recorded, checkpoint=checkpoint), tmp_path)
    assert "greedy text after 'every morning': id" in message
    assert "at position 3" in message


@pytest.mark.parametrize("changed", ["generation_config.json", "record_reference.py"])
def test_a_stale_recording_fails_and_says_how_to_make_another(recorded, tmp_path, changed):
    checkpoint = shutil.copytree(recorded.checkpoint, tmp_path / "checkpoint")
    (checkpoint / changed).write_text((checkpoint / changed).read_text() + "\n")
    message = failure(bundles.replace(recorded, checkpoint=checkpoint), tmp_path)
    assert "stale" in message
    assert "record it again with record_reference.py" in message


def with_recording(built, tmp_path, change):
    """The same bundle, with ``change`` made to a copy of its recording."""
    checkpoint = shutil.copytree(built.checkpoint, tmp_path / "checkpoint")
    path = checkpoint / "reference" / "reference.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return bundles.replace(built, checkpoint=checkpoint)


def recording_failure(built, tmp_path, change, **params):
    return failure(with_recording(built, tmp_path, change), tmp_path, **params)


def other_text(document):
    document["cases"][0]["continuations"][0]["text"] = "another text"


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.clear(),
        lambda document: document.update(versions=["torch"]),
        lambda document: document.update(cases=3),
        lambda document: document.update(script="record_reference.py"),
        lambda document: document["cases"][0].pop("prompt"),
        lambda document: document["cases"][0].update(prompt=7),
        lambda document: document["cases"][0].update(prompt="\ud800"),
        lambda document: document["cases"][0].update(tokens=[]),
        lambda document: document["cases"][0]["tokens"].__setitem__(70, 512),
        lambda document: document["cases"][0]["tokens"].__setitem__(70, "1"),
        lambda document: document["cases"][0].update(logits="other"),
        lambda document: document["cases"][0].update(continuations=[None]),
        lambda document: document["cases"][0]["continuations"][0].update(ids=[-1]),
        lambda document: document["cases"][0]["continuations"][0].update(text=None),
    ],
)
def test_a_damaged_recording(recorded, tmp_path, change):
    message = recording_failure(recorded, tmp_path, change)
    assert message.startswith("reference/reference.json: damaged")
    assert "\n" not in message


def test_a_recording_nested_too_deeply(recorded, tmp_path):
    checkpoint = shutil.copytree(recorded.checkpoint, tmp_path / "checkpoint")
    (checkpoint / "reference" / "reference.json").write_text("[" * 100_000)
    assert "damaged" in failure(bundles.replace(recorded, checkpoint=checkpoint), tmp_path)


def test_a_machine_that_does_not_fit_fails_before_anything_is_loaded(recorded, tmp_path):
    built = recorded.copy(tmp_path)

    def change(document):
        document["tvm"]["apache-tvm-ffi"] = "0.1.15"
        document["cpu"]["features"].append("avx10.2-512")

    built.edit(change)
    message = failure(built, tmp_path)
    assert "apache-tvm-ffi 0.1.15 is needed" in message
    assert "lacks avx10.2-512" in message


def test_a_live_reference_that_cannot_be_computed_is_a_message(recorded, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "transformers.py").write_text("raise SystemExit('no transformers today')")
    assert "the original model, run by torch, ended with exit code 1: no transformers today" in failure(
        recorded, tmp_path, reference="live"
    )


def test_a_reference_that_is_not_finite_is_a_message(quantized, tmp_path, monkeypatch):
    def overflown(request, _progress):
        picks = [ids for _, ids in request.continued]
        return live.ReferenceAnswer("a model", np.full((len(request.tokens), 512), np.inf, np.float32), np.inf, picks)

    monkeypatch.setattr(live, "answer", overflown)
    assert "the live reference's own logits are not finite" in failure(quantized, tmp_path, reference="live")


@pytest.mark.parametrize(("spread", "bound"), [(1e-5, 2.4e-4), (1.04e-5, 2.5e-4), (0.0, 9.6e-7)])
def test_a_bound_is_the_reference_s_own_movement_times_a_factor_rounded_up(spread, bound):
    assert spread_bound("float32", spread) == pytest.approx(bound)


@pytest.mark.parametrize("inherited", ["", ":", ":/nowhere"])
def test_nothing_in_the_working_directory_is_executed(quantized, tmp_path, monkeypatch, inherited):
    (tmp_path / "transformers.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", inherited)
    assert bundles.verify(quantized, tmp_path / "verify", reference="live").summary_text.startswith("verified")
