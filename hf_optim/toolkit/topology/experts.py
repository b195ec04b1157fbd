"""Experts of a mixture that transformers stores as stacked matrices, each seen as a linear layer.

transformers 5 has no ``nn.Linear`` per expert: one module holds ``gate_up_proj [E, 2F, H]`` (or ``up_proj``, without a
gate) and ``down_proj [E, H, F]``, or both transposed, and its forward takes all tokens and the router's choice. An
``ExpertLinear`` is one matrix of one expert: a view of its weight as ``[out, in]``, and hooks that are called with the
tokens that the router sends to that expert, for every implementation of the forward. Observers of inputs and
techniques that loop over linear layers therefore work on experts without changes.

The input of ``down_proj`` is not a tensor of the forward; it is recomputed from the tokens, expert by expert.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from . import valid_rows

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"
INTERFACE = ("has_gate", "is_transposed", "num_experts")
PACKED_SHAPES = "_hf_optim_matrix_shapes"
"""Attribute of experts without stacked parameters, whose matrices are packed: name -> ``[E, out, in]``."""
NOT_A_NUMBER = re.compile(r"per_tok|top_?k|size|dim|capacity|token_id|period|offset|interval|layer_(start|end)")
"""Settings of experts that are not their number."""


class ExpertLinear:
    """One matrix of one expert, with the interface of an ``nn.Linear``. It is a view of a stacked parameter.

    Attributes:
        experts: the module that holds the matrices of all experts.
        experts_name: its qualified name.
        parameter: the name of the stacked parameter in the module.
        index: the number of the expert.
    """

    def __init__(self, experts: nn.Module, experts_name: str, parameter: str, index: int) -> None:
        self.experts, self.experts_name, self.parameter, self.index = experts, experts_name, parameter, index

    @property
    def name(self) -> str:
        """``model.layers.0.mlp.experts.3.down_proj``: the name that the matrix would have in a list of experts."""
        prefix = f"{self.experts_name}." if self.experts_name else ""
        return f"{prefix}{self.index}.{self.parameter}"

    @property
    def parameter_name(self) -> str:
        """The qualified name of the stacked parameter, the same for all experts of the module."""
        return f"{self.experts_name}.{self.parameter}".removeprefix(".")

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view without gradient: writing into it changes the model."""
        matrix = self.experts.get_parameter(self.parameter).detach()[self.index]
        return matrix.T if self.transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, a view, or None."""
        stacked = self.experts._parameters.get(f"{self.parameter}_bias")
        return None if stacked is None else stacked.detach()[self.index]

    @property
    def transposed(self) -> bool:
        """True if the stacked parameter is ``[E, in, out]``."""
        return bool(getattr(self.experts, "is_transposed", False))

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    def __call__(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight, self.bias)

    def inputs_for(self, tokens: Tensor) -> Tensor:
        """Return the inputs ``[n, in_features]`` of this matrix if the router sent ``tokens [n, H]`` to its expert."""
        return tokens if self.parameter in UP else down_proj_inputs(self.experts, self.index, tokens)

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> _Handle:
        """Call ``hook(self, (inputs,), {})`` with the inputs ``[n, in_features]`` of this expert.

        The hook runs in each forward in which the router sends tokens to the expert; what it returns is ignored. The
        returned handle has ``remove()``.
        """
        dispatch = _dispatches.get(self.experts)
        if dispatch is None:
            dispatch = _dispatches[self.experts] = _Dispatch()
        wrapped = hook if with_kwargs else lambda module, args, kwargs: hook(module, args)
        return dispatch.add(self.experts, self, wrapped)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield the stacked parameter of all experts."""
        yield self.experts.get_parameter(self.parameter)

    def __repr__(self) -> str:
        return f"ExpertLinear({self.name}, in_features={self.in_features}, out_features={self.out_features})"


def is_fused_experts(module: nn.Module) -> bool:
    """Return True if a module stores experts in the layout of transformers' fused forwards."""
    if is_packed_experts(module) or not all(hasattr(module, name) for name in INTERFACE):
        return False
    matrices = [module._parameters.get(key) for key in matrix_names(module)]
    return all(matrix is not None and matrix.dim() == 3 for matrix in matrices)


def matrix_names(experts: nn.Module) -> tuple[str, str]:
    """Return the names of the stacked matrices of a module, in the order in which a token passes through them."""
    return (UP[0] if getattr(experts, "has_gate", True) else UP[1], DOWN)


def is_packed_experts(module: nn.Module) -> bool:
    """Return True if a module computes like fused experts, but holds their matrices packed instead of stacked."""
    return PACKED_SHAPES in vars(module)


def matrix_shape(experts: nn.Module, parameter: str) -> tuple[int, int, int]:
    """Return ``(E, out, in)`` of the matrices of fused or packed experts."""
    packed = vars(experts).get(PACKED_SHAPES)
    if packed is not None:
        return packed[parameter]
    count, rows, columns = experts.get_parameter(parameter).shape
    return (count, columns, rows) if getattr(experts, "is_transposed", False) else (count, rows, columns)


def interface_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that run through transformers' interface for experts, by qualified name: fused or packed."""
    return {n: module for n, module in model.named_modules() if is_fused_experts(module) or is_packed_experts(module)}


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model that store fused experts, by qualified name."""
    return {name: module for name, module in model.named_modules() if is_fused_experts(module)}


def expert_linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Return every matrix of every expert by name, module by module: first the up projections, then ``down_proj``."""
    found = {}
    for name, experts in fused_experts(model).items():
        for parameter in matrix_names(experts):
            for index in range(len(experts.get_parameter(parameter))):
                view = ExpertLinear(experts, name, parameter, index)
                found[view.name] = view
    return found


