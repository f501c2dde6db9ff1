"""config-parse on whole checkpoints: what it writes, and what it says about bad ones."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import pytest

from stagegraph.stage import StageError
from stages.checkpoint import strict_json
from stages.config_parse import ConfigParse
from stages.models import FAMILIES
from tests.support.checkpoints import write_json, write_qwen, write_raw_safetensors
from tests.support.local_context import LocalContext, run_stage

if TYPE_CHECKING:
    from pathlib import Path


def parse(checkpoint: Path, out: Path, **params: Any) -> LocalContext:
    return run_stage(ConfigParse(), out, {"checkpoint": str(checkpoint), **params})


def problems(checkpoint: Path, **params: Any) -> list[str]:
    with pytest.raises(StageError) as caught:
        parse(checkpoint, checkpoint.parent / "out", **params)
    return [problem.removeprefix(f"{checkpoint}: ") for problem in caught.value.problems]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_qwen(tmp_path / "checkpoint")


def change(checkpoint: Path, name: str, **values: Any) -> None:
    write_json(checkpoint / name, {**json.loads((checkpoint / name).read_text()), **values})


def test_the_documents(checkpoint: Path, tmp_path: Path):
    ctx = parse(checkpoint, tmp_path / "out", context_window=128)
    model, generation, tensors = (
        json.loads((tmp_path / "out" / name).read_text()) for name in ("model.json", "generation.json", "tensors.json")
    )
    assert model == {
        "schema": 1, "family": "qwen", "architecture": "QWenLMHeadModel", "context_window": 128, "vocab_size": 512,
        "hidden_size": 64, "num_layers": 2,
        "config": {
            "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_layers": 2, "num_heads": 2,
            "head_dim": 32, "rms_eps": 1e-6, "rope_theta": 10000.0, "seq_length": 512, "use_dynamic_ntk": True,
            "use_logn_attn": True, "log_n": 0,
        },
    }  # fmt: skip
    assert generation == {
        "schema": 1, "bos": None, "eos": [300], "pad": 300, "stop": [300], "chat_format": "chatml",
        "sampling": {"do_sample": True, "top_k": 0, "top_p": 0.8, "max_new_tokens": 512},
    }  # fmt: skip
    assert len(tensors["tensors"]) == 8 * 2 + 3
    assert tensors["tensors"]["lm_head.weight"] == {
        "dtype": "BF16",
        "shape": [512, 64],
        "file": "model-00002-of-00002.safetensors",
    }
    assert ctx.facts == {"family": "qwen", "state": "kv"}
    assert ctx.summary_text == "qwen, 2 layers, 19 tensors, 0.3 MB"
    assert "kv_channels" in ctx.views["config"]


def test_the_window_is_the_models_own_by_default(checkpoint: Path, tmp_path: Path):
    parse(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out/model.json").read_text())["context_window"] == 512
    assert problems(checkpoint, context_window=40000)[0].startswith("context_window = 40000 exceeds seq_length = 512")


def test_rows_name_the_family_and_tolerate_what_is_not_there(checkpoint: Path, tmp_path: Path):
    def rows(folder: Path) -> Any:
        return ConfigParse().rows(ConfigParse.Params(checkpoint=str(folder)), {})

    assert rows(checkpoint) == {"stages.models:FAMILIES": ["qwen"]}
    change(checkpoint, "config.json", model_type="unheard-of")
    assert rows(checkpoint) == {}
    (checkpoint / "config.json").write_text("[1, 2")
    assert rows(checkpoint) == {}
    assert rows(tmp_path / "nowhere") == {}
    for text in ('{"model_type": ["qwen"]}', "[" * 100_000, '{"a":' * 100_000, '"qwen"'):
        (checkpoint / "config.json").write_text(text)
        assert rows(checkpoint) == {}


def test_a_config_in_whose_place_transformers_reads_another_is_refused(checkpoint: Path):
    from transformers import AutoConfig

    values = json.loads((checkpoint / "config.json").read_text()) | {"model_type": "llama"}
    write_json(checkpoint / "config.4.0.0.json", {**values, "rope_theta": 5.0})
    write_json(checkpoint / "config.json", {**values, "configuration_files": ["config.4.0.0.json"]})
    assert AutoConfig.from_pretrained(checkpoint).to_dict()["rope_parameters"]["rope_theta"] == 5
    (problem,) = problems(checkpoint)
    assert problem.startswith(
        "config.json: configuration_files names 'config.4.0.0.json', of which transformers may read one, by its own"
    )
    later, plain = ["config.99.0.0.json", "config.99.1.json"], ["config.json", "generation_config.json", "config.txt"]
    change(checkpoint, "config.json", configuration_files=later)
    assert AutoConfig.from_pretrained(checkpoint).to_dict()["rope_parameters"]["rope_theta"] != 5
    for number, harmless in enumerate((later, plain, [], None)):
        change(checkpoint, "config.json", configuration_files=harmless, model_type="qwen")
        parse(checkpoint, checkpoint.parent / f"out{number}")


@pytest.mark.parametrize(
    ("version", "installed", "read"),
    [
        ("4.57.0", "5.3.0", True), ("5.3.0", "5.3.0", True), ("5.3", "5.3.0", True), ("5.3.0", "5.3", True),
        ("5.3.1", "5.3.0", False), ("5.10.0", "5.9.0", False), ("5.9.0", "5.10.0", True), ("99", "5.3.0", False),
        ("5.0.0", "5.0.0.dev0", True), ("99", "absent", True), ("latest", "5.3.0", True), ("4.0.0-x", "5.3.0", True),
    ],
)  # fmt: skip
def test_another_config_is_one_of_no_later_version(version: str, installed: str, read: bool):
    from stages.config_parse import _read_instead

    name = f"config.{version}.json"
    assert _read_instead(["config.json", name, 5], installed) == ([name] if read else [])


def test_no_config_and_no_weights(checkpoint: Path):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    assert problems(checkpoint) == ["no *.safetensors file with weights there"]
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert problems(checkpoint)[0].startswith(
        "the weights are pickle files, which can run code when read (pytorch_model.bin); load it once with transformers"
    )
    (checkpoint / "pytorch_model.bin").unlink()
    (checkpoint / "config.json").rename(checkpoint / "kept.json")
    assert problems(checkpoint) == ["no config.json there; expected a checkpoint directory in Hugging Face format"]
    snapshot = checkpoint / "snapshots" / "0a"
    snapshot.mkdir(parents=True)
    shutil.copy(checkpoint / "kept.json", snapshot / "config.json")
    assert problems(checkpoint) == [f"no config.json there; name the folder in it that has one: {snapshot}"]
    (checkpoint / "config.json").symlink_to("../../blobs/1")
    (checkpoint / "model.safetensors").symlink_to("../../blobs/2")
    assert problems(checkpoint)[0].startswith(
        "no config.json there; config.json, model.safetensors are links to files that are not there; copy a folder"
    )


KNOWN = f"known: {', '.join(sorted(FAMILIES.keys() - {'traced'}))}"
UNKNOWN = (
    f"config.json: model_type 'gptneox' has no family here, and transformers {version('transformers')} does not know "
    "it either; did you mean 'gpt_neox'?; the code that its auto_map names is never run: if a newer transformers does, "
    "install that"
)
WRONG = """config.json: architectures = ["QWenLMHeadModl"] of model_type 'qwen'; """
OTHER = """config.json: architectures = ["Other", "QWenLMHeadModel"] of model_type 'qwen'; """
EXPECTED = "expected one of: QWenLMHeadModel"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gptneox"}, UNKNOWN),
        ({"model_type": None}, f"config.json: model_type is missing; {KNOWN}"),
        ({"architectures": ["QWenLMHeadModl"]}, WRONG + EXPECTED + "; did you mean 'QWenLMHeadModel'?"),
        ({"architectures": ["Other", "QWenLMHeadModel"]}, OTHER + EXPECTED),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_named(checkpoint: Path, values, message):
    change(checkpoint, "config.json", **values)
    assert problems(checkpoint) == [message]


def test_an_architecture_may_be_spelt_in_other_letters(checkpoint: Path, tmp_path: Path):
    """As in the first Llama checkpoints; transformers goes by model_type."""
    change(checkpoint, "config.json", architectures=["QwenLMHeadModel"])
    parse(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out/model.json").read_text())["architecture"] == "QWenLMHeadModel"


def test_files_without_tensors_are_no_model(checkpoint: Path):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    write_raw_safetensors(checkpoint / "model.safetensors", b"{}", b"")
    assert problems(checkpoint) == ["the *.safetensors files hold no tensors"]


def test_what_transformers_does_not_read_is_ignored_and_listed_once(checkpoint: Path, tmp_path: Path):
    """Among it the sampling defaults of old checkpoints: those of generation_config.json alone count."""
    change(checkpoint, "config.json", temperature=0.7, unsloth_fixed=True, id2label={str(i): "x" for i in range(1000)})
    (checkpoint / "generation_config.json").unlink()
    ctx = parse(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out/generation.json").read_text())["sampling"] == {}
    _, ignored = ctx.views["config"].split("ignored keys of config.json\n")
    for key in ("temperature", "unsloth_fixed", "id2label", "torch_dtype"):
        assert [line.split()[0] for line in ctx.views["config"].splitlines()].count(key) == 1
        assert f"  {key} " in ignored
    assert ctx.warnings == []


def test_an_infinite_number_of_a_config_is_read_as_transformers_writes_it(tmp_path: Path):
    """Python's JSON has it, and configs of Mamba 2 do: {"time_step_limit": [0.0, Infinity]}."""
    (tmp_path / "config.json").write_text('{"time_step_limit": [0.0, Infinity]}')
    found = strict_json.read_object(tmp_path / "config.json", "config.json")
    assert found == {"time_step_limit": [0.0, {"__float__": "Infinity"}]}
    with pytest.raises(ValueError, match="Infinity is not a JSON number"):
        strict_json.parse(b"[Infinity]")


