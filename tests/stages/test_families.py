"""Every family's bundle, run by the runtime alone, against transformers on the same weights."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stages import profiles
from stages.codegen import views
from stages.config_parse import ConfigParse
from stages.models import load_family
from stages.runtime import manifest, tensor_cache
from stages.runtime.errors import RequestError
from stages.targets import toolchain
from stages.targets.cuda import fatbin
from stages.targets.cuda.fatbin import FatbinEntry
from tests.support import family_models
from tests.support.bytes_cache import in_bytes
from tests.support.compiled_qwen import Registered, build_graphs, compile_library
from tests.support.family_models import BATCH, CASES, CHUNK, ODD_VOCAB, Built, error
from tests.support.local_context import run_stage

LIMIT = CASES["llama"].config["max_position_embeddings"]
IDS = [int(token) for token in np.random.default_rng(5).integers(3, ODD_VOCAB, LIMIT)]
OTHER = [int(token) for token in np.random.default_rng(6).integers(3, ODD_VOCAB, LIMIT)]
TOLERANCES = {"q0f32": 1e-3, "q4f32_1": 2e-3, "q4f16_1": 2e-2}
STEPS = 32
# What follows needs a library each; those that differ little from others wait for `-m slow`.
SLOW = ("mistral-full", "mistral-24", "llama-tied")
QUICK = {("q4f32_1", "llama"), *(("q0f32", name) for name in CASES if name not in SLOW)}


def quick(*values: Any) -> Any:
    """Return a test's parameters, of which the first is a case: slow ones wait for ``-m slow``."""
    return pytest.param(*values, marks=[pytest.mark.slow] if values[0] in SLOW else [])


BUILDS = [
    pytest.param(name, scheme, marks=[] if (scheme, name) in QUICK else pytest.mark.slow, id=f"{name}-{scheme}")
    for scheme in TOLERANCES
    for name in CASES
]


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    @functools.cache
    def build(name: str, scheme: str) -> Built:
        return family_models.build(tmp_path_factory.mktemp(name), CASES[name], scheme)

    return build


@pytest.fixture(scope="session")
def expected(built: Callable[..., Built]) -> Callable[..., np.ndarray]:
    @functools.cache
    def compute(name: str, scheme: str, ids: tuple[int, ...]) -> np.ndarray:
        return built(name, scheme).reference(ids)

    return compute


def within(scheme: str, found: list[np.ndarray], wanted: list[np.ndarray]) -> None:
    errors = [error(have, want) for have, want in zip(found, wanted, strict=True)]
    assert max(errors) <= TOLERANCES[scheme], errors


@pytest.mark.parametrize(("name", "scheme"), BUILDS)
def test_prompts_of_any_length_then_decoding(built, expected, name, scheme):
    logits = expected(name, scheme, tuple(IDS))
    session = built(name, scheme).session()
    for length in (1, 7, 64, session.prefill_chunk + 1):
        sequence = session.add()
        found = [session.prefill(sequence, IDS[:length])]
        found += [session.decode(sequence, IDS[i]) for i in range(length, length + STEPS)]
        within(scheme, found, list(logits[length - 1 : length + STEPS]))
        session.remove(sequence)


@pytest.mark.parametrize(("name", "scheme"), BUILDS)
def test_two_sequences_taken_back_and_read_on(built, expected, name, scheme):
    first, second = expected(name, scheme, tuple(IDS)), expected(name, scheme, tuple(OTHER))
    session = built(name, scheme).session(BATCH)
    a, b = session.add(), session.add()
    sizes = 11, 5  # together below every chunk, also those shorter than a sliding window
    within(scheme, list(session.batch_prefill({a: IDS[: sizes[0]], b: OTHER[: sizes[1]]})), [first[10], second[4]])
    for step in range(20):
        at = [size + step for size in sizes]
        found = session.batch_decode({a: IDS[at[0]], b: OTHER[at[1]]})
        within(scheme, list(found), [first[at[0]], second[at[1]]])
    within(scheme, list(session.batch_prefill({a: IDS[31:40], b: OTHER[25:32]})), [first[39], second[31]])
    for count in (3, 30):
        session.popn(a, count)
        held = session.length(a)
        within(scheme, [session.prefill(a, IDS[held : held + 9])], [first[held + 8]])
        held = session.length(a)
        within(scheme, [session.decode(a, IDS[held])], [first[held]])
    within(scheme, [session.prefill(b, OTHER[32:])], [second[-1]])


