"""What ``pipeline diff`` says of graphs, libraries and tokenizers."""

from __future__ import annotations

import json

from stages.inspection import compare


def files(folder, name, documents):
    found = {}
    for path, document in documents.items():
        file = folder / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document))
        found[path] = file
    return found


def structure(calls, kernels, **others):
    return {compare.STRUCTURE: {"schema": 1, "functions": {"decode": calls, **others}, "kernels": kernels}}


def test_graphs_by_call_and_kernel(tmp_path):
    a = files(tmp_path, "a", structure(["matmul(f[1]) -> f[2]", "add(f[2]) -> f[2]"], {"deq": "1", "old": "2"}))
    b = files(
        tmp_path, "b", structure(["matmul(f[1]) -> f[4]", "add(f[2]) -> f[2]", "silu"], {"deq": "3"}, embed=["take"])
    )
    assert compare.graphs(a, a) == []
    assert compare.graphs(a, b) == [
        ("embed", "-", "1 calls"),
        ("decode, call 0", "matmul(f[1]) -> f[2]", "matmul(f[1]) -> f[4]"),
        ("decode, call 2", "", "silu"),
        ("kernel deq", "1", "3"),
        ("kernel old", "2", "-"),
    ]


def test_graphs_whose_structure_was_never_recorded(tmp_path):
    b = files(tmp_path, "b", structure([], {}))
    assert compare.graphs({}, b) == [("structure", "not recorded", "recorded")]


def test_many_rows_are_counted(tmp_path):
    a, b = (files(tmp_path, n, structure([], {f"k{i}": n for i in range(100)})) for n in ("a", "b"))
    rows = compare.graphs(a, b)
    assert len(rows) == compare.SHOWN + 1
    assert rows[-1] == (f"{100 - compare.SHOWN} more kernels", "", "")


def test_libraries(tmp_path):
    base = {"target": {"opt": 3}, "kernels": ["a", "b"], "params": [{"name": "w", "dtype": "float32", "shape": [2]}]}
    other = {"target": {"opt": 2}, "kernels": ["b", "c"], "params": [{"name": "w", "dtype": "float16", "shape": [2]}]}
    base["device_kernels"] = {"sm_80": {"b": {"registers": 30, "code": 128}}}
    other["device_kernels"] = {"sm_80": {"b": {"registers": 32, "code": 128}}}
    a, b = files(tmp_path, "a", {"metadata.json": base}), files(tmp_path, "b", {"metadata.json": other})
    assert compare.libraries(a, b) == [
        ("target.opt", "3", "2"),
        ("kernel a", "there", "-"),
        ("kernel c", "-", "there"),
        ("sm_80.b.registers", "30", "32"),
        ("param w", "float32 [2]", "float16 [2]"),
    ]


def test_tokenizers_by_id(tmp_path):
    def tokenizer(vocabulary, eos):
        added = [{"content": "<|end|>", "id": 9}]
        document = {"model": {"vocab": vocabulary}, "added_tokens": added}
        return {"tokenizer/tokenizer.json": document, "tokenizer/tokenizer_info.json": {"eos": [eos]}}

    a = files(tmp_path, "a", tokenizer({"x": 0, "y": 1}, 9))
    b = files(tmp_path, "b", tokenizer({"x": 1, "z": 2}, 8))
    assert compare.tokenizers(a, b) == [
        ("eos", "[9]", "[8]"),
        ("token 'x'", "0", "1"),
        ("token 'y'", "1", "-"),
        ("token 'z'", "-", "2"),
    ]
    unigram = files(tmp_path, "c", tokenizer([["x", -1.0], ["y", -2.0]], 9))
    assert compare.tokenizers(a, unigram) == []
