"""From a dense model to 2:4 sparsity with int4 codes, step by step: what each step of the chain is worth.

    python examples/sparsity/chain.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/sparsity --keep checkpoints

Every decoder linear becomes 2:4. ``--data`` is a folder with train.jsonl and calibration.jsonl, which are trained and
calibrated on, and eval.jsonl, on which each link is measured once, after stock transformers has reloaded it from
disk. 4000 steps take four to eight minutes on a GPU of 2022, and an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import chain_page
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator

import hf_optim
from hf_optim import DataConfig, OptimTrainer
from hf_optim.evaluation.evaluate import evaluate
from hf_optim.evaluation.sizes import bytes_on_disk
from hf_optim.training.fit import training_arguments

Step = dict[str, Any]

BATCH = 16

PERMUTE: Step = {"technique": "channel_permutation"}
ONCE: Step = {"technique": "nm"}
# Under Adam the decay is felt from about 10 on (docs/pruning.md).
REFINED: Step = {"technique": "sr_ste", "decay": 10.0}
KD: Step = {"technique": "logit_kd", "alpha": 1.0, "temperature": 1.0}
INT4: Step = {"technique": "gptq", "bits": 4, "group_size": 32, "observer": "mse"}


class Link(NamedTuple):
    """A link of the chain.

    Attributes:
        name: as printed.
        steps: the recipe.
        training: the share of ``--steps`` that it trains for. Training on labels alone wears a small text out: there a
            fifth of the steps is better than all.
        start: the link whose checkpoint it begins from; none: the dense model.
        noise: share of the input tokens of every second window that are replaced by others of the text.
        sampled: windows of text drawn from the dense model itself, each begun with a few tokens of a story; half of
            the windows trained on are of these.
    """

    name: str
    steps: list[Step]
    training: float = 0.0
    start: str | None = None
    noise: float = 0.0
    sampled: int = 0


LINKS = (
    Link("dense", []),
    Link("2:4 one shot", [ONCE]),
    Link("+ permutation", [PERMUTE, ONCE]),
    Link("+ retraining, fixed mask", [PERMUTE, ONCE], 0.2),
    Link("+ retraining, sr_ste", [PERMUTE, REFINED], 0.2),
    Link("+ KD", [PERMUTE, REFINED, KD], 1.0),
    Link("+ KD, longer, noisy inputs", [ONCE, KD], 0.4, start="+ KD", noise=0.1),
    Link("+ KD, longer, sampled text", [ONCE, KD], 0.4, start="+ KD", sampled=8192),
    Link("+ int4", [ONCE, INT4], start="+ KD, longer, sampled text"),
    Link("int4 alone", [INT4]),
)


class Crops(Dataset):  # type: ignore[type-arg]
    """Windows of ``length`` tokens that begin anywhere in a stream [n] of token ids; ``count`` of them, by seed.

    With ``noise``, that share of every second window's tokens is replaced by tokens from anywhere in the stream. With
    ``sampled`` [m, length], every second window is one of those.
    """

    def __init__(
        self, stream: Tensor, length: int, count: int, noise: float = 0.0, sampled: Tensor | None = None, seed: int = 0
    ) -> None:
        self.stream, self.length, self.noise, self.sampled, self.seed = stream, length, noise, sampled, seed
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(0, len(stream) - length, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if self.sampled is not None and index % 2:
            ids = self.sampled[index // 2 % len(self.sampled)]
        else:
            ids = self.stream[self.starts[index] : self.starts[index] + self.length]
        if self.noise and index % 2:
            generator = torch.Generator().manual_seed(self.seed + index)
            others = self.stream[torch.randint(0, len(self.stream), ids.shape, generator=generator)]
            ids = torch.where(torch.rand(ids.shape, generator=generator) < self.noise, others, ids)
        return {"input_ids": ids, "labels": ids.clone()}


@torch.no_grad()
def sample(model: Any, stream: Tensor, count: int, length: int, prompt: int = 16, batch: int = 512) -> Tensor:
    """Text from the model itself, at temperature 1, begun with ``prompt`` tokens from the stream: [count, length]."""
    torch.manual_seed(0)
    found = []
    starts = torch.randint(0, len(stream) - prompt, (count,))
    for part in starts.split(batch):
        prompts = stream[part[:, None] + torch.arange(prompt)].to(model.device)
        drawn = model.generate(
            prompts,
            do_sample=True,
            top_k=0,
            min_new_tokens=length - prompt,
            max_new_tokens=length - prompt,
            pad_token_id=0,
        )
        found.append(drawn.cpu())
    return torch.cat(found)


def stream(tokenizer: Any, files: list[Path]) -> Tensor:
    """All stories, each preceded by bos: token ids [n], int64."""
    return torch.tensor(list(_tokens(tokenizer, files)))


def _tokens(tokenizer: Any, files: list[Path]) -> Iterator[int]:
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            yield tokenizer.bos_token_id
            yield from tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]


def compute(link: Link, args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Make one link, write it, let stock transformers read it, and measure that."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    home = args.model if link.start is None else args.keep / folder(link.start)
    model = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).to(device)
    files = [args.data / "train.jsonl", args.data / "calibration.jsonl"]
    figures: dict[str, Any] = {}
    if link.steps:
        calibration = DataConfig(str(files[1]), samples=240)
        # A model that is sparse already learns from the dense one, not from itself.
        teacher = {"teacher": str(args.model)} if link.start is not None else {}
        steps = [{**step, **teacher} if step["technique"] == "logit_kd" else step for step in link.steps]
        recipe = hf_optim.OptimConfig(hf_optim.OptimConfig.parse(steps).steps, calibration)
        model = hf_optim.optimize(model, recipe, tokenizer=tokenizer)
        if link.training:
            figures["steps"] = max(1, round(link.training * args.steps))
            model = train(model, windows(link, model, tokenizer, files, figures["steps"], args), figures["steps"], args)
    with tempfile.TemporaryDirectory() as home:
        model.eval().save_pretrained(home)
        figures["bytes"] = bytes_on_disk(Path(home))
        stock = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).to(device).eval()
        data = DataConfig(str(args.data / "eval.jsonl"), samples=None)
        figures["perplexity"] = float(evaluate(stock, tokenizer, data, speed=False)["perplexity"])
        if link.steps:
            model.save_pretrained(args.keep / folder(link.name))
    return {**figures, "seconds": round(time.perf_counter() - started, 1)}


def folder(link: str) -> str:
    """The name of the folder that a link's checkpoint is kept in."""
    return link.replace("+ ", "").replace(",", "").replace(" ", "-").replace(":", "of")


