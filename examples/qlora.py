"""QLoRA end to end: a 4-bit base on kernels, LoRA adapters on top, a stock Trainer, save, reload, merge.

    python examples/qlora.py                                             # bundled model and text, two minutes
    python examples/qlora.py --model org/model --text my.jsonl --steps 500 --output out

1. Quantize the base to 4 bits (GPTQ) and save it: an ordinary compressed-tensors checkpoint.
2. Load it with ``optim_config="auto"``: the linears hold their 4-bit codes and run on kernels, without a dense copy.
3. Attach LoRA with peft and train it in ``transformers.Trainer``; only the adapter gets gradients.
4. Save the adapter (kilobytes) and load it onto the 4-bit base again.
5. Merge: ``hf_optim.restore`` turns the base back into ordinary dense layers, peft adds the adapter to them, and the
   sum is saved as a dense checkpoint. Quantize that again only if you accept to lose a part of what was learned.

Needs ``pip install "hf-optim[peft]"``. The bundled model (3.5 M parameters) has learned the source code of Python's
library; by default the adapter teaches it the language manual (``pydoc_data``). It prints (two CPU cores)::

    loss on held-out text, nats per token
      float base                 3.2151
      4-bit base                 3.2239
      4-bit base + LoRA          2.9395
      adapter loaded again       2.9395
      merged, dense              2.9393
    checkpoints: base 2.73 MB, adapter 723 kB, merged 6.96 MB

On a GPU load the base in bfloat16, which is the default of this script everywhere: the kernels are for 16-bit models.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, logging

import hf_optim
from hf_optim import DataConfig
from hf_optim.cli.jobs.demo import bundled_model
from hf_optim.data.datasets import load_texts

WIDTH = 128  # tokens of a row


def rows_of(tokenizer: Any, texts: list[str], count: int) -> list[dict[str, torch.Tensor]]:
    """Cut texts into rows of ``WIDTH`` tokens, each its own label; at most ``count`` rows."""
    ids = [token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]]
    chunks = torch.tensor(ids[: len(ids) // WIDTH * WIDTH]).view(-1, WIDTH)[:count]
    return [{"input_ids": chunk, "labels": chunk} for chunk in chunks]


@torch.no_grad()
def loss_of(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean cross-entropy of a model, nats per token."""
    model.eval()
    ids = torch.stack([row["input_ids"] for row in rows]).to(model.device)
    return sum(float(model(input_ids=part, labels=part).loss) * len(part) for part in ids.split(8)) / len(ids)


def size_of(folder: Path) -> int:
    """Return the bytes of the safetensors files of a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(
    model_name: str, text: str | None, steps: int, calibration_rows: int, evaluation_rows: int, output: Path
) -> dict[str, float]:
    """Run the five steps, print the table, and return the losses by name."""
    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(model_name)
    # The bundled model was trained on the code of Python's library; the manual is new to it.
    texts = [topics[name] for name in sorted(topics)] if text is None else list(load_texts(DataConfig(text)))
    judged = set(range(0, len(texts), 8))
    learn = [one for number, one in enumerate(texts) if number not in judged]
    train = rows_of(tokenizer, learn, 100_000)
    held_out = rows_of(tokenizer, [texts[number] for number in judged], evaluation_rows)
    losses = {}

    # 1. The 4-bit base.
    dense = AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.bfloat16)
    losses["float base"] = loss_of(dense, held_out)
    ids = torch.stack([row["input_ids"] for row in train[:calibration_rows]])
    base = hf_optim.optimize(dense, "w4a16", calibration=ids)
    base.save_pretrained(output / "base-w4a16")
    tokenizer.save_pretrained(output / "base-w4a16")

    # 2. On kernels.
    model = AutoModelForCausalLM.from_pretrained(output / "base-w4a16", optim_config="auto")
    losses["4-bit base"] = loss_of(model, held_out)

    # 3. LoRA in a stock Trainer.
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    arguments = TrainingArguments(
        str(output / "training"),
        max_steps=steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to=[],
        logging_strategy="no",
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model=model, args=arguments, train_dataset=train).train()
    losses["4-bit base + LoRA"] = loss_of(model, held_out)

    # 4. The adapter alone is saved, and loaded onto the 4-bit base again.
    model.save_pretrained(output / "adapter")
    base = AutoModelForCausalLM.from_pretrained(output / "base-w4a16", optim_config="auto")
    again = PeftModel.from_pretrained(base, output / "adapter")
    losses["adapter loaded again"] = loss_of(again, held_out)

    # 5. Merge into dense layers.
    hf_optim.restore(again)
    merged = again.merge_and_unload()
    merged.save_pretrained(output / "merged")
    tokenizer.save_pretrained(output / "merged")
    losses["merged, dense"] = loss_of(AutoModelForCausalLM.from_pretrained(output / "merged"), held_out)

    print("loss on held-out text, nats per token")
    for name, loss in losses.items():
        print(f"  {name:<26} {loss:.4f}")
    sizes = [size_of(output / name) for name in ("base-w4a16", "adapter", "merged")]
    print(f"checkpoints: base {sizes[0] / 1e6:.2f} MB, adapter {sizes[1] / 1e3:.0f} kB, merged {sizes[2] / 1e6:.2f} MB")
    return losses


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="QLoRA end to end: 4-bit base, LoRA, Trainer, save, merge.")
    parser.add_argument("--model", default=str(bundled_model()), help="Hub id or folder (default: the bundled model)")
    parser.add_argument("--text", help="text, json, jsonl, csv, tsv or parquet file (default: Python's manual)")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps")
    parser.add_argument("--calibration-rows", type=int, default=64, help=f"rows of {WIDTH} tokens for GPTQ")
    parser.add_argument("--evaluation-rows", type=int, default=64, help=f"rows of {WIDTH} tokens to evaluate on")
    parser.add_argument("--output", type=Path, help="folder to keep the checkpoints in (default: a temporary one)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    given = parse()
    with tempfile.TemporaryDirectory() as folder:
        main(
            given.model,
            given.text,
            given.steps,
            given.calibration_rows,
            given.evaluation_rows,
            given.output or Path(folder),
        )