def test_config_must_be_strict_json(checkpoint: Path):
    (checkpoint / "config.json").write_text('{"model_type": "qwen",\n "model_type": "llama"}')
    assert problems(checkpoint) == ["config.json: not valid JSON: key 'model_type' occurs twice in one object"]
    (checkpoint / "config.json").write_text('{"model_type": NaN}')
    assert problems(checkpoint) == ["config.json: not valid JSON: NaN is not a JSON number"]
    (checkpoint / "config.json").write_text('{"model_type": 1e999}')
    assert problems(checkpoint) == [
        "config.json: not valid JSON: 1e999 is beyond every floating-point number",
    ]
    for text in (r'{"\udce9": 1}', r'{"a": [{"b": "x\ud800y"}]}'):
        (checkpoint / "config.json").write_text(text)
        (problem,) = problems(checkpoint)
        assert problem.endswith("holds half of a surrogate pair, which is no character")
        assert problem.encode()
    (checkpoint / "config.json").write_text('"qwen"')
    assert problems(checkpoint) == ["config.json: expected a JSON object, found str"]


def test_a_whole_surrogate_pair_is_a_character(tmp_path: Path):
    (tmp_path / "x").write_text(r'{"a": "\ud83d\ude00"}')
    assert strict_json.read_object(tmp_path / "x", "x") == {"a": "\N{GRINNING FACE}"}


