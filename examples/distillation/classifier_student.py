"""Distil a classifier with DistilBERT's recipe: an encoder fine-tuned on SST-2, and a student of half its layers.

    python examples/quantization/train_sst2_classifier.py --encoder MINILM --data sst2 --output sst2-classifier
    python examples/distillation/classifier_student.py --classifier sst2-classifier --data sst2 --json classifier.json

The same copied layers are trained twice on train.tsv, with the recipe and with the task loss alone. The script reports
the accuracy on dev.tsv, the parameters of the layers, and the time to encode the sentences of dev. 600 steps of 32
sentences take five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from minilm_student import encoding_seconds, load_batches, loss_variants, training_arguments
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_optim
from hf_optim import DataConfig
from hf_optim.evaluation.evaluate import evaluate
from hf_optim.training.fit import training_rows


def distil_classifier(args: argparse.Namespace) -> dict[str, Any]:
    """Train the student with both losses, and measure both students and the teacher."""
    tokenizer = AutoTokenizer.from_pretrained(args.classifier)
    held_out = DataConfig(str(args.data / "dev.tsv"), samples=None)

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(args.classifier, dtype=torch.float32).to(args.device)

    def accuracy(model: Any) -> float:
        return float(evaluate(model.eval(), tokenizer, held_out, speed=False)["accuracy"])

    teacher = load()
    results: dict[str, Any] = {"teacher": accuracy(teacher)}
    rows, collator = training_rows(
        teacher, tokenizer, DataConfig(str(args.data / "train.tsv"), samples=args.steps * args.batch)
    )
    for name, weights in loss_variants():
        student = hf_optim.optimize(load(), {"technique": "distilbert", "layers": args.layers, **weights})
        results.setdefault("copied layers", accuracy(student))
        with tempfile.TemporaryDirectory() as home:
            trainer = hf_optim.OptimTrainer(
                model=student,
                args=training_arguments(args, home, args.rate),
                train_dataset=rows,  # type: ignore[arg-type]
                data_collator=collator,
            )
            trainer.train()
        student = trainer.run.model
        results[name] = accuracy(student)
        reported = trainer.run.record.steps["0"]
        results["layer parameters"] = [reported["layer_parameters_before"], reported["layer_parameters_after"]]
        results["layers"] = reported["layers"]
        print(name, results[name], flush=True)
    inputs = load_batches(args.data / "dev.tsv", "sentence", tokenizer)
    slow, fast = encoding_seconds([teacher.base_model, student.base_model], inputs)
    return {**results, "encoding seconds": [slow, fast], "speed-up": slow / fast}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", type=Path, required=True, help="folder of the fine-tuned encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv of SST-2")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3, 5])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True, help="where the results are written")
    args = parser.parse_args()
    settings = {key: str(value) for key, value in vars(args).items()}
    results = {"settings": settings, "classifier": distil_classifier(args)}
    print(json.dumps(results["classifier"], indent=2))
    args.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