# Windows of 20 tokens, where pages have 16.
WINDOWED = (quick("mistral"), quick("mistral-24"), quick("qwen2-window"))


class Forks:
    """Sequences of a session that the library forks, each with the ids that it holds."""

    def __init__(self, built: Built) -> None:
        self.built = built
        self.session = built.session(BATCH)
        self.ids = {self.session.add(): []}

    def fork(self, parent: int, at: int) -> int:
        child = max(self.ids) + 1
        self.session._call("fork_sequence", parent, child, at)
        self.ids[child] = self.ids[parent][: at if at >= 0 else None]
        self.session._lengths[child] = self.session._reach[child] = len(self.ids[child])
        return child

    def pop(self, sequence: int, count: int) -> None:
        self.session.popn(sequence, count)
        del self.ids[sequence][-count:]

    def read(self, parts: dict[int, list[int]]) -> None:
        """Read in one batch, and compare with what transformers says of each sequence alone."""
        for sequence, ids in parts.items():
            self.ids[sequence] = self.ids[sequence] + ids
        if all(len(ids) == 1 for ids in parts.values()):
            found = self.session.batch_decode({sequence: ids[0] for sequence, ids in parts.items()})
        else:
            found = self.session.batch_prefill(parts)
        within("q0f32", list(found), [self.wanted(self.ids[sequence]) for sequence in parts])

    def wanted(self, ids: list[int]) -> np.ndarray:
        """Return what follows ``ids`` where they begin the longest sequence: longrope is of that one."""
        return self.built.reference([*ids, *[5] * (LIMIT - len(ids))])[len(ids) - 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mistral", "qwen2-window"])
def test_a_cache_in_bytes_loses_what_rounding_keys_and_values_does(tmp_path, monkeypatch, name):
    """In chunks, decoding beyond windows, and behind a fork; a code that falls between two may go either way."""
    library = family_models.build(tmp_path, CASES[name], "q0f32", kv_dtype="int8")
    exact = library.reference(IDS)
    in_bytes(monkeypatch, json.loads((library.checkpoint / "config.json").read_text())["model_type"])
    wanted = library.reference(IDS)
    session = library.session(BATCH)
    sequence = session.add()
    found = [session.prefill(sequence, IDS[:17]), session.prefill(sequence, IDS[17:41])]
    found += [session.decode(sequence, token) for token in IDS[41:]]
    child = session.fork(sequence, 50)
    found += [session.decode(child, token) for token in IDS[50:60]]
    rows = [16, 40, *range(41, LIMIT), *range(50, 60)]
    assert error(np.stack(found), wanted[rows]) < error(wanted[rows], exact[rows]) / 10


@pytest.mark.parametrize("name", ["llama", *WINDOWED])
@pytest.mark.parametrize("at", [3, 16, 21, 32, 41, 48, 50, -1])
def test_parent_and_child_of_a_fork_are_as_if_each_were_alone(built, name, at):
    """Wherever it is forked: within a page and between two, near the beginning and farther back than a window."""
    forks = Forks(built(name, "q0f32"))
    (parent,) = forks.ids
    for start in range(0, 51, 17):
        forks.read({parent: IDS[start : start + 17]})
    child = forks.fork(parent, at)
    for step in range(3):
        forks.read({parent: [IDS[60 + step]], child: [OTHER[step]]})
    # Chunks of different lengths: their common beginning is one block for the kernels, their positions lie apart.
    forks.read({child: OTHER[10:18], parent: IDS[70:73]})
    forks.read({parent: [IDS[80]]})
    forks.read({child: OTHER[20:39]})
    forks.read({parent: IDS[81:89], child: [OTHER[40]]})
    forks.read({child: [OTHER[41]], parent: [IDS[90]]})


@pytest.mark.parametrize("name", ["llama", *WINDOWED])
def test_forks_of_forks_and_what_is_taken_back_of_them(built, name):
    """Beyond two blocks TVM's cache lays the later ones together."""
    forks = Forks(built(name, "q0f32"))
    (first,) = forks.ids
    forks.read({first: IDS[:16]})
    forks.read({first: IDS[16:27]})
    second = forks.fork(first, 16)
    forks.read({second: OTHER[:18]})
    third = forks.fork(second, -1)
    forks.read({third: IDS[40:57]})
    fourth = forks.fork(third, 33)
    forks.read({first: IDS[60:63], third: IDS[65:66]})
    forks.read({fourth: IDS[66:72], second: IDS[63:65]})
    for step in range(2):
        for pair in ((first, fourth), (third, second)):
            forks.read({sequence: [OTHER[70 + step + sequence]] for sequence in pair})
    forks.pop(third, 19)  # into what it has in common with the second
    forks.pop(fourth, 5)
    forks.session.remove(second)
    for step in range(21):
        forks.read({sequence: [OTHER[80 + step + sequence]] for sequence in (third, fourth)})
    forks.read({fourth: IDS[90:97], third: [7]})


def test_a_tree_of_tokens_that_branches_is_refused(built, expected):
    """TVM's runtime calls its kernel of trees for processors, which knows no layout of ours, otherwise than it is."""
    session = built("llama", "q0f32").session()
    tvm, vm, shape = session._tvm, session._vm, session._tvm.runtime.ShapeTuple
    call, ends = tvm.get_global_func, session._tensor(np.arange(3, dtype=np.int32))
    sequence, states = session.add(), session._states(IDS[5:8], (1, 3))
    session.prefill(sequence, IDS[:5])

    def forward(parents):
        call("vm.builtin.kv_state_begin_forward")(session._state.objects[0], *map(shape, ([sequence], [3], parents)))
        return vm["batch_prefill"](states, ends, session._state.objects[0], session._params)[0].numpy()[0]

    logits = expected("llama", "q0f32", tuple(IDS))
    within("q0f32", [forward([-1, 0, 1])], [logits[5:8]])  # a chain is no tree
    call("vm.builtin.kv_state_end_forward")(session._state.objects[0])
    with pytest.raises(TypeError, match=r"Expected 1[46] arguments when calling"):
        forward([-1, 0, 0])


@pytest.mark.parametrize("name", [name for name in CASES if ("q0f32", name) in QUICK])
def test_the_context_to_its_last_token_and_not_one_more(built, expected, name):
    logits = expected(name, "q0f32", tuple(IDS))
    session = built(name, "q0f32").session()
    sequence = session.add()
    with pytest.raises(RequestError, match=f"the context holds {LIMIT} tokens: 0 are in use, {LIMIT + 1} more"):
        session.prefill(sequence, [*IDS, IDS[0]])
    within("q0f32", [session.prefill(sequence, IDS[:-1]), session.decode(sequence, IDS[-1])], list(logits[-2:]))
    with pytest.raises(RequestError, match=f"the context holds {LIMIT} tokens: {LIMIT} are in use, 1 more"):
        session.decode(sequence, IDS[0])


@pytest.mark.parametrize("name", ["llama", quick("mistral-24"), "redpajama"])
def test_the_library_itself_refuses_a_position_outside_its_context(built, expected, name):
    """Whichever function reads it, with a bound of the context on any count of tokens out of the way."""
    logits = expected(name, "q0f32", tuple(IDS))
    session = built(name, "q0f32").session(BATCH)
    whole, other = session.add(), session.add()
    session.prefill(whole, IDS[:-1])
    within("q0f32", [session.decode(whole, IDS[-1])], [logits[-1]])
    session._state = dataclasses.replace(session._state, limit=None)
    calls = (
        lambda: session.decode(whole, 7),
        lambda: session.prefill(whole, [7]),
        lambda: session.prefill(whole, [7, 8, 9]),
        lambda: session.batch_prefill({other: [7, 8, 9], whole: [7]}),
        lambda: session.batch_decode({other: 7, whole: 8}),
    )
    for call in calls:
        with pytest.raises(ValueError, match=f"position {LIMIT} or later: the library was built for .* most {LIMIT} "):
            call()


def test_chunks_are_shorter_than_the_window_where_the_context_is_not(built):
    window = CASES["mistral"].config["sliding_window"]
    assert built("mistral", "q0f32").session().prefill_chunk == window - 1
    assert built("llama", "q0f32").session().prefill_chunk == CHUNK


@pytest.mark.parametrize("name", [name for name in CASES if ("q0f32", name) in QUICK])
def test_verify_is_given_the_same_model_as_transformers_reads(built, expected, name):
    """The family's words for transformers, without the checkpoint's config.json."""
    import torch
    import transformers

    library = built(name, "q0f32")
    described = json.loads(library.config.read_text())
    family = load_family(described["family"])
    class_name, keywords, state = family.to_reference(family.config(**described["config"]), library.held)
    cls = getattr(transformers, class_name)
    model = cls(cls.config_class(**keywords, attn_implementation="eager")).float().eval()
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in state.items()}, strict=True)
    with torch.inference_mode():
        logits = model(torch.tensor([IDS])).logits[0].numpy()
    assert error(logits, expected(name, "q0f32", tuple(IDS))) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(toolchain.toolkit() is None, reason="no CUDA toolkit on this machine")
