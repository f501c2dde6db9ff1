"""Every family through the whole pipeline as a user runs it: a checkpoint as transformers writes it, with a tokenizer
of the family's kind, to a bundle that verify holds against transformers.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from stagegraph.files import dotted
from stagegraph.stage import StageError
from stages import profiles
from tests.support import bundles, family_models, gguf_models, rwkv_models, traced_models
from tests.support.checkpoints import write_qwen
from tests.support.edited_project import ROOT, Project
from tests.support.tokenizer_folders import FOLDERS, SIZE, write_folder

OVERLAY = f"""\
extends: {ROOT}/pipeline.yaml
name: tiny-qwen
vars: {{targets: [llvm], checkpoint: %(checkpoint)s, context_window: 0, scheme: %(scheme)s}}
stages:
  graph-build: {{with: {{prefill_chunk: 48, sep_embed: %(sep_embed)s}}}}
  verify: {{with: {{reference: live, probe_tokens: 256, max_kl: 100, min_top1: 0, max_ppl_ratio: 100}}}}
"""
ROWS = SIZE + 35  # of the embedding: some without a token, and no multiple of anything
NODES = 12


@dataclass(frozen=True)
class Model:
    """The folder of :data:`FOLDERS` whose tokenizer is the family's kind, and what is built."""

    tokenizer: str
    scheme: str = "q4f32_1"
    sep_embed: str = "true"
    checkpoint: str = "checkpoint"


MODELS = {
    "llama": Model("llama3 model"),
    "llama-tied": Model("digits", sep_embed="false"),
    "mistral": Model("llama3 tables"),
    "mistral-full": Model("llama3 tables", "q0f16"),
    "qwen": Model("tiktoken", "q4f16_1"),
    "qwen2": Model("qwen2 vocab", "q4f16_1"),
    "qwen3": Model("qwen2 tables"),
    "gpt_neox": Model("neox", "q0f32"),
    "redpajama": Model("neox"),
    "rwkv": Model("rwkv world"),
    "gguf": Model("its own", "q4a32", checkpoint="checkpoint/model.gguf"),
}
# Traced: experts that are stored one by one, or together; projections in one tensor, transposed, or shared by layers;
# states beside the cache, or instead of it; sinks.
TRACED = {
    "qwen3_moe": "q8f16_1",
    "mixtral": "q4f16_1",
    "granitemoe": "q4f16_1",
    "gpt_oss": "q0f32",
    "deepseek_v3": "q0f32",
    "phi3": "q4k",
    "gpt2": "q8f16_1",
    "falcon": "q4f16_1",
    "gemma3n_text": "q0f32",
    "lfm2": "q4k",
    "qwen3_next": "q0f32",
    "bamba": "q4f16_1",
    "mamba2": "q0f32",
}
MODELS |= {
    name: Model("sentencepiece" if name.startswith("gemma") else "qwen2 tables", scheme)
    for name, scheme in TRACED.items()
}
QUICK = ("llama", "rwkv", "gguf")  # a prefix before every text; a recurrent state; files that are made of one


def write_checkpoint(folder: Path, name: str) -> None:
    """Write model and tokenizer of :data:`MODELS`; transformers lacks Qwen's first generation alone."""
    if name == "qwen":
        write_qwen(folder)
        return
    if name == "gguf":
        folder.mkdir()
        gguf_models.write(folder / "model.gguf", "llama", "Q4_1")
        return
    files, _, eos = FOLDERS[MODELS[name].tokenizer]
    control = {"bos_token_id": SIZE if "llama3" in MODELS[name].tokenizer else eos, "eos_token_id": eos}
    write_folder(folder, files)
    if name == "rwkv":
        rwkv_models.write_checkpoint(folder, vocab_size=ROWS, context_length=128, **control)
    elif name in TRACED:
        tables = {"vocab_size_per_layer_input": ROWS} if name == "gemma3n_text" else {}
        traced_models.write(folder, name, vocab_size=ROWS, **control, **tables)
    else:
        case = family_models.CASES[name]
        family_models.write(folder, dataclasses.replace(case, config={**case.config, "vocab_size": ROWS, **control}))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Project]:
    """Run the pipeline on a model of :data:`MODELS`, once; nothing may fail."""

    @functools.cache
    def run(name: str) -> Project:
        project = Project(tmp_path_factory.mktemp(name))
        write_checkpoint(project.checkpoint, name)
        (project.folder / "overlay.yaml").write_text(OVERLAY % dataclasses.asdict(MODELS[name]))
        outcomes = project.run()
        assert {node["outcome"] for node in outcomes.values()} == {"BUILT"}
        assert len(outcomes) == NODES
        return project

    return run


def node(project: Project, name: str) -> Path:
    return project.folder / "artifacts" / "tiny-qwen" / dotted(name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS]
)
def test_a_checkpoint_becomes_a_verified_bundle(finished: Callable[[str], Project], name: str) -> None:
    project = finished(name)
    report = json.loads((node(project, "verify[llvm]") / "verify.json").read_text())
    assert (report["verdict"], report["reference"]["kind"]) == ("verified", "live")
    checked = {check["name"]: check["ok"] for check in report["checks"]}
    assert {"weights", "tokenizer against the source vocabulary", "every step", "two sequences at once"} <= set(checked)
    assert sum(check.startswith("greedy text") for check in checked) == 2
    assert all(checked.values())
    said = json.loads(
        project("generate", str(node(project, "bundle[llvm]") / "bundle"), "--prompt", "It", "--json").stdout
    )
    assert said["decode_tokens_per_second"] > 0


@pytest.mark.slow
def test_a_bundle_that_forgets_what_goes_before_a_text_is_found(
    finished: Callable[[str], Project], tmp_path: Path
) -> None:
    """Negative control: every id of a text is right, and the one before them is missing."""
    profiles.compiler()  # verify would load the runtime alone, and other tests of this process compile
    project = finished("llama")
    built = bundles.Built(
        folder=project.folder,
        checkpoint=project.checkpoint,
        scheme=MODELS["llama"].scheme,
        config=node(project, "config-parse") / "model.json",
        params=node(project, "param-register[llvm]") / "params.json",
        report=node(project, "quantize[llvm]") / "report.json",
        bundle=node(project, "bundle[llvm]") / "bundle",
    ).copy(tmp_path)
    path = built.bundle / "tokenizer_info.json"
    info = json.loads(path.read_text())
    assert info["prefix"] == [SIZE]
    path.write_text(json.dumps({**info, "prefix": []}))
    built.sign()
    with pytest.raises(StageError, match="tokenizer against the source vocabulary: ids differ"):
        bundles.verify(built, tmp_path / "verify", reference="none")
