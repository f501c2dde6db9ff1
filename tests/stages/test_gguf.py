"""GGUF files as checkpoints: what is read of them is what the model was that llama.cpp's converter made them of."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from stagegraph.stage import StageError, list_files
from stages.checkpoint.gguf import container, folder
from stages.checkpoint.headers import read_headers
from stages.checkpoint.tensors import Weights
from stages.config_parse import ConfigParse
from stages.quantize import Quantize
from stages.tokenizers.errors import TokenizerError
from stages.tokenizers.formats import gguf_files
from stages.tokenizers.formats.metaspace import SPACE
from stages.tokenizers.formats.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, read_model
from stages.verification import gguf_original
from stages.verification.checks import PROBES
from stages.verification.reference import checkpoint_digest
from tests.endurance.hostile import gguf_documents
from tests.support import family_models, gguf_models, sentencepiece_models, tokenizer_folders
from tests.support.local_context import run_stage

IDS = [3, 200, 17, 17, 41, 5, 77, 300, 12, 9] * 4  # more than a window of the sliding one


def module(name: str) -> str:
    """transformers' own name of a tensor that its files have under an older one."""
    return name.replace("embed_out.", "lm_head.")


def weights_of(path: Path) -> tuple[Weights, dict[str, Any]]:
    table = read_headers({path.name: path}).table()
    return Weights({path.name: path}, table), table


@pytest.mark.parametrize("case", gguf_models.CASES)
def test_the_model_is_the_one_that_the_file_was_made_of(case: str, tmp_path: Path) -> None:
    """transformers' model of our config.json and tensors has the logits of the model that was converted."""
    import torch
    import transformers

    path = tmp_path / "model.gguf"
    original = gguf_models.write(path, case)
    folder.write({path.name: path}, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == original.config.model_type
    weights, table = weights_of(path)
    read = transformers.AutoModelForCausalLM.from_config(config).eval()
    state = {module(name): torch.from_numpy(weights[name].copy()) for name in table}
    missing, unexpected = read.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    read.tie_weights()
    with torch.no_grad():
        found, wanted = (made(torch.tensor([IDS])).logits.numpy() for made in (read, original))
    assert family_models.error(found, wanted) < 1e-5
    family_models.parse_and_register(tmp_path / "stages", path, "q0f32")


@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3", "gptneox"])
def test_the_original_is_read_by_others_and_the_same(case: str, tmp_path: Path) -> None:
    import transformers

    path = tmp_path / "model.gguf"
    gguf_models.write(path, case, "Q4_1")
    folder.write({path.name: path}, tmp_path)
    weights, table = weights_of(path)
    theirs = dict(gguf_original.tensors([path], transformers.AutoConfig.from_pretrained(tmp_path)))
    assert theirs.keys() == {*map(module, table)}
    for name in table:
        np.testing.assert_array_equal(weights[name], theirs[module(name)], err_msg=name)


@pytest.mark.parametrize("kind", [name for name, _, _ in container.TYPES.values()])
def test_every_type_is_dequantized_as_by_its_own_package(kind: str, tmp_path: Path) -> None:
    """A block of rows at a time, put back in order."""
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", kind)
    weights, table = weights_of(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}["blk.1.attn_k.weight"]
    wanted = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
    assert np.isfinite(wanted).all()
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(gguf_models.paired(weights[name].astype(np.float32), 2), wanted)
    assert table[name]["packed"]["called"] == kind


@pytest.mark.parametrize(
    ("kind", "scheme", "scales", "twice"),
    [
        ("Q4_0", "q4s32", "full", "2 matrices are quantized already (Q8_0)"),  # embedding and head, by 127 steps
        ("Q4_1", "q4a32", "max", ""),
        ("Q8_0", "q8f16_1", "max", ""),
        ("Q6_K", "q8f16_1", "max", "8 matrices are quantized already (Q6_K)"),
    ],
)
def test_a_row_that_is_a_type_holds_its_values_as_they_are(
    kind: str, scheme: str, scales: str, twice: str, tmp_path: Path
) -> None:
    """And where none does, it is said how much more is lost."""
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", kind)
    ports = family_models.parse_and_register(tmp_path / "stages", path, scheme)
    choice = {"scheme": scheme, "scales": scales, "target": "llvm", "checkpoint": str(path)}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: ports[name] for name in ("params", "tensors")})
    lines = json.loads((tmp_path / "made" / "report.json").read_text())["tensors"]
    lost = [line["name"] for line in lines if line["rmse"] and "norm" not in line["name"]]
    assert len(lost) == int(twice[:1] or 0)
    said = [text for text in ctx.warnings if "a second time" in text]
    assert [text[: len(twice)] for text in said] == [twice] * bool(twice)


