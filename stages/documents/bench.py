"""What bench writes: bench.json, how fast a bundle runs on one machine."""

from __future__ import annotations

from typing import NotRequired, TypedDict


class Rates(TypedDict):
    """How many ``tokens`` were read a second: the median of several times, the lowest and the highest.

    ``after`` is how many stood before them, where they were read one by one.
    """

    tokens: int
    rate: float
    lowest: float
    highest: float
    after: NotRequired[int]


class KernelTime(TypedDict):
    """How often the library called a kernel or a function of the runtime, and the seconds of all calls together."""

    name: str
    calls: int
    seconds: float


class Machine(TypedDict):
    """Where it was measured: the kind of device, its name, a GPU's driver, and the threads of the host."""

    kind: str
    name: str
    driver: NotRequired[str]
    threads: int


class Measurement(TypedDict):
    """bench.json: ``not_run`` says why nothing was measured, in place of all that was."""

    schema: int
    scheme: str
    target: str
    not_run: NotRequired[str]
    prefill: NotRequired[Rates]
    decode: NotRequired[Rates]
    kernels: NotRequired[dict[str, list[KernelTime]]]  # of prefill and of decode; none on a GPU
    machine: NotRequired[Machine]
    repeats: NotRequired[int]
