"""Valid tiny examples of everything that is read: checkpoints, their files, recipes, records, journals and data."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from ...data.calibration_set import CalibrationData
from ...lifecycle.loading import optimize
from ...recipes.config import OptimConfig, shipped_recipes
from ..models import tiny_bert, tiny_llama
from ..stock import StockTransformers
from .example_files import bench_results, data_files

IDS = torch.arange(20).reshape(2, 10) % 60
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "over",
    "mat",
    "log",
    "fast",
    "and",
    "then",
    "slept",
    "all",
    "day",
]
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 16,
    "desc_act": False,
    "sym": True,
    "checkpoint_format": "gptq",
}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}
STEPS: tuple[Any, ...] = (
    [{"technique": "rtn", "bits": 4, "group_size": 16, "targets": ["Linear"], "skip": ["lm_head"]}],
    [{"technique": "smoothquant", "alpha": 0.5}, {"technique": "rtn", "bits": 8}],
    [{"technique": "magnitude", "sparsity": 0.5}],
    [{"technique": "nm", "keep": 2, "group": 4}],
    [{"technique": "gptq", "bits": 4, "group_size": 16}],
    [{"technique": "structured"}],
)
TRAINING: Mapping[str, Any] = {"max_steps": 2, "learning_rate": 1e-3, "save_strategy": "no"}
TRAINING_STEPS: tuple[Any, ...] = (
    [{"technique": "gmp", "sparsity": 0.5}],
    [{"technique": "sr_ste"}],
    [{"technique": "top_kast", "sparsity": 0.5}],
)


class Examples:
    """Examples in a folder, each made once.

    Args:
        home: a folder for them.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._child = contextlib.ExitStack()
        self.batches = [{"input_ids": torch.arange(24).reshape(2, 12) % 60} for _ in range(2)]

    def close(self) -> None:
        """End the child process of ``stock_error``."""
        self._child.close()

    @cached_property
    def _stock(self) -> StockTransformers:
        return self._child.enter_context(StockTransformers())

    def stock_error(self, home: Path, class_name: str) -> str:
        """Return the error of a process that cannot import hf_optim for a checkpoint; empty if it loads and runs."""
        try:
            self._stock.logits(home, class_name, {"input_ids": IDS})
            return ""
        except OSError as error:
            return str(error)

    @cached_property
    def tokenizer(self) -> Any:
        """A tokenizer of words, with the special tokens of a decoder."""
        from tokenizers import Tokenizer, models, pre_tokenizers

        vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *WORDS])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
        )

    @cached_property
    def dense(self) -> Path:
        """A dense checkpoint of a decoder."""
        home = self.home / "dense"
        tiny_llama().save_pretrained(home)
        return home

    @cached_property
    def sharded(self) -> Path:
        """The same in shards, with an index."""
        home = self.home / "sharded"
        tiny_llama().save_pretrained(home, max_shard_size="20KB")
        return home

    def compressed(self, name: str) -> Path:
        """A compressed checkpoint: ``w4``, ``w8a8``, ``fp8``, ``gptq`` or ``awq``."""
        home = self.home / name
        if home.exists():
            return home
        if name in ("gptq", "awq"):
            return self._packed_by_others(home, GPTQ if name == "gptq" else AWQ)
        step = {
            "w4": {"technique": "rtn", "bits": 4, "group_size": 16},
            "w8a8": {"technique": "rtn", "bits": 8},
            "fp8": {"technique": "rtn", "format": "float"},
        }[name]
        optimize(tiny_llama(), [step]).save_pretrained(home)
        return home

    def _packed_by_others(self, home: Path, config: dict[str, Any]) -> Path:
        shutil.copytree(self.dense, home)
        weights, random = load_file(home / "model.safetensors"), torch.Generator().manual_seed(0)
        for name in [key for key in weights if key.endswith("_proj.weight")]:
            rows, columns = weights.pop(name).shape
            prefix, groups = name.removesuffix("weight"), columns // config["group_size"]
            gptq = config["quant_method"] == "gptq"
            shape = (columns // 8, rows) if gptq else (columns, rows // 8)

            def codes(*shape: int) -> torch.Tensor:
                return torch.randint(-(2**31), 2**31, shape, generator=random).to(torch.int32)

            weights[f"{prefix}qweight"] = codes(*shape)
            weights[f"{prefix}qzeros"] = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32)
            weights[f"{prefix}scales"] = 0.02 * torch.rand(groups, rows, generator=random)
            if gptq:
                weights[f"{prefix}g_idx"] = (torch.arange(columns) // config["group_size"]).to(torch.int32)
        save_file(weights, home / "model.safetensors", metadata={"format": "pt"})
        settings = json.loads((home / "config.json").read_text()) | {"quantization_config": config}
        (home / "config.json").write_text(json.dumps(settings))
        return home

    @cached_property
    def recipes(self) -> list[dict[str, Any]]:
        """Recipes that fit the decoder, and the shipped ones."""
        data = {"dataset": "random", "samples": 4, "seq_len": 16, "seed": 1, "batch_size": 2, "split": "train"}
        training = {"max_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 2, "save_strategy": "no"}
        own = [
            {"steps": steps, "calibration": data, "training": training, "driver": "auto", "description": "one line"}
            for steps in STEPS
        ]
        return own + [OptimConfig.load(name).to_dict() for name in sorted(shipped_recipes())]

    @cached_property
    def record(self) -> bytes:
        """A record with every kind of entry."""
        home = self.home / "recorded"
        steps = [{"technique": "gptq", "bits": 4, "group_size": 16}]
        optimize(tiny_llama(), steps, CalibrationData(self.batches, {"dataset": "x"})).save_pretrained(home)
        data = json.loads((home / "hf_optim.json").read_text())
        side = {"task": "text-generation", "perplexity": 2.2, "tokens": 100, "bytes_on_disk": 5000, "device": "cpu"}
        side |= {"ms_per_token": 4.0, "ms_per_token_iqr": 0.6, "time_rounds": 9}
        data["measured"] = {
            "before": side,
            "after": {**side, "kl": 0.1},
            "accelerated": {**side, "kernels": "int4: 14", "kernel_layers": 14},
            "control": {**side, "name": "dense"},
            "timing": {"what": "64 tokens", "in_turn": True, "load_average": 7.5, "cores": 2},
            "evaluation": {"dataset": "e.jsonl", "split": "x"},
        }
        data["notes"] = ["One note."]
        data["sections"] += [{"kind": "figure", "title": "A figure", "path": "plots/x.png", "alt": "numbers"}]
        return json.dumps(data).encode()

    @cached_property
    def bench_results(self) -> bytes:
        """The results of a benchmark, with a row of each kind."""
        return json.dumps(bench_results()).encode()

    @cached_property
    def texts(self) -> Path:
        """A data file of texts."""
        path = self.home / "texts.jsonl"
        path.write_text("\n".join(json.dumps({"text": " ".join(WORDS)}) for _ in range(8)))
        return path

    @cached_property
    def with_tokenizer(self) -> Path:
        """A dense checkpoint of a decoder, with its tokenizer."""
        home = self.home / "with_tokenizer"
        shutil.copytree(self.dense, home)
        self.tokenizer.save_pretrained(home)
        return home

    @cached_property
    def classifier(self) -> Any:
        """A classifier of texts with two labels."""
        return tiny_bert()

    @cached_property
    def data(self) -> dict[str, bytes]:
        """Data files, by suffix: texts with labels, token ids, nested columns, images and answers."""
        return data_files(WORDS)
