"""hf_optim: one plugin host that makes any Hugging Face transformer cheaper to run.

Importing this module lets ``from_pretrained`` of every transformers model take ``optim_config=``; a call without it
behaves as before. Everything else is imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .hookup import install

__version__ = "0.1.0"

# Public name -> the module that has it. Imported on first use, so that `import hf_optim` stays cheap.
_HOMES = {
    "OptimConfig": "config",
    "DataConfig": "config",
    "Technique": "techniques",
    "technique": "techniques",
    "option": "techniques",
    "Contract": "techniques",
    "Paper": "techniques",
    "Reload": "techniques",
    "Trait": "traits",
    "hookimpl": "hookspecs",
    "Run": "run",
    "Scope": "scope",
    "run_of": "run",
    "Kernel": "packed",
    "OptimError": "errors",
    "RecipeError": "errors",
    "DataError": "errors",
    "ModelError": "errors",
    "NumericalError": "errors",
    "CheckpointError": "errors",
    "optimize": "loading",
    "advance": "loading",
    "callbacks": "training",
    "OptimTrainer": "training",
    "Rounds": "rounds",
    "RoundTraining": "round_training",
    "accelerate": "acceleration",
    "compile_config": "acceleration",
    "KernelWarning": "acceleration",
    "restore": "acceleration",
    "report": "acceleration",
    "release": "loading",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_optim' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if TYPE_CHECKING:
    from .acceleration import KernelWarning as KernelWarning
    from .acceleration import accelerate as accelerate
    from .acceleration import compile_config as compile_config
    from .acceleration import report as report
    from .acceleration import restore as restore
    from .config import DataConfig as DataConfig
    from .config import OptimConfig as OptimConfig
    from .errors import CheckpointError as CheckpointError
    from .errors import DataError as DataError
    from .errors import ModelError as ModelError
    from .errors import NumericalError as NumericalError
    from .errors import OptimError as OptimError
    from .errors import RecipeError as RecipeError
    from .hookspecs import hookimpl as hookimpl
    from .loading import advance as advance
    from .loading import optimize as optimize
    from .loading import release as release
    from .packed import Kernel as Kernel
    from .round_training import RoundTraining as RoundTraining
    from .rounds import Rounds as Rounds
    from .run import Run as Run
    from .run import run_of as run_of
    from .scope import Scope as Scope
    from .techniques import Contract as Contract
    from .techniques import Paper as Paper
    from .techniques import Reload as Reload
    from .techniques import Technique as Technique
    from .techniques import option as option
    from .techniques import technique as technique
    from .training import OptimTrainer as OptimTrainer
    from .training import callbacks as callbacks
    from .traits import Trait as Trait

install()