def test_an_endless_config_is_not_read(checkpoint: Path):
    with (checkpoint / "config.json").open("wb") as file:
        file.truncate(strict_json.MAX_BYTES + 1)
    assert problems(checkpoint) == ["config.json: more than 67,108,864 bytes are too many for a config"]


def test_hostile_numbers_and_keys_make_short_messages(checkpoint: Path):
    change(checkpoint, "config.json", hidden_size=10**4000, layer_norm_epsilon=10**400)
    assert all(len(problem) < 300 for problem in problems(checkpoint))


def test_everything_wrong_is_said_at_once(checkpoint: Path):
    change(checkpoint, "config.json", no_bias=False, kv_channels=16, quantization_bit=4, use_logn_attn=[])
    change(checkpoint, "generation_config.json", stop_words_ids="</s>")
    shard = checkpoint / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:100])
    found = problems(checkpoint)
    assert len(found) == 6
    for part in (
        "no_bias",
        "kv_channels",
        "quantization_bit",
        "use_logn_attn",
        "stop_words_ids = '</s>'",
        f"{shard.name}: truncated",
    ):
        assert sum(part in problem for problem in found) == 1, part


def test_generation_settings_are_normalised(checkpoint: Path, tmp_path: Path):
    change(checkpoint, "config.json", bos_token_id=299, eos_token_id=1)
    change(checkpoint, "generation_config.json", eos_token_id=[300, 302], stop_words_ids=[[301], [300], [5, 6]])
    ctx = parse(checkpoint, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation.json").read_text())
    assert (generation["bos"], generation["eos"], generation["stop"]) == (299, [300, 302, 1], [300, 302, 1, 301])
    assert len(ctx.warnings) == 1
    assert "[5, 6]" in ctx.warnings[0]
    (checkpoint / "generation_config.json").unlink()
    parse(checkpoint, tmp_path / "again")
    generation = json.loads((tmp_path / "again/generation.json").read_text())
    assert (generation["eos"], generation["chat_format"], generation["sampling"]) == ([1], None, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "2"}, "eos_token_id = '2'; expected token ids"),
        ({"pad_token_id": True}, "pad_token_id = True; expected token ids"),
        ({"stop_words_ids": [300]}, "stop_words_ids = [300]; expected a list of lists of token ids"),
        ({"stop_words_ids": [[1, "x"]]}, "stop_words_ids = [1, 'x']; expected token ids"),
        ({"chat_format": 7}, "chat_format = 7; expected a name"),
        ({"top_p": "high"}, "top_p = 'high'; expected a number above 0 and at most 1"),
        ({"top_p": True}, "top_p = True; expected a number above 0 and at most 1"),
    ],
)
def test_bad_generation_settings_are_named(checkpoint: Path, values, message):
    change(checkpoint, "generation_config.json", **values)
    assert problems(checkpoint) == [f"generation_config.json: {message}"]


