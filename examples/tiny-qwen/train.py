"""Train the example model (CPU, two threads, about twelve minutes) and write the checkpoint around it.

The model is transformers' Qwen2 under Qwen-1's names (qwen1.py). Documents are packed, <|endoftext|> between them. What
is measured at the end is what is stored: the weights after rounding to bfloat16.

    python examples/tiny-qwen/train.py
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from typing import TYPE_CHECKING

import torch
from ngram import KneserNey
from qwen1 import CONFIG, HERE, from_qwen2, load_qwen2, load_tensors, new_qwen2, save_tensors
from torch.nn.functional import cross_entropy
from vocabulary import END_OF_TEXT, encoding, read_documents

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import Qwen2ForCausalLM

SEED = 7
LENGTH, BATCH = 512, 8
PEAK_RATE, WARMUP, DECAY = 4e-3, 60, 0.1
ORDERS = range(1, 6)


def packed_batches(documents: list[list[int]], rng: random.Random) -> Iterator[torch.Tensor]:
    """Yield [BATCH, LENGTH + 1] token batches for ever: documents shuffled and joined anew in every epoch."""
    while True:
        order = rng.sample(documents, len(documents))
        stream = [token for document in order for token in document]
        rows = [stream[i : i + LENGTH + 1] for i in range(rng.randrange(LENGTH), len(stream) - LENGTH, LENGTH)]
        rng.shuffle(rows)
        for i in range(0, len(rows) - BATCH + 1, BATCH):
            yield torch.tensor(rows[i : i + BATCH])


def optimizer_for(model: Qwen2ForCausalLM) -> torch.optim.AdamW:
    """Return AdamW that decays matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98))


def learning_rate(step: int, steps: int) -> float:
    """Return the rate at a step: linear warm-up, then a cosine down to a hundredth."""
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / (steps - WARMUP)
    return PEAK_RATE * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


@torch.no_grad()
def perplexity(model: Qwen2ForCausalLM, documents: list[list[int]]) -> float:
    """Return the perplexity per token over whole documents, each begun behind <|endoftext|> as in training."""
    model.eval()
    loss, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([[document[-1], *document]])
        logits = model(ids[:, :-1]).logits[0]
        loss += cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        tokens += len(document)
    return math.exp(loss / tokens)


def fit(model: Qwen2ForCausalLM, documents: list[list[int]], held_out: list[list[int]], steps: int) -> None:
    """Train in place, reporting now and then."""
    optimizer, batches, start = optimizer_for(model), packed_batches(documents, random.Random(SEED)), time.monotonic()
    for step in range(steps):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        batch = next(batches)
        logits = model(batch[:, :-1]).logits
        loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            spent, unseen = time.monotonic() - start, perplexity(model, held_out[:20])
            print(f"{spent:5.0f} s  step {step + 1}  loss {loss:.3f}  held-out {unseen:.3f}", flush=True)


def write_json(name: str, value: object) -> None:
    """Write one JSON file of the checkpoint."""
    (HERE / name).write_text(json.dumps(value, indent=1) + "\n")


def write_checkpoint(model: Qwen2ForCausalLM) -> None:
    """Write weights, config, tokenizer config and generation config in Hugging Face form."""
    end = encoding().encode_single_token(END_OF_TEXT)
    assert encoding().n_vocab <= CONFIG["vocab_size"]
    save_tensors(from_qwen2(model.state_dict()))
    write_json("config.json", CONFIG)
    write_json(
        "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONFIG["seq_length"],
            "tokenizer_class": "QWenTokenizer",
        },
    )
    write_json(
        "generation_config.json",
        {
            "chat_format": "raw",
            "do_sample": True,
            "eos_token_id": end,
            "max_new_tokens": 128,
            "pad_token_id": end,
            "stop_words_ids": [[end]],
            "temperature": 0.7,
            "top_k": 0,
            "top_p": 0.8,
            "transformers_version": "4.32.0",
        },
    )


def main() -> None:
    """Train, write, and hold the stored weights against the n-gram baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1600)
    steps = parser.parse_args().steps
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    documents, held_out = read_documents("train.txt.xz"), read_documents("heldout.txt")
    model = new_qwen2()
    fit(model, documents, held_out, steps)
    write_checkpoint(model)
    ours = perplexity(load_qwen2(load_tensors()), held_out)
    theirs = {n: KneserNey(documents, n, encoding().n_vocab).perplexity(held_out) for n in ORDERS}
    print(f"held-out perplexity per token: model {ours:.3f}")
    print("  Kneser-Ney " + ", ".join(f"{n}-gram {value:.3f}" for n, value in theirs.items()))
    assert ours < 0.8 * min(theirs.values()), "the model must be clearly better than its n-gram baseline"


if __name__ == "__main__":
    main()
