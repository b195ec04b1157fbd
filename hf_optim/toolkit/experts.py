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

from . import sharing
from .observers import InputObserver, Moment

UP = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


class ExpertLinear:
    """One matrix of one expert, with the face of an ``nn.Linear``. It owns nothing: its weight is the stack's.

    Attributes:
        stack: the module that holds the matrices of all experts.
        stack_name: its qualified name.
        parameter: the name of the stacked parameter.
        index: of the expert.
    """

    def __init__(self, stack: nn.Module, stack_name: str, parameter: str, index: int) -> None:
        self.stack, self.stack_name, self.parameter, self.index = stack, stack_name, parameter, index

    @property
    def name(self) -> str:
        """``model.layers.0.mlp.experts.3.down_proj``: the place that the matrix would have in a list of experts."""
        prefix = f"{self.stack_name}." if self.stack_name else ""
        return f"{prefix}{self.index}.{self.parameter}"

    @property
    def stage(self) -> str:
        """The same for the matrices that a token meets at the same time: those of one parameter of one stack."""
        return f"{self.stack_name}.{self.parameter}"

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, a view without gradient: writing into it changes the model."""
        matrix = self.stack.get_parameter(self.parameter).detach()[self.index]
        return matrix.T if self.transposed else matrix

    @property
    def bias(self) -> Tensor | None:
        """``[out]``, a view, or None."""
        stacked = self.stack._parameters.get(f"{self.parameter}_bias")
        return None if stacked is None else stacked.detach()[self.index]

    @property
    def transposed(self) -> bool:
        """Whether the stack holds ``[E, in, out]``."""
        return bool(getattr(self.stack, "is_transposed", False))

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
        return tokens if self.parameter in UP else intermediate(self.stack, self.index, tokens)

    def register_forward_pre_hook(self, hook: Callable[..., Any], *, with_kwargs: bool = False) -> _Handle:
        """Call ``hook(self, (inputs,), {})`` with the inputs ``[n, in_features]`` of this expert, at each forward in
        which the router sends it tokens. What the hook returns is ignored. The handle has ``remove()``."""
        dispatch = _dispatches.get(self.stack)
        if dispatch is None:
            dispatch = _dispatches[self.stack] = _Dispatch()
        return dispatch.add(self.stack, self, hook if with_kwargs else lambda module, args, kwargs: hook(module, args))

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The stacked parameter, of all experts."""
        yield self.stack.get_parameter(self.parameter)

    def __repr__(self) -> str:
        return f"ExpertLinear({self.name}, in_features={self.in_features}, out_features={self.out_features})"


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds experts the way transformers' own fused forwards read them."""
    if not all(hasattr(module, name) for name in ("has_gate", "is_transposed", "num_experts")):
        return False
    matrices = [module._parameters.get(key) for key in parameters(module)]
    return all(matrix is not None and matrix.dim() == 3 for matrix in matrices)


def parameters(stack: nn.Module) -> tuple[str, str]:
    """The names of the stacked matrices, in the order in which a token meets them."""
    return (UP[0] if getattr(stack, "has_gate", True) else UP[1], DOWN)


