"""The ``compress`` job on the bundled model, for ``make demo`` and ``hf-optim demo``."""

from __future__ import annotations

import dataclasses
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import torch

from ...checkpoints.atomic import require_replaceable
from ...checkpoints.source import ModelSource
from ...errors import OptimError
from ...recipes.config import DataConfig, OptimConfig
from ...runs import progress
from ...runs.record import Record
from ...runs.run import Run
from . import demo_corpus
from .compress import Job, compress

log = logging.getLogger(__name__)

RECIPE = "w4a16"
CALIBRATION_SEQUENCES = 64
EVALUATION_SEQUENCES = 48

# Run in a process that cannot import hf_optim: the logits are those of stock transformers.
STOCK_RELOAD = """
import sys
sys.modules["hf_optim"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["input_ids"]).logits
save_file({"logits": logits.contiguous()}, sys.argv[3])
"""


def bundled_model() -> Path:
    """Return the directory of the demo model that is bundled with hf_optim."""
    return Path(str(resources.files("hf_optim.cli.jobs") / "demo_model"))


def demo(output: Path, print_line: Callable[[str], None] = log.info) -> Record:
    """Compress and evaluate the bundled model, write checkpoint and card, and check the reload. Returns the record.

    Raises ``OptimError`` if stock transformers reloads the checkpoint with different logits.
    """
    require_replaceable(output)
    with tempfile.TemporaryDirectory() as folder:
        calibration = _corpus(Path(folder) / "stdlib-train.jsonl", "train")
        held_out = _corpus(Path(folder) / "stdlib-held-out.jsonl", "held_out")
        recipe = OptimConfig.load(RECIPE)
        recipe = dataclasses.replace(
            recipe, calibration=DataConfig(dataset=str(calibration), samples=CALIBRATION_SEQUENCES)
        )
        source = ModelSource(str(bundled_model()), dtype="float32")
        evaluation = DataConfig(dataset=str(held_out), samples=EVALUATION_SEQUENCES)
        run = compress(Job(source, recipe, output, evaluation, device="cpu", print_line=print_line))
        with progress.stage("reloading with stock transformers"):
            check_stock_reload(run, output, Path(folder))
        print_line("reloaded by stock transformers in a process without hf_optim: identical logits")
    return run.record


def check_stock_reload(run: Run, output: Path, folder: Path) -> None:
    """Reload ``output`` with stock transformers in another process and compare the logits.

    Raises ``OptimError`` unless they are bitwise identical.
    """
    from safetensors.torch import load_file, save_file

    text = "def main(argv):\n    parser = argparse.ArgumentParser()\n"
    ids = run.tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = run.model(ids).logits
    files = [folder / "ids.safetensors", folder / "logits.safetensors"]
    save_file({"input_ids": ids}, files[0])
    command = [sys.executable, "-c", STOCK_RELOAD, str(output), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OptimError(f"stock transformers could not load {output}: {done.stderr.strip().splitlines()[-1]}")
    if not torch.equal(load_file(files[1])["logits"], expected):
        raise OptimError("the logits of stock transformers differ from those of the model in memory")


def _corpus(path: Path, split: str) -> Path:
    with path.open("w", encoding="utf-8") as file:
        for text in demo_corpus.texts(split):
            file.write(json.dumps({"text": text}) + "\n")
    return path
