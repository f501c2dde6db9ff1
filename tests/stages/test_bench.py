"""bench: what it measures, what is in its key, and a bundle that cannot be run here."""

from __future__ import annotations

import json

import pytest

from stages.bench import Bench
from stages.runtime import host, manifest, speed
from stages.runtime.session import Session
from tests.support.local_context import run_stage


def params(**values):
    return Bench.Params(target="llvm", **values)


def test_rates_are_those_of_the_tokens_that_were_read(quantized, tmp_path, monkeypatch):
    clock = iter([0.0, 2.0, 3.0, 10.0, 11.0, 15.0, 20.0, 21.0, 23.0, 30.0, 32.0, 33.0])
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(clock))
    read, told = [], []
    forward = Session._forward

    def counted(self, function, requests, *arguments):
        read.append(sum(len(ids) for ids in requests.values()))
        return forward(self, function, requests, *arguments)

    monkeypatch.setattr(Session, "_forward", counted)
    bundle = manifest.read(quantized.bundle)
    found = speed.measure(Session(bundle), prompt_tokens=20, decode_tokens=8, repeats=3, progress=told.append)
    assert found == {
        "prefill": {"tokens": 20, "rate": 20.0, "lowest": 10.0, "highest": 20.0},
        "decode": {"after": 20, "tokens": 8, "rate": 4.0, "lowest": 2.0, "highest": 8.0},
    }
    assert read == [20, *[1] * 8] * 4
    assert told == [1, 2, 3, 4]


def test_a_short_context_is_filled_and_not_overrun(quantized):
    bundle = manifest.read(quantized.bundle)
    window = bundle.model["context_window"]
    found = speed.measure(Session(bundle), prompt_tokens=10 * window, decode_tokens=10 * window, repeats=1)
    assert found["prefill"]["tokens"] + found["decode"]["tokens"] == window


def test_the_stage_says_speed_and_machine(quantized, tmp_path):
    asked = {"target": "llvm", "prompt_tokens": 16, "decode_tokens": 4, "repeats": 2}
    context = run_stage(Bench(), tmp_path / "out", asked, {"bundle": quantized.bundle})
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["machine"]["name"] == host.cpu_name()
    assert found["prefill"]["tokens"] == 16
    assert found["decode"]["lowest"] <= found["decode"]["rate"] <= found["decode"]["highest"]
    assert context.summary_text.startswith("prefill ")
    for function, steps in (("prefill", 1), ("decode", 4)):
        calls = {each["name"]: each["calls"] for each in found["kernels"][function]}
        own = {name: count for name, count in calls.items() if not name.startswith("vm.builtin.")}
        assert any(name.startswith("linear_") for name in own), "the kernels by the names that compile gives them"
        assert all(count % steps == 0 for count in own.values())
        spent = sum(each["seconds"] for each in found["kernels"][function])
        assert all(each["seconds"] >= 0 for each in found["kernels"][function])
        assert f"| {function} | calls | milliseconds | share |" in context.views["kernels"]
        assert spent > 0


def test_a_bundle_without_its_device_is_not_run(quantized, tmp_path, monkeypatch):
    built = quantized.copy(tmp_path)
    built.edit(lambda document: document.update(target="cuda"))
    monkeypatch.setattr(host, "has_nvidia_driver", lambda: False)
    context = run_stage(Bench(), tmp_path / "out", {"target": "cuda"}, {"bundle": built.bundle})
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["not_run"] == "no NVIDIA driver is loaded"
    assert "decode" not in found
    assert context.summary_text == "not run: no NVIDIA driver is loaded"


@pytest.mark.parametrize(
    ("name", "value"), [("cpu_name", "another"), ("cpu_flags", frozenset({"sse2"})), ("physical_cores", 64)]
)
def test_another_machine_measures_anew(monkeypatch, name, value):
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    before = Bench().tools(params())
    monkeypatch.setattr(host, name, lambda: value)
    assert Bench().tools(params()) != before
    assert Bench.measures


def test_gpus_are_named_by_the_driver(tmp_path):
    (tmp_path / "0000:01:00.0").mkdir()
    (tmp_path / "0000:01:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 1\n")
    assert host.nvidia_devices(tmp_path) == ["NVIDIA H200"]
    assert host.nvidia_devices(tmp_path / "none") == []
