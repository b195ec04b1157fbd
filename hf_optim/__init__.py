"""hf_optim: one plugin host that makes any Hugging Face transformer cheaper to run.

Importing this module lets ``from_pretrained`` of every transformers model take ``optim_config=``; a call without it
behaves as before. Everything else is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .lifecycle.from_pretrained import install

__version__ = "0.1.0"

# Public name -> the module that has it. Imported on first use, so that `import hf_optim` stays cheap.
_HOMES = {
    "OptimConfig": "recipes.config",
    "DataConfig": "recipes.config",
    "OptimQuantizationConfig": "lifecycle.quantization_argument",
    "Technique": "recipes.technique",
    "technique": "recipes.technique",
    "option": "recipes.field_checks",
    "Contract": "recipes.contract",
    "Paper": "recipes.contract",
    "Phase": "recipes.contract",
    "Reload": "recipes.contract",
    "Trait": "recipes.traits",
    "hookimpl": "recipes.hooks",
    "Run": "runs.run",
    "Scope": "runs.scope",
    "run_of": "runs.run",
    "Card": "evaluation.cards.card",
    "Kernel": "compressed.packed.kernel",
    "OptimError": "errors",
    "RecipeError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "NumericalError": "errors",
    "CheckpointError": "errors",
    "RankError": "errors",
    "optimize": "lifecycle.loading",
    "advance": "lifecycle.stages",
    "callbacks": "training.stage_callbacks",
    "OptimTrainer": "training.trainer",
    "Rounds": "training.pruning_rounds",
    "RoundTraining": "training.rounds_callback",
    "accelerate": "compressed.packed.accelerate",
    "compile_config": "compressed.packed.accelerate",
    "KernelWarning": "compressed.packed.packed_linear",
    "restore": "compressed.packed.accelerate",
    "report": "compressed.packed.layer_report",
    "offload": "toolkit.offloading",
    "offload_plan": "toolkit.offloading",
    "offloaded_cache": "generation.offloaded_cache",
    "expert_load": "toolkit.experts.load",
    "expert_exchange": "toolkit.experts.rank_models",
    "expert_buckets": "toolkit.experts.bucketed_model",
    "release": "lifecycle.stages",
    "merge_adapters": "training.peft",
    "generate": "generation.door",
    "GenerationWarning": "generation.door",
    "captured": "toolkit.modules",
    "key_value_cache": "generation.quantized_cache",
    "SegmentStreams": "data.segment_streams",
    "exits_of": "toolkit.exits",
    "attach_exits": "checkpoints.saving",
    "ExitSettings": "toolkit.exits",
    "forward_with_exits": "toolkit.exits",
    "run_to_exit": "toolkit.exits",
    "KeyValueScheme": "toolkit.quantization",
    "cache_size": "toolkit.quantization",
    "disable_progress_bars": "runs.progress",
    "enable_progress_bars": "runs.progress",
}
# Public modules.
_MODULES = {
    "traits": "recipes.traits",
    "compressed": "compressed",
    "early_exit": "generation.early_exit",
    "remote_code": "checkpoints.remote_code",
}

__all__ = ["__version__", *_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    value: Any
    if name in _MODULES:
        value = importlib.import_module(f".{_MODULES[name]}", __name__)
    elif name in _HOMES:
        value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'hf_optim' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})


if TYPE_CHECKING:
    from . import compressed as compressed
    from .checkpoints import remote_code as remote_code
    from .checkpoints.saving import attach_exits as attach_exits
    from .compressed.packed.accelerate import accelerate as accelerate
    from .compressed.packed.accelerate import compile_config as compile_config
    from .compressed.packed.accelerate import restore as restore
    from .compressed.packed.kernel import Kernel as Kernel
    from .compressed.packed.layer_report import report as report
    from .compressed.packed.packed_linear import KernelWarning as KernelWarning
    from .data.segment_streams import SegmentStreams as SegmentStreams
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import ModelError as ModelError
    from .errors import NumericalError as NumericalError
    from .errors import OptimError as OptimError
    from .errors import RankError as RankError
    from .errors import RecipeError as RecipeError
    from .evaluation.cards.card import Card as Card
    from .generation import early_exit as early_exit
    from .generation.door import GenerationWarning as GenerationWarning
    from .generation.door import generate as generate
    from .generation.offloaded_cache import offloaded_cache as offloaded_cache
    from .generation.quantized_cache import key_value_cache as key_value_cache
    from .lifecycle.loading import optimize as optimize
    from .lifecycle.quantization_argument import OptimQuantizationConfig as OptimQuantizationConfig
    from .lifecycle.stages import advance as advance
    from .lifecycle.stages import release as release
    from .recipes import traits as traits
    from .recipes.config import DataConfig as DataConfig
    from .recipes.config import OptimConfig as OptimConfig
    from .recipes.contract import Contract as Contract
    from .recipes.contract import Paper as Paper
    from .recipes.contract import Phase as Phase
    from .recipes.contract import Reload as Reload
    from .recipes.field_checks import option as option
    from .recipes.hooks import hookimpl as hookimpl
    from .recipes.technique import Technique as Technique
    from .recipes.technique import technique as technique
    from .recipes.traits import Trait as Trait
    from .runs.progress import disable_progress_bars as disable_progress_bars
    from .runs.progress import enable_progress_bars as enable_progress_bars
    from .runs.run import Run as Run
    from .runs.run import run_of as run_of
    from .runs.scope import Scope as Scope
    from .toolkit.exits import ExitSettings as ExitSettings
    from .toolkit.exits import exits_of as exits_of
    from .toolkit.exits import forward_with_exits as forward_with_exits
    from .toolkit.exits import run_to_exit as run_to_exit
    from .toolkit.experts.bucketed_model import expert_buckets as expert_buckets
    from .toolkit.experts.load import expert_load as expert_load
    from .toolkit.experts.rank_models import expert_exchange as expert_exchange
    from .toolkit.offloading import offload as offload
    from .toolkit.offloading import offload_plan as offload_plan
    from .toolkit.quantization import KeyValueScheme as KeyValueScheme
    from .toolkit.quantization import cache_size as cache_size
    from .training.peft import merge_adapters as merge_adapters
    from .training.pruning_rounds import Rounds as Rounds
    from .training.rounds_callback import RoundTraining as RoundTraining
    from .training.stage_callbacks import callbacks as callbacks
    from .training.trainer import OptimTrainer as OptimTrainer

install()
