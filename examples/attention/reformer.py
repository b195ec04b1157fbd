"""LSH attention on a CPU: time against length, a pretrained model after a short training, and copying over a distance.

    python examples/attention/reformer.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/attention

``times``: the causal attention of one row, 12 heads of 64 in float32, hashing included, beside PyTorch's
scaled_dot_product_attention: processor time, the best of the repetitions. ``memory``: bytes that the backward of a
decoder waits with, by its number of layers, with and without reversible layers. ``recovery``: held-out perplexity of a
pretrained model that is converted and trained as in ``patterns.py``, beside the dense model with the same training.
``copy``: a decoder of two layers learns to repeat a text of random symbols that it has read once, as in section 5 of
the paper (2001.04451), where the symbol to repeat lies further back than a chunk reaches; beside full attention, and
beside a window as wide as two chunks. Parts are chosen by ``--parts``; all take about 10 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import reformer_page
import torch
from patterns import sequences, train
from processor_time import shortest_time
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_optim
from hf_optim.evaluation.evaluate import perplexity
from hf_optim.toolkit.attention.lsh_chunks import lsh_attention
from hf_optim.toolkit.attention.lsh_hashing import draw_rotations, hash_vectors
from hf_optim.toolkit.attention.lsh_places import LshScheme

HEADS, SIZE, CHUNK = 12, 64, 64
TIMED = {
    "LSH, 1 round": ("bucket", 1),
    "LSH, 4 rounds": ("bucket", 4),
    "LSH of the paper, 1 round": ("paper", 1),
    "LSH of the paper, 4 rounds": ("paper", 4),
}
REFORMER = {"technique": "reformer", "chunk": 16, "buckets": [16]}
RECOVERED: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "full attention, shared queries and keys": {**REFORMER, "chunk": 256},
    "the same, mean of both projections": {**REFORMER, "chunk": 256, "shared": "mean"},
    "1 round": {**REFORMER, "rounds": 1},
    "4 rounds": {**REFORMER, "rounds": 4},
    "8 rounds": {**REFORMER, "rounds": 8},
    "4 rounds, redrawn in each step": {**REFORMER, "rounds": 4, "redraw": True},
    "4 rounds, chunks of the paper": {**REFORMER, "rounds": 4, "scheme": "paper"},
    "4 rounds, reversible": {**REFORMER, "rounds": 4, "reversible": True},
}
WORD, SYMBOLS, COPY_CHUNK = 63, 16, 16
COPIED: dict[str, dict[str, Any] | None] = {
    "full attention": None,
    "LSH, 4 rounds": {"technique": "reformer", "chunk": COPY_CHUNK, "buckets": [8], "rounds": 4},
    "window of two chunks": {"technique": "local", "window": 2 * COPY_CHUNK},
}


def attention(name: str, length: int, training: bool) -> Callable[[], Any]:
    """Return a call of causal attention over one row, with gradients if ``training``."""
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, HEADS, length, SIZE, generator=generator).requires_grad_(training) for _ in range(2))
    kind, rounds = TIMED.get(name, ("", 0))
    buckets = 2 * length // CHUNK
    factors = (buckets,) if buckets <= 128 else (16, buckets // 16)
    scheme = LshScheme(kind, factors, rounds, CHUNK)
    rotations = draw_rotations(HEADS, SIZE, rounds, factors, 0) if rounds else None

    def call() -> None:
        with torch.set_grad_enabled(training):
            if rotations is None:
                out = functional.scaled_dot_product_attention(q, q, v, is_causal=True)
            else:
                out = lsh_attention(q, v, hash_vectors(q, rotations, factors), scheme, True)
            if training:
                torch.autograd.grad(out, (q, v), out.detach())

    return call


def times(args: argparse.Namespace) -> dict[str, Any]:
    """Return milliseconds by name and length, of the forward and with gradients."""
    found: dict[str, Any] = {}
    for kind, training in (("forward", False), ("with gradients", True)):
        for length in args.lengths:
            for name in ("dense", *TIMED):
                milliseconds = round(shortest_time(attention(name, length, training), args.seconds), 1)
                found.setdefault(kind, {}).setdefault(name, {})[str(length)] = milliseconds
                print(kind, length, name, milliseconds, flush=True)
    return found


def recovery(args: argparse.Namespace) -> dict[str, Any]:
    """Return the held-out perplexity of each variant before and after ``args.steps`` steps."""
    tokenizer, wanted = AutoTokenizer.from_pretrained(args.model), args.steps * 8
    rows = torch.cat([sequences(tokenizer, args.data / f"{name}.jsonl", wanted) for name in ("train", "calibration")])
    held_out, found = sequences(tokenizer, args.data / "eval.jsonl", args.sequences), {}
    for name, step in RECOVERED.items():
        found[name] = perplexity_after(step, rows[:wanted], held_out, args)
        print(name, json.dumps(found[name]), flush=True)
    return found


def perplexity_after(
    step: dict[str, Any] | None, rows: Tensor, held_out: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Return the perplexity of one variant before and after training; arguments as of ``patterns.measure``."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    if step is not None:
        model = hf_optim.optimize(model, [step])
    args.dense = step is None
    before = perplexity(model.eval(), held_out, 8)["perplexity"]
    train(model, rows, args)
    return {"before": round(before, 4), "after": round(perplexity(model.eval(), held_out, 8)["perplexity"], 4)}


def duplicates(count: int, generator: torch.Generator) -> Tensor:
    """Return ``0 w 0 w`` with random symbols from 1 in w, int64 ``[count, 2 WORD + 2]``."""
    word = torch.randint(1, SYMBOLS, (count, WORD), generator=generator)
    half = functional.pad(word, (1, 0))
    return torch.cat([half, half], 1)


def copying(step: dict[str, Any] | None, steps: int, seed: int = 0) -> float:
    """Return the share of symbols of the second word that a decoder predicts after a training from random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=SYMBOLS, n_positions=2 * WORD + 2, n_embd=64, n_layer=2, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0,
        embd_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    if step is not None:
        model = hf_optim.optimize(model, [step])
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (number + 1) / 50)
        ids = duplicates(32, generator)
        logits = model(ids, use_cache=False).logits[:, WORD + 1 : -1]
        functional.cross_entropy(logits.flatten(0, 1), ids[:, WORD + 2 :].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    ids = duplicates(64, generator)
    with torch.no_grad():
        found = model(ids, use_cache=False).logits[:, WORD + 1 : -1].argmax(-1)
    return float((found == ids[:, WORD + 2 :]).double().mean())


def copy(args: argparse.Namespace) -> dict[str, Any]:
    """Return the share of symbols that each kind of attention copies."""
    found = {}
    for name, step in COPIED.items():
        start = time.process_time()
        found[name] = round(copying(step, args.copy_steps), 4)
        print(name, found[name], f"{time.process_time() - start:.0f} s", flush=True)
    return found


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Return the bytes that the backward of a decoder waits with, by kind and number of layers; buckets included."""
    found: dict[str, Any] = {}
    for kind in ("stored", "reversible"):
        for layers in (2, 4, 8):
            config = LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=4, max_position_embeddings=1024,
            )  # fmt: skip
            torch.manual_seed(0)
            step = {"technique": "reformer", "chunk": 32, "rounds": 1, "reversible": kind == "reversible"}
            model = hf_optim.optimize(LlamaForCausalLM(config).model, [step]).train()
            ids = torch.randint(256, (2, 1024))
            model(ids[:1, :64], use_cache=False)
            before = held_bytes()
            out = model(ids, use_cache=False)[0]
            found.setdefault(kind, {})[str(layers)] = held_bytes() - before
            del out, model
    print(json.dumps(found), flush=True)
    return found


def held_bytes() -> int:
    """Return the bytes of all tensors that are reachable from Python or from what autograd has saved."""
    gc.collect()
    waiting = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in waiting}
    nodes, seen = [each.grad_fn for each in waiting if each.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions if following is not None]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        saved += getattr(node, "saved_tensors", ())
        for each in saved:
            if isinstance(each, torch.Tensor):
                storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


PARTS = {"times": times, "memory": memory, "recovery": recovery, "copy": copy}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="for the part recovery")
    parser.add_argument("--data", type=Path, help="a folder with train.jsonl, calibration.jsonl and eval.jsonl")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=["times", "memory", "copy"])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--sequences", type=int, default=32, help="held-out sequences of 256 tokens")
    parser.add_argument("--copy-steps", type=int, default=300)
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = args.output / "reformer.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for part in args.parts:
        results[part] = PARTS[part](args)
        if part == "recovery":
            results["trained_tokens"] = args.steps * 8 * 256
        if part == "copy":
            results["copy_steps"] = args.copy_steps
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    reformer_page.write(args.output)


if __name__ == "__main__":
    main()
