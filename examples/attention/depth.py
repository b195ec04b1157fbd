"""babyllama-1m with tied blocks, and with tokens that halt, before and after a short recovery.

    python examples/attention/depth.py --shared ../shared --output model_cards/attention
    python examples/attention/depth.py --shared ../shared --output trial --recovery 5 --texts 4    # a trial

Each row is the pretrained model as ``universal_transformer`` (and ``act``) leaves it, trained for ``--recovery`` steps
of four windows of 256 tokens of stories, as a dense control is: perplexity on held-out stories before and after, the
parameters that a checkpoint holds, the bytes of a cache, and the steps of a token. ``study`` is for other scripts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import stories
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_optim

PLAIN = {"technique": "universal_transformer", "position_signal": "none", "step_signal": "none"}
LEARNED = {"technique": "universal_transformer", "position_signal": "none", "step_signal": "learned"}
Recipes = dict[str, list[dict[str, Any]]]
RECIPES: Recipes = {
    "dense": [],
    "one block, mean": [PLAIN],
    "one block, mean, learned steps": [LEARNED],
    "one block, the first": [{**LEARNED, "initial": 0}],
    "two blocks, mean": [{**LEARNED, "groups": 2}],
    "two blocks, the first": [{**LEARNED, "groups": 2, "initial": 0}],
    "four blocks, the first": [{**LEARNED, "groups": 4, "initial": 0}],
    "four blocks, the first, halting": [{**LEARNED, "groups": 4, "initial": 0}, {"technique": "act", "bias": -2.0}],
}


def study(
    shared: Path, recovery: int, texts: int, recipes: dict[str, list[dict[str, Any]]] = RECIPES
) -> dict[str, Any]:
    """Return a row for each recipe: parameters, perplexities before and after ``recovery`` steps, steps of a token.

    Args:
        shared: folder with models/babyllama-1m and data/tinystories.
        recovery: steps of the Trainer, of four windows each.
        texts: held-out windows of 256 tokens.
        recipes: by their names in the table.
    """
    home, data = shared / "models" / "babyllama-1m", shared / "data" / "tinystories"
    tokenizer = AutoTokenizer.from_pretrained(home)
    held = stories.windows(tokenizer, data / "eval.jsonl", texts)
    train = stories.windows(tokenizer, data / "train.jsonl", 4 * recovery)
    rows = []
    for name, recipe in recipes.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(home).eval()
        layers = model.config.num_hidden_layers
        if recipe:
            model = hf_optim.optimize(model, recipe)
        row = {"recipe": name, "layers": layers, "parameters": model.num_parameters()}
        row |= {"cache_bytes": stories.cache_bytes(model, held), "before": stories.perplexity(model, held)}
        model = stories.recovered(model, train, recovery)
        row["after"] = stories.perplexity(model, held)
        if (pondered := getattr(model, "pondered", None)) is not None:
            row["mean_steps"] = round(float(pondered.steps.double().mean()), 4)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return {"held_out_tokens": held.numel(), "steps": recovery, "batch": 4, "context": stories.CONTEXT, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shared", required=True, type=Path, help="folder with models and data")
    parser.add_argument("--output", type=Path, default=Path("model_cards/attention"))
    parser.add_argument("--recovery", type=int, default=60, help="steps of training")
    parser.add_argument("--texts", type=int, default=48, help="held-out windows of 256 tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = study(args.shared, args.recovery, args.texts)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "depth.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
