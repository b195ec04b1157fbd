"""Compare sparse upcycling with the dense model, for equal steps, data and learning rate, on the bundled demo model.

Both models continue training from the same weights on the source of the Python standard library. Prints, per seed, the
mean training loss over the last tenth of the steps and the loss on the held-out modules. On a GPU the defaults take a
few minutes; on a CPU try ``--steps 20 --seeds 1 --batch 4 --seq-len 128``.

    python examples/upcycle_against_dense.py --steps 600 --seeds 3
"""

from __future__ import annotations

import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim
from hf_optim.cli.jobs import demo_corpus
from hf_optim.cli.jobs.demo import bundled_model
from hf_optim.toolkit.modules import eval_mode


def load_tokens(tokenizer, split: str, limit: int | None) -> torch.Tensor:
    """Load the texts of a split, joined: token ids ``[n]``, int64; ``limit`` is in bytes of text."""
    ids: list[int] = []
    for text in demo_corpus.texts(split, limit):
        ids += tokenizer.backend_tokenizer.encode(text).ids
    return torch.tensor(ids)


def random_sequences(data: torch.Tensor, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Return sequences from random positions: token ids ``[batch, length]``, int64."""
    starts = torch.randint(len(data) - length, (batch,), generator=generator)
    return torch.stack([data[s : s + length] for s in starts.tolist()])


def train(model, data, args, seed: int, device: torch.device) -> float:
    """Train the model; return the mean task loss over the last tenth of the steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.1)
    losses = []
    model.train()
    for _ in range(args.steps):
        ids = random_sequences(data, args.batch, args.seq_len, generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    tail = losses[-max(1, args.steps // 10) :]
    return float(torch.stack(tail).mean())


def held_out_loss(model, data: torch.Tensor, length: int, device: torch.device) -> float:
    """Compute the mean loss over the first 64 sequences of the held-out modules."""
    rows = data[: len(data) // length * length].view(-1, length)[:64]
    with eval_mode(model):
        losses = [float(model(row[None].to(device), labels=row[None].to(device)).loss) for row in rows]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("steps", 600), ("seeds", 3), ("batch", 32), ("seq-len", 256), ("experts", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=5e-4)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(bundled_model())
    data, held_out = load_tokens(tokenizer, "train", None), load_tokens(tokenizer, "held_out", 400_000)
    for seed in range(args.seeds):
        row: dict[str, object] = {"seed": seed, "steps": args.steps, "experts": args.experts}
        for name in ("dense", "upcycled"):
            model = AutoModelForCausalLM.from_pretrained(bundled_model(), dtype=torch.float32)
            if name == "upcycled":
                step = {"technique": "upcycle", "experts": args.experts, "seed": seed}
                model = hf_optim.optimize(model, [step], tokenizer=tokenizer)
            model.to(device)
            row[name] = {
                "train_loss": round(train(model, data, args, seed, device), 4),
                "held_out_loss": round(held_out_loss(model, held_out, args.seq_len, device), 4),
            }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
