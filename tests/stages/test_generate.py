"""The command: text alone on stdout, one document with --json, exit code 2 for what cannot be served."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages.cli import generate
from stages.runtime import command, manifest
from stages.runtime.session import Session
from stages.runtime.tokenizer import BundleTokenizer
from tests.output_schema import validate

ROOT = Path(__file__).parents[2]


def run(*arguments):
    parser = argparse.ArgumentParser()
    generate.add_arguments(parser)
    out, err = io.StringIO(), io.StringIO()
    code = command.run(parser.parse_args([str(argument) for argument in arguments]), out, err)
    return code, out.getvalue(), err.getvalue()


def test_greedy_text_is_that_of_the_argmax_of_every_step(recorded):
    session, tokenizer = Session(manifest.read(recorded.bundle)), BundleTokenizer(recorded.bundle)
    sequence, ids = session.add(), []
    logits = session.prefill(sequence, tokenizer.encode("every morning"))
    for _ in range(12):
        ids.append(int(logits[: tokenizer.active_vocab_size].argmax()))
        logits = session.decode(sequence, ids[-1])
    code, out, err = run(recorded.bundle, "--prompt", "every morning", "--max-tokens", 12)
    assert (code, out) == (0, tokenizer.decode(ids) + "\n")
    assert "prefill" in err
    assert "tokens/s" in err
    assert "12 tokens; prefill" in err
    assert "decode 11 steps, " in err


def test_one_token_takes_no_decode_step(recorded):
    assert "decode 0 steps; ended by length" in run(recorded.bundle, "--prompt", "every", "--max-tokens", 1)[2]


def test_a_reader_that_leaves_is_no_traceback(recorded):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "stages.runtime", recorded.bundle, "--prompt", "every morning"]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_one_document_with_json(quantized):
    arguments = [quantized.bundle, "--prompt", "every morning", "--json", "--temperature", 1.5, "--max-tokens", 9]
    documents = [json.loads(run(*arguments, "--seed", seed)[1]) for seed in (1, 1, 2)]
    assert documents[0]["ids"] == documents[1]["ids"] != documents[2]["ids"]
    first = documents[0]
    assert (first["generated_tokens"], first["finish"], first["target"], first["device"]) == (
        9,
        "length",
        "llvm",
        "cpu",
    )
    assert first["prefill_tokens_per_second"] > 0
    assert first["decode_tokens_per_second"] > 0
    assert max(first["ids"]) < 508


def test_a_prompt_longer_than_a_chunk_and_a_full_context(quantized):
    document = json.loads(run(quantized.bundle, "--prompt", "e" * 500, "--json", "--max-tokens", 100)[1])
    validate(document, "generate")
    assert document["prompt_tokens"] > 24
    assert document["prompt_tokens"] + document["generated_tokens"] - 1 == 512
    assert document["finish"] == "context"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a\udcff"], "not UTF-8 at character 1"),
        (["--prompt", "e" * 2000], "the context holds 512 tokens"),
        (["--prompt", "a", "--top-p", "2"], "top_p 2.0"),
        (["--prompt", "a", "--max-tokens", "0"], "max_tokens 0"),
        (["--prompt", "a", "--device", "cuda"], "it runs on cpu, not on cuda"),
    ],
)
def test_what_cannot_be_served_is_said_without_a_traceback(quantized, arguments, message):
    code, out, err = run(quantized.bundle, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err


def test_a_damaged_bundle_is_not_loaded(recorded, tmp_path):
    built = recorded.copy(tmp_path)
    (built.bundle / "model.so").write_bytes(b"not a library")
    code, out, err = run(built.bundle, "--prompt", "a")
    assert (code, out) == (2, "")
    assert "model.so: 13 bytes" in err


DEPLOYED = """
import runpy, sys
sys.argv = ["stages.runtime", *sys.argv[1:]]
try:
    runpy.run_module("stages.runtime", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    code = stop.code
import tvm
foreign = {"torch", "transformers", "stagegraph", "yaml", "diskcache", "networkx", "blake3", "tiktoken"}
rooms = {name for name in sys.modules if name.startswith("stages.") and not name.startswith("stages.runtime")}
print(code, tvm.base._RUNTIME_ONLY, sorted(foreign & set(sys.modules)), sorted(rooms), file=sys.stderr)
"""


def test_the_folder_alone_runs_a_bundle_without_compiler_or_torch(recorded, tmp_path):
    shutil.copytree(ROOT / "stages" / "runtime", tmp_path / "stages" / "runtime")
    shutil.copy(ROOT / "stages" / "__init__.py", tmp_path / "stages")
    done = subprocess.run(
        [sys.executable, "-c", DEPLOYED, recorded.bundle, "--prompt", "every morning", "--max-tokens", "5"],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith(("TVM_", "PYTHON"))},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == run(recorded.bundle, "--prompt", "every morning", "--max-tokens", 5)[1]
    assert done.stderr.splitlines()[-1] == "0 True [] []"
