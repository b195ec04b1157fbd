"""DistilBERT's recipe on a classifier: an encoder fine-tuned on SST-2, and a student of half of its layers.

    python examples/quantization/train_sst2_classifier.py --encoder MINILM --data sst2 --output sst2-classifier
    python examples/distillation/classifier_student.py --classifier sst2-classifier --data sst2 --json classifier.json

The same copied layers are trained twice on train.tsv, with the recipe and by the task loss alone; reported are the
accuracy on dev.tsv, parameters of the layers, and the time to encode the sentences of dev. 600 steps of 32 sentences
take five minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from minilm_student import arguments, batches, seconds, variants
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_optim
from hf_optim import DataConfig
from hf_optim.evaluation.evaluate import evaluate
from hf_optim.training.fit import training_rows


def classifier(args: argparse.Namespace) -> dict[str, Any]:
    """Teach the student in both ways, and measure all."""
    tokenizer = AutoTokenizer.from_pretrained(args.classifier)
    held_out = DataConfig(str(args.data / "dev.tsv"), samples=None)

    def load() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(args.classifier, dtype=torch.float32).to(args.device)

    def accuracy(model: Any) -> float:
        return float(evaluate(model.eval(), tokenizer, held_out, speed=False)["accuracy"])

    teacher = load()
    found: dict[str, Any] = {"teacher": accuracy(teacher)}
    rows, collator = training_rows(
        teacher, tokenizer, DataConfig(str(args.data / "train.tsv"), samples=args.steps * args.batch)
    )
    for name, weights in variants():
        student = hf_optim.optimize(load(), {"technique": "distilbert", "layers": args.layers, **weights})
        found.setdefault("copied layers", accuracy(student))
        with tempfile.TemporaryDirectory() as home:
            trainer = hf_optim.OptimTrainer(
                model=student, args=arguments(args, home, args.rate), train_dataset=rows, data_collator=collator
            )  # type: ignore[arg-type]
            trainer.train()
        student = trainer.run.model
        found[name] = accuracy(student)
        figures = trainer.run.record.steps["0"]
        found["layer parameters"] = [figures[f"layer_parameters_{when}"] for when in ("before", "after")]
        found["layers"] = figures["layers"]
        print(name, found[name], flush=True)
    slow, fast = seconds(
        [teacher.base_model, student.base_model], batches(args.data / "dev.tsv", "sentence", tokenizer)
    )
    return {**found, "encoding seconds": [slow, fast], "speed-up": slow / fast}


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
    parser.add_argument("--json", type=Path, required=True, help="where the figures are written")
    args = parser.parse_args()
    found = {"settings": {key: str(value) for key, value in vars(args).items()}, "classifier": classifier(args)}
    print(json.dumps(found["classifier"], indent=2))
    args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
