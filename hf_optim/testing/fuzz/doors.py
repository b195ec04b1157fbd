"""The doors: for each kind of input, what is mutated, what reads it, and what a result must equal."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
import yaml

from ...checkpoints.hub import _require_finished
from ...checkpoints.source import ModelSource, load_model
from ...cli.check import check
from ...data.calibration_set import build_calibration_data
from ...evaluation.cards.card import Card
from ...evaluation.cards.index import render_index
from ...evaluation.evaluate import evaluate
from ...lifecycle.loading import optimize
from ...recipes.config import DataConfig, OptimConfig
from ...runs.record import FILE_NAME, Record
from ..models import tiny_llama
from .examples import STEPS, Examples
from .mutations import dumps, mutate_bytes, mutate_json, mutate_safetensors, mutate_tree

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
TOLERANCE = 1e-4
# Compressed checkpoints that stock transformers reads without further packages.
STOCK_READS = ("w4", "w8a8", "fp8")
IDS = torch.arange(20).reshape(2, 10) % 60


class WrongResult(Exception):
    """An input was accepted and gave a result that neither the unmutated one nor stock transformers gives."""


@dataclass(frozen=True)
class Door:
    """One way in.

    Attributes:
        kind: what is mutated.
        name: what reads it.
        enter: mutates an example in an empty folder, and reads it; returns after reading, or raises.
    """

    kind: str
    name: str
    enter: Callable[[Examples, Path, Random], None]


# -- checkpoints ------------------------------------------------------------------------------------------------------
def logits(model: Any) -> torch.Tensor:
    """Return the logits of a decoder on fixed token ids, float32."""
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def _forward(load: Callable[[], Any]) -> torch.Tensor | None:
    """Return the logits of what ``load`` returns; None if it or its forward raises."""
    try:
        return logits(load())
    except Exception:  # any failure of stock transformers
        return None


def require_like_stock(model: Any, home: Path, original: torch.Tensor) -> None:
    """Raise ``WrongResult`` unless a model has the original's logits, or those of the stock loader on the same files."""
    cls = transformers.AutoModelForCausalLM
    ours, stock = _forward(lambda: model), None
    if ours is not None and ours.shape == original.shape and torch.allclose(ours, original, atol=TOLERANCE):
        return
    with torch.random.fork_rng():
        stock = _forward(lambda: cls.from_pretrained(home, trust_remote_code=False, use_safetensors=True))
    if ours is None and stock is None:
        return
    if ours is None or stock is None:
        raise WrongResult("only one of ours and stock transformers runs it")
    if ours.shape != stock.shape or not torch.allclose(ours, stock, atol=TOLERANCE, equal_nan=True):
        raise WrongResult(f"logits differ from stock transformers by {(ours - stock).abs().max():.3g}")


def _mutated(source: Path, home: Path, name: str, mutation: Callable[[bytes, Random], bytes], random: Random) -> Path:
    """Copy a checkpoint into ``home``, and mutate one of its files."""
    target = home / "model"
    shutil.copytree(source, target)
    (target / name).write_bytes(mutation((source / name).read_bytes(), random))
    return target


def _quantization(raw: bytes, random: Random) -> bytes:
    import json

    config = json.loads(raw)
    return dumps({**config, "quantization_config": mutate_tree(config["quantization_config"], random)})


def _load_dense(part: str, mutation: Callable[[bytes, Random], bytes]) -> Callable[[Examples, Path, Random], None]:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.sharded if part == INDEX else examples.dense
        target = _mutated(source, home, part, mutation, random)
        require_like_stock(load_model(ModelSource(str(target))), target, logits(tiny_llama()))

    return enter


def _optimize_dense(part: str, mutation: Callable[[bytes, Random], bytes]) -> Callable[[Examples, Path, Random], None]:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.sharded if part == INDEX else examples.dense
        target = _mutated(source, home, part, mutation, random)
        # 0 % sparsity keeps the weights, so that stock transformers is the reference.
        cls = random.choice((transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM))
        model = cls.from_pretrained(target, optim_config=[{"technique": "magnitude", "sparsity": 0.0}])
        require_like_stock(model, target, logits(tiny_llama()))

    return enter


