"""A pruning, a QAT and a distillation recipe under DDP and FSDP2: the losses of one GPU at the same batch, step times.

    torchrun --nproc-per-node 1 examples/gpu/several/training.py --home DIR      # writes its losses into DIR
    torchrun --nproc-per-node 2 examples/gpu/several/training.py --home DIR --how ddp
    torchrun --nproc-per-node 2 examples/gpu/several/training.py --home DIR --how fsdp2

babyllama-1m and TinyStories from the folder ``HF_OPTIM_TEST_DATA`` (there or in its folders ``models`` and ``data``:
``babyllama-1m``, ``tinystories/train.jsonl``), 20 steps of 32 windows of 256 tokens in float32, without shuffling, so
that ranks together see the batches of one. One GPU also takes each batch in two parts, whose gradients it sums: that
differs by roundings alone, so it shows how far roundings move the losses (the codes of QAT jump). A model of one
million weights shows that the losses are equal; its step time is that of launches and collectives. The Trainer itself
joins the ranks, as it does for its users. Writes ``$OUT/training-1.json`` and ``$OUT/training-HOW-RANKS.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from ranks import CUDA, TINY, leave, now, say, write
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

import hf_optim

RANKS = int(os.environ.get("WORLD_SIZE", "1"))
DATA = Path(os.environ.get("HF_OPTIM_TEST_DATA", "shared"))
MODEL, STORIES = (
    next((path for path in (DATA / folder / name, DATA / name) if path.exists()), DATA / name)
    for folder, name in (("models", "babyllama-1m"), ("data", "tinystories/train.jsonl"))
)
STEPS, BATCH, WIDTH = (4, 4, 64) if TINY else (20, 32, 256)
RECIPES: dict[str, list[dict[str, Any]]] = {
    "gmp": [{"technique": "gmp", "sparsity": 0.5, "every": 2}],
    "qat": [{"technique": "qat", "bits": 4, "group_size": 32}],
    "logit_kd": [{"technique": "nm"}, {"technique": "logit_kd", "alpha": 0.7}],
}
FSDP = {
    "version": 2,
    "fsdp_version": 2,
    "state_dict_type": "FULL_STATE_DICT",
    "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
}


def windows() -> list[dict[str, torch.Tensor]]:
    """Return the stories of the training split one after the other, each after bos, cut into windows."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids: list[int] = []
    for line in STORIES.read_text(encoding="utf-8").splitlines():
        ids.append(tokenizer.bos_token_id)
        ids += tokenizer(json.loads(line)["text"], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= STEPS * BATCH * WIDTH:
            break
    count = len(ids) // WIDTH
    return [{"input_ids": row, "labels": row} for row in torch.tensor(ids[: count * WIDTH]).view(count, WIDTH)]


class Watch(TrainerCallback):
    """Losses and times of the steps."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.parameters: list[str] = []

    def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
        self.parameters = self.parameters or sorted({type(each).__name__ for each in model.parameters()})
        self._began = now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(now() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InOrder(hf_optim.OptimTrainer):
    """A trainer that takes the rows in their order, so that the ranks' parts of a batch are one rank's batch."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def train(name: str, how: str, rows: list[Any], home: Path) -> dict[str, Any]:
    """Train one recipe; return its losses and the milliseconds of a step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    recipe = [{**step, "teacher": str(MODEL)} if step["technique"] == "logit_kd" else step for step in RECIPES[name]]
    model = hf_optim.optimize(model, recipe, announce=False)
    watch = Watch()
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": FSDP} if how == "fsdp2" else {}
    parts = 2 if how == "one, in two parts" else 1
    arguments = TrainingArguments(
        output_dir=str(home / f"{name}-{how}"), max_steps=STEPS, report_to=[], save_strategy="no", logging_steps=1,
        per_device_train_batch_size=BATCH // RANKS // parts, gradient_accumulation_steps=parts, disable_tqdm=True,
        learning_rate=3e-4, seed=0,
        use_cpu=not CUDA, optim="adamw_torch", weight_decay=0.0, lr_scheduler_type="constant", **sharded,
        **({} if CUDA else {"ddp_backend": "gloo", "dataloader_pin_memory": False}),
    )  # fmt: skip
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, callbacks=[watch])
    began = time.perf_counter()
    trainer.train()
    if how == "fsdp2" and "DTensor" not in watch.parameters:
        raise RuntimeError("the Trainer has not sharded the parameters (on a CPU it leaves FSDP out)")
    own = torch.tensor(watch.losses[:STEPS], dtype=torch.float64)
    return {
        "losses": own.tolist(),
        "processes_of_the_trainer": trainer.accelerator.num_processes,
        "rows_a_process": arguments.train_batch_size,
        "parameters_are": watch.parameters,
        "ms_a_step": round(statistics.median(watch.seconds[3:] or watch.seconds) * 1e3, 3),
        "seconds": round(time.perf_counter() - began, 1),
        "finished": bool(trainer.run.finished),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--how", choices=("ddp", "fsdp2"), default="ddp", help="of several ranks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    if CUDA:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rows = windows()
    name_of_results = f"training-{args.how}-{RANKS}" if RANKS > 1 else "training-1"
    results: dict[str, Any] = {"steps": STEPS, "batch": BATCH, "tokens_a_row": WIDTH, "rows": []}
    one = args.home / "losses_of_one.json"
    alone = json.loads(one.read_text()) if RANKS > 1 and one.exists() else {}
    for how in (args.how,) if RANKS > 1 else ("one", "one, in two parts"):
        for name in RECIPES:
            row: dict[str, Any] = {"recipe": name, "how": how}
            try:
                row |= train(name, how, rows, args.home)
                if how == "one":
                    alone[name] = row["losses"]
                elif name in alone:
                    pairs = list(zip(row["losses"], alone[name], strict=True))
                    row["largest_difference_of_losses"] = max(abs(a - b) for a, b in pairs)
            except Exception:
                row["error"] = traceback.format_exc()[-600:]
            results["rows"].append(row)
            write(name_of_results, results)
            say({key: value for key, value in row.items() if key != "losses"}, row.get("losses", [])[-2:])
    if RANKS == 1:
        one.write_text(json.dumps(alone))
    leave()


if __name__ == "__main__":
    main()
