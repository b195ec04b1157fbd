"""Take a dense model to 2:4 sparsity with int4 codes, and measure what each step of the chain contributes.

    python examples/sparsity/chain.py --model ../shared/models/babyllama-1m --data ../shared/data/tinystories \\
        --output model_cards/sparsity --keep checkpoints

Every linear layer of the decoder blocks becomes 2:4. ``--data`` is a folder with train.jsonl and calibration.jsonl, for
training and calibration, and eval.jsonl, on which each link is evaluated once, after stock transformers has reloaded it
from disk. 4000 steps take four to eight minutes on a GPU of 2022, and an hour on two CPU cores.
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
FIXED_MASK: Step = {"technique": "nm"}
# Under Adam, the decay has an effect from about 10 on (docs/pruning.md).
DYNAMIC_MASK: Step = {"technique": "sr_ste", "decay": 10.0}
KD: Step = {"technique": "logit_kd", "alpha": 1.0, "temperature": 1.0}
INT4: Step = {"technique": "gptq", "bits": 4, "group_size": 32, "observer": "mse"}


class Link(NamedTuple):
    """A link of the chain.

    Attributes:
        name: as printed.
        steps: the recipe.
        training: fraction of ``--steps`` to train for. Training with labels alone overfits a small corpus: there a
            fifth of the steps gives better results than all.
        start: the link whose checkpoint this one starts from; None starts from the dense model.
        noise: fraction of the input tokens, in every second sequence, that are replaced by random tokens of the corpus.
        sampled: number of sequences to sample from the dense model, each prompted with a few tokens of a story; they
            are every second training sequence.
    """

    name: str
    steps: list[Step]
    training: float = 0.0
    start: str | None = None
    noise: float = 0.0
    sampled: int = 0


LINKS = (
    Link("dense", []),
    Link("2:4 one shot", [FIXED_MASK]),
    Link("+ permutation", [PERMUTE, FIXED_MASK]),
    Link("+ retraining, fixed mask", [PERMUTE, FIXED_MASK], 0.2),
    Link("+ retraining, sr_ste", [PERMUTE, DYNAMIC_MASK], 0.2),
    Link("+ KD", [PERMUTE, DYNAMIC_MASK, KD], 1.0),
    Link("+ KD, longer, noisy inputs", [FIXED_MASK, KD], 0.4, start="+ KD", noise=0.1),
    Link("+ KD, longer, sampled text", [FIXED_MASK, KD], 0.4, start="+ KD", sampled=8192),
    Link("+ int4", [FIXED_MASK, INT4], start="+ KD, longer, sampled text"),
    Link("int4 alone", [INT4]),
)


class RandomSequences(Dataset):  # type: ignore[type-arg]
    """``count`` sequences of ``length`` tokens from random positions of ``stream``, token ids ``[n]``.

    With ``noise``, that fraction of the tokens of every second sequence is replaced by random tokens of the stream.
    With ``sampled`` ``[m, length]``, every second sequence is one of those.
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
            replacements = self.stream[torch.randint(0, len(self.stream), ids.shape, generator=generator)]
            ids = torch.where(torch.rand(ids.shape, generator=generator) < self.noise, replacements, ids)
        return {"input_ids": ids, "labels": ids.clone()}


@torch.no_grad()
def sample(model: Any, stream: Tensor, count: int, length: int, prompt: int = 16, batch: int = 512) -> Tensor:
    """Sample text at temperature 1 after prompts of ``prompt`` tokens of the stream: token ids ``[count, length]``."""
    torch.manual_seed(0)
    parts = []
    starts = torch.randint(0, len(stream) - prompt, (count,))
    for part in starts.split(batch):
        prompts = stream[part[:, None] + torch.arange(prompt)].to(model.device)
        generated = model.generate(
            prompts,
            do_sample=True,
            top_k=0,
            min_new_tokens=length - prompt,
            max_new_tokens=length - prompt,
            pad_token_id=0,
        )
        parts.append(generated.cpu())
    return torch.cat(parts)


def token_stream(tokenizer: Any, files: list[Path]) -> Tensor:
    """Join all stories, each preceded by bos: token ids ``[n]``, int64."""
    return torch.tensor(list(_tokens(tokenizer, files)))


def _tokens(tokenizer: Any, files: list[Path]) -> Iterator[int]:
    for file in files:
        for line in file.read_text(encoding="utf-8").splitlines():
            yield tokenizer.bos_token_id
            yield from tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]


def compute(link: Link, args: argparse.Namespace, tokenizer: Any) -> dict[str, Any]:
    """Compute one link, save it, reload it with stock transformers, and evaluate the result."""
    started = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = args.model if link.start is None else args.keep / folder_name(link.start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).to(device)
    files = [args.data / "train.jsonl", args.data / "calibration.jsonl"]
    result: dict[str, Any] = {}
    if link.steps:
        calibration = DataConfig(str(files[1]), samples=240)
        # The teacher of a model that is already sparse is the dense model, not the model itself.
        teacher = {"teacher": str(args.model)} if link.start is not None else {}
        steps = [{**step, **teacher} if step["technique"] == "logit_kd" else step for step in link.steps]
        recipe = hf_optim.OptimConfig(hf_optim.OptimConfig.parse(steps).steps, calibration)
        model = hf_optim.optimize(model, recipe, tokenizer=tokenizer)
        if link.training:
            result["steps"] = max(1, round(link.training * args.steps))
            dataset = build_dataset(link, model, tokenizer, files, result["steps"], args)
            model = train(model, dataset, result["steps"], args)
    with tempfile.TemporaryDirectory() as home:
        model.eval().save_pretrained(home)
        result["bytes"] = bytes_on_disk(Path(home))
        stock = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32).to(device).eval()
        data = DataConfig(str(args.data / "eval.jsonl"), samples=None)
        result["perplexity"] = float(evaluate(stock, tokenizer, data, speed=False)["perplexity"])
        if link.steps:
            model.save_pretrained(args.keep / folder_name(link.name))
    return {**result, "seconds": round(time.perf_counter() - started, 1)}


def folder_name(link: str) -> str:
    """Return the name of the folder of a link's checkpoint."""
    return link.replace("+ ", "").replace(",", "").replace(" ", "-").replace(":", "of")


def build_dataset(
    link: Link, model: Any, tokenizer: Any, files: list[Path], steps: int, args: argparse.Namespace
) -> RandomSequences:
    """Return the sequences that a link trains on."""
    tokens, length = token_stream(tokenizer, files), model.config.max_position_embeddings
    sampled = None
    if link.sampled:
        dense = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(model.device).eval()
        sampled = sample(dense, tokens, link.sampled, length)
    # A link that continues from another takes another seed, since its start was trained on the sequences of seed 0.
    seed = 0 if link.start is None else 1
    return RandomSequences(tokens, length, BATCH * steps, link.noise, sampled, seed)


def train(model: Any, dataset: RandomSequences, steps: int, args: argparse.Namespace) -> Any:
    """Train the current stage, and continue with the recipe; return the model."""
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
            train_dataset=dataset,
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
    parser.add_argument("--keep", type=Path, required=True, help="folder of the checkpoints that links start from")
    parser.add_argument("--render", action="store_true", help="only write README.md and the plot, from results.json")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    for link in [] if args.render else LINKS:
        if args.only is None or link.name in args.only:
            result = compute(link, args, tokenizer)
            print(f"{link.name:28} {json.dumps(result)}", flush=True)
            chain_page.add(args.output, link.name, result)
    chain_page.render(args.output, [link.name for link in LINKS])


if __name__ == "__main__":
    main()
