"""Detects the machine: CPU features, physical cores, NVIDIA driver and GPUs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# LLVM's feature name -> the flag of /proc/cpuinfo, where the two spell the same instructions differently.
_FLAG_OF_FEATURE = {
    "64bit": "lm",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vp2intersect": "avx512_vp2intersect",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxifma": "avx_ifma",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "prfchw": "3dnowprefetch",
    "rdrnd": "rdrand",
    "sahf": "lahf_lm",
    "sha": "sha_ni",
    "sse3": "pni",
    "x87": "fpu",
}
# Part of another feature on every processor, and without a flag of its own.
_IMPLIED = {"crc32": "sse4_2", "evex512": "avx512f"}


_CPUINFO = Path("/proc/cpuinfo")


def cpu_flags(cpuinfo: Path = _CPUINFO) -> frozenset[str]:
    """Return the instruction set flags that the kernel reports; empty where it reports none."""
    return frozenset(_reported(cpuinfo, "flags", "Features").split())


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """Return the model name that the kernel reports of the first processor, else what machine it is."""
    return _reported(cpuinfo, "model name", "Hardware") or os.uname().machine


def _reported(cpuinfo: Path, *keys: str) -> str:
    """Return the value of the first line of ``/proc/cpuinfo`` with one of these keys; empty if there is none."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return ""


def missing_features(features: Iterable[str], flags: frozenset[str]) -> list[str]:
    """Return those of LLVM's ``features`` (with or without a leading ``+``) that ``flags`` do not cover."""

    def covered(feature: str) -> bool:
        name = feature.removeprefix("+")
        spelt = _FLAG_OF_FEATURE.get(name) or _IMPLIED.get(name) or name.replace(".", "_").replace("-", "_")
        return spelt in flags

    return [feature.removeprefix("+") for feature in features if not covered(feature)]


def physical_cores() -> int:
    """Return how many physical cores this process may use: its affinity and its control group's quota count."""
    usable = sorted(os.sched_getaffinity(0))
    cores = {_core_of(cpu) for cpu in usable}
    return max(1, min(len(cores), _quota() or len(cores)))


def _core_of(cpu: int) -> tuple[str, str]:
    topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
    try:
        return (topology / "physical_package_id").read_text().strip(), (topology / "core_id").read_text().strip()
    except OSError:
        return "", str(cpu)


def _quota() -> int | None:
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, -(-int(quota) // int(period)))


def has_nvidia_driver() -> bool:
    """Say whether an NVIDIA kernel driver is loaded; asks no library."""
    return nvidia_driver() != "absent"


def nvidia_driver() -> str:
    """Return what the NVIDIA kernel driver says of its version, ``"unknown"`` or, without a driver, ``"absent"``."""
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace").splitlines()[0]
    except (OSError, IndexError):
        return "unknown" if Path("/dev/nvidiactl").exists() else "absent"


def nvidia_devices(folder: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the model of each GPU that the NVIDIA driver knows, in its order; asks no library."""
    return [name for file in sorted(folder.glob("*/information")) if (name := _reported(file, "Model"))]
