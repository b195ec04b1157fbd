"""Make the cards in ``model_cards/``: compress a model with each recipe, and keep the card, the record and the plots.

    python examples/make_model_cards.py --model ../shared/models/babyllama-1m \\
        --calibration calibration.jsonl --eval eval.jsonl --recipes w4a16 w3a16 w8a8

Without ``--model``, the script uses the bundled demo model, with the standard library's source as data. Weights are not
kept. With ``--render`` it measures nothing: it renders all cards, their plots and the index again from the records.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from hf_optim.cli import main as hf_optim_command
from hf_optim.cli.jobs import demo_corpus
from hf_optim.cli.jobs.demo import bundled_model
from hf_optim.runs.record import FILE_NAME

CARDS = Path(__file__).resolve().parent.parent / "model_cards"
# Only the start of each held-out file is used, so that all modules count and a laptop takes minutes.
HELD_OUT_CHARACTERS = 6_000


def write_demo_data(folder: Path, split: str) -> str:
    """Write a split of the demo corpus as a JSON-lines file; return its path."""
    path = folder / f"stdlib-{split}.jsonl"
    length = HELD_OUT_CHARACTERS if split == "held_out" else None
    rows = (json.dumps({"text": text[:length]}) for text in demo_corpus.texts(split))
    path.write_text("\n".join(rows), encoding="utf-8")
    return str(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--calibration")
    parser.add_argument("--eval")
    parser.add_argument("--recipes", nargs="+", default=["w4a16", "w8a8", "2of4-w4a16"])
    parser.add_argument("--render", action="store_true", help="only render cards and index again from the records")
    args = parser.parse_args()
    if args.render:
        for record in sorted(CARDS.glob(f"*/{FILE_NAME}")):
            render(record.parent)
        render(CARDS)
        return
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        model = args.model or str(bundled_model())
        name = Path(args.model).name if args.model else "hf-optim-demo"
        calibration = args.calibration or write_demo_data(folder, "train")
        evaluation = args.eval or write_demo_data(folder, "held_out")
        for recipe in args.recipes:
            output = folder / f"{name}-{recipe}"
            command = ["compress", model, "--recipe", recipe, "--calibration", calibration, "--eval", evaluation]
            command += ["--dtype", "float32", "--output", str(output)]
            if hf_optim_command(command):
                raise SystemExit(f"{recipe} failed on {name}")
            card = CARDS / output.name
            shutil.rmtree(card, ignore_errors=True)
            shutil.copytree(
                output, card, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*token*", "gen*", "*.py")
            )
    render(CARDS)


def render(folder: Path) -> None:
    """Render the card of a checkpoint, or the index of a folder of cards, from the records."""
    if hf_optim_command(["card", str(folder)]):
        raise SystemExit(f"{folder} was not rendered")


if __name__ == "__main__":
    main()