@torch.no_grad()
def down_proj_inputs(experts: nn.Module, index: int, tokens: Tensor) -> Tensor:
    """Return the inputs ``[n, F]`` of one expert's ``down_proj`` for tokens ``[n, H]``.

    They are ``act(gate) * up``, or ``act(up)`` without a gate.
    """
    up = ExpertLinear(experts, "", matrix_names(experts)[0], index)(tokens)
    return experts._apply_gate(up) if experts.has_gate else experts.act_fn(up)  # type: ignore[operator]


class _Handle:
    """Removes one hook."""

    def __init__(self, dispatch: _Dispatch, key: tuple[int, str], hook: Callable[..., Any]) -> None:
        self._registered: Any = (dispatch, key, hook)

    def remove(self) -> None:
        if self._registered is not None:
            dispatch, key, hook = self._registered
            self._registered = None
            dispatch.remove(key, hook)


class _Dispatch:
    """One hook on the module of the experts that sorts the tokens by expert, once for all hooks on its experts."""

    def __init__(self) -> None:
        self.hooks: dict[tuple[int, str], list[tuple[ExpertLinear, Callable[..., Any]]]] = {}
        self.handle: Any = None

    def add(self, experts: nn.Module, view: ExpertLinear, hook: Callable[..., Any]) -> _Handle:
        if self.handle is None:
            self.handle = experts.register_forward_pre_hook(self._run, with_kwargs=True)
        key = (view.index, view.parameter)
        self.hooks.setdefault(key, []).append((view, hook))
        return _Handle(self, key, hook)

    def remove(self, key: tuple[int, str], hook: Callable[..., Any]) -> None:
        left = [pair for pair in self.hooks.pop(key) if pair[1] is not hook]
        if left:
            self.hooks[key] = left
        if not self.hooks and self.handle is not None:
            self.handle.remove()
            self.handle = None

    @torch.no_grad()
    def _run(self, experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens, chosen = routed_tokens(experts, args, kwargs)
        counted = valid_rows.mask_of(experts, tokens)
        if counted is not None:
            tokens, chosen = tokens[counted], chosen[counted]
        up, down = matrix_names(experts)
        for index, rows in enumerate(split_by_expert(tokens, chosen, len(experts.get_parameter(down)))):
            if not len(rows):
                continue
            self._call((index, up), rows)
            if (index, down) in self.hooks:
                self._call((index, down), down_proj_inputs(experts, index, rows))

    def _call(self, key: tuple[int, str], rows: Tensor) -> None:
        for view, hook in self.hooks.get(key, ()):
            hook(view, (rows,), {})


_dispatches: WeakKeyDictionary[nn.Module, _Dispatch] = WeakKeyDictionary()


def routed_tokens(experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the tokens ``[n, H]`` and the chosen experts of each ``[n, k]`` from the arguments of a forward."""
    bound = inspect.signature(experts.forward).bind(*args, **kwargs).arguments
    tokens, chosen = list(bound.values())[:2]
    return tokens.reshape(-1, tokens.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


def split_by_expert(tokens: Tensor, chosen: Tensor, experts: int) -> list[Tensor]:
    """Return the tokens of each expert, ``[n_e, H]``, in the order of the tokens."""
    order = chosen.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
    rows = tokens[order // chosen.shape[-1]]
    return list(rows.split(counts))[:experts]  # beyond them: tokens of experts on other devices


def has_experts(model: nn.Module) -> bool:
    """Return True if the model routes tokens to experts: as many modules or stacked matrices as its config states."""
    counts = expert_counts(model)
    return bool(counts) and any(_stores_experts(module, counts) for module in model.modules())


def expert_counts(model: nn.Module) -> set[int]:
    """Return the numbers above one that the config of a model states for experts; empty without such settings."""
    config = getattr(model, "config", None)
    if config is None:
        return set()
    settings = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else vars(config)
    nested = [value for value in settings.values() if isinstance(value, dict)]
    return {
        value
        for part in (settings, *nested)
        for key, value in part.items()
        if type(value) is int and value > 1 and "expert" in str(key) and not NOT_A_NUMBER.search(str(key))
    }


def has_stacked_weights(module: nn.Module) -> bool:
    """Return True if a module has stacked matrices ``[n, ., .]``, the form of fused experts.

    Kernels of convolutions have three dimensions, too, also where a parametrization (weight normalization) holds them.
    """
    if isinstance(
        module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, ParametrizationList)
    ):
        return False
    return is_fused_experts(module) or any(p.dim() == 3 and len(p) > 1 for p in module.parameters(recurse=False))


def expert_stacks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that store the experts of a mixture as stacked matrices, by qualified name.

    Other modules have parameters of three dimensions, too: the heads of XLNet, scales of layers, gates of recurrences.
    """
    counts = expert_counts(model)
    return {
        name: module
        for name, module in model.named_modules()
        if is_fused_experts(module)
        or (has_stacked_weights(module) and any(p.dim() == 3 and len(p) in counts for p in module.parameters(False)))
    }


def _stores_experts(module: nn.Module, counts: set[int]) -> bool:
    """Return True if a module is a list of experts or has their stacked matrices; ``counts`` are possible numbers."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        # Not the length alone: NLLB-MoE keeps a dropout beside its experts.
        return len(module) in counts or any(n in counts for n in Counter(map(type, module.children())).values())
    return is_packed_experts(module) or any(
        p.dim() == 3 and p.shape[0] in counts for p in module.parameters(recurse=False)
    )