def test_sampling_defaults_out_of_range_are_left_out(checkpoint: Path, tmp_path: Path):
    change(checkpoint, "generation_config.json", temperature=-1, top_k=-1, top_p=0, repetition_penalty=1.1)
    ctx = parse(checkpoint, tmp_path / "out")
    sampling = json.loads((tmp_path / "out/generation.json").read_text())["sampling"]
    assert sampling["repetition_penalty"] == 1.1
    assert not {"temperature", "top_k", "top_p"} & sampling.keys()
    assert ctx.warnings == [
        "generation_config.json: temperature = -1; expected a number, at least 0; it is left out",
        "generation_config.json: top_p = 0; expected a number above 0 and at most 1; it is left out",
        "generation_config.json: top_k = -1; expected a whole number, at least 0; it is left out",
    ]


def test_ids_of_no_token_are_left_out_and_their_file_named(checkpoint: Path, tmp_path: Path):
    change(checkpoint, "config.json", pad_token_id=-1)
    change(checkpoint, "generation_config.json", pad_token_id=None, stop_words_ids=[[301, 512], [512], [302]])
    ctx = parse(checkpoint, tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation.json").read_text())
    assert (generation["pad"], generation["stop"]) == (None, [300, 302])
    outside = "is outside the model's vocabulary of 512 rows and is left out"
    assert ctx.warnings == [
        f"config.json: pad_token_id = -1 {outside}",
        f"generation_config.json: stop_words_ids = 512 {outside}",
        f"generation_config.json: stop_words_ids = 512 {outside}",
    ]


def test_a_quantization_that_no_tensor_has_is_ignored_and_said(checkpoint: Path, tmp_path: Path):
    change(checkpoint, "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    ctx = parse(checkpoint, tmp_path / "out")
    assert ctx.warnings == [
        "config.json: quantization_config (quant_method 'bitsandbytes') is ignored: none of the 19 tensors is quantized"
    ]


@pytest.mark.parametrize(
    ("names", "dtype", "method"),
    [
        ("{}.qweight {}.qzeros {}.g_idx", "I32", "GPTQ (1 tensors such as {}.qweight)"),
        ("{}.qweight {}.qzeros", "I32", "AWQ (1 tensors such as {}.qweight)"),
        ("{}.weight {}.weight.absmax", "U8", "bitsandbytes with 4 bits (1 tensors such as {}.weight.absmax)"),
        ("{}.SCB", "I8", "bitsandbytes with int8 (1 tensors such as {}.SCB)"),
        ("{}.weight_packed", "I32", "compressed-tensors (1 tensors such as {}.weight_packed)"),
        ("{}.weight {}.scales {}.biases", "U32", "MLX (1 tensors such as {}.scales)"),
        ("{}.weight", "U8", "a method that stores packed bytes (1 tensors such as {}.weight)"),
    ],
)
def test_packed_weights_are_named_by_their_method(checkpoint: Path, names: str, dtype: str, method: str):
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    module, size = "transformer.h.0.attn.c_attn", 4 if dtype in ("I32", "U32") else 1
    entries = {
        name.format(module): {"dtype": dtype, "shape": [1], "data_offsets": [place * size, place * size + size]}
        for place, name in enumerate(names.split())
    }
    payload = bytes(len(entries) * size)
    write_raw_safetensors(checkpoint / "model.safetensors", json.dumps(entries).encode(), payload)
    change(checkpoint, "config.json", quantization_config={"quant_method": "some"})
    (problem,) = problems(checkpoint)
    assert problem.startswith(f"the weights are quantized by {method.format(module)}")
    assert (
        "as quantization_config of config.json says (quant_method 'some'), which cannot be read; start from" in problem
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["adapter_config.json", "adapter_model.safetensors"],
            "the weights are a LoRA adapter (PEFT), which is no model",
        ),
        (["config.json", "adapter_model.safetensors"], "the weights are a LoRA adapter (PEFT), which is no model"),
        (
            ["m-Q4_K_M.gguf", "README.md"],
            "the weights are in GGUF, llama.cpp's format, of which one file is a checkpoint (m-Q4_K_M.gguf); name the ",
        ),
        (["consolidated.00.pth", "params.json"], "the weights are Meta's own format (consolidated.00.pth); take the"),
        (
            ["config.json", "consolidated.safetensors"],
            "the weights are Mistral's own format (consolidated.safetensors); ",
        ),
        (["config.json", "weights.npz"], "the weights are arrays of NumPy, as MLX once wrote them (weights.npz); take"),
        (["config.json", "tf_model.h5"], "the weights are of another framework, which cannot be read (tf_model.h5); "),
    ],
)
def test_a_folder_of_another_format_is_named_for_what_it_is(checkpoint: Path, tmp_path: Path, files, message):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in files:
        (folder / name).write_text("{}")
        if name == "config.json":
            shutil.copy(checkpoint / name, folder)
    (problem,) = problems(folder)
    missing = "" if "config.json" in files else "no config.json there; "
    assert problem.startswith(missing + message)


def test_a_file_is_no_checkpoint(checkpoint: Path, tmp_path: Path):
    config = checkpoint / "config.json"
    assert problems(config) == [f"{config} is a file; checkpoint names the folder that holds config.json: {checkpoint}"]
    (tmp_path / "model.bin").write_text("")
    (problem,) = problems(tmp_path / "model.bin")
    assert problem.startswith(f"{tmp_path / 'model.bin'} is a file; the weights are pickle files")


def test_symlinks_and_other_folders(checkpoint: Path, tmp_path: Path):
    """A hub snapshot is a folder of links; what lies in subfolders is not part of the checkpoint."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    (snapshot / "reference").mkdir()
    shutil.copy(checkpoint / "model-00001-of-00002.safetensors", snapshot / "reference" / "reference.safetensors")
    parse(snapshot, tmp_path / "a")
    parse(checkpoint, tmp_path / "b")
    for name in ("model.json", "tensors.json", "generation.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