def test_the_sizes_of_types_are_those_of_the_package() -> None:
    theirs = {int(kind): (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in gguf.GGMLQuantizationType}
    assert {number: theirs[number] for number in container.TYPES} == container.TYPES


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2", "smollm", "qwen2", "tekken", "deepseek-coder"])
def test_a_byte_level_tokenizer_is_proven_as_of_a_folder(pre: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", "Q8_0", **{"tokenizer.ggml.pre": pre})
    inputs = family_models.parse_and_register(tmp_path / "stages", path, "q0f32")
    wanted = {name: inputs[name] for name in ("config", "generation", "tensors")}
    run_stage(tokenizer_folders.TokenizerBundle(), tmp_path / "out", {"checkpoint": str(path)}, wanted)
    made = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer.json").read_text())
    size = len(tokenizer_folders.vocab())
    assert [token["id"] for token in made["added_tokens"]] == [size, size + 1]
    assert ("<|begin|>" in json.dumps(made["post_processor"])) is (pre in ("llama-bpe", "tekken"))
    said = json.loads((tmp_path / "out" / "tokenizer" / "tokenizer_config.json").read_text())
    assert said["chat_template"].endswith("<|end|>{% endfor %}")


@pytest.mark.parametrize("name", ["llama", "no space before", "control tokens", "digits", "runs of spaces"])
def test_a_sentencepiece_vocabulary_becomes_the_model_that_it_was_taken_of(name: str, tmp_path: Path) -> None:
    import sentencepiece

    (tmp_path / "trained.model").write_bytes(sentencepiece_models.trained(name))
    model = read_model(tmp_path / "trained.model")
    prefix = "tokenizer.ggml."
    keys = {
        f"{prefix}model": "llama",
        f"{prefix}tokens": [
            piece.text.replace(SPACE, " ") if piece.kind == USER_DEFINED else piece.text for piece in model.pieces
        ],
        f"{prefix}scores": [piece.score for piece in model.pieces],
        # A tokenizer.json beside the model says of its special tokens only that they are such.
        f"{prefix}token_type": [CONTROL if piece.kind == UNKNOWN else piece.kind for piece in model.pieces],
        f"{prefix}unknown_token_id": model.unk,
        f"{prefix}bos_token_id": model.bos,
        f"{prefix}eos_token_id": model.eos,
        f"{prefix}padding_token_id": model.pad if model.pad >= 0 else None,
        f"{prefix}add_space_prefix": model.dummy_prefix,
    }
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", **keys)
    assert gguf_files.family(path) == "sentencepiece"
    files = gguf_files.write(path, tmp_path)
    assert read_model(files["tokenizer.model"]) == model
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
        for file in ("tokenizer.model", "trained.model")
    )
    for text in PROBES:
        assert ours.encode(text) == theirs.encode(text)


def put(path: Path, changes: Mapping[int, bytes] = {}, length: int | None = None) -> Path:
    data = bytearray(path.read_bytes())
    for place, value in changes.items():
        data[place : place + len(value)] = value
    path.write_bytes(data[:length])
    return path


def problem(path: Path, out: Path) -> str:
    with pytest.raises(StageError) as raised:
        run_stage(ConfigParse(), out, {"checkpoint": str(path)})
    (only,) = raised.value.problems
    return only


def place(path: Path, text: str, after: int = 0) -> int:
    return path.read_bytes().index(text.encode()) + len(text) + after


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    gguf_models.write(path, "llama", "Q4_0")
    return path


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    (tmp_path / "model.gguf").write_bytes(whole.read_bytes())
    return tmp_path / "model.gguf"


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.02, 0.5, 0.999])
def test_a_truncated_file_is_named(share: float, copy: Path, tmp_path: Path) -> None:
    put(copy, length=int(share * copy.stat().st_size))
    said = problem(copy, tmp_path / "out")
    assert "model.gguf: truncated" in said or "model.gguf: not a GGUF file" in said
    assert "fetch it again" in said


