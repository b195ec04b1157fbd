"""DistilBERT's recipe on two real models: a sentence encoder of half the depth, and a decoder of three fifths.

The encoder (all-MiniLM-L6-v2: six layers, STS-B test Spearman 0.8203) becomes one of three layers, taught on unlabeled
sentences by the directions of its teacher's last hidden states and of their mean. Reported are Spearman on dev and
test, parameters of the layers, and the time to encode test sentences. The decoder (babyllama-1m: five layers to three)
is trained on stories twice from the same copied layers, with the recipe and by the task loss alone; reported is
perplexity on the evaluation stories.

    python examples/distillation/minilm_student.py --encoder PATH --layers 0 3 5 --decoder PATH --data FOLDER

``FOLDER`` has stsb/{train,dev,test}.tsv, sst2/train.tsv, multi30k/train.jsonl and tinystories/{train,eval}.jsonl. On
a CPU core the encoder takes about ten minutes (with layers 0, 3 and 5, chosen by dev: test 0.805, 98.1 % of its
teacher's, at half of the layers' parameters and twice the speed); on a GPU give ``--steps 4000 --batch 256``.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    TrainingArguments,
)

import hf_optim
from hf_optim import DataConfig
from hf_optim.data.datasets import load_examples
from hf_optim.evaluation.evaluate import evaluate, mean_pool
from hf_optim.toolkit.modules import eval_mode

SOURCES = {
    "stsb/train.tsv": ("sentence1", "sentence2"),
    "sst2/train.tsv": ("sentence",),
    "multi30k/train.jsonl": ("en",),
}


# -- the encoder -----------------------------------------------------------------------------------------------------
def sentences(data: Path, seed: int) -> list[str]:
    """The distinct sentences of all sources, without labels, shuffled."""
    found: dict[str, None] = {}
    for name, columns in SOURCES.items():
        for row in load_examples(DataConfig(str(data / name))):
            found.update(dict.fromkeys(str(row[column]).strip() for column in columns))
    texts = [text for text in found if len(text.split()) > 2]
    random.Random(seed).shuffle(texts)
    return texts


def encoded(texts: list[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Sentences as token ids."""
    return [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]


