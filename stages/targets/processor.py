"""Detects this machine's processor in LLVM's terms: a baseline CPU plus an explicit list of features.

``native`` would mean another thing on every machine, and virtual machines mask features: only what the kernel reports
is used, and all of it is spelt out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection
from pathlib import Path

# The levels of the x86-64 psABI: name -> (LLVM features it adds to the level before).
LEVELS: dict[str, tuple[str, ...]] = {
    "x86-64": ("sse", "sse2"),
    "x86-64-v2": ("cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"),
    "x86-64-v3": ("avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"),
    "x86-64-v4": ("avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"),
}
# Instructions beyond the levels that kernels can gain from. Above an incomplete level nothing is picked singly: an
# AVX-512 feature without AVX-512 enabled is worth nothing.
EXTRAS = (
    "amx-bf16",
    "amx-int8",
    "amx-tile",
    "avx512bf16",
    "avx512bitalg",
    "avx512fp16",
    "avx512ifma",
    "avx512vbmi",
    "avx512vbmi2",
    "avx512vnni",
    "avx512vpopcntdq",
    "avxifma",
    "avxvnni",
    "gfni",
    "vaes",
    "vpclmulqdq",
)
EXTRAS_OF_LEVEL = {"x86-64-v3": ("avxifma", "avxvnni"), "x86-64-v4": EXTRAS}
# Features by which kernels multiply bytes and add the products up (stages/kernels/cpu/byte_products.py), fastest first.
BYTE_PRODUCTS = ("avx512vnni", "avxvnni", "avx2")
# What LLVM turns on with an extra, beyond the extra's level.
IMPLIED = {"amx-bf16": "amx-tile", "amx-int8": "amx-tile", "vaes": "aes", "vpclmulqdq": "pclmul"}
# LLVM's name -> the flag of /proc/cpuinfo, where they differ.
FLAGS = {
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-tile": "amx_tile",
    "avx512bf16": "avx512_bf16",
    "avx512bitalg": "avx512_bitalg",
    "avx512fp16": "avx512_fp16",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avxifma": "avx_ifma",
    "avxvnni": "avx_vnni",
    "bmi": "bmi1",
    "lzcnt": "abm",
    "pclmul": "pclmulqdq",
    "sahf": "lahf_lm",
    "sse3": "pni",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
}
CPUINFO = Path("/proc/cpuinfo")
# What it says of who made a processor: of x86-64, and of Arm.
MAKER = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU architecture", "CPU variant", "CPU part")


@functools.cache
def host_cpu() -> str:
    """Return this machine's processor as one literal, such as ``x86-64-v4+avx512vnni+gfni``; ``generic`` if unknown."""
    if os.uname().machine != "x86_64":
        return "generic"
    return describe(_flags(CPUINFO))


@functools.cache
def exact_cpu() -> str:
    """Return :func:`host_cpu` and which processor it is, such as ``x86-64-v3 of AuthenticAMD 25 1``: libraries that
    multiply matrices choose by that, too, in which order they add up.
    """
    return f"{host_cpu()} of {maker(CPUINFO)}"


def maker(cpuinfo: Path) -> str:
    """Return who made the processor that ``cpuinfo`` describes, its family and its model; ``unknown`` if it does not.

    Of several kinds of cores in a machine it is the first one's.
    """
    lines = (line.partition(":") for line in _text(cpuinfo).partition("\n\n")[0].splitlines())
    found = {name.strip(): value.strip() for name, _, value in lines}
    return " ".join(found[name] for name in MAKER if name in found) or "unknown"


def describe(flags: frozenset[str]) -> str:
    """Return the literal of an x86-64 processor that reports ``flags``: its highest full level, then the extras."""
    best = "x86-64"
    for level, features in LEVELS.items():
        if not all(_has(feature, flags) for feature in features):
            break
        best = level
    extras = (
        feature
        for feature in EXTRAS_OF_LEVEL.get(best, ())
        if _has(feature, flags) and _has(IMPLIED.get(feature, feature), flags)
    )
    return "+".join([best, *extras])


def parse(cpu: str) -> tuple[str, tuple[str, ...]]:
    """Split a literal into LLVM's CPU name and the features added to it, as they stand."""
    mcpu, *features = cpu.split("+")
    return mcpu, tuple(features)


def required_features(cpu: str) -> tuple[str, ...]:
    """Return every feature that code for the literal ``cpu`` may use, sorted; a processor without x86-64 has none."""
    mcpu, added = parse(cpu)
    names = list(LEVELS)
    levels = names[: names.index(mcpu) + 1] if mcpu in LEVELS else []
    implied = {IMPLIED[feature] for feature in added if feature in IMPLIED}
    return tuple(sorted({*added, *implied, *(feature for level in levels for feature in LEVELS[level])}))


def byte_product(features: Collection[str]) -> str:
    """Return the feature by which kernels for a processor with ``features`` multiply bytes, empty if they cannot."""
    return next((feature for feature in BYTE_PRODUCTS if feature in features), "")


def problems(cpu: str) -> list[str]:
    """Return the problems of a processor name that a user wrote.

    Names of single processors (``znver4``) are refused: which instructions LLVM takes them to have is written nowhere,
    so a loader could not tell whether its machine has them.
    """
    mcpu, added = parse(cpu)
    baselines = tuple(LEVELS) if os.uname().machine == "x86_64" else ("generic",)
    if mcpu not in baselines:
        advice = "take the highest that the processor has and add what it has beyond, as in x86-64-v4+avx512vnni"
        return [f"mcpu: {mcpu!r} is not one of {', '.join(baselines)}; {advice} (auto does, here {host_cpu()})"]
    known = EXTRAS_OF_LEVEL.get(mcpu, ())
    return [
        f"mcpu: {mcpu} cannot be given {name!r}; what it can be given: {', '.join(known) or 'nothing'}"
        for name in added
        if name not in known
    ]


def _has(feature: str, flags: frozenset[str]) -> bool:
    return FLAGS.get(feature, feature) in flags


def _flags(cpuinfo: Path) -> frozenset[str]:
    text = _text(cpuinfo)
    start = text.find("\nflags")
    line = text[start + 1 : text.find("\n", start + 1)] if start >= 0 else ""
    return frozenset(line.partition(":")[2].split())


def _text(cpuinfo: Path) -> str:
    try:
        return cpuinfo.read_text("utf-8", errors="replace")
    except OSError:
        return ""