def windows(link: Link, model: Any, tokenizer: Any, files: list[Path], steps: int, args: argparse.Namespace) -> Crops:
    """What a link trains on."""
    tokens, length = stream(tokenizer, files), model.config.max_position_embeddings
    sampled = None
    if link.sampled:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(model.device).eval()
        sampled = sample(dense, tokens, link.sampled, length)
    # Another seed where an earlier link has seen the windows of the first.
    return Crops(tokens, length, BATCH * steps, link.noise, sampled, seed=0 if link.start is None else 1)


def train(model: Any, rows: Crops, steps: int, args: argparse.Namespace) -> Any:
    arguments = {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, steps // 50),
        "logging_steps": 250,
        "disable_tqdm": True,
    }
    with tempfile.TemporaryDirectory() as home:
        trainer = OptimTrainer(
            model=model,
            args=training_arguments(home, arguments),
            train_dataset=rows,
            data_collator=default_data_collator,
        )
        trainer.train()
    return trainer.run.model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--only", nargs="*", help="names of links")
    parser.add_argument("--keep", type=Path, required=True, help="folder for the checkpoints; links go on from them")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot anew")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for link in [] if args.render else LINKS:
        if args.only is None or link.name in args.only:
            found = compute(link, args, tokenizer)
            print(f"{link.name:28} {json.dumps(found)}", flush=True)
            chain_page.add(args.output, link.name, found)
    chain_page.render(args.output, [link.name for link in LINKS])


if __name__ == "__main__":
    main()
