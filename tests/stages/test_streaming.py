"""Weights that stay in the checkpoint's files, whatever their size beside the machine's memory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from stages.checkpoint.headers import read_headers
from stages.verification.streaming import Mapped


def test_a_file_larger_than_the_machine_s_memory_is_read_in_place(tmp_path):
    """A hole takes no room on the disk; the kernel gives no process that much memory of its own."""
    swap = sum(int(line.split()[2]) for line in Path("/proc/swaps").read_text().splitlines()[1:]) * 1024
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap
    rows, columns = 4 * memory // (2 * 4096), 4096
    described = {"weight": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}}
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        try:
            file.truncate(8 + len(header) + 2 * rows * columns)
        except OSError:
            pytest.skip("this file system takes no file that large")
        file.seek(-2, os.SEEK_END)
        file.write(b"\x80\x3f")  # bfloat16's one
    paths = {path.name: path}
    mapped = Mapped(paths, read_headers(paths).tensors)
    (tensor,) = mapped.tensors.values()
    assert tensor.dtype == torch.bfloat16
    assert tensor[0].float().abs().max() == 0
    assert tensor[-1, -1] == 1
    mapped.release()