def stacks(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that hold fused experts, by qualified name."""
    return {name: module for name, module in model.named_modules() if is_fused(module)}


def expert_linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Every matrix of every expert by name, stack by stack; first what all experts read, then their ``down_proj``."""
    found = {}
    for name, stack in stacks(model).items():
        for parameter in parameters(stack):
            for index in range(len(stack.get_parameter(parameter))):
                view = ExpertLinear(stack, name, parameter, index)
                found[view.name] = view
    return found


@torch.no_grad()
def intermediate(stack: nn.Module, index: int, tokens: Tensor) -> Tensor:
    """What ``down_proj`` of one expert reads, ``[n, F]``, for tokens ``[n, H]``: ``act(gate) * up``, or ``act(up)``."""
    up = ExpertLinear(stack, "", parameters(stack)[0], index)(tokens)
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
        tokens, chosen = routed(stack, args, kwargs)
        up, down = parameters(stack)
        for index, rows in enumerate(by_expert(tokens, chosen, len(stack.get_parameter(down)))):
            if not len(rows):
                continue
            self._call((index, up), rows)
            if (index, down) in self.hooks:
                self._call((index, down), intermediate(stack, index, rows))

    def _call(self, key: tuple[int, str], rows: Tensor) -> None:
        for view, hook in self.hooks.get(key, ()):
            hook(view, (rows,), {})


_dispatches: WeakKeyDictionary[nn.Module, _Dispatch] = WeakKeyDictionary()


def routed(stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The tokens ``[n, H]`` and the experts chosen for each ``[n, k]``, from the arguments of a stack's forward."""
    bound = inspect.signature(stack.forward).bind(*args, **kwargs).arguments
    tokens, chosen = list(bound.values())[:2]
    return tokens.reshape(-1, tokens.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


def by_expert(tokens: Tensor, chosen: Tensor, experts: int) -> list[Tensor]:
    """The tokens of each expert, ``[n_e, H]``, in the order of the tokens."""
    order = chosen.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen.reshape(-1), minlength=experts).tolist()
    rows = tokens[order // chosen.shape[-1]]
    return list(rows.split(counts))[:experts]  # beyond them: tokens that experts on other devices take


class TokenSample(InputObserver[Tensor]):
    """A sample of the tokens that a mixture reads, evenly spread over the data: stack name -> ``[n, H]``.

    It has between ``size`` and ``2 * size`` tokens where there are as many: all tokens are kept until there are more
    than ``2 * size``, then every second one, then every fourth, and so on. No random numbers are drawn.

    Args:
        layers: of which the ``ExpertLinear`` count; their stacks are watched.
        label: see ``InputObserver``.
        size: None takes the largest number of inputs that a matrix of the stack has.
    """

    def __init__(self, layers: Mapping[str, Any], label: str = "", size: int | None = None) -> None:
        views = [layer for layer in layers.values() if isinstance(layer, ExpertLinear)]
        super().__init__({view.stack_name: view.stack for view in views}, label)
        self.sizes = {view.stack_name: size or 1 for view in views}
        for view in views if size is None else ():
            self.sizes[view.stack_name] = max(self.sizes[view.stack_name], view.in_features)
        self._steps = dict.fromkeys(self.modules, 1)
        self._passed = dict.fromkeys(self.modules, 0)

    def update(self, name: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        first = -self._passed[name] % self._steps[name]
        self._passed[name] += len(rows)
        taken = rows[first :: self._steps[name]]
        self.check_finite(name, taken)
        kept = torch.cat([self.found[name], taken]) if name in self.found else taken.clone()
        while len(kept) > 2 * self.sizes[name]:
            kept = kept[::2].clone()
            self._steps[name] *= 2
        self.found[name] = kept

    def reduce(self) -> None:
        """The samples of all ranks one after another, thinned out again."""
        for name, stack in self.modules.items():
            mine = self.found.pop(name, None)
            lengths = torch.zeros(sharing.ranks(), dtype=torch.long)
            lengths[sharing.rank()] = 0 if mine is None else len(mine)
            begin = int(sharing.reduce_(lengths, "sum")[: sharing.rank()].sum())
            width = ExpertLinear(stack, name, parameters(stack)[0], 0).in_features
            joined = torch.zeros(int(lengths.sum()), width, device=self.device)
            if mine is not None:
                joined[begin : begin + len(mine)] = mine.float()
            sharing.reduce_(joined, "sum")
            while len(joined) > 2 * self.sizes[name]:
                joined = joined[::2].clone()
            if len(joined):
                self.found[name] = joined.to(next(stack.parameters()).dtype)


@torch.no_grad()
def top_up(layers: Mapping[str, Any], moments: dict[str, Moment], sample: Mapping[str, Tensor]) -> dict[str, int]:
    r"""Give experts that saw too few tokens the tokens of their layer, in place.

    Fewer tokens than a matrix has inputs leave its second moment singular. With ``n_e`` tokens seen, ``n =
    in_features`` and the layer's tokens ``T`` (a sample, most of which the router sent elsewhere)::

        X_eᵀX_e  +  (n - n_e) / |T| · X_e(T)ᵀ X_e(T)

    takes the place of ``X_eᵀX_e``: as if the expert had seen ``n - n_e`` more tokens, average ones of its layer.
    ``X_e(T)`` is what the matrix reads for these tokens; for ``down_proj`` that goes through the expert's own first
    matrix. An expert that saw no token at all is calibrated on those alone.

    Args:
        layers: name -> layer; only ``ExpertLinear`` are looked at.
        moments: what ``SecondMoment`` found for them; changed in place.
        sample: what ``TokenSample`` found.

    Returns:
        Name -> tokens that it saw, of the matrices that saw fewer than they have inputs.
    """
    scarce = {}
    dtypes = {moment.total.dtype for moment in moments.values()}
    for name, layer in layers.items():
        if not isinstance(layer, ExpertLinear) or layer.stack_name not in sample:
            continue
        moment = moments.get(name)
        seen = moment.count if moment is not None else 0
        if seen >= layer.in_features:
            continue
        rows = layer.inputs_for(sample[layer.stack_name]).to(dtypes.copy().pop() if dtypes else torch.float32)
        more = (rows.T @ rows) * ((layer.in_features - seen) / len(rows))
        total = more if moment is None else moment.total + more
        moments[name] = Moment(total, layer.in_features, [name])
        scarce[name] = seen
    return scarce