@pytest.mark.parametrize("name", [name for name in CASES if name not in ("mistral", "mistral-24")])
def test_a_cuda_library_holds_device_code(tmp_path, name):
    profiles.compiler()
    checkpoint = family_models.write(tmp_path / "checkpoint", CASES[name])
    ports = family_models.parse_and_register(tmp_path, checkpoint, "q4f16_1", "cuda")
    registered = Registered(ports["config"], ports["params"])
    graphs = build_graphs(tmp_path, registered, "cuda", prefill_chunk=CHUNK, max_batch=BATCH, **CASES[name].options)
    context = compile_library(tmp_path / "compile", graphs, registered, target="cuda", archs=(80, 90))
    expected = [FatbinEntry(80, "elf"), FatbinEntry(90, "elf"), FatbinEntry(90, "ptx")]
    assert fatbin.entries(context.out / "model.so") == expected
    metadata = json.loads((context.out / "metadata.json").read_text())
    assert any(kernel.startswith("batch_prefill_paged_kv_") for kernel in metadata["kernels"])
    assert metadata["model"]["compute_dtype"] == "float16"


@pytest.mark.slow
def test_ids_and_embeddings_give_equal_logits(built, tmp_path):
    """``llama-tied`` embeds inside prefill and decode; the same model with embed apart."""
    inside = built("llama-tied", "q0f32")
    apart = family_models.build(tmp_path, CASES["llama-tied"], "q0f32", checkpoint=inside.checkpoint, sep_embed=True)
    rows = []
    for library in (inside, apart):
        session = library.session()
        sequence = session.add()
        rows.append([session.prefill(sequence, IDS[:20]), session.decode(sequence, IDS[20])])
    assert np.abs(np.array(rows[0]) - np.array(rows[1])).max() < 1e-6


