"""Distil two real models with DistilBERT's recipe: a sentence encoder to half its depth, a decoder to three fifths.

The encoder (all-MiniLM-L6-v2: six layers, STS-B test Spearman 0.8203) becomes a student of three layers. It learns on
unlabelled sentences to match the directions of its teacher's last hidden states and of their mean. The script reports
Spearman on dev and test, the parameters of the layers, and the time to encode test sentences. The decoder
(babyllama-1m: five layers to three) is trained on stories twice from the same copied layers, with the recipe and with
the task loss alone; the script reports the perplexity on the evaluation stories.

    python examples/distillation/minilm_student.py --encoder PATH --layers 0 3 5 --decoder PATH --data FOLDER

``FOLDER`` has stsb/{train,dev,test}.tsv, sst2/train.tsv, multi30k/train.jsonl and tinystories/{train,eval}.jsonl. On
a CPU core the encoder takes about ten minutes (layers 0, 3 and 5, chosen on dev, give 0.805 on test: 98.1 % of the
teacher's Spearman with half of the layers' parameters, at twice the speed). On a GPU pass ``--steps 4000 --batch 256``.
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
def load_sentences(data: Path, seed: int) -> list[str]:
    """Load the distinct sentences of all sources, without labels, shuffled."""
    distinct: dict[str, None] = {}
    for name, columns in SOURCES.items():
        for row in load_examples(DataConfig(str(data / name))):
            distinct.update(dict.fromkeys(str(row[column]).strip() for column in columns))
    texts = [text for text in distinct if len(text.split()) > 2]
    random.Random(seed).shuffle(texts)
    return texts


def tokenize(texts: list[str], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Return the token ids of sentences, one example each."""
    return [{"input_ids": ids} for ids in tokenizer(texts, truncation=True, max_length=64)["input_ids"]]


def training_arguments(args: argparse.Namespace, home: str, rate: float) -> TrainingArguments:
    """Return the training settings of both models."""
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


def measure_spearman(model: Any, tokenizer: Any, data: Path) -> dict[str, float]:
    """Compute Spearman on dev and test, from the cosines of mean-pooled vectors."""
    splits = {split: DataConfig(str(data / "stsb" / f"{split}.tsv"), samples=None) for split in ("dev", "test")}
    return {split: evaluate(model, tokenizer, source, speed=False)["spearman"] for split, source in splits.items()}


def load_batches(file: Path, column: str, tokenizer: Any, size: int = 64) -> list[dict[str, torch.Tensor]]:
    """Load the first 1,024 sentences of a file in batches, sorted by length."""
    rows = load_examples(DataConfig(str(file)), limit=1024)
    texts = sorted((str(row[column]) for row in rows), key=len)
    parts = [texts[i : i + size] for i in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def encoding_seconds(models: list[Any], inputs: list[dict[str, torch.Tensor]], repeats: int = 7) -> list[float]:
    """Return the median seconds that each model takes to encode all batches; the models take turns."""
    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 1):
        for model, taken in zip(models, times, strict=True):
            with eval_mode(model):
                start = time.perf_counter()
                for batch in inputs:
                    vectors = mean_pool(model, batch)
                vectors.sum().item()  # waits for the device
            if turn:  # the first one warms up
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def distil_encoder(args: argparse.Namespace) -> dict[str, Any]:
    """Train the encoder student, and measure it and its teacher."""
    tokenizer = AutoTokenizer.from_pretrained(args.encoder)
    teacher = AutoModel.from_pretrained(args.encoder, dtype=torch.float32).to(args.device)
    of_teacher = measure_spearman(teacher, tokenizer, args.data)
    step: dict[str, Any] = {"technique": "distilbert", "alpha_pool": args.alpha_pool}
    if args.layers:
        step["layers"] = args.layers
    student = hf_optim.optimize(AutoModel.from_pretrained(args.encoder, dtype=torch.float32), step)
    before = measure_spearman(student.to(args.device), tokenizer, args.data)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as home:
        trainer = hf_optim.OptimTrainer(
            model=student,
            args=training_arguments(args, home, args.encoder_rate),
            train_dataset=tokenize(load_sentences(args.data, args.seed), tokenizer),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        trainer.train()
    student = trainer.run.model
    reported = trainer.run.record.steps["0"]
    of_student = measure_spearman(student, tokenizer, args.data)
    inputs = load_batches(args.data / "stsb" / "test.tsv", "sentence1", tokenizer)
    slow, fast = encoding_seconds([teacher, student], inputs)
    if args.output:
        student.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)
    return {
        "teacher": of_teacher,
        "copied layers": before,
        "student": of_student,
        "share of the teacher": {split: of_student[split] / of_teacher[split] for split in of_student},
        "layers": reported["layers"],
        "layer parameters": [reported["layer_parameters_before"], reported["layer_parameters_after"]],
        "parameters": [reported["parameters_before"], reported["parameters_after"]],
        "encoding seconds": [slow, fast],
        "speed-up": slow / fast,
        "training seconds": time.perf_counter() - started,
    }


# -- the decoder -----------------------------------------------------------------------------------------------------
def loss_variants() -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the loss weights of the recipe, and those of the task loss alone."""
    yield "distilbert", {}
    yield "task loss alone", {"alpha_ce": 0.0, "alpha_task": 1.0, "alpha_cos": 0.0}


def load_stories(data: Path, tokenizer: Any, length: int) -> list[dict[str, list[int]]]:
    """Load stories as token ids: bos and the first ``length - 1`` tokens.

    Each example starts where its story does, because a teacher predicts poorly from the middle of a text.
    """
    examples = []
    for row in load_examples(DataConfig(str(data / "tinystories" / "train.jsonl"))):
        ids = [tokenizer.bos_token_id, *tokenizer(row["text"], add_special_tokens=False)["input_ids"]][:length]
        examples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids})
    return examples


def distil_decoder(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the perplexity of the decoder, and of the student of its layers 0, 2 and 4 trained with both losses."""
    tokenizer = AutoTokenizer.from_pretrained(args.decoder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    held_out = DataConfig(str(args.data / "tinystories" / "eval.jsonl"), samples=None)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(args.decoder, dtype=torch.float32).to(args.device)

    def perplexity(model: Any) -> float:
        return float(evaluate(model, tokenizer, held_out, speed=False)["perplexity"])

    results: dict[str, Any] = {"teacher": perplexity(load())}
    settings = argparse.Namespace(**{**vars(args), "steps": args.decoder_steps, "batch": 16})
    for name, weights in loss_variants():
        student = hf_optim.optimize(load(), {"technique": "distilbert", "every": 2, **weights})
        results.setdefault("copied layers", perplexity(student))
        with tempfile.TemporaryDirectory() as home:
            trainer = hf_optim.OptimTrainer(
                model=student,
                args=training_arguments(settings, home, args.decoder_rate),
                train_dataset=load_stories(args.data, tokenizer, student.config.max_position_embeddings),
                data_collator=DataCollatorForSeq2Seq(tokenizer),
            )
            trainer.train()
        results[name] = perplexity(trainer.run.model)
        reported = trainer.run.record.steps["0"]
        results["layer parameters"] = [reported["layer_parameters_before"], reported["layer_parameters_after"]]
    return results


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
    parser.add_argument("--json", type=Path, help="where the results are written")
    args = parser.parse_args()
    results: dict[str, Any] = {"settings": {key: str(value) for key, value in vars(args).items()}}
    for name, distil in (("decoder", distil_decoder), ("encoder", distil_encoder)):
        if getattr(args, name) is not None:
            results[name] = distil(args)
            print(name, json.dumps(results[name], indent=2))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
