"""Models that no transformers class can express: their code is saved with the checkpoint.

``convert`` gives a model its own class and configuration class, generated from the source text of one self-contained
module. From then on stock ``save_pretrained`` and ``push_to_hub`` write that module beside the weights and name it in
``auto_map``, which is transformers' own mechanism for custom models. The ``model_type`` is new, so that stock
transformers refuses the checkpoint instead of loading it as another model, unless

- the caller passes ``trust_remote_code=True`` (the code comes from the checkpoint), or
- ``hf_optim.remote_code.register(model_type)`` was called (the code comes from the installed technique, and nothing in
  the checkpoint is executed), after which ``AutoModel...from_pretrained`` needs no flag.
"""

from __future__ import annotations

import ast
import atexit
import copy
import importlib.util
import inspect
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from ..compressed.dense_conversions import forget_conversions, keep_float_stacks
from ..errors import ModelError
from ..toolkit.modules import remote_code_guard
from ..toolkit.modules.transplant import auto_classes
from ..trust.code import WrittenCode

PACKAGE = "hf_optim_generated"
FUTURE = "from __future__ import annotations"


@dataclass(frozen=True)
class RemoteCode:
    """The code of a technique whose models need their own; the class attribute ``remote_code`` of the technique.

    Attributes:
        name: the name of the technique; the prefix of ``model_type`` and, capitalized, of class names.
        source: text of a module that imports only torch and transformers (``joined`` makes one of several modules).
        config_base: name of the class in ``source`` that the configuration classes inherit from. It must make stock
            classes that are loaded by name refuse the checkpoint; empty for ``remote_code_guard.RefusedByStock``, which
            does so.
        field: name of the configuration field with the settings of the technique: a number, or plain JSON.
        default: the value of the field in a configuration created without it.
        model_base: name of the class in ``source`` that the model classes inherit from first; empty for none. Its
            ``__init__`` runs when a checkpoint is loaded, not in ``convert``.
        takes_over: name of a technique whose code this one contains: it takes that one's models, after ``revert``.
    """

    name: str
    source: str
    config_base: str = ""
    field: str = ""
    default: int | None = None
    model_base: str = ""
    takes_over: str = ""

    @property
    def prefix(self) -> str:
        """Prefix of the class names."""
        return "".join(part.capitalize() for part in self.name.split("_"))


def joined(*modules: ModuleType) -> str:
    """Return the source of several modules as one; each may import from the preceding ones, by any hf_optim path.

    Those imports, and repeated ``from __future__`` lines, are removed from the text.
    """
    return "\n".join([FUTURE, *map(_part, modules)]) + "\n"


@cache
def _part(module: ModuleType) -> str:
    source = inspect.getsource(module)
    dropped = {
        line
        for node in ast.parse(source).body
        if isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module or ""))
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    return "\n".join(line for number, line in enumerate(source.splitlines(), 1) if number not in dropped)


def _is_ours(module: str) -> bool:
    return module == "__future__" or module.partition(".")[0].startswith("hf_optim")


def convert(model: PreTrainedModel, code: RemoteCode, value: Any) -> PreTrainedModel:
    """Change the class of ``model`` and of its configuration to generated ones, in place; nothing else changes.

    Args:
        model: a model whose modules the technique has already changed as ``__init__`` of the new class would.
        code: the code of the technique.
        value: the value of the configuration field ``code.field``.

    Raises ``ModelError`` if the class of the model is not one of transformers' ``AutoModel`` classes.
    """
    config_class, model_class = type(model.config), type(model)
    module = generate(code, config_class)  # type: ignore[arg-type]
    name = code.prefix + model_class.__name__
    if not hasattr(module, name):
        raise ModelError(
            f"{model_class.__name__} is not among the classes that transformers' AutoModel classes support"
        )
    own = getattr(module, code.prefix + config_class.__name__)
    for config in _configs(model, config_class):
        config.__class__ = own
        config.__dict__.pop("model_type", None)  # a loaded configuration holds that of its file beside its class
        setattr(config, code.field, value)
        config.auto_map = dict(module.AUTO_MAP)
    model.__class__ = getattr(module, name)
    forget_conversions(model)
    keep_float_stacks(model)
    return model