def _swapped(first: str, second: str) -> Callable[[dict[str, Any]], None]:
    def change(tensors: dict[str, Any]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda tensors: tensors.update({name: np.zeros_like(tensors[name])})


def _heads_swapped(tensors: dict[str, Any]) -> None:
    """Exchange q and k of every head of a fused projection that goes head by head."""
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    heads = CASES["gpt_neox"].config["num_attention_heads"]
    split = tensors[name].reshape(heads, 3, -1, tensors[name].shape[1])
    tensors[name] = split[:, [1, 0, 2]].reshape(tensors[name].shape)


BLOCK = "model.layers.1"
MISTAKES = [
    ("gpt_neox", _heads_swapped),
    ("qwen3", _swapped(f"{BLOCK}.self_attn.q_norm.weight", f"{BLOCK}.self_attn.k_norm.weight")),
    ("mistral", _swapped(f"{BLOCK}.mlp.gate_proj.weight", f"{BLOCK}.mlp.up_proj.weight")),
    ("llama", _without(f"{BLOCK}.self_attn.v_proj.bias")),
    ("llama", _without(f"{BLOCK}.mlp.down_proj.bias")),
    ("qwen2", _without(f"{BLOCK}.self_attn.q_proj.bias")),
    ("gpt_neox", _without("gpt_neox.layers.1.attention.dense.bias")),
    ("redpajama", _without("gpt_neox.final_layer_norm.bias")),
]


@pytest.mark.parametrize(("name", "mistake"), MISTAKES)
def test_a_weight_out_of_place_is_seen(built, expected, name, mistake):
    """Negative control: with a mistake in either of the two models, here the reference, they must differ."""
    library = built(name, "q0f32")
    wrong = dict(library.held)
    assert error(library.reference(IDS, wrong), expected(name, "q0f32", tuple(IDS))) < 1e-6
    mistake(wrong)
    assert differs(library, library.reference(IDS, wrong))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama", {"rms_norm_eps": 1e-2}),
        ("gpt_neox", {"layer_norm_eps": 3e-2}),
        ("qwen3", {"rope_parameters": family_models.theta(1e4)}),
        ("llama", {"rope_parameters": {**family_models.LLAMA3, "factor": 4.0}}),
        ("qwen2", {"rope_parameters": {**family_models.YARN, "beta_slow": 0.1}}),
        ("qwen2", {"rope_parameters": {**family_models.YARN, "attention_factor": 1.0}}),
        quick("mistral-24", {"rope_parameters": {**family_models.YARN, "attention_factor": 1.31}}),
        ("redpajama", {"rope_parameters": {**family_models.DYNAMIC, "factor": 4.5, "partial_rotary_factor": 1.0}}),
        (
            "mistral",
            {
                "rope_parameters": {
                    **family_models.longrope(16),
                    "long_factor": family_models.longrope(16)["short_factor"],
                }
            },
        ),
        ("mistral", {"rope_parameters": {**family_models.longrope(16), "factor": 8.0}}),
        quick("llama-tied", {"rope_parameters": family_models.theta(1000.0)}),
        ("gpt_neox", {"rope_parameters": family_models.theta(1e4, partial_rotary_factor=0.5)}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("redpajama", {"hidden_act": "relu"}),
        ("mistral", {"sliding_window": 21}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_an_option_read_wrongly_is_seen(built, tmp_path, name, change):
    """Negative control: the reference is given the mistake in its config."""
    library = built(name, "q0f32")
    for path in library.checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((library.checkpoint / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    wrong = Built(tmp_path, library.scheme, library.config, library.params, library.bundle)
    assert differs(library, wrong.reference(IDS))


def differs(library: Built, logits: np.ndarray) -> bool:
    session = library.session()
    sequence = session.add()
    found = [session.prefill(sequence, IDS[:64])] + [session.decode(sequence, IDS[i]) for i in range(64, 68)]
    return max(error(have, want) for have, want in zip(found, logits[63:68], strict=True)) > TOLERANCES["q0f32"]


CACHE_SIZES = """
import sys, tvm
from tvm import relax

def reserved():
    return int(open("/proc/self/statm").read().split()[0]) * 4096

vm = relax.VirtualMachine(tvm.runtime.load_module(sys.argv[1]), tvm.cpu())
shape, kept, sizes = tvm.runtime.ShapeTuple, [], []
for tokens in (100_000, 300_000):
    before = reserved()
    kept.append(vm["create_tir_paged_kv_cache"](*(shape([size]) for size in (1, tokens, 16, 16, 0))))
    sizes.append(reserved() - before)
print((sizes[1] - sizes[0]) / 200_000)
"""


@pytest.mark.parametrize("name", ["gpt_neox", "mistral"])
def test_the_memory_that_compile_promises_is_what_the_runtime_takes(built, name):
    library = built(name, "q0f32")
    metadata = json.loads((library.bundle.parents[1] / "compile" / "metadata.json").read_text())
    per_token = metadata["model"]["cache_bytes_per_token"]
    command = [sys.executable, "-c", CACHE_SIZES, str(library.bundle / "model.so")]
    measured = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert abs(measured / per_token - 1) < 0.01
    records = tensor_cache.records(manifest.read(library.bundle).folder)
    weights = sum(record.load().nbytes for record in records.values())
    table = views.memory(metadata)
    assert f"| weights | {weights:,} |" in table
    assert f"| KV cache, one sequence of {LIMIT} tokens | {per_token * LIMIT:,} |" in table


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama-tied", 0.25),
        *(
            pytest.param(*row, marks=pytest.mark.slow)
            for row in [("llama-tied", 0.0), ("gpt_neox-tied", 0.0), ("gpt_neox-tied", 0.25)]
        ),
    ],
)
def test_a_head_stored_beside_a_tied_embedding_is_what_transformers_makes_of_it(tmp_path, name, change):
    """Equal to the embedding it is the embedding; another is a head of its own, whatever config.json says."""
    from safetensors.numpy import load_file, save_file

    case = CASES["gpt_neox" if name == "gpt_neox-tied" else name]
    tied = dataclasses.replace(case, config={**case.config, "tie_word_embeddings": True})
    checkpoint = family_models.write(tmp_path / "checkpoint", tied)
    head, table = ("lm_head.weight", "model.embed_tokens.weight")
    if name == "gpt_neox-tied":
        head, table = "embed_out.weight", "gpt_neox.embed_in.weight"
    tensors = {key: value for path in checkpoint.glob("*.safetensors") for key, value in load_file(path).items()}
    assert head not in tensors
    tensors[head] = tensors[table] + np.float32(change) * np.sign(tensors[table])
    for path in checkpoint.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    context = run_stage(ConfigParse(), tmp_path / "parse", {"checkpoint": str(checkpoint)})
    assert [head in warning for warning in context.warnings] == ([True] if change else [])
    library = family_models.build(tmp_path / "build", tied, "q0f32", checkpoint=checkpoint)
    assert json.loads(library.config.read_text())["config"]["tied"] is (not change)
    session = library.session()
    within("q0f32", [session.prefill(session.add(), IDS[:20])], [library.reference(IDS[:20])[-1]])
