"""Experts of a mixture that transformers keeps as stacked matrices, each seen as a linear layer of its own.

transformers 5 has no ``nn.Linear`` per expert: one module holds ``gate_up_proj [E, 2F, H]`` (or ``up_proj``, without a
gate) and ``down_proj [E, H, F]``, or both transposed, and its forward takes all tokens and the router's choice. An
``ExpertLinear`` is one matrix of one expert: a view of its weight as ``[out, in]``, and hooks that are called with the
tokens which the router sends to that expert, whatever implementation of the forward runs. So an observer of inputs and
a technique that loops over linears work on experts as they are.

The input of ``down_proj`` is no tensor of the forward; it is computed again from the tokens, expert by expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


class ExpertLinear:
    """One matrix of one expert, with the face of an ``nn.Linear``. It owns nothing: its weight is the stack's.

    Attributes:
        experts: the module that holds the matrices of all experts.
        experts_name: its qualified name.
        parameter: the name of the stacked parameter.
        index: of the expert.
    """

    def __init__(self, experts: nn.Module, experts_name: str, parameter: str, index: int) -> None:
        self.experts, self.experts_name, self.parameter, self.index = experts, experts_name, parameter, index

    @property
    def name(self) -> str:
        """``model.layers.0.mlp.experts.3.down_proj``: the place that the matrix would have in a list of experts."""
        prefix = f"{self.experts_name}." if self.experts_name else ""
        return f"{prefix}{self.index}.{self.parameter}"

    @property
    def parameter_name(self) -> str:
        """The qualified name of the stacked parameter, shared by the matrices of all its experts."""
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
        """Whether the stack holds ``[E, in, out]``."""
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
        """What this matrix would read if the router sent ``tokens [n, H]`` to its expert: ``[n, in_features]``."""
        return tokens if self.parameter in UP else down_proj_inputs(self.experts, self.index, tokens)

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> _Handle:
        """Call ``hook(self, (inputs,), {})`` with the inputs ``[n, in_features]`` of this expert, at each forward in
        which the router sends it tokens. What the hook returns is ignored. The handle has ``remove()``."""
        dispatch = _dispatches.get(self.experts)
        if dispatch is None:
            dispatch = _dispatches[self.experts] = _Dispatch()
        return dispatch.add(
            self.experts, self, hook if with_kwargs else lambda module, args, kwargs: hook(module, args)
        )

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stacked parameter, of all experts."""
        yield self.experts.get_parameter(self.parameter)

    def __repr__(self) -> str:
        return f"ExpertLinear({self.name}, in_features={self.in_features}, out_features={self.out_features})"


def is_fused_experts(module: nn.Module) -> bool:
    """Whether a module holds experts the way transformers' own fused forwards read them."""
    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts")):
        return False
    matrices = [module._parameters.get(key) for key in matrix_names(module)]
    return all(matrix is not None and matrix.dim() == 3 for matrix in matrices)


def matrix_names(stack: nn.Module) -> tuple[str, str]:
    """The names of the stacked matrices, in the order in which a token meets them."""
    return (UP[0] if getattr(stack, "has_gate", True) else UP[1], DOWN)


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that hold fused experts, by qualified name."""
    return {name: module for name, module in model.named_modules() if is_fused_experts(module)}


def expert_linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Every matrix of every expert by name, stack by stack; first what all experts read, then their ``down_proj``."""
    found = {}
    for name, stack in fused_experts(model).items():
        for parameter in matrix_names(stack):
            for index in range(len(stack.get_parameter(parameter))):
                view = ExpertLinear(stack, name, parameter, index)
                found[view.name] = view
    return found


@torch.no_grad()
def down_proj_inputs(stack: nn.Module, index: int, tokens: Tensor) -> Tensor:
    """What ``down_proj`` of one expert reads, ``[n, F]``, for tokens ``[n, H]``: ``act(gate) * up``, or ``act(up)``."""
    up = ExpertLinear(stack, "", matrix_names(stack)[0], index)(tokens)
    return stack._apply_gate(up) if stack.has_gate else stack.act_fn(up)  # type: ignore[operator]


class _Handle:
    """Takes one hook off again."""

    def __init__(self, dispatch: _Dispatch, key: tuple[int, str], hook: Callable[..., Any]) -> None:
        self._taken: Any = (dispatch, key, hook)

    def remove(self) -> None:
        if self._taken is not None:
            dispatch, key, hook = self._taken
            self._taken = None
            dispatch.remove(key, hook)


class _Dispatch:
    """One hook on a stack that sorts the tokens by expert, once for all hooks on its experts."""

    def __init__(self) -> None:
        self.hooks: dict[tuple[int, str], list[tuple[ExpertLinear, Callable[..., Any]]]] = {}
        self.handle: Any = None

    def add(self, stack: nn.Module, view: ExpertLinear, hook: Callable[..., Any]) -> _Handle:
        if self.handle is None:
            self.handle = stack.register_forward_pre_hook(self._run, with_kwargs=True)
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
    def _run(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens, chosen = routed_tokens(stack, args, kwargs)
        up, down = matrix_names(stack)
        for index, rows in enumerate(split_by_expert(tokens, chosen, len(stack.get_parameter(down)))):
            if not len(rows):
                continue
            self._call((index, up), rows)
            if (index, down) in self.hooks:
                self._call((index, down), down_proj_inputs(stack, index, rows))

    def _call(self, key: tuple[int, str], rows: Tensor) -> None:
        for view, hook in self.hooks.get(key, ()):
            hook(view, (rows,), {})


_dispatches: WeakKeyDictionary[nn.Module, _Dispatch] = WeakKeyDictionary()


def routed_tokens(stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The tokens ``[n, H]`` and the experts chosen for each ``[n, k]``, from the arguments of a stack's forward."""
    bound = inspect.signature(stack.forward).bind(*args, **kwargs).arguments
    tokens, chosen = list(bound.values())[:2]
    return tokens.reshape(-1, tokens.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


def split_by_expert(tokens: Tensor, chosen: Tensor, experts: int) -> list[Tensor]:
    """The tokens of each expert, ``[n_e, H]``, in the order of the tokens."""
    order = chosen.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
    rows = tokens[order // chosen.shape[-1]]
    return list(rows.split(counts))[:experts]  # beyond them: tokens that experts on other devices take


def has_experts(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts: as many modules or stacked matrices as its config says."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    settings = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else vars(config)
    counts = {
        value
        for key, value in settings.items()
        if "expert" in key and "per_tok" not in key and type(value) is int and value > 1
    }
    return any(_holds_experts(module, counts) for module in model.modules())


def _holds_experts(module: nn.Module, counts: set[int]) -> bool:
    """Whether a module is a list of experts or holds their matrices [experts, ., .], `counts` of them."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module) in counts
    return any(p.dim() == 3 and p.shape[0] in counts for p in module.parameters(recurse=False))