def test_what_no_file_may_claim_is_refused(copy: Path, tmp_path: Path) -> None:
    name = "blk.0.attn_q.weight"
    info = place(copy, name)  # rank, two sizes, type, offset
    cases = [
        ({0: b"GGML"}, "not a GGUF file"),
        ({4: b"\0\0\0\3"}, "written for a big-endian machine"),
        ({4: struct.pack("<I", 9)}, "version 9 of GGUF"),
        ({8: struct.pack("<Q", 2**60)}, "more than any model has"),
        ({16: struct.pack("<Q", 2**40)}, "more than any model has"),
        ({24: struct.pack("<Q", 2**50)}, "claims 1,125,899,906,842,624 bytes"),
        ({place(copy, "tokenizer.ggml.tokens", 8): struct.pack("<Q", 2**40)}, "claims 1,099,511,627,776 values"),
        ({place(copy, "tokenizer.ggml.token_type", 4): struct.pack("<I", 99)}, "is of type 99"),
        ({info: struct.pack("<I", 200)}, f"tensor '{name}' has 200 dimensions"),
        ({info + 4: struct.pack("<Q", 2**61)}, "has the sizes"),
        ({info + 4: struct.pack("<Q", 100)}, "which no tensor in Q4_0 has"),
        ({info + 20: struct.pack("<I", 4)}, "is of the type number 4, which is not read"),
        ({info + 24: struct.pack("<Q", 2**45)}, f"truncated: tensor '{name}'"),
        (
            {info - len(name): b"../../../etc/passwd"},
            "tensor '../../../etc/passwd' belongs to no supported llama model",
        ),
        ({info - len(name): b"blk.1.attn_q.weight"}, "tensor 'blk.1.attn_q.weight' is there twice"),
    ]
    data = copy.read_bytes()
    for number, (changes, wanted) in enumerate(cases):
        copy.write_bytes(data)
        assert wanted in problem(put(copy, changes), tmp_path / str(number)), wanted


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"split.count": 3}, "model.gguf: one of 3 files of a model, of which 1 were found: fetch all of them into"),
        ({"split.tensors.count": 9}, "21 tensors are in its files, and it says 9; fetch them again"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8: such a model is not supported"),
        ({"llama.attention.causal": False}, "llama.attention.causal = false: its tokens attend to later ones"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0; expected a positive whole number"),
        ({"llama.attention.head_count_kv": [2, 1]}, "layers that differ are not supported"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length = 32; expected the 64 channels"),
        ({"llama.rope.scaling.type": "longrope"}, "none, linear and yarn are read"),
        ({"llama.rope.freq_base": float("nan")}, "llama.rope.freq_base = nan; expected a positive number"),
        ({"general.alignment": 24}, "general.alignment = 24"),
        ({"llama.embedding_length": 128}, "the config asks for [1216, 128]"),
    ],
)
def test_metadata_that_is_not_built_is_named_by_its_key(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", **changes)
    with pytest.raises(StageError) as raised:
        family_models.parse_and_register(tmp_path / "out", path, "q0f32")
    assert any(wanted in said for said in raised.value.problems), raised.value.problems


def test_another_architecture_is_refused_by_name(copy: Path, tmp_path: Path) -> None:
    put(copy, {place(copy, "general.architecture", 4 + 8): b"gemma"})
    said = problem(copy, tmp_path / "out")
    assert (
        "general.architecture = 'gemma': of GGUF files, the architectures llama, qwen2, qwen3, gemma3, gptneox are"
        in said
    )


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model = 'bert'; of GGUF files, the tokenizers gpt2, llama are read"),
        ({"pre": None}, "tokenizer.ggml.pre is missing: an old converter wrote the file"),
        ({"pre": "unheard-of"}, "tokenizer.ggml.pre = 'unheard-of' is not known"),
        ({"token_type": [1, 2]}, "tokenizer.ggml.token_type has 2 values"),
        ({"merges": ["a b c"]}, "tokenizer.ggml.merges has 'a b c'"),
        ({"model": "llama"}, "tokenizer.ggml.scores has 0 values"),
        ({"tokens": "text"}, "tokenizer.ggml.tokens = 'text'; expected a list of str"),
    ],
)
def test_a_tokenizer_that_is_not_read_is_named_by_its_key(changes: dict[str, Any], wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    gguf_models.write(path, "llama", **{f"tokenizer.ggml.{key}": value for key, value in changes.items()})
    with pytest.raises(TokenizerError) as raised:
        gguf_files.write(path, tmp_path)
    assert wanted in str(raised.value)


@pytest.fixture
def split(tmp_path: Path) -> list[Path]:
    """A model's files as the package splits one, with what is common to all in the first alone."""
    gguf_models.write(tmp_path / "model.gguf", "llama", "Q4_1", split_max_tensors=8)
    return sorted(tmp_path.glob("model-0000?-of-00003.gguf"))


def test_files_that_one_was_split_into_are_one_checkpoint(split: list[Path], tmp_path: Path) -> None:
    """The first names them all: every stage has the same of them as of the whole."""
    import transformers

    gguf_models.write(tmp_path / "whole.gguf", "llama", "Q4_1")
    whole, _ = weights_of(tmp_path / "whole.gguf")
    made = [
        family_models.parse_and_register(tmp_path / path.stem, path, "q4a32")
        for path in (tmp_path / "whole.gguf", split[0])
    ]
    assert made[0]["config"].read_bytes() == made[1]["config"].read_bytes()
    files = list_files(split[0], (), ("*.gguf",))[1]
    assert [*files.values()] == split
    table = read_headers(files).table()
    assert {entry["file"] for entry in table.values()} == {path.name for path in split}
    weights = Weights(files, table)
    folder.write(files, tmp_path)
    theirs = dict(gguf_original.tensors(split, transformers.AutoConfig.from_pretrained(tmp_path)))
    assert theirs.keys() == table.keys()
    for name in table:
        np.testing.assert_array_equal(weights[name], whole[name], err_msg=name)
        np.testing.assert_array_equal(weights[name], theirs[name], err_msg=name)
    choice = {"scheme": "q4a32", "target": "llvm", "checkpoint": str(split[0])}
    ctx = run_stage(Quantize(), tmp_path / "made", choice, {name: made[1][name] for name in ("params", "tensors")})
    lines = json.loads((ctx.out / "report.json").read_text())["tensors"]
    assert not [line["name"] for line in lines if line["rmse"] and "norm" not in line["name"]]


def test_files_of_a_split_model_that_are_missing_or_anothers_are_named(split: list[Path], tmp_path: Path) -> None:
    assert "one of 3 files of a model, of which 1 were found" in problem(split[1], tmp_path / "second")
    kept = split[1].read_bytes()
    split[1].write_bytes(split[2].read_bytes())
    assert f"{split[1].name}: not number 1 of the 3 files" in problem(split[0], tmp_path / "another")
    split[1].unlink()
    assert "of which 2 were found: fetch all of them" in problem(split[0], tmp_path / "missing")
    split[1].write_bytes(kept)
    run_stage(ConfigParse(), tmp_path / "again", {"checkpoint": str(split[0])})


def test_two_files_are_two_checkpoints() -> None:
    """Under this digest a certificate names the checkpoint."""
    digests = [checkpoint_digest({"model.gguf": content * 64}) for content in "ab"]
    assert len({*digests, checkpoint_digest({})}) == 3


def test_what_draws_broken_files_makes_a_sound_one_of_a_sound_document(whole: Path) -> None:
    data = whole.read_bytes()
    assert gguf_documents.put_together(*gguf_documents.taken_apart(data)) == data


def test_planning_reads_the_first_keys_and_imports_nothing_for_it(whole: Path) -> None:
    script = f"""
import sys
from stages.config_parse import ConfigParse
from stages.quantize import Quantize
from stages.tokenizer_bundle import TokenizerBundle
for stage in (ConfigParse(), TokenizerBundle()):
    params = stage.Params(checkpoint={str(whole)!r})
    print(sorted(map(str, stage.rows(params, {{}}).values())), "gguf" in stage.tools(params))
print([name for name in ("numpy", "gguf", "ml_dtypes") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[\"['llama', 'mistral']\"] True",
        "['tokenizer-json', 'tokenizer-json'] False",
        "[]",
    ]
