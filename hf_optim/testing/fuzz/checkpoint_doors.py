"""Doors for the files of a checkpoint: what loads must be what stock transformers loads from the same files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers

from ...checkpoints.source import ModelSource, load_model, load_processor
from ...cli.check import check
from ...data.calibration_set import build_calibration_data
from ...errors import OptimError
from ...recipes.config import DataConfig
from ..models import tiny_llama
from .door import Door, Enter, StockError, WrongResult, frames_of_ours
from .examples import IDS, Examples
from .mutations import Mutation, dumps, mutate_bytes, mutate_json, mutate_safetensors, mutate_tree

INDEX, WEIGHTS, CONFIG = "model.safetensors.index.json", "model.safetensors", "config.json"
GENERATION = "generation_config.json"
TOLERANCE = 1e-4
# Compressed checkpoints that stock transformers reads without further packages.
STOCK_READS = ("w4", "w8a8", "fp8")
AUTO = transformers.AutoModelForCausalLM


def logits(model: Any) -> torch.Tensor:
    """Return the logits of a decoder on fixed token ids, float32."""
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def _or_error(compute: Callable[[], Any]) -> tuple[Any, str]:
    """Return what ``compute`` returns, and an empty text; or None and the type of its error."""
    try:
        return compute(), ""
    except Exception as error:  # any failure of stock transformers
        return None, type(error).__name__


def _stock(home: Path) -> tuple[Any, bool, str]:
    """Load with stock transformers: the model or None, whether every tensor was placed, and the type of an error."""
    with torch.random.fork_rng():
        found, failure = _or_error(
            lambda: AUTO.from_pretrained(home, trust_remote_code=False, use_safetensors=True, output_loading_info=True)
        )
    if found is None:
        return None, False, failure
    model, info = found
    keys = ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")
    return model, not any(info.get(key) for key in keys), ""


def require_like_stock(model: Any, home: Path, original: torch.Tensor) -> None:
    """Raise ``WrongResult`` unless a model computes what the stock loader's does for the same files.

    Where the stock loader fails, or leaves tensors at random, the model must have the logits of the unmutated files.
    """
    stock, whole, failure = _stock(home)
    ours, error = _or_error(lambda: logits(model))
    expected, stock_error = _or_error(lambda: logits(stock)) if whole else (original, "")
    if ours is None and stock_error == error:
        return  # both load it, and the forward fails alike
    if ours is None or expected is None:
        raise WrongResult(f"only one of ours ({error or 'runs'}) and stock ({stock_error or 'runs'}) runs it")
    if ours.shape != expected.shape or not torch.allclose(ours, expected, atol=TOLERANCE, equal_nan=whole):
        of = "stock transformers" if whole else f"the original, and stock does not load it whole ({failure})"
        raise WrongResult(f"logits differ from {of}: {_distance(ours, expected)}")


def _distance(ours: torch.Tensor, expected: torch.Tensor) -> str:
    if ours.shape != expected.shape:
        return f"{tuple(ours.shape)} and {tuple(expected.shape)}"
    return f"by {(ours - expected).abs().max():.3g}"


def _as_user(examples: Examples, home: Path, cls: Any, **kwargs: Any) -> Any:
    """Load as a user does. Raises ``StockError`` for a file that transformers refuses before hf_optim is reached."""
    try:
        return cls.from_pretrained(home, **kwargs)
    except OptimError:
        raise
    except Exception as error:
        if not frames_of_ours(error) and examples.stock_error(home, cls.__name__).startswith(type(error).__name__):
            raise StockError(str(error)[:300]) from error
        raise


def _mutated(source: Path, home: Path, name: str, mutation: Mutation, random: Random) -> Path:
    """Copy a checkpoint into ``home``, and mutate one of its files."""
    target = home / "model"
    shutil.copytree(source, target)
    (target / name).write_bytes(mutation((source / name).read_bytes(), random))
    return target


def _dense(examples: Examples, part: str) -> Path:
    return examples.sharded if part == INDEX else examples.dense


def _quantization(raw: bytes, random: Random) -> bytes:
    config = json.loads(raw)
    return dumps({**config, "quantization_config": mutate_tree(config["quantization_config"], random)})


def _load(part: str, mutation: Mutation) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        target = _mutated(_dense(examples, part), home, part, mutation, random)
        require_like_stock(load_model(ModelSource(str(target))), target, logits(tiny_llama()))

    return enter


def _from_pretrained(part: str, mutation: Mutation) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        target = _mutated(_dense(examples, part), home, part, mutation, random)
        # 0 % sparsity keeps the weights, so that stock transformers is the reference.
        cls = random.choice((AUTO, transformers.LlamaForCausalLM))
        model = _as_user(examples, target, cls, optim_config=[{"technique": "magnitude", "sparsity": 0.0}])
        require_like_stock(model, target, logits(tiny_llama()))

    return enter


def _check(part: str, mutation: Mutation) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        check([{"technique": "rtn", "bits": 4}], str(_mutated(_dense(examples, part), home, part, mutation, random)))

    return enter


def _auto(part: str, mutation: Mutation, names: Sequence[str]) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.compressed(random.choice(names))
        original = logits(AUTO.from_pretrained(source, optim_config="auto"))
        target = _mutated(source, home, part, mutation, random)
        require_like_stock(_as_user(examples, target, AUTO, optim_config="auto"), target, original)

    return enter


def _load_compressed(part: str, mutation: Mutation) -> Enter:
    def enter(examples: Examples, home: Path, random: Random) -> None:
        source = examples.compressed(random.choice(STOCK_READS))
        original = logits(AUTO.from_pretrained(source))
        target = _mutated(source, home, part, mutation, random)
        require_like_stock(load_model(ModelSource(str(target))), target, original)

    return enter


def _tokenizer(examples: Examples, home: Path, random: Random) -> None:
    target = home / "model"
    shutil.copytree(examples.dense, target)
    examples.tokenizer.save_pretrained(target)
    path = random.choice(sorted(target.glob("*token*.json")) + sorted(target.glob("*.jinja")))
    mutation = mutate_json if path.suffix == ".json" else mutate_bytes
    path.write_bytes(mutation(path.read_bytes(), random))
    found = load_processor(ModelSource(str(target)), transformers.LlamaForCausalLM)
    data = DataConfig(dataset=str(examples.texts), samples=2, seq_len=8)
    build_calibration_data(None, model_config=tiny_llama().config, tokenizer=found, data=data)


DOORS = (
    Door("config", "load", _load(CONFIG, mutate_json)),
    Door("config", "from_pretrained", _from_pretrained(CONFIG, mutate_json)),
    Door("config", "check", _check(CONFIG, mutate_json)),
    Door("config", "generation", _from_pretrained(GENERATION, mutate_json)),
    Door("tokenizer", "load", _tokenizer),
    Door("index", "load", _load(INDEX, mutate_json)),
    Door("index", "from_pretrained", _from_pretrained(INDEX, mutate_json)),
    Door("index", "check", _check(INDEX, mutate_json)),
    Door("safetensors", "load", _load(WEIGHTS, mutate_safetensors)),
    Door("safetensors", "auto", _auto(WEIGHTS, mutate_safetensors, STOCK_READS)),
    Door("quantization", "auto", _auto(CONFIG, _quantization, (*STOCK_READS, "gptq", "awq"))),
    Door("quantization", "load", _load_compressed(CONFIG, _quantization)),
)
