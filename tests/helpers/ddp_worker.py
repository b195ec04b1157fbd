"""Run by ``test_ddp`` as one of two ranks: every technique that trains, under DDP. Its settings serve one rank too."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tiny_models import tiny_llama
from toy_training import arguments, sentences
from transformers import PreTrainedModel

import hf_optim
from hf_optim.toolkit.distributed import collectives

KD = {"technique": "logit_kd", "alpha": 0.7}
HALF: dict[str, Any] = {"sparsity": 0.5}
QUICK = {**HALF, "end": 0.3}
# Without chance, so that two ranks must learn what one learns from their batches together.
EXACT: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"technique": "magnitude", **HALF}],
    "gmp": [{"technique": "gmp", **HALF, "every": 2}],
    "iterative": [{"technique": "iterative", **HALF, "rounds": 2}],
    "lr_rewinding": [{"technique": "lr_rewinding", **HALF, "rounds": 2, "dense": True}],
    "sr_ste": [{"technique": "sr_ste", "decay": 1e-3}],
    "top_kast": [{"technique": "top_kast", **HALF, "backward_sparsity": 0.2, "end": 0.75}],
    "nm, logit_kd": [{"technique": "nm"}, KD],
    "structured, logit_kd": [
        {"technique": "structured", "neurons": 0.25, "score": "magnitude"}, {**KD, "direction": "js"}
    ],
    "distilbert": [{"technique": "distilbert", "layers": [1]}],
}  # fmt: skip
# With noise of each rank's own, or (SquareHead) a norm of its own batch.
OWN: dict[str, list[dict[str, Any]]] = {
    "nm, logit_kd with states": [{"technique": "nm"}, {**KD, "alpha_states": 0.5}],
    "l0": [{"technique": "l0", **QUICK, "initial": 0.8, "gate_learning_rate": 0.5}],
    "l0, settled": [{"technique": "l0", **QUICK, "initial": 0.8, "gate_learning_rate": 0.5, "settle": 0.5}],
    "variational_dropout": [{"technique": "variational_dropout", **QUICK, "examples": 99}],
    "variational_dropout, settled": [{"technique": "variational_dropout", **QUICK, "settle": 0.5}],
}
TRAINED = {"max_steps": 8, "learning_rate": 1e-3, "optim": "adamw_torch", "weight_decay": 0.1}


def train(recipe: list[dict[str, Any]], folder: Path, **changes: Any) -> PreTrainedModel:
    """Eight steps on four sentences each. Returns the trained model."""
    model = hf_optim.optimize(tiny_llama(), recipe)
    trainer = hf_optim.OptimTrainer(
        model=model, args=arguments(folder, **{**TRAINED, **changes}), train_dataset=sentences(64)
    )
    trainer.train()
    assert trainer.run.finished
    return trainer.run.model


def whole(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Weights and masks."""
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return weights | {f"mask of {name}": mask.clone() for name, mask in hf_optim.run_of(model).masks.items()}


def main() -> int:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    home = Path(sys.argv[1])
    for name, recipe in {**EXACT, **OWN}.items():
        found = whole(train(recipe, home / name, ddp_backend="gloo"))
        flat = torch.cat([t.flatten().double() for t in found.values()])
        gathered = [torch.empty_like(flat) for _ in range(2)]
        dist.all_gather(gathered, flat)
        if not torch.equal(*gathered):
            raise AssertionError(f"{name}: the ranks have become different models")
        if collectives.rank() == 0:
            save_file(found, home / f"{name}.safetensors")
            print(name, flush=True)
        dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
