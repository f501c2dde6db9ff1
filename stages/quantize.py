"""quantize: stream a checkpoint's weights, tensor by tensor, into quantized shards in TVM's tensor-cache format."""

from __future__ import annotations

import errno
import json
import math
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagegraph.stage import In, Out, Source, Stage, StageError, dist_versions, param, source

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from stagegraph.stage import Context
    from stages.models.weights import Weights
    from stages.quantization.schemes import Scheme
    from stages.quantization.tensor_cache import TensorCacheWriter

DTYPE_BYTES = {"uint32": 4, "float32": 4, "float16": 2}
SLACK = 2**20  # bytes for tensor-cache.json and report.json


class Quantize(Stage):
    """Bounded memory: at any time one parameter's source, mapped, and its result are in the process."""

    id = "quantize"

    @dataclass(frozen=True)
    class Params:
        """Parameters."""

        checkpoint: Source = source("checkpoint directory with the weights", include=("*.safetensors",))
        scheme: str = param("quantization scheme", choices="stages.quantization.schemes:SCHEMES")
        target: str = param("what the bundle is built for", choices="stages.targets.table:TARGETS")

    inputs = {
        "params": In("param-register", "params", "what to store, and what it is made of"),
        "tensors": In("config-parse", "tensors", "dtype, shape and file of the checkpoint's tensors"),
    }
    outputs = {
        "weights": Out("weights", "shards and tensor-cache.json"),
        "report": Out("report.json", "per parameter: how it is stored and its error against the source"),
    }

    def tools(self, params: Params) -> dict[str, str]:  # noqa: ARG002
        """Return the libraries that do the arithmetic."""
        return dist_versions("numpy", "ml-dtypes")

    def rows(self, params: Params, facts: Mapping[str, Any]) -> dict[str, str | Sequence[str]]:  # noqa: ARG002
        """Return the one scheme; what the weights are is in the register, so no family is looked up."""
        return {"stages.quantization.schemes:SCHEMES": params.scheme, "stages.models:FAMILIES": ()}

    def run(self, ctx: Context) -> None:
        """Quantize in packed order; report each parameter's error as read back from what is stored."""
        from stages.models.weights import Weights
        from stages.quantization.schemes import SCHEMES
        from stages.quantization.tensor_cache import TensorCacheWriter

        register = json.loads(ctx.input("params").read_bytes())
        tensors = json.loads(ctx.input("tensors").read_bytes())["tensors"]
        if [register["scheme"], register["target"]] != [ctx.params.scheme, ctx.params.target]:
            raise StageError(
                f"the parameters are registered for {register['scheme']} on {register['target']}, quantize is asked "
                f"for {ctx.params.scheme} on {ctx.params.target}: give param-register and quantize the same values"
            )
        size = sum(math.prod(entry["shape"]) * DTYPE_BYTES[entry["dtype"]] for entry in register["params"])
        _check_space(ctx, size)
        weights = Weights(ctx.source("checkpoint").files, tensors)
        total = sum(weights.nbytes(name) for entry in register["logical"] for name in entry["sources"])
        scheme, report, done = SCHEMES[ctx.params.scheme], [], 0
        try:
            with TensorCacheWriter(ctx.out / "weights") as writer:
                for entry in register["logical"]:
                    report.append(_convert(entry, weights, scheme, register["layout"], writer))
                    done += sum(weights.nbytes(name) for name in entry["sources"])
                    ctx.progress(done, total, "B")
                count = sum(math.prod(entry["shape"]) for entry in register["logical"])
                bits = round(8 * writer.nbytes / count, 3)
                names = len(register["params"])
                writer.finish({"ParamSize": names, "ParamBytes": writer.nbytes, "BitsPerParam": bits})
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise StageError(
                f"{ctx.out}: the disk is full after {done:,} of {total:,} bytes of weights were read; what was written "
                f"is removed again. The weights take {size:,} bytes as {scheme.name}: free as much, then run again"
            ) from None
        document = {"schema": 1, "scheme": scheme.name, "tensors": report}
        text = json.dumps(document, allow_nan=False, indent=1, sort_keys=True) + "\n"
        (ctx.out / "report.json").write_text(text, encoding="utf-8")
        ctx.view("errors", _view(report))
        ctx.summary(f"{scheme.name}: {total / 1e6:,.1f} MB -> {size / 1e6:,.1f} MB, {bits:.2f} bits per parameter")


def _check_space(ctx: Context, size: int) -> None:
    free = shutil.disk_usage(ctx.out).free
    if size + SLACK > free:
        raise StageError(
            f"{ctx.out}: the weights take {size:,} bytes as {ctx.params.scheme}, the disk has {free:,} bytes free"
        )


def _convert(
    entry: Mapping[str, Any], weights: Weights, scheme: Scheme, layout: str, writer: TensorCacheWriter
) -> dict[str, Any]:
    """Store one parameter; return its line of the report."""
    from stages.models import transforms
    from stages.quantization import group, layouts
    from stages.quantization.blocks import cast, relative_error

    name = entry["name"]
    try:
        array = transforms.apply(entry["transform"], [weights[source] for source in entry["sources"]])
        if entry["quantize"]:
            q_weight, q_scale = group.quantize(array, scheme)
            stored = [q_weight, q_scale]
            rmse, worst = relative_error(
                array, lambda rows: group.dequantize(q_weight[rows], q_scale[rows], scheme, array.shape[1])
            )
        else:
            stored = [cast(array, entry["dtype"])]
            rmse, worst = relative_error(array, lambda rows: stored[0][rows].astype("float32"))
    except ValueError as error:
        raise StageError(f"parameter {name} (from {', '.join(entry['sources'])}): {error}") from None
    if entry["kind"] in layouts.MATRICES:
        stored = [layouts.arrange(layout, tensor, scheme.bits) for tensor in stored]
    for stored_name, tensor in zip(entry["stored"], stored, strict=True):
        writer.add(stored_name, tensor)
    return {
        "name": name,
        "kind": entry["kind"],
        "scheme": scheme.name if entry["quantize"] else entry["dtype"],
        "shape": entry["shape"],
        "source_dtype": str(array.dtype),
        "bytes": sum(tensor.nbytes for tensor in stored),
        "rmse": rmse,
        "max_error": worst,
    }


def _view(report: Iterable[Mapping[str, Any]]) -> str:
    """Render the report, largest error first."""
    head = f"{'relative RMSE':>13}  {'max error':>9}  {'bytes':>13}  {'stored as':<9}  {'from':<8}  parameter"
    lines = (
        f"{line['rmse']:13.3e}  {line['max_error']:9.2e}  {line['bytes']:13,}  {line['scheme']:<9}  "
        f"{line['source_dtype']:<8}  {line['name']} {line['shape']}"
        for line in sorted(report, key=lambda line: (-line["rmse"], line["name"]))
    )
    return "\n".join([head, *lines]) + "\n"
