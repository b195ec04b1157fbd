"""Train with masks on FSDP2 shards in a stock Trainer, resume, and check the checkpoint.

    PYTHONPATH=.:plugins:kernels torchrun --standalone --nproc-per-node GPUS examples/gpu/fsdp_masks.py

Trains six steps, then resumes from the checkpoint after three. Prints whether masks and weights are bitwise identical,
and whether the saved model has its zeros.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim.runs.masking import stray_weights
from hf_optim.toolkit.distributed import fsdp

warnings.simplefilter("ignore")
GMP = [{"technique": "gmp", "sparsity": 0.6, "initial": 0.2, "every": 1}]
FSDP = {
    "version": 2,
    "fsdp_version": 2,
    "state_dict_type": "FULL_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}


class RandomTokens(Dataset):
    ids = torch.randint(0, 512, (64, 32), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def build_model():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    return LlamaForCausalLM(config)


def train(home, resume=None):
    """Train six steps; return the trainer, the run and the full weights."""
    model = hf_optim.optimize(build_model(), GMP)
    arguments = TrainingArguments(
        output_dir=str(home / "trainer"), max_steps=6, per_device_train_batch_size=2, report_to=[], save_steps=3,
        save_strategy="steps", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2, weight_decay=0.1, seed=0,
        fsdp=True, fsdp_config=FSDP,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=RandomTokens(), callbacks=hf_optim.callbacks(model))
    trainer.train(resume_from_checkpoint=resume)
    run = hf_optim.run_of(model)
    if stray_weights(run) or not run.finished:
        raise AssertionError("weights outside their masks")
    return trainer, run, {name: fsdp.full_tensor(p.detach()).clone() for name, p in run.model.named_parameters()}


def main():
    ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    # All ranks need the same folder, and the launcher's port is the same for all of them.
    home = Path(tempfile.gettempdir()) / f"fsdp-masks-{os.environ['MASTER_PORT']}"
    trainer, run, weights = train(home)
    _, resumed_run, resumed_weights = train(home, str(home / "trainer" / "checkpoint-3"))
    trainer.save_model(str(home / "final"))
    dist.barrier()
    if rank == 0:
        saved = AutoModelForCausalLM.from_pretrained(home / "final")
        results = {
            "device": torch.cuda.get_device_name(),
            "ranks": ranks,
            "parameters are": sorted({type(p).__name__ for p in run.model.parameters()}),
            "masks equal after resuming": all(torch.equal(run.masks[n], resumed_run.masks[n]) for n in run.masks),
            "weights equal after resuming": all(torch.equal(weights[n], resumed_weights[n]) for n in weights),
            "zeros in the checkpoint": all(not saved.get_parameter(n)[~m.cpu()].any() for n, m in run.masks.items()),
            "sparsity": run.record.steps["0"]["sparsity"],
        }
        text = json.dumps(results, indent=1)
        print(text, flush=True)
        (Path(os.environ.get("OUT", ".")) / "fsdp-masks.json").write_text(text + "\n", encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