def _check_model(part: str, mutation: Callable[[bytes, Random], bytes]) -> Callable[[Examples, Path, Random], None]:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.sharded if part == INDEX else examples.dense
        check([{"technique": "rtn", "bits": 4}], str(_mutated(source, home, part, mutation, random)))

    return enter


def _auto(
    part: str, mutation: Callable[[bytes, Random], bytes], names: Sequence[str]
) -> Callable[[Examples, Path, Random], None]:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.compressed(random.choice(names))
        cls = transformers.AutoModelForCausalLM
        original = logits(cls.from_pretrained(source, optim_config="auto"))
        target = _mutated(source, home, part, mutation, random)
        require_like_stock(cls.from_pretrained(target, optim_config="auto"), target, original)

    return enter


# -- recipes ----------------------------------------------------------------------------------------------------------
def _recipe(examples: Examples, home: Path, random: Random, few: bool = False) -> Path:
    listed = examples.recipes[: len(STEPS)] if few else examples.recipes
    tree, path = mutate_tree(random.choice(listed), random), home / random.choice(("r.yaml", "r.json"))
    if path.suffix == ".json":
        raw = dumps(tree)
    else:
        raw = yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    path.write_bytes(mutate_bytes(raw, random) if random.random() < 0.3 else raw)
    return path


def _parse(examples: Examples, home: Path, random: Random) -> None:
    OptimConfig.parse(_recipe(examples, home, random)).check()


def _check(examples: Examples, home: Path, random: Random) -> None:
    check(_recipe(examples, home, random), str(examples.dense))


def _apply(examples: Examples, home: Path, random: Random) -> None:
    path = _recipe(examples, home, random, few=True)
    transformers.AutoModelForCausalLM.from_pretrained(
        examples.dense, optim_config=str(path), calibration=examples.batches, tokenizer=examples.tokenizer
    )


# -- records ----------------------------------------------------------------------------------------------------------
def _write_record(examples: Examples, folder: Path, random: Random) -> Path:
    folder.mkdir()
    (folder / FILE_NAME).write_bytes(mutate_json(examples.record, random))
    return folder


