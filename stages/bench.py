"""bench: measures how fast a bundle runs on this machine."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stagegraph.stage import Context, In, JsonObject, Out, Stage, StageError, dist_versions, param

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stages.documents.bench import KernelTime, Measurement


_BUSY = 1.25  # how much faster the fastest repeat may be than the slowest on a machine that does nothing else


class Bench(Stage):
    """Measure the prefill and decode rates of a bundle in tokens a second; `pipeline compare` shows them in its table.

    A measurement and no build product: the processor is in its key, and a second one need not be the same. Let it run
    alone (`resources: {exclusive: true}`).
    """

    id = "bench"
    profile = "runtime"
    measures = True

    @dataclass(frozen=True)
    class Params:
        """Parameters of bench."""

        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")
        prompt_tokens: int = param("how many tokens are read at once", default=128, minimum=1)
        decode_tokens: int = param("how many are read one by one after them", default=32, minimum=1)
        repeats: int = param("how often; the median counts, the first time does not", default=5, minimum=1)

    inputs = {"bundle": In("bundle", "bundle", "the bundle")}
    outputs = {"speed": Out("bench.json", "tokens per second, how far the repeats are apart, and on what machine")}

    def tools(self, params: Params) -> Mapping[str, str]:
        """Name the runtime and the processor with its threads: another machine measures again."""
        from stages.runtime import host
        from stages.targets.table import TARGETS

        flags = hashlib.sha256(" ".join(sorted(host.cpu_flags())).encode()).hexdigest()[:16]
        found = {
            **dist_versions("apache-tvm", "apache-tvm-ffi", "numpy"),
            "processor": f"{host.cpu_name()}, {_threads()} threads, flags {flags}",
        }
        if TARGETS[params.target].device == "cuda":
            found["gpu"] = f"{', '.join(host.nvidia_devices()) or 'none'}, {host.nvidia_driver()}"
            found["visible-cuda-devices"] = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
        return found

    def rows(self, params: Params, facts: JsonObject) -> dict[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the target."""
        return {"stages.targets.table:TARGETS": params.target}

    def run(self, ctx: Context) -> None:
        """Measure; a bundle for a device that is not here is not run, which bench.json says."""
        from stages.documents.files import write_json
        from stages.runtime import backend, host, manifest, speed
        from stages.runtime.errors import BundleError, RequestError
        from stages.runtime.session import Session

        params = ctx.params
        bundle = manifest.read(ctx.input("bundle"))
        found: Measurement = {"schema": 1, "scheme": bundle.model["scheme"], "target": bundle.target}
        if bundle.device == "cuda" and not host.has_nvidia_driver():
            found["not_run"] = "no NVIDIA driver is loaded"
            ctx.summary(f"not run: {found['not_run']}")
        else:
            try:
                problems = manifest.check(bundle)
                if problems:
                    raise BundleError(*problems)
                session = Session(bundle)
                text = {"prompt_tokens": params.prompt_tokens, "decode_tokens": params.decode_tokens}
                rates = speed.measure(
                    session,
                    **text,
                    repeats=params.repeats,
                    progress=lambda done: ctx.progress(done, params.repeats + 1, "repeats"),
                )
                if bundle.device == "cpu":
                    found["kernels"] = speed.kernels(session, **text)
                    ctx.view("kernels", _kernels(found["kernels"]))
            except BundleError as error:
                raise StageError(*error.problems) from None
            except RequestError as error:
                raise StageError(str(error)) from None
            found["prefill"], found["decode"] = rates["prefill"], rates["decode"]
            found["machine"] = {**backend.device_name(bundle.device), "threads": backend.threads()}
            found["repeats"] = params.repeats
            spread = max(each["highest"] / each["lowest"] for each in rates.values())
            if spread > _BUSY:
                ctx.warn(
                    f"the fastest repeat is {spread:.1f} times the slowest: the machine was busy; --force measures anew"
                )
            ctx.summary(", ".join(f"{name} {each['rate']:,.0f} tokens/s" for name, each in rates.items()))
        write_json(ctx.out / "bench.json", found)


def _kernels(found: Mapping[str, Sequence[KernelTime]]) -> str:
    """Render where the time goes: of reading a prompt at once, then of reading tokens one by one."""
    pages = []
    for function, kernels in found.items():
        whole = sum(each["seconds"] for each in kernels) or 1.0
        rows = [
            f"| {each['name']} | {each['calls']:,} | {each['seconds'] * 1e3:,.3f} | {each['seconds'] / whole:.1%} |"
            for each in kernels
        ]
        head = f"| {function} | calls | milliseconds | share |\n|---|---:|---:|---:|"
        pages.append("\n".join([head, *rows]) + "\n")
    return "\n".join(pages)


def _threads() -> str:
    from stages.runtime import host

    return os.environ.get("TVM_NUM_THREADS") or str(host.physical_cores())
