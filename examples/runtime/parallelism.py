"""Parts of a 4-bit model on two ranks beside the whole of it: outputs, tokens, and bytes of each rank.

    python examples/runtime/parallelism.py --model ../shared/models/babyllama-1m --output model_cards/runtime

The model is quantized by ``rtn`` with ``parallelism`` in its recipe, so that ``optim_config="auto"`` under ``torchrun``
divides it. Both ranks run on one machine with gloo, which says what is equal and how much a rank holds, and nothing
about time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim  # noqa: F401 - gives from_pretrained its optim_config

RANKS, NEW = 2, 48
PROMPT = "Once upon a time, there was a little girl"


def bytes_of(model: Any) -> int:
    """Return the bytes of all parameters and buffers that a model holds, each once."""
    tensors = {id(t): t for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def load(checkpoint: str) -> Any:
    """Return the checkpoint on hf_optim's kernels, divided if the process is a rank."""
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, optim_config="auto").eval()


def computed(checkpoint: str) -> dict[str, Any]:
    """Return logits of a prompt, the tokens of greedy decoding, and the bytes that the process holds."""
    model, tokenizer = load(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits.float()
        tokens = model.generate(ids, max_new_tokens=NEW, do_sample=False)
    return {"logits": logits, "tokens": tokens.tolist(), "bytes": bytes_of(model)}


def run_rank(checkpoint: str, folder: Path) -> None:
    """Compute as one rank and write what it found."""
    found = computed(checkpoint)
    torch.save(found, folder / f"rank-{os.environ['RANK']}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a small language model")
    parser.add_argument("--output", type=Path, help="the folder of the record")
    parser.add_argument("--rank-of", nargs=2, metavar=("CHECKPOINT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of[0], Path(args.rank_of[1]))
        return
    with tempfile.TemporaryDirectory() as home:
        folder, checkpoint = Path(home), str(Path(home) / "w4a16")
        recipe = [{"technique": "rtn", "bits": 4, "group_size": 32}, {"technique": "parallelism", "ranks": RANKS}]
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, optim_config=recipe)
        model.save_pretrained(checkpoint)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(checkpoint)
        whole = computed_alone(checkpoint)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        subprocess.run([*command, __file__, "--rank-of", checkpoint, home], check=True)
        ranks = [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]
    record = {
        "model": args.model.name,
        "recipe": recipe,
        "torch": torch.__version__,
        "new_tokens": NEW,
        "bytes_whole": whole["bytes"],
        "bytes_of_ranks": [rank["bytes"] for rank in ranks],
        "largest_difference": [float((r["logits"] - whole["logits"]).abs().max()) for r in ranks],
        "largest_logit": float(whole["logits"].abs().max()),
        "equal_tokens": [rank["tokens"] == whole["tokens"] for rank in ranks],
    }
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "parallelism.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def computed_alone(checkpoint: str) -> dict[str, Any]:
    """Compute in this process, whose checkpoint then must not ask for ranks: of a copy without that entry."""
    path = Path(checkpoint) / "config.json"
    text = path.read_text(encoding="utf-8")
    config = json.loads(text)
    config.pop("hf_optim_parallelism")
    path.write_text(json.dumps(config), encoding="utf-8")
    try:
        return computed(checkpoint)
    finally:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
