"""Train a Llama-shaped example on tiny-qwen's text and vocabulary, with tiny-qwen's training loop, and write it.

What is measured at the end is what is stored: the weights after rounding to bfloat16.

    python examples/tiny-llama/train.py
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny-qwen"))

from train import SEED, fit, perplexity  # noqa: E402
from vocabulary import END_OF_TEXT, encoding, read_documents  # noqa: E402

# Rows of 192 values end in a short group of 32 where groups take 40; heads share keys and values three to one.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.05,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 1856,
}


def write_json(name: str, value: object) -> None:
    """Write one JSON file of the checkpoint."""
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Train, write, and measure what was written."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    end = encoding().encode_single_token(END_OF_TEXT)
    config = CONFIG | {"bos_token_id": end, "eos_token_id": end}
    held_out = read_documents("heldout.txt")
    model = LlamaForCausalLM(LlamaConfig(**config))
    fit(model, read_documents("train.txt.xz"), held_out, args.steps)
    state = {name: tensor.detach().bfloat16().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, HERE / "model.safetensors", metadata={"format": "pt"})
    write_json("config.json", config)
    write_json("generation_config.json", {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end})
    stored = load_file(HERE / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in stored.items()})
    print(f"held-out perplexity per token: {perplexity(model, held_out):.3f}")


if __name__ == "__main__":
    main()