def _require_inside(home: Path, folder: Path) -> None:
    stray = [path for path in home.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
    if stray:
        raise WrongResult(f"{stray[0]} was written outside {folder}")


def _card(examples: Examples, home: Path, random: Random) -> None:
    folder = _write_record(examples, home / "card", random)
    Card(Record.read(folder), folder).write()
    _require_inside(home, folder)


def _index(examples: Examples, home: Path, random: Random) -> None:
    (home / "all").mkdir()
    for name in ("a", "b"):
        _write_record(examples, home / "all" / name, random)
    render_index(home / "all")
    _require_inside(home, home / "all")


def _push(examples: Examples, home: Path, random: Random) -> None:
    folder = _write_record(examples, home / "card", random)
    for name in ("config.json", "README.md", WEIGHTS):
        (folder / name).write_text("{}")
    _require_finished(folder)


# -- journals ---------------------------------------------------------------------------------------------------------
def _resume(examples: Examples, home: Path, random: Random) -> None:
    original = logits(examples.resume(home / "whole", False))
    journal = home / "journal"
    shutil.copytree(examples.journal, journal)
    path = random.choice(sorted(path for path in journal.rglob("*") if path.is_file()))
    mutation = (
        mutate_safetensors if path.suffix == ".safetensors" else mutate_json if path.suffix == ".json" else mutate_bytes
    )
    path.write_bytes(mutation(path.read_bytes(), random))
    if not torch.equal(logits(examples.resume(journal, True)), original):
        raise WrongResult("a resumed run gave other weights")


# -- data -------------------------------------------------------------------------------------------------------------
def _data_file(examples: Examples, home: Path, random: Random) -> DataConfig:
    suffix = random.choice(sorted(examples.data))
    raw, path = examples.data[suffix], home / f"data{suffix}"
    if suffix.endswith(".jsonl") and random.random() < 0.6:
        lines = raw.splitlines()
        for _ in range(random.choice((1, 1, len(lines)))):
            at = random.randrange(len(lines))
            lines[at] = mutate_json(lines[at], random) if lines[at].startswith(b"{") else lines[at]
        path.write_bytes(b"\n".join(lines))
    else:
        path.write_bytes(mutate_bytes(raw, random))
    column = random.choice((None, None, None, "text", "label", "nothing"))
    return DataConfig(
        dataset=str(path), samples=random.choice((1, 2, None)), seq_len=random.choice((4, 8)), text_column=column
    )


def _calibrate_on_file(examples: Examples, home: Path, random: Random) -> None:
    model = tiny_llama()
    build_calibration_data(
        None, model_config=model.config, tokenizer=examples.tokenizer, data=_data_file(examples, home, random)
    )


def _evaluate_lm(examples: Examples, home: Path, random: Random) -> None:
    evaluate(tiny_llama(), examples.tokenizer, _data_file(examples, home, random), speed=False)


def _evaluate_classifier(examples: Examples, home: Path, random: Random) -> None:
    evaluate(examples.classifier, examples.tokenizer, _data_file(examples, home, random), speed=False)


_TENSORS: tuple[Callable[[], Any], ...] = (
    lambda: IDS, lambda: IDS[:0], lambda: IDS[:, :0], lambda: IDS.float(), lambda: IDS.bool(), lambda: IDS[0], lambda: IDS[0, 0],
    lambda: IDS + 1000, lambda: -IDS, lambda: IDS[None], lambda: IDS.tolist(), list, lambda: None, lambda: "text",
    lambda: torch.full((2, 10), float("nan")), lambda: torch.ones_like(IDS), lambda: torch.zeros_like(IDS), lambda: IDS[:, :5],
    lambda: IDS.numpy(), lambda: IDS.to_sparse(), lambda: IDS.to("meta"),
)  # fmt: skip


def _calibrate_in_memory(examples: Examples, home: Path, random: Random) -> None:
    keys = ("input_ids", "attention_mask", "labels", "position_ids", "pixel_values", "nothing", "")
    chosen = ("input_ids", *random.sample(keys, random.randrange(3)))
    batch = {key: random.choice(_TENSORS)() for key in chosen}
    values: tuple[Any, ...] = (
        [batch],
        [{"input_ids": IDS}, batch],
        batch,
        batch["input_ids"],
        [],
        [[]],
        [{}],
        [""],
        ["the cat"],
        5,
        [None],
    )
    optimize(tiny_llama(), STEPS[4], random.choice(values), tokenizer=examples.tokenizer)


DOORS = (
    Door("recipe", "parse", _parse),
    Door("recipe", "check", _check),
    Door("recipe", "from_pretrained", _apply),
    Door("config", "load", _load_dense(CONFIG, mutate_json)),
    Door("config", "from_pretrained", _optimize_dense(CONFIG, mutate_json)),
    Door("config", "check", _check_model(CONFIG, mutate_json)),
    Door("index", "load", _load_dense(INDEX, mutate_json)),
    Door("index", "from_pretrained", _optimize_dense(INDEX, mutate_json)),
    Door("index", "check", _check_model(INDEX, mutate_json)),
    Door("safetensors", "load", _load_dense(WEIGHTS, mutate_safetensors)),
    Door("safetensors", "auto", _auto(WEIGHTS, mutate_safetensors, STOCK_READS)),
    Door("quantization", "auto", _auto(CONFIG, _quantization, (*STOCK_READS, "gptq", "awq"))),
    Door("record", "card", _card),
    Door("record", "index", _index),
    Door("record", "push", _push),
    Door("journal", "resume", _resume),
    Door("data", "calibration", _calibrate_on_file),
    Door("data", "evaluate", _evaluate_lm),
    Door("data", "classify", _evaluate_classifier),
    Door("batches", "optimize", _calibrate_in_memory),
)