def arguments(args: argparse.Namespace, home: str, rate: float) -> TrainingArguments:
    """The training settings of both models."""
    return TrainingArguments(
        home,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, args.steps // 20),
        weight_decay=0.01,
        bf16=args.device == "cuda",
        use_cpu=args.device == "cpu",
        logging_steps=max(1, args.steps // 10),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=args.seed,
    )


def spearman(model: Any, tokenizer: Any, data: Path) -> dict[str, float]:
    """Spearman of dev and test, of cosines of mean-pooled vectors."""
    parts = {part: DataConfig(str(data / "stsb" / f"{part}.tsv"), samples=None) for part in ("dev", "test")}
    return {part: evaluate(model, tokenizer, where, speed=False)["spearman"] for part, where in parts.items()}


def batches(file: Path, column: str, tokenizer: Any, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """The first 1,024 sentences of a file by length, in batches."""
    rows = load_examples(DataConfig(str(file)), limit=1024)
    texts = sorted((str(row[column]) for row in rows), key=len)
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def seconds(models: list[Any], inputs: list[dict[str, torch.Tensor]], repeats: int = 7) -> list[float]:
    """Median time of each model to encode all batches; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, found in zip(models, times, strict=True):
            with eval_mode(model):
                start = time.perf_counter()
                for batch in inputs:
                    vectors = mean_pool(model, batch)
                vectors.sum().item()  # waits for the device
            if turn:
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def encoder(args: argparse.Namespace) -> dict[str, Any]:
    """Teach the encoder of half the depth and measure both."""
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    teacher = AutoModel.from_pretrained(args.encoder, dtype=torch.float32).to(args.device)
    theirs = spearman(teacher, tokenizer, args.data)
    step: dict[str, Any] = {"technique": "distilbert", "alpha_pool": args.alpha_pool}
    if args.layers:
        step["layers"] = args.layers
    student = hf_optim.optimize(AutoModel.from_pretrained(args.encoder, dtype=torch.float32), step)
    before = spearman(student.to(args.device), tokenizer, args.data)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        trainer = hf_optim.OptimTrainer(
            model=student,
            args=arguments(args, home, args.encoder_rate),
            train_dataset=encoded(sentences(args.data, args.seed), tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
    student = trainer.run.model
    figures = trainer.run.record.steps["0"]
    ours = spearman(student, tokenizer, args.data)
    slow, fast = seconds([teacher, student], batches(args.data / "stsb" / "test.tsv", "sentence1", tokenizer))
    if args.output:
        student.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    return {
        "teacher": theirs,
        "copied layers": before,
        "student": ours,
        "share of the teacher": {part: ours[part] / theirs[part] for part in ours},
        "layers": figures["layers"],
        "layer parameters": [figures["layer_parameters_before"], figures["layer_parameters_after"]],
        "parameters": [figures["parameters_before"], figures["parameters_after"]],
        "encoding seconds": [slow, fast],
        "speed-up": slow / fast,
        "training seconds": time.perf_counter() - started,
    }


# -- the decoder -----------------------------------------------------------------------------------------------------
def variants() -> Iterator[tuple[str, dict[str, float]]]:
    """The recipe, and the same student by the task loss alone."""
    yield "distilbert", {}
    yield "task loss alone", {"alpha_ce": 0.0, "alpha_task": 1.0, "alpha_cos": 0.0}


def stories(data: Path, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Stories from their beginning, after bos: a teacher knows little of a text that begins in its middle."""
    rows = []
    for row in load_examples(DataConfig(str(data / "tinystories" / "train.jsonl"))):
        ids = [tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]][:length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return rows


def decoder(args: argparse.Namespace) -> dict[str, Any]:
    """Perplexity of the decoder, and of the student of its layers 0, 2 and 4 trained in both ways."""
    tokenizer = AutoTokenizer.from_pretrained(args.decoder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    held_out = DataConfig(str(args.data / "tinystories" / "eval.jsonl"), samples=None)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.decoder, dtype=torch.float32).to(args.device)

    def perplexity(model: Any) -> float:
        return float(evaluate(model, tokenizer, held_out, speed=False)["perplexity"])

    found: dict[str, Any] = {"teacher": perplexity(load())}
    settings = argparse.Namespace(**{**vars(args), "steps": args.decoder_steps, "batch": 16})
    for name, weights in variants():
        student = hf_optim.optimize(load(), {"technique": "distilbert", "every": 2, **weights})
        found.setdefault("copied layers", perplexity(student))
        with tempfile.TemporaryDirectory() as home:
            trainer = hf_optim.OptimTrainer(
                model=student,
                args=arguments(settings, home, args.decoder_rate),
                train_dataset=stories(args.data, tokenizer, student.config.max_position_embeddings),
                data_collator=DataCollatorForSeq2Seq(tokenizer),
            )
            trainer.train()
        found[name] = perplexity(trainer.run.model)
        found["layer parameters"] = [
            trainer.run.record.steps["0"][f"layer_parameters_{when}"] for when in ("before", "after")
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2, or of another encoder")
    parser.add_argument("--decoder", type=Path, help="folder of babyllama-1m, or of another decoder")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, nargs="+", help="the encoder's layers to keep (default: every other)")
    parser.add_argument("--alpha-pool", type=float, default=10.0, help="weight of the encoder's sentence vectors")
    parser.add_argument("--steps", type=int, default=220)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--encoder-rate", type=float, default=5e-4)
    parser.add_argument("--decoder-steps", type=int, default=150)
    parser.add_argument("--decoder-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="where the encoder's student is saved")
    parser.add_argument("--json", type=Path, help="where the figures are written")
    args = parser.parse_args()
    found: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    for name, part in (("decoder", decoder), ("encoder", encoder)):
        if getattr(args, name) is not None:
            found[name] = part(args)
            print(name, json.dumps(found[name], indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
