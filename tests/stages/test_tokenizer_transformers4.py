"""What is emitted, loaded unchanged by the previous generation of transformers, in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import unicodedata

import pytest

from stages.tokenizers import load_tokenizer_family
from stages.tokenizers.proof.equality import sample_corpus
from stages.tokenizers.resolution import resolve
from tests.support.tiny_tokenizers import QWEN_CONFIG, SPECIALS, tiktoken_text, tiny_ranks
from tests.support.tokenizer_folders import FOLDERS, SIZE, build

PYTHON = os.environ.get("STAGEGRAPH_TRANSFORMERS4")
QWEN = {"qwen.tiktoken": tiktoken_text(tiny_ranks()), "tokenizer_config.json": QWEN_CONFIG}
# RWKV World has no class in transformers.
NAMES = ["qwen", *(name for name in FOLDERS if name != "rwkv world")]
LOAD = """
import json, sys, transformers
from transformers import AutoTokenizer
directory, texts = json.load(sys.stdin)
loaded = AutoTokenizer.from_pretrained(directory)
print(json.dumps({
    "version": transformers.__version__,
    "class": type(loaded).__name__,
    "ids": [loaded(text)["input_ids"] for text in texts],
    "again": [loaded.decode(loaded(text, add_special_tokens=False)["input_ids"]) for text in texts],
    "roles": {role: getattr(loaded, f"{role}_token_id") for role in ("bos", "eos", "pad")},
    "template": loaded.chat_template,
    "longest": loaded.model_max_length,
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="STAGEGRAPH_TRANSFORMERS4 names no Python that has transformers 4")
@pytest.mark.parametrize("name", NAMES)
def test_transformers_4_loads_what_is_emitted_and_agrees(tmp_path, name):
    if name == "qwen":
        _, directory = build(tmp_path, QWEN, "qwen", SIZE, rows=SIZE + SPECIALS + 16, chat_format="chatml")
    else:
        _, directory = build(tmp_path, *FOLDERS[name])
    checkpoint = tmp_path / "checkpoint"
    resolution = resolve(checkpoint, {path.name: path for path in checkpoint.iterdir()})
    reference = load_tokenizer_family(resolution.family).reference(resolution)
    info, config = (json.loads((directory / f"tokenizer_{part}.json").read_bytes()) for part in ("info", "config"))
    # In the form that tokenizer_info.json asks for; the file's own normalizer has older tables.
    form = info["normalize"]
    texts = [unicodedata.normalize(form, text) if form else text for _, text in sample_corpus()]
    done = subprocess.run(
        [str(PYTHON), "-c", LOAD],
        input=json.dumps([str(directory), texts]),
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["version"].startswith("4.")
    assert found["class"] == "PreTrainedTokenizerFast"
    assert found["roles"] == {"bos": info["bos"], "eos": info["eos"][0], "pad": info["pad"]}
    assert (found["template"], found["longest"]) == (config.get("chat_template"), 512)
    for text, ids, again in zip(texts, found["ids"], found["again"], strict=True):
        assert ids == [*reference.prefix, *reference.encode(text, specials=True)]
        assert again == reference.decode(reference.encode(text, specials=True))