def require_own_code(model: PreTrainedModel, code: RemoteCode, label: str) -> None:
    """Raise ``ModelError``, which begins with ``label``, unless ``convert`` can be called with a model and a code."""
    try:
        module = generate(code, type(model.config))  # type: ignore[arg-type]
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error
    if not hasattr(module, code.prefix + type(model).__name__):
        raise ModelError(
            f"{label}: {type(model).__name__} is not among the classes that transformers' AutoModel classes "
            "support, so no code can be saved with it"
        )


def converted_skeleton(model: PreTrainedModel, code: RemoteCode, value: Any) -> PreTrainedModel:
    """Return a model on the meta device of the class that ``convert`` would give ``model``; the arguments are its own.

    Unlike there, ``__init__`` of the class replaces the modules. ``model`` is not changed.
    """
    module = generate(code, stock_class(type(model.config)))  # type: ignore[arg-type]
    config = copy.deepcopy(model.config)
    config.__class__ = getattr(module, code.prefix + stock_class(type(config)).__name__)
    config.__dict__.pop("model_type", None)
    setattr(config, code.field, value)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return getattr(module, code.prefix + stock_class(type(model)).__name__)(config)


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo ``convert``, in place: restore the stock classes. Modules are not changed, and stock models left alone."""
    stock = stock_class(type(model))
    if stock is type(model):
        return model
    config_class = type(model.config)
    field = next(name for name in vars(config_class).get("__annotations__", {}))
    for config in _configs(model, config_class):
        config.__class__ = stock_class(config_class)
        for name in (field, "auto_map"):
            config.__dict__.pop(name, None)
    model.__class__ = stock
    forget_conversions(model)
    return model


def stock_class(cls: type) -> type:
    """Return the transformers class that a generated class was made from; any other class is returned unchanged."""
    if not cls.__module__.startswith(f"{PACKAGE}."):
        return cls
    return next(base for base in cls.__mro__[1:] if getattr(transformers, base.__name__, None) is base)


def written_code(model: PreTrainedModel) -> WrittenCode | None:
    """Return the code that ``save_pretrained`` writes with a model of a generated class; None for any other model."""
    cls = type(model)
    if stock_class(cls) is cls:
        return None
    name = cls.__module__.rpartition(".")[2]
    auto_map = dict(sys.modules[cls.__module__].AUTO_MAP)
    if getattr(cls, "_auto_class", None) is not None:
        auto_map[cls._auto_class] = f"{name}.{cls.__name__}"
    return WrittenCode.of(f"{name}.py", _texts[cls.__module__], auto_map)


def register(model_type: str) -> type[PretrainedConfig]:
    """Register a ``model_type`` such as ``local_gpt2`` in this process, with the code of the installed technique.

    Returns the configuration class. Raises ``ModelError`` if no technique makes models of this type.
    """
    from ..recipes.catalogue import catalogue

    for name in catalogue().names():
        code = getattr(catalogue().get(name), "remote_code", None) if model_type.startswith(name + "_") else None
        base = model_type.removeprefix(name + "_")
        if isinstance(code, RemoteCode) and base in CONFIG_MAPPING:
            module = generate(code, CONFIG_MAPPING[base])  # type: ignore[arg-type]
            return getattr(module, code.prefix + CONFIG_MAPPING[base].__name__)
    raise ModelError(f"no technique makes models of type {model_type!r}")


@cache
def generate(code: RemoteCode, config_class: type[PretrainedConfig]) -> ModuleType:
    """Generate and import the module of ``code`` for one architecture, and register it with the ``Auto`` classes.

    Raises ``ModelError`` if ``config_class`` is not a configuration class of transformers, such as a generated one.
    """
    if stock_class(config_class) is not config_class:
        raise ModelError(
            f"a model of type {config_class.model_type} has code of its own already, and {code.name} brings code of "
            "its own too: one checkpoint cannot store both, so leave out one of the two steps"
        )
    heads = auto_classes(config_class)
    if not heads or getattr(transformers, config_class.__name__, None) is not config_class:
        raise ModelError(f"{config_class.__name__} is not a configuration class of transformers")
    name = f"modeling_{code.name}_{config_class.model_type}"
    module = _import_text(name, write_source(code, config_class, name))
    own = getattr(module, code.prefix + config_class.__name__)
    own.register_for_auto_class()
    AutoConfig.register(own.model_type, own, exist_ok=True)
    for model_class, autos in heads.items():
        generated = getattr(module, code.prefix + model_class.__name__)
        generated.register_for_auto_class(autos[0].__name__)
        for auto in autos:
            auto.register(own, generated, exist_ok=True)  # type: ignore[attr-defined]
    return module


def write_source(code: RemoteCode, config_class: type[PretrainedConfig], name: str) -> str:
    """Return the text of the generated module: the technique's source, then a class per class of the architecture."""
    heads = auto_classes(config_class)
    own = code.prefix + config_class.__name__
    auto_map = {"AutoConfig": f"{name}.{own}"}
    classes = []
    for model_class, autos in heads.items():
        for auto in autos:
            auto_map.setdefault(auto.__name__, f"{name}.{code.prefix}{model_class.__name__}")
        bases = f"{code.model_base}, " * bool(code.model_base) + f"transformers.{model_class.__name__}"
        classes.append(f"class {code.prefix}{model_class.__name__}({bases}):\n    config_class = {own}")
    kind = "int" if isinstance(code.default, int) else "dict | None"
    source, config_base = code.source.rstrip(), code.config_base
    if not config_base:
        own_lines = joined(remote_code_guard).removeprefix(FUTURE).strip()
        source, config_base = f"{source}\n\n\n{own_lines}", remote_code_guard.RefusedByStock.__name__
    config = (
        f"class {own}({config_base}, transformers.{config_class.__name__}):\n"
        f'    model_type = "{code.name}_{config_class.model_type}"\n'
        f"    {code.field}: {kind} = {code.default}"
    )
    entries = "".join(f'    "{auto}": "{path}",\n' for auto, path in auto_map.items())
    parts = [source, "import transformers  # noqa: E402", config, *classes, f"AUTO_MAP = {{\n{entries}}}"]
    return "\n\n\n".join(parts) + "\n"


def _configs(model: PreTrainedModel, config_class: type[PretrainedConfig]) -> list[PretrainedConfig]:
    """Return every configuration object of that class held by any part of the model."""
    held = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in held if type(config) is config_class}.values())


def _import_text(name: str, text: str) -> ModuleType:
    # transformers copies the file of the module that defines a class, so the module needs a file.
    path = _folder() / f"{name}.py"
    path.write_text(text, encoding="utf-8")
    # pickle imports the module of a class, and so its package. In another process there is none: a checkpoint is the
    # way to it.
    sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    qualified = f"{PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(qualified, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[qualified] = module
    _texts[qualified] = text
    try:
        spec.loader.exec_module(module)
    except Exception:
        del sys.modules[qualified]
        raise
    return module


# Qualified name of each generated module -> its text.
_texts: dict[str, str] = {}


@cache
def _folder() -> Path:
    """Return the folder of generated modules; it is removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="hf_optim_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


__all__ = [
    "RemoteCode",
    "convert",
    "converted_skeleton",
    "generate",
    "joined",
    "register",
    "require_own_code",
    "revert",
    "stock_class",
    "write_source",
    "written_code",
]
