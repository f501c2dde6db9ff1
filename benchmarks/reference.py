"""Peak memory of the original model that verify reads, at the shape of a large one whose weights are a hole in a file.

    python benchmarks/reference.py [7b] [70b] [--tokens N]

Prints, for each shape, the size of the weights, CPU seconds and the peak of resident memory of a process that computes
the reference of N tokens module by module; exits with 1 if a peak is above its bound. A hole reads as zeros and takes
no room on the disk, but is read and converted like any weights. Each shape is measured in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Shape = tuple[int, ...]
# Hidden and intermediate size, layers, heads, heads of keys, vocabulary of Llama's; bound of the peak in GB.
SHAPES = {"7b": ((4096, 11008, 32, 32, 32, 32000), 4.0), "70b": ((8192, 28672, 80, 64, 8, 32000), 10.0)}


def tensors(hidden: int, between: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Shape]:
    """Return the name and shape of every tensor of a Llama of these sizes."""
    kv = hidden // heads * kv_heads
    found: dict[str, Shape] = {
        "model.embed_tokens.weight": (vocab, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    for i in range(layers):
        matrices = {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (between, hidden),
            "mlp.up_proj": (between, hidden),
            "mlp.down_proj": (hidden, between),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in matrices.items()}
    return found


def write(folder: Path, sizes: Shape) -> int:
    """Write a checkpoint of bfloat16 zeros to ``folder``; return the bytes of its weights."""
    import transformers

    hidden, between, layers, heads, kv_heads, vocab = sizes
    transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], dtype="bfloat16", hidden_size=hidden, intermediate_size=between,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=vocab,
        max_position_embeddings=4096,
    ).save_pretrained(folder)  # fmt: skip
    header, end = {}, 0
    for name, shape in tensors(*sizes).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def measure(shape: str, tokens: int) -> dict[str, Any]:
    """Compute the reference of ``tokens`` zeros; return what it took of this process."""
    from stages.verification import original

    sizes, bound = SHAPES[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = write(folder, sizes)
        files = {each: folder / each for each in ("model.safetensors", "config.json")}
        request = original.OriginalRequest(folder, files, folder / "none", [[0] * tokens], 0)
        original.compute(request, lambda _done, _total, _unit: None)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"weights": weights, "cpu": used.ru_utime + used.ru_stime, "peak": 1024 * used.ru_maxrss, "bound": bound}


def main() -> int:
    """Measure the shapes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", choices=[*SHAPES, []], metavar="SHAPE", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--tokens", type=int, default=16, metavar="N")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measure(args.shapes[0], args.tokens)))
        return 0
    missed = 0
    for shape in args.shapes or SHAPES:
        command = [sys.executable, __file__, shape, "--tokens", str(args.tokens), "--here"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        missed += found["peak"] > 1e9 * found["bound"]
        print(
            f"{shape:4} {found['weights'] / 1e9:6.1f} GB of weights, {args.tokens} tokens: {found['cpu']:.0f} CPU s, "
            f"peak {found['peak'] / 1e9:.2f} GB (at most {found['bound']:.0f})",
            flush=True,
        )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
