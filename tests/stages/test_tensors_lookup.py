"""What a parameter is made of and what a checkpoint tensor becomes, followed both ways."""

from __future__ import annotations

import json

import pytest

from stages.inspection import tensors
from stages.models import transforms
from stages.quantization.rows import Row
from tests.support import family_models
from tests.support.output_schema import validate


@pytest.fixture(scope="module", params=["llama-tied", "gpt_neox", "qwen3"])
def documents(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = family_models.write(folder / "checkpoint", family_models.CASES[request.param])
    ports = family_models.parse_and_register(folder, checkpoint, "q4f16_1")
    return {port: json.loads(ports[port].read_text()) for port in ("params", "tensors")}


def test_every_transform_is_said_in_words():
    assert set(tensors.HOW) == set(transforms.TRANSFORMS)


def test_both_ways_agree_about_every_tensor(documents):
    packed = [entry["name"] for entry in documents["params"]["params"]]
    seen = []
    for name in documents["tensors"]["tensors"]:
        found = tensors.find(documents, name)["checkpoint"]
        (parameter,) = found["feeds"]
        assert tensors.find(documents, parameter["name"])["parameter"] == parameter
        (source,) = [source for source in parameter["sources"] if source["name"] == name]
        assert {key: source[key] for key in ("dtype", "shape", "file")} == documents["tensors"]["tensors"][name]
        assert {key: found[key] for key in ("dtype", "shape", "file")} == documents["tensors"]["tensors"][name]
        for part in parameter["stored"]:
            assert packed[part["place"]] == part["name"]
            assert tensors.find(documents, part["name"])["parameter"] == parameter
            seen.append(part["name"])
        ends = [source["rows"] for source in parameter["sources"] if "rows" in source]
        assert not ends or [0, *(end for _, end in ends)] == [*(start for start, _ in ends), parameter["shape"][0]]
        assert name in tensors.page(tensors.find(documents, name))
    assert set(seen) == set(packed)
    assert set(documents["tensors"]["tensors"]) | set(packed) <= tensors.names(documents)


def test_rows_and_scheme_are_told():
    params = {
        "scheme": "q4f16_1",
        "params": [
            {"name": "qk.q_weight", "dtype": "uint32", "shape": [6, 4]},
            {"name": "qk.q_scale", "dtype": "float16", "shape": [6, 1]},
        ],
        "logical": [{
            "name": "qk.weight", "shape": [6, 32], "kind": "linear", "sources": ["q", "k"],
            "source_shapes": [[4, 32], [2, 32]], "transform": "concat0", "dtype": "float16",
            "quantize": Row("group", 4, 32, "float16").document(),
            "stored": ["qk.q_weight", "qk.q_scale"],
        }],
    }  # fmt: skip
    headers = {"k": {"dtype": "BF16", "shape": [2, 32], "file": "m.safetensors"}}
    buffer = {"inv_freq": {"dtype": "F32", "shape": [16], "file": "m.safetensors"}}
    documents = {
        "params": params,
        "tensors": {"tensors": {**headers, **buffer}, "unused": {"inv_freq": "the model derives it"}},
    }
    assert tensors.page(tensors.find(documents, "qk.weight")).splitlines() == [
        "parameter qk.weight [6, 32], linear",
        "  stored, quantized as 4 bits/32 float16, as",
        "    qk.q_weight  uint32 [6, 4], packed at 0",
        "    qk.q_scale  float16 [6, 1], packed at 1",
        "  made, concat0 (one under the other), of",
        "    q  [4, 32], rows 0 to 3",
        "    k  BF16 [2, 32] in m.safetensors, rows 4 to 5",
    ]
    assert tensors.page(tensors.find(documents, "k")).splitlines() == [
        "checkpoint tensor k  BF16 [2, 32] in m.safetensors",
        "  feeds qk.weight [6, 32], rows 4 to 5, concat0 (one under the other)",
        "    stored as qk.q_weight, qk.q_scale",
    ]
    assert "feeds no parameter: the model derives it" in tensors.page(tensors.find(documents, "inv_freq"))
    for name in ("qk.weight", "k", "inv_freq"):
        validate({"param-register": tensors.find(documents, name)}, "tensor")
    assert tensors.find(documents, "v") is None
    without = {"params": params}
    assert tensors.find(without, "k")["checkpoint"]["shape"] == [2, 32]
    assert "inv_freq" not in tensors.names(without)
